"""What dialects are made of.

listing   what lies at a path: names, headers and small JSON files, read when asked for
build     from tensors, sorted by module and part, to updates
losses    what dialects commonly cannot say
pickles   state dicts of `torch.save`
"""
