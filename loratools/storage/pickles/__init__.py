"""Tensors in pickled PyTorch files, read without running any code of theirs.

archive    the zip file of `torch.save`: where each tensor's bytes lie
unpickle   its pickle, read as data
bare       a pickle that is in no zip: what it would import, for the refusal
tar        where the files of a tar archive lie
window     a file inside a file: a member of a tar archive
"""

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
"""Endings of files that `torch.save` wrote."""

EMBEDDING = "a textual-inversion embedding, not a LoRA"
"""What a file is that holds a word's vectors, of which web UIs keep many beside the adapters."""
