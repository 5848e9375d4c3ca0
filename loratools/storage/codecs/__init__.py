"""How numbers are stored, one file for each family of encodings.

floats    bfloat16, float16, float32 and float64, read and rounded in NumPy
schemes   quantized models: what of one is codes, and the name of the scheme
"""
