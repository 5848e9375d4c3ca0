"""Updates of projections that one model stores fused and another apart.

products   products B·A: factors of their own, or joined factors
rows       the other kinds: rows of ΔW, which a merge places
"""
