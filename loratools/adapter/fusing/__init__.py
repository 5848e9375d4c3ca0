"""Updates of projections that one model stores fused and another apart.

products.py   products B·A: factors of their own, or joined factors
rows.py       the other kinds: rows of ΔW, which a merge places
"""
