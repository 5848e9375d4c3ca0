"""What is found of changes, in files where it travels to whoever makes the adapter; else it stays in memory.

A value with tensors in it (`LazyTensor`) pickles, and goes to JSON, once they lie in a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from loratools.linalg.stacks import Array, Decomposition
from loratools.parallel import shared
from loratools.storage import files
from loratools.storage.codecs import floats
from loratools.storage.lazy import LazyTensor
from loratools.storage.save import Spool
from loratools.surgery.combine.change import Change, Settled

FILE = ".factors"


def spool() -> Spool | None:
    """Return the file for tensors that travel, in whoever does a part; None in whoever makes the adapter."""
    room = shared.room()
    return None if room is None else Spool(room / FILE)


def settled(found: Settled, into: Spool | None) -> Settled:
    """Return what is stored of a change, in a file."""
    kept = found.kept
    return found if into is None else found._replace(
        kept=replace(kept, left=into.stored(kept.left), right=into.stored(kept.right))
    )  # fmt: skip


class Laid(NamedTuple):
    """Numbers in a file."""

    numbers: LazyTensor

    @classmethod
    def of(cls, numbers: Array, into: Spool) -> Laid:
        """Write numbers as float64, which holds every one of float32, and counts and answers too."""
        wide = np.ascontiguousarray(numbers, np.float64)
        return cls(LazyTensor.stored(into.append("F64", wide.shape, floats.bytes_of(wide))))

    def read(self) -> Array:
        """Return them."""
        assert self.numbers.spec is not None
        return np.frombuffer(files.read_bytes(self.numbers.spec), np.float64).reshape(self.numbers.shape)


@dataclass(frozen=True, slots=True)
class Looked:
    """The decomposition of a stack, and the changes of its modules; the numbers of it lie in a file."""

    sigma: Laid
    ranks: Laid
    grams: tuple[Laid, Laid]
    finite: Laid
    changes: tuple[Laid, Laid]
    made: Mapping[str, tuple[Laid, Laid]]
    of_modules: Mapping[str, Change]

    def read(self) -> tuple[Decomposition, Mapping[str, Change]]:
        """Return them, as they were found."""
        (gram_B, gram_A), (left, right) = self.grams, self.changes
        made = {int(i): (one.read(), other.read()) for i, (one, other) in self.made.items()}
        return Decomposition(
            self.sigma.read(), self.ranks.read().astype(np.int64), (gram_B.read(), gram_A.read()),
            self.finite.read().astype(bool), (left.read(), right.read()), made,
        ), self.of_modules  # fmt: skip


def looked(found: Decomposition, changes: Mapping[str, Change], into: Spool) -> Looked:
    """Return the decomposition of a stack in a file."""

    def laid(numbers: Sequence[Array]) -> tuple[Laid, Laid]:
        one, other = numbers
        return Laid.of(one, into), Laid.of(other, into)

    return Looked(
        Laid.of(found.sigma, into), Laid.of(found.ranks, into), laid(found.grams), Laid.of(found.finite, into),
        laid(found.changes), {str(i): laid(pair) for i, pair in found.made.items()}, changes,
    )  # fmt: skip
