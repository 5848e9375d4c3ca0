"""Any kind of update on any dtype in torch, on the processor or a CUDA device; and the memory of a thread that does it.

Rows are worked on in blocks that depend on the tensor's shape alone, whatever the tiles: a matrix product of other
shape may add in another order. A block is widened to float32 (float64 for float64), changed in place by every term and
rounded once; results near zero are computed again in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import TYPE_CHECKING, Any

from loratools.adapter.kinds import Refinable, Term
from loratools.adapter.site import Site
from loratools.engine.device import TILES
from loratools.engine.lane import Lane
from loratools.engine.stochastic import Stochastic
from loratools.engine.task import Changed, TensorTask, near_zero, not_finite
from loratools.storage import dtypes

if TYPE_CHECKING:
    import torch

_ON_DEVICE = ("arrived", "work", "base", "result")
_SENT = ("stored", "out")  # page-locked where there is a device
_REFINED = 1 << 18  # elements that are computed again in float64 at a time


class Workspace:
    """The memory of one thread, reused from tensor to tensor; grown on demand, never shared between threads.

    Fresh memory costs a page fault for every four kilobytes, which for a merge would cost more than its arithmetic.
    `moves` says that tiles move to the `device` and back, as they do unless it is the processor; results are looked
    at where they are, but those of a GPU of Apple, which has no float64, on the host. Work is done in a `lane`.
    """

    def __init__(self, device: torch.device, moves: bool | None = None) -> None:
        self.device, self.moves = device, device.type != "cpu" if moves is None else moves
        self.looks = self.moves and device.type != "mps"
        self.lane = Lane(device).open
        self._memory: dict[str, torch.Tensor] = {}

    def of(self, name: str, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Return so many elements under a name; what they held is lost."""
        import torch

        nbytes = elements * dtype.itemsize
        held = self._memory.get(name)
        if held is None or len(held) < nbytes:
            pinned = self.device.type == "cuda" and name in _SENT
            if pinned:  # at once as much as a tile has, for locking pages takes long and none is given back
                nbytes = max(nbytes, TILES["cuda"])
            where = self.device if name in _ON_DEVICE else torch.device("cpu")
            self._memory[name] = held = torch.empty(nbytes, dtype=torch.uint8, device=where, pin_memory=pinned)
        return held[: elements * dtype.itemsize].view(dtype)


class TorchRows:
    """The tiles of one tensor in torch: terms act in their order, in float64 where it is `wide`, else in float32.

    `stochastic` rounds at random, where it is given; else rounding is to nearest even.
    """

    def __init__(
        self, task: TensorTask, terms: Sequence[tuple[Site, Term]], workspace: Workspace, *, wide: bool = False,
        stochastic: Stochastic | None = None,
    ) -> None:  # fmt: skip
        import torch

        self._task, self._terms, self._workspace, self._stochastic = task, terms, workspace, stochastic
        self._stored, self._out = dtypes.to_torch(task.source.dtype), dtypes.to_torch(task.dtype)
        double = wide or torch.float64 in (self._stored, self._out)
        self._work = torch.float64 if double else torch.float32
        self._narrows = dtypes.narrows(task.source.dtype, task.dtype)
        # Whether a term comes to rows that no other has changed
        self._first = [not any(site.meets(other) for other, _ in terms[:i]) for i, (site, _) in enumerate(terms)]
        self._keep_base = any(
            term.needs_base and not first for (_, term), first in zip(terms, self._first, strict=True)
        )
        self._delicate = [] if wide or stochastic else self._near_zero()
        block = lcm(*(term.together for _, term in terms))
        width = max(1, task.matrix[1] * max(self._stored.itemsize, self._out.itemsize))
        self._rows = max(block, TILES[workspace.device.type] // width // block * block)

    def _near_zero(self) -> list[tuple[Site, Refinable, float]]:
        """Return the sites where float32 may not do, each with a magnitude below which it shows (before any gain)."""
        share = near_zero(self._task.dtype)
        if share is None:
            return []
        return [(site, term, term.bound() * share) for site, term in self._terms if isinstance(term, Refinable)]

    @property
    def together(self) -> int:
        """Number of rows of a block."""
        return self._rows

    @property
    def needs_pass(self) -> bool:
        """Whether a norm runs across rows."""
        return any(term.needs_pass for _, term in self._terms)

    def room(self, rows: int) -> memoryview:
        """Return memory for a tile of so many rows as stored, and take as much for the result."""
        elements = rows * self._task.matrix[1]
        self._workspace.of("out", elements, self._out)
        return _bytes_of(self._workspace.of("stored", elements, self._stored))

    def observe(self, stored: memoryview, first: int) -> None:
        """Let terms see unchanged rows, in working precision."""
        for start, block in self._blocks(stored):
            W = self._widened(self._arrived(block, wait=True))  # the next tile is read to the same memory
            for site, term in self._terms:
                if term.needs_pass and (met := site.overlap(first + start, first + start + len(block))):
                    term.observe_rows(W[met[0], slice(*site.columns)], met[1])

    def change(self, stored: memoryview, first: int, measured: int) -> Changed:
        """Return the tile changed; raise `IncompatibleAdapter` when a value is not finite."""
        retained = total = changed = 0.0
        overflowed = flushed = 0
        out = self._workspace.of("out", len(stored) // self._stored.itemsize, self._out)
        for start, block in self._blocks(stored):
            arrived = self._arrived(block)
            W = self._widened(arrived)
            rows = min(len(W), max(0, measured - start))
            base = self._base(arrived if self._keep_base else arrived[:rows])
            self._apply(W, base, first + start)
            sent = out[start * W.shape[1] :][: W.numel()].view(W.shape)
            rounded = (
                self._workspace.of("result", W.numel(), self._out).view(W.shape) if self._workspace.looks else sent
            )
            rounded.copy_(self._stochastic(W, (first + start) * W.shape[1]) if self._stochastic else W)
            self._check_finite(W, rounded)
            if self._narrows:
                lost = _lost(W, rounded)
                overflowed, flushed = overflowed + lost[0], flushed + (0 if self._stochastic else lost[1])
            self._refine(block, rounded, first + start)
            some = _measured(base[:rows], W, rounded)
            retained, total, changed = retained + some[0], total + some[1], changed + some[2]
            if rounded is not sent:
                sent.copy_(rounded)  # which waits for all that was asked of the device
        return Changed(_bytes_of(out), retained, total, changed, overflowed, flushed)

    def _blocks(self, stored: memoryview) -> list[tuple[int, torch.Tensor]]:
        """Return the blocks of a tile as stored, each with its first row in the tile."""
        import torch

        if not stored:
            return []
        tile = torch.frombuffer(stored, dtype=self._stored).view(-1, self._task.matrix[1])
        return [(start, tile[start : start + self._rows]) for start in range(0, len(tile), self._rows)]

    def _arrived(self, block: torch.Tensor, *, wait: bool = False) -> torch.Tensor:
        """Return a block on the device; it moves there as it is stored, in half the bytes.

        This thread goes on meanwhile, unless it is to `wait`: until then the memory of the block must stay as it is.
        """
        if not self._workspace.moves:
            return block
        return self._workspace.of("arrived", block.numel(), self._stored).view(block.shape).copy_(block, not wait)

    def _widened(self, block: torch.Tensor) -> torch.Tensor:
        """Return a block in working precision, where it is."""
        return self._workspace.of("work", block.numel(), self._work).view(block.shape).copy_(block)

    def _base(self, block: torch.Tensor) -> torch.Tensor:
        """Return a block in working precision once more, as it is before it is changed."""
        return self._workspace.of("base", block.numel(), self._work).view(block.shape).copy_(block)

    def _apply(self, W: torch.Tensor, base: torch.Tensor, first: int) -> None:
        for (site, term), fresh in zip(self._terms, self._first, strict=True):
            if met := site.overlap(first, first + len(W)):
                inside = (met[0], slice(*site.columns))
                term.apply_rows(W[inside], met[1], None if fresh or not term.needs_base else base[inside])

    def _check_finite(self, W: torch.Tensor, rounded: torch.Tensor) -> None:
        # One cheap sum finds any infinity or NaN; where the rounding can overflow, the rounded values count.
        suspect = rounded if self._narrows or self._task.dtype == "F16" or self._stochastic else W
        if self._terms and not bool(suspect.sum(dtype=W.dtype).isfinite()) and not bool(suspect.isfinite().all()):
            raise not_finite(self._task.name, self._task.dtype)

    def _refine(self, block: torch.Tensor, rounded: torch.Tensor, first: int) -> None:
        """Compute results that are too near zero again, in float64, and round them once."""
        for site, term, bound in self._delicate:
            if not (met := site.overlap(first, first + len(block))):
                continue
            inside = (met[0], slice(*site.columns))
            region = rounded[inside]
            every = self._below(region, _bits(bound * term.gain(met[1]), self._out))
            for start in range(0, len(every), _REFINED):
                near = every[start : start + _REFINED]
                rows, columns = near // region.shape[1], near % region.shape[1]
                values = term.elements(block[inside][rows, columns].double(), rows + met[1].start, columns)
                region[rows.to(region.device), columns.to(region.device)] = values.to(region.device, region.dtype)

    def _below(self, region: torch.Tensor, limit: int) -> torch.Tensor:
        """Return where in a 16-bit float region, flattened, the magnitude is at most `limit`, both read as integers.

        Without their sign, 16-bit floats are in the order of their bits. On the host NumPy looks through a tile in a
        tenth of the time that torch takes. The places are told on the host.
        """
        import numpy as np
        import torch

        if not region.is_cpu:
            return (region.view(torch.int16) & 0x7FFF).le(limit).flatten().nonzero()[:, 0].cpu()
        bits, mask = (
            self._workspace.of(name, region.numel(), dtype).numpy().reshape(region.shape)
            for name, dtype in (("bits", torch.int16), ("mask", torch.bool))
        )
        np.bitwise_and(region.view(torch.int16).numpy(), 0x7FFF, out=bits)
        np.less_equal(bits, np.int16(limit), out=mask)
        return torch.from_numpy(np.flatnonzero(mask))


def _lost(W: torch.Tensor, rounded: torch.Tensor) -> tuple[int, int]:
    """Return of how many finite numbers rounding made an infinity, and of how many that were not zero it made zero."""
    import torch

    overflowed = 0
    if not bool(rounded.sum(dtype=torch.float64).isfinite()):
        overflowed = int(torch.count_nonzero(rounded.isinf() & W.to(rounded.device).isfinite()))
    return overflowed, int(torch.count_nonzero(W)) - int(torch.count_nonzero(rounded))


def _bits(limit: float, dtype: torch.dtype) -> int:
    """Return a number, rounded to a 16-bit float dtype, as the integer of its bits."""
    import torch

    return int(torch.tensor([limit], dtype=dtype).view(torch.int16))


def _measured(base: torch.Tensor, W: torch.Tensor, rounded: torch.Tensor) -> tuple[float, float, float]:
    """Return ⟨rounded − base, W − base⟩, ⟨W − base, W − base⟩ and the count of rounded ≠ base, over the base's rows."""
    import torch

    retained = total = changed = 0.0
    # A few rows at a time: whole tiles in float64 would leave the cache, or take much of a device's memory.
    step = max(1, (1 << (16 if W.is_cpu else 20)) // max(1, W.shape[1]))
    for start in range(0, len(base), step):
        part = slice(start, min(start + step, len(base)))
        # A float64 tile is its own double, so nothing is done in place; a GPU of Apple has no float64.
        tiles = base[part], W[part], rounded[part].to(W.device)
        before, after, result = ((tile.cpu() if tile.is_mps else tile).double().flatten() for tile in tiles)
        delta, kept = after.sub(before), result.sub(before)
        retained += float(kept.dot(delta))
        total += float(delta.dot(delta))
        changed += float(torch.count_nonzero(kept))
    return retained, total, changed


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a tensor, shared, not copied."""
    import torch

    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array)
