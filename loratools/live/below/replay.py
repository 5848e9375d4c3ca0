"""Gradient checkpointing repeats a forward inside the backward: with the adapters of the forward, or it is an error.

Which adapters act is state of the model, not of the graph. Where `use`, `off` or the end of `route` changed it between
a forward and its backward, the repetition would compute the gradients of other adapters, in silence.
"""

from __future__ import annotations

from typing import Any

import torch

from loratools.errors import LoraToolsError

_OUTSIDE = -1


class Replay:
    """What acted in the forwards since the last backward that repeated some; of several, two are enough to know."""

    def __init__(self) -> None:
        self.noted: list[Any] = []
        self.expected: list[Any] = []
        self.task = _OUTSIDE
        self.stamp: object = None

    def __getstate__(self) -> dict[str, Any]:
        return Replay().__dict__

    def begin(self, key: Any, stamp: object) -> None:
        """Note what acts in a forward of the whole model; `stamp` tells whether factors changed since.

        What was not repeated before an optimizer's step never will be.
        """
        if stamp != self.stamp:
            self.noted, self.stamp = [], stamp
        self.see(key)

    def see(self, key: Any) -> None:
        """Note what acts in a forward with gradients; inside a backward raise unless it is what acted before it."""
        task = torch._C._current_graph_task_id()
        if task == _OUTSIDE:
            if not self.noted or (self.noted[-1] is not key and self.noted[-1] != key):
                self.noted = [*self.noted[-1:], key]
            return
        if task != self.task:
            self.task = task
            if self.noted:
                self.expected, self.noted = self.noted, []
        if any(own != key for own in self.expected):
            raise LoraToolsError(
                "gradient checkpointing repeats a forward in which other adapters acted than act now, so its gradients "
                "would be those of others",
                hint="Call backward() before the next `use`, inside the block of `route` or `off`; run forwards that "
                "have no backward under torch.no_grad().",
            )
