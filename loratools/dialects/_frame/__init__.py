"""What dialects are made of.

listing.py   what lies at a path: file names, headers and small JSON files, read when a dialect asks for them
build.py     from a file's tensors, sorted by module and part, to the updates of an adapter
losses.py    what foreign layouts commonly cannot say of an adapter
metadata.py  the header entries of a file, which stay with an adapter from reading to writing
numbers.py   single numbers in a file: alphas that are read, scalings that one value must stand for
pickles.py   state dicts of `torch.save`
"""
