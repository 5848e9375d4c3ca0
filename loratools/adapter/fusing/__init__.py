"""Modules that a model stores fused (qkv, gate and up): one update of several, and several of one.

products   of updates that are products of two factors
rows       of all others, by the rows of ΔW
"""
