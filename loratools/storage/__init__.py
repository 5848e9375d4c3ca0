"""Bytes and files: headers, checkpoints, digests, atomic output. Knows nothing of adapters."""
