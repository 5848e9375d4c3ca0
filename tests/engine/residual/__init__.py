"""Tests of the residual: predictions, and the codes of what they miss."""
