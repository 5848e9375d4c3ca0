"""A thread's way to a device: a stream of its own, and page-locked memory through which matrices go there.

A matrix goes in pieces of `PIECE` bytes through two buffers by turns: while one is on its way, the other is filled, and
what is asked of the device meanwhile waits on the device alone. Buffers and stream are taken once for a thread, so what
is page-locked depends neither on the matrices nor on their number. On the processor a lane does nothing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from threading import local
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PIECE = 16 << 20
"""Bytes that are on their way at once: large enough for the full speed of a bus."""

_MINE = local()


class Lane:
    """The way of one thread to a device; `of` gives a thread its own."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device = device
        self._pieces: list[tuple[Tensor, torch.cuda.Event]] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @classmethod
    def of(cls, device: str) -> Lane:
        """Return this thread's lane to a device."""
        import torch

        lanes: dict[str, Lane] = _MINE.__dict__
        if device not in lanes:
            lanes[device] = cls(torch.device(device))
        return lanes[device]

    def open(self) -> AbstractContextManager[object]:
        """Return a context in which the work of this thread goes to its stream."""
        if self._stream is None:
            return nullcontext()
        import torch

        return torch.cuda.stream(self._stream)

    def wait(self) -> None:
        """Wait until all that was asked of the device in this lane is done, so that another thread can use it."""
        if self._stream is not None:
            self._stream.synchronize()

    def send(self, X: Tensor) -> Tensor:
        """Return X (m, n), of a processor's memory and any float dtype, on the device; in an open lane."""
        import torch

        if self._stream is None:
            return X.to(self.device)
        if not X.is_contiguous():
            return self.send(X.T).T if X.T.is_contiguous() else self.send(X.contiguous())
        sent = torch.empty(X.shape, dtype=X.dtype, device=self.device)
        source, target = X.view(-1), sent.view(-1)
        step = PIECE // X.element_size()
        for turn, start in enumerate(range(0, len(source), step)):
            memory, arrived = self._piece(turn % 2)
            piece = memory.view(X.dtype)[: len(source) - start]
            arrived.synchronize()  # what this piece held before has left it
            piece.copy_(source[start : start + step])
            target[start : start + step].copy_(piece, non_blocking=True)
            arrived.record(self._stream)
        return sent

    def _piece(self, number: int) -> tuple[Tensor, torch.cuda.Event]:
        import torch

        while len(self._pieces) <= number:
            memory = torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
            self._pieces.append((memory, torch.cuda.Event()))  # type: ignore[no-untyped-call]
        return self._pieces[number]
