"""Modules whose tensors are part of a model and of none of its state dicts, and follow it from the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn


class Silent(nn.Module):
    """A module whose tensors are part of the model but of none of its state dicts.

    `values` are those of its tensors, by name, while they are on the meta device for the model was when they were made.
    """

    values: Mapping[str, Tensor] | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast the tensors; those that come from the meta device get their values then."""
        self.forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.values is not None:
            self.fill()
        return self

    def train(self, mode: bool = True) -> Self:
        """Change the mode; what was kept is forgotten, for training writes in ways that autograd does not count."""
        self.forget()
        return super().train(mode)

    def forget(self) -> None:
        """Forget what is kept from call to call."""

    @torch.no_grad()
    def fill(self) -> None:
        """Give tensors that have left the meta device their values."""
        for name, value in (self.values or {}).items():
            tensor = getattr(self, name)
            if tensor.is_meta:
                return
            tensor.copy_(spread_like(value, tensor))
        self.values = None

    def state_dict(self, *args: Any, destination: Any = None, **settings: Any) -> Any:
        """Return what came before it, unchanged."""
        return args[0] if args else {} if destination is None else destination

    def _load_from_state_dict(self, *_: Any) -> None:
        """Take nothing, and miss nothing."""


def spread_like(value: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor spread over processes as another one is, where that is a DTensor."""
    if not hasattr(tensor, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]
