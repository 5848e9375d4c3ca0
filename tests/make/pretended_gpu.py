"""A CUDA device that is the processor: what the library does on one runs here, and tensors of two devices never meet.

Numbers lie in ordinary tensors; only what torch says of their device is pretended. An operation on tensors of both
devices is an error, as on CUDA, and so are NumPy on one of the device, and memory of the host that changes while it may
still be on its way. Nothing of the library is replaced: only torch's own functions that ask for a device, a stream or
page-locked memory are. What this cannot show is a real device's order of additions, its streams and its speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = "Pretended GPU"
COUNT = 2
"""Devices that there are: cuda:0 and cuda:1."""

_Tensor = torch.Tensor
_INDEXING = {_Tensor.__getitem__, _Tensor.__setitem__}  # indices may lie on the host
_TOLD: dict[object, Callable[[Any], Any]] = {
    _Tensor.device: lambda tensor: tensor.place, _Tensor.is_cuda: lambda _: True, _Tensor.is_cpu: lambda _: False,
}  # fmt: skip
_WAITS = {
    _Tensor.cpu, _Tensor.item, _Tensor.tolist, _Tensor.nonzero, torch.nonzero, _Tensor.__bool__, _Tensor.__float__,
    _Tensor.__int__,
}  # fmt: skip
_PLAIN = {_Tensor.__repr__, _Tensor.__len__, _Tensor.__hash__, _Tensor.__iter__}


class Log:
    """What was asked of the device: page-locked memory in bytes, streams, and how many operations; and its `room`."""

    def __init__(self) -> None:
        self.pinned, self.streams, self.operations, self.room = 0, 0, 0, math.inf
        self.of_thread = local()

    def on_the_way(self, source: torch.Tensor | None = None) -> None:
        """Check what is on its way to the device; note one more, or with none, that all has arrived."""
        waiting = self.of_thread.__dict__.setdefault("waiting", [])
        for memory, before in waiting:
            if not torch.equal(memory.view(torch.uint8), before.view(torch.uint8)):
                raise RuntimeError("memory of the host was written to while a copy to the device may have read it")
        if source is None:
            waiting.clear()
        else:
            waiting.append((source, source.clone()))


class OnDevice(torch.Tensor):
    """A tensor of the pretended device."""

    place: torch.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _on(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        made = tensor.as_subclass(OnDevice)
        made.place = place
    return made


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


def _cuda(value: object) -> torch.device | None:
    """Return the device where `value` names one of CUDA, with its index."""
    if isinstance(value, str | torch.device) and str(value).startswith("cuda"):
        return torch.device("cuda", torch.device(value).index or 0)
    return None


def _moved(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """Return where `Tensor.to` moves its tensor."""
    wanted = next((x for x in (*args[1:], *kwargs.values()) if isinstance(x, str | torch.device | torch.Tensor)), None)
    if isinstance(wanted, OnDevice):
        return wanted.place
    if wanted is None:
        return args[0].place if isinstance(args[0], OnDevice) else None
    return _cuda(wanted)


def _host(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return _plain(value)
    return torch.device("cpu") if _cuda(value) else value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", "")
    if isinstance(args[0] if args else None, OnDevice) and (property_ := _TOLD.get(getattr(func, "__self__", None))):
        return property_(args[0])
    if func is _Tensor.numpy or name == "__array__":
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    places = {_place(x) for x in (tensors[:1] if func in _INDEXING else tensors) if _dims(x)}
    here = next((x.place for x in tensors if isinstance(x, OnDevice)), None)
    if func in _INDEXING and not isinstance(args[0], OnDevice):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if func not in (_Tensor.copy_, _Tensor.to, _Tensor.__setitem__) and len(places) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} found {sorted(places)}")
    if func is _Tensor.to:
        here = _moved(args, kwargs)
    elif func is _Tensor.cpu:
        here = None
    elif func is _Tensor.copy_:
        here = args[0].place if isinstance(args[0], OnDevice) else None
    elif (device := _cuda(kwargs.get("device"))) or "device" in kwargs:
        here = device
    inner, more = tree_map(_host, (tuple(args), dict(kwargs)))
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*inner, **more)
        if func in (_Tensor.to, _Tensor.cpu) and len({_place(args[0]), str(here or "cpu")}) > 1:
            result = result.clone()
    if isinstance(result, torch.Size):
        return result
    if func in _PLAIN and func is not _Tensor.__iter__:
        return result
    if func is not _Tensor.to and inner and result is inner[0] and not isinstance(args[0], OnDevice):
        return args[0]
    return tree_map(lambda x: _on(x, here) if here and isinstance(x, torch.Tensor) else x, result)


def _dims(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.dim()


def _place(tensor: torch.Tensor) -> str:
    return str(tensor.place) if isinstance(tensor, OnDevice) else "cpu"


class Made(TorchFunctionMode):
    """Makes what is asked for on the device, and page-locked memory of any."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.pop("pin_memory", False):
            made = func(*args, **kwargs)
            self.log.pinned += made.nbytes
            return made
        moved = func is _Tensor.to and any(_cuda(x) for x in (*args[1:], *kwargs.values()))
        if _cuda(kwargs.get("device")) or moved or any(isinstance(x, OnDevice) for x in tree_leaves((args, kwargs))):
            self.log.operations += 1
            result = _run(func, args, kwargs)
            moving = func is _Tensor.copy_ and isinstance(args[0], OnDevice) and not isinstance(args[1], OnDevice)
            if moving and (args[2:3] == (True,) or kwargs.get("non_blocking")):
                self.log.on_the_way(args[1])
            elif func in _WAITS or func is _Tensor.copy_:
                self.log.on_the_way()
            self._count(result)
            return result
        return func(*args, **kwargs)

    def _count(self, result: Any) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, OnDevice) and _plain(tensor).nbytes > self.log.room:
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB"
                )


@contextmanager
def pretended() -> Iterator[Log]:
    """Let torch have CUDA devices while the block runs; other threads have them on a stream of theirs."""
    log = Log()

    class Stream:
        def __init__(self, device: object = None, **_: object) -> None:
            self.device = _cuda(device) or torch.device("cuda", 0)
            log.streams += 1

        def synchronize(self) -> None: ...

    class Event:
        def record(self, stream: object = None) -> None: ...

        def synchronize(self) -> None:
            log.on_the_way()

    @contextmanager
    def stream(of: Stream | None) -> Iterator[None]:
        with Made(log):
            yield

    def properties(device: object = None) -> Any:
        return SimpleNamespace(name=GPU, total_memory=1 << 34, major=9, minor=0)

    changed: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True, "device_count": lambda: COUNT, "Stream": Stream, "stream": stream,
        "Event": Event,
        "get_device_name": lambda device=None: GPU, "get_device_properties": properties,
        "current_device": lambda: 0, "synchronize": lambda device=None: None, "empty_cache": lambda: None,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, function in changed.items():
            patch.setattr(torch.cuda, name, function)
        with Made(log):
            yield log
