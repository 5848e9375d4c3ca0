"""Choosing ranks, from singular values.

rules      rules for one matrix: a fixed rank, energy, a ratio, a floor, those of kohya
noise      how large the rounding of a stored dtype is, and the rule that stops there
budget     one budget of parameters for all layers: water-filling, or one rank for all
allocate   the ranks of a whole model, by any of these
"""
