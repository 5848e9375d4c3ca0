"""Where a method leaves something to chance: seeded, and independent of threads and of the order of adapters."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from loratools.surgery.combine.methods._terms import Term


class Seeded:
    """One stream of numbers for each seed, adapter, module and tile: no draw depends on another.

    The seed of a tile is the beginning of SHA-256 over `seed|identity|tile`; an element is kept where a float32 of
    torch's CPU generator, uniform in [0, 1), lies below its probability.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def keep(self, term: Term, tile: int, probability: Tensor) -> Tensor:
        """Return the mask of one tile."""
        name = f"{self.seed}|{term.identity}|{tile}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:8]) >> 1)
        return torch.rand(probability.shape, generator=generator).to(probability.device) < probability


class AsPeft:
    """The draws of PEFT: `torch.bernoulli` over one stream, adapter after adapter, module after module.

    `peft.utils.merge_utils` draws the same masks after `torch.manual_seed(seed)` if it is called for the modules in the
    natural order of their names. `add_weighted_adapter` draws the factors of a new adapter from that stream first.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def keep(self, term: Term, tile: int, probability: Tensor) -> Tensor:
        """Return the mask of a whole matrix, which must come as one tile."""
        if tile:
            raise ValueError("PEFT draws the mask of a whole matrix at once")
        return torch.bernoulli(probability.cpu(), generator=self.generator).bool().to(probability.device)
