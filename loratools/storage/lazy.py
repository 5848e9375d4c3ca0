"""A tensor that is known by dtype and shape, and read when its numbers are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from loratools.errors import LoraToolsError
from loratools.storage import dtypes
from loratools.storage.header import TensorSpec

if TYPE_CHECKING:
    import torch


@dataclass(slots=True, eq=False)  # frozen, each of its fields would be set by a call, and models have many tensors
class LazyTensor:
    """A tensor whose `dtype` (safetensors name) and `shape` are known, and whose numbers `load()` reads.

    Nobody sets a field of it: tensors are shared.

    `spec` is set where the tensor is exactly some bytes of a file, and `held` where its bytes are in memory: then it is
    hashed and copied without torch. `file` is the file that its numbers come from, however they are changed on the way,
    and must not be overwritten.
    """

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]
    spec: TensorSpec | None = None
    file: Path | None = None
    held: memoryview | None = None

    PLAIN: ClassVar = ("spec",)
    """What it is made of where it travels (`parallel/plain.py`): one that is in memory only does not go to JSON."""

    @classmethod
    def from_plain(cls, spec: TensorSpec) -> LazyTensor:
        """Stand for a tensor in a file, that another process has said."""
        return cls.stored(spec)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle where its bytes lie, or else the bytes."""
        if self.spec is not None:
            return LazyTensor.stored, (self.spec,)
        return _held, (self.dtype, self.shape, b"".join(self.chunks("that is pickled")))

    @classmethod
    def stored(cls, spec: TensorSpec) -> LazyTensor:
        """Stand for a tensor in a file."""
        return cls(spec.dtype, spec.shape, lambda: _read(spec), spec, spec.file)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> LazyTensor:
        """Stand for a tensor that is in memory already."""
        return cls(dtypes.from_torch(tensor.dtype), tuple(tensor.shape), lambda: tensor)

    @classmethod
    def holding(cls, dtype: str, shape: tuple[int, ...], held: memoryview) -> LazyTensor:
        """Stand for a tensor whose bytes, as a file has them, are in memory already; they are shared, not copied."""

        def load() -> torch.Tensor:
            import torch

            return torch.frombuffer(bytearray(held), dtype=dtypes.to_torch(dtype)).reshape(shape)

        return cls(dtype, shape, load, held=held)

    def reshaped(self, shape: tuple[int, ...]) -> LazyTensor:
        """Stand for the same bytes in another shape of as many elements, in C order: `spec` is kept, with the shape.

        So are bytes that are `held`.
        """
        if shape == self.shape:
            return self
        load, spec = self.load, self.spec and self.spec._replace(shape=shape)
        return LazyTensor(self.dtype, shape, lambda: load().reshape(shape), spec, self.file, self.held)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> LazyTensor:
        """Stand for `change(tensor)` of the given shape and the same dtype: a transpose, a slice, a permutation."""
        load = self.load
        return LazyTensor(self.dtype, shape, lambda: change(load()), file=self.file)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield its bytes, each piece valid until the next is asked for; those of a file are not loaded by torch.

        Raises `LoraToolsError`, which calls the tensor by its `name`, where `load` gives another dtype or shape.
        """
        if self.spec:
            from loratools.storage import files

            yield from files.chunks(self.spec)
            return
        if self.held is not None:
            yield self.held
            return
        import torch

        tensor = self.load().detach().cpu().contiguous()
        if dtypes.from_torch(tensor.dtype) != self.dtype or tuple(tensor.shape) != self.shape:
            loaded = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise LoraToolsError(f"tensor {name!r} became {loaded} when loaded, expected {self.dtype} {self.shape}")
        yield memoryview(tensor.reshape(-1).view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in its stored dtype."""
        return prod(self.shape) * dtypes.BITS[self.dtype] // 8


def _read(spec: TensorSpec) -> torch.Tensor:
    from loratools.storage import files  # headers are read without what reads data

    return files.read_tensor(spec)


def _held(dtype: str, shape: tuple[int, ...], raw: bytes) -> LazyTensor:
    return LazyTensor.holding(dtype, shape, memoryview(raw))


def chunks_of_all(tensors: Mapping[str, LazyTensor]) -> Iterator[tuple[str, Iterator[memoryview]]]:
    """Yield each tensor's name and its bytes piece by piece, in their order, each valid until the next is asked for.

    A file is opened once for tensors that follow each other in it, and small ones side by side are read at once.
    """
    for stored, run in groupby(tensors.items(), key=lambda item: item[1].spec is not None):
        if stored:
            from loratools.storage import files

            yield from files.chunks_of_all({name: tensor.spec for name, tensor in run if tensor.spec})
        else:
            yield from ((name, tensor.chunks(name)) for name, tensor in run)


def in_order_of_files(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the tensors as they lie in their files, and those of no file last: an order to read all of them in."""

    def place(item: tuple[str, LazyTensor]) -> tuple[bool, str, int]:
        spec = item[1].spec
        return (False, str(spec.file), spec.start) if spec else (True, "", 0)

    return dict(sorted(tensors.items(), key=place))
