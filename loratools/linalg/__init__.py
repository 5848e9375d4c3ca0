"""Tensor maths without files: arrays in, arrays out.

truncated.py     truncated SVD of a dense matrix, near-optimal, with its certificate
  krylov.py        the iteration, products with D and Dᵀ only
  certificate.py   how far from the optimum the result can be
  orthonormal.py   bases that survive dependent columns; sums in float64
ranks.py         rules that choose one matrix's rank: fixed, energy, ratio, absolute, kohya's
  noise.py         the rounding floor of the stored dtype, and the rule that stops at it
  budget.py        one budget for all layers: water-filling, uniform
factored.py      algebra of ΔW = B·A in factor space: sums, SVD, norms, inner products
  similarity.py    subspace similarity and amplification, as in the LoRA paper
"""
