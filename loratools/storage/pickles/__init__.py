"""Tensors in pickled PyTorch files, read without running any code of theirs."""
