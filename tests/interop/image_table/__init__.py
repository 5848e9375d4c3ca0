"""A table of families of image and video models: what becomes of adapters under every naming.

`python -m tests.interop.image_table [FAMILY ...]` prints it; `test_image_table.py` runs a sample, `--whole` all of it.

models    diffusers' classes at the depth of published models, as narrow as they can be
files     adapters and bases in every naming, with numbers that are known
rows      one row: read, accounted for, merged into both namings, converted, loaded by diffusers
"""
