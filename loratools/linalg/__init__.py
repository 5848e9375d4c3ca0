"""Tensor maths without files: arrays in, arrays out.

factored      algebra of ΔW = B·A in factor space: SVD, norms, inner products; no matrix of ΔW's size
stacks        sums of products, and their SVDs, of many layers of one shape at once, in NumPy
delta         one ΔW as factors or as a dense matrix: norms, angles and directions of either
sketch        256 numbers of a change of many matrices, whose cosines are near those of the changes
angles        subspaces of many pairs at once, in NumPy
similarity    subspace similarity, principal angles and amplification, as in the LoRA paper
precision     products in full float32, whatever the process allows
orthonormal   orthonormal bases, also of columns that depend on each other; sums in float64
products      a large matrix times few columns: in C where it serves
svd           the truncated SVD of a large matrix, near-optimal, with a certificate of its error
ranks         which rank to keep: by a rule, above the noise of rounding, or within a budget for all layers
native        the C: W + left·right on rows of a weight; ΔW of two; factors beside a linear layer that runs
"""
