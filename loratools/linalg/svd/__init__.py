"""Truncated singular value decompositions of large matrices, with certificates of their error.

usual         the decomposition in C and NumPy, of what most layers are
basis         its iteration, and what both hold to
truncated     the decomposition: exact for small matrices, iterated for large ones
start         the random sketch that it begins with
krylov        the iteration: block Krylov, products with D and Dᵀ only
stopping      what is still to be won, so when to stop
certificate   how far from the optimum the result can be
"""
