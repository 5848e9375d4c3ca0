"""Truncated singular value decompositions of large matrices, with certificates of their error."""
