"""The hash cases: name -> (files of a checkpoint, all tensors together). What they share shows what a hash ignores."""

from __future__ import annotations

from make import tensor

Tensors = dict[str, tuple[str, list[int], bytes]]

W = tensor([2, 3], [0.5, -1, 2, 4, 0.25, 8])
N = tensor([2], [1, 1], "F16")
FLIPPED = (W[0], W[1], bytes([W[2][0] ^ 1]) + W[2][1:])
LONG = tensor([20, 20], [(i * 37 % 101) / 8 for i in range(400)])  # longer than one chunk of BLAKE3


def one(**tensors: tuple[str, list[int], bytes]) -> tuple[dict[str, Tensors], Tensors]:
    return {"model.safetensors": tensors}, tensors


HASH_CASES: dict[str, tuple[dict[str, Tensors], Tensors]] = {
    "one-file": one(w=W, n=N),
    "data-in-another-order": one(n=N, w=W),
    "two-shards": ({"model-1.safetensors": {"w": W}, "model-2.safetensors": {"n": N}}, {"w": W, "n": N}),
    "one-bit-flipped": one(w=FLIPPED, n=N),
    "another-name": one(v=W, n=N),
    "another-shape": one(w=("F32", [3, 2], W[2]), n=N),
    "another-dtype": one(w=("I32", [2, 3], W[2]), n=N),
    "names-beyond-ascii": one(**{"\U0001f600": N, "ﬀ": N, "Z": N, "a": N}),
    "no-dimensions-and-no-elements": one(scalar=tensor([], [7]), empty=tensor([0, 3], [])),
    "more-than-a-chunk": one(long=LONG),
}
