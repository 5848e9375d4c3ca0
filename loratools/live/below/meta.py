"""Parameters that have no values here: on the meta device, not initialized yet, or offloaded by accelerate's hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from loratools.errors import IncompatibleAdapter


def device_of(module: nn.Module) -> torch.device:
    """Return where the factors beside a module belong: the device of its own parameters, or the one it runs on."""
    parameter = next((p for p in module._parameters.values() if p is not None), None)
    if parameter is None:
        return torch.device("cpu")
    if not parameter.is_meta:
        return parameter.device
    devices = (getattr(hook, "execution_device", None) for hook in _hooks(module))
    return torch.device(next((device for device in devices if device is not None), "meta"))


def stored(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter of a module, of an offloaded one what is kept elsewhere; None where it has none."""
    parameter = module._parameters.get(name)
    if parameter is None or not parameter.is_meta:
        return parameter
    maps = (getattr(hook, "weights_map", None) for hook in _hooks(module))
    kept: Tensor | None = next((held[name] for held in maps if held is not None and name in held), None)
    return parameter if kept is None else kept


def refuse_uninitialized(names: Sequence[str]) -> None:
    """Raise `IncompatibleAdapter` with these parameters, which have no shape yet, where there are any."""
    if names:
        raise IncompatibleAdapter(
            "these parameters get their shape in the model's first forward, so no factors fit them yet", names,
            hint="Run the model once, then attach or load.",
        )  # fmt: skip


def uninitialized(module: nn.Module) -> bool:
    """Tell whether a module is a lazy one that has not run yet."""
    return any(is_lazy(parameter) for parameter in module.parameters(recurse=False))


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Yield accelerate's hooks of a module, also those in a `SequentialHook`."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield hook
        yield from getattr(hook, "hooks", ())
