"""Folded bases: the model in another basis, as AWQ and SmoothQuant leave it, and adapters carried there.

A weight of such a base is diag(1/s_out)·W·diag(s_in), so a change of W is carried by A·diag(s_in) and diag(1/s_out)·B.

table     where scales are folded, by names
scales    the scales: read from norms, estimated from weights
carry     an adapter of the original, carried into the base
original  the original's weights in the base's basis
choice    which adapters of a call are carried, and what is said of the others
"""

from __future__ import annotations

from loratools.surgery.folding.choice import InBasis, carried, in_basis_of

__all__ = ["InBasis", "carried", "in_basis_of"]
