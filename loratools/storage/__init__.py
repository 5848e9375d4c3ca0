"""Bytes and files: headers, checkpoints, digests, streaming writers. Knows nothing of LoRA."""
