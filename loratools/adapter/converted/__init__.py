"""Updates on tensors that transformers makes of a base's own as it loads them, and the other way round.

pieces  what its operations do with tensors: which numbers of a model's tensor lie where in its files
sites   where an update of such a tensor lies in the files, and one of the files in such a tensor
"""
