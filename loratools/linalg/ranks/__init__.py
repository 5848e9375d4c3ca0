"""Choosing ranks: by rules over singular values, by what rises above noise, and within a budget for a whole model."""
