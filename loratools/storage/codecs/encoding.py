"""What is asked of a weight that is stored as codes, and of the codec that reads it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from loratools.errors import UnsupportedAdapter
from loratools.storage import dtypes, files
from loratools.storage.header import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

Grid = Literal["own", "fresh"]
"""The scales by which numbers become codes again: those that the weight has, or new ones that fit the numbers."""

_NOWHERE = -(1 << 62)

_NUMPY = {
    "U8": "<u1", "I8": "<i1", "BOOL": "<u1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4", "I64": "<i8",
    "U64": "<u8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2",
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Module:
    """A module whose weight is stored as codes.

    `path`       its path; of a stack of experts that of the stack
    `scheme`     the scheme's name
    `names`      part -> name of the stored tensor: {"weight": "….q_proj.weight", "weight_scale_inv": …}
    `specs`      part -> where that lies
    `statement`  what config.json says of the quantization; {} where it says nothing
    `dtype`      the 16-bit dtype that the model computes in: BF16 or F16
    `model_type` config.json's; "" where it says none
    `metadata`   the strings in the headers of the model's files
    """

    path: str
    scheme: str
    names: Mapping[str, str]
    specs: Mapping[str, TensorSpec]
    statement: Mapping[str, Any]
    dtype: str
    model_type: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def refuse(self, why: str, hint: str | None = None) -> UnsupportedAdapter:
        """Return the exception for a module that a codec does not read: its path, the scheme's name, and why."""
        hint = hint or "Merge into the unquantized model that it was made from, then quantize the result again."
        return UnsupportedAdapter(f"{self.path} is quantized with {self.scheme}: {why}", hint=hint)

    def need(self, *parts: str) -> None:
        """Raise `UnsupportedAdapter` unless the module has all these parts."""
        if missing := [part for part in parts if part not in self.specs]:
            raise self.refuse(f"{', '.join(missing)} is missing beside {', '.join(sorted(self.specs))}")

    def read(self, part: str) -> Array:
        """Return all of a part as `Parts.whole` does, for what is read once: when the module is opened."""
        with ExitStack() as stack:
            return Parts(self, stack).whole(part)


class Parts:
    """The stored tensors of one module, open for reading: one thread's own, small parts are read once."""

    def __init__(self, module: Module, stack: ExitStack) -> None:
        self._module, self._stack = module, stack
        self._open: dict[str, files.Read] = {}
        self._whole: dict[str, Array] = {}
        self._numbers: dict[str, Array] = {}
        self._lent: dict[str, bytearray] = {}
        self._matrices: dict[str, tuple[int, Array]] = {}

    def whole(self, part: str) -> Array:
        """Return all of a part as it is stored: BF16 and 8-bit floats as their bits. It is read once."""
        if part not in self._whole:
            self._whole[part] = self.rows(part, 0, None)
        return self._whole[part]

    def rows(self, part: str, start: int, stop: int | None) -> Array:
        """Return part[start:stop] along its first side as it is stored; BF16 and 8-bit floats as their bits."""
        spec = self._module.specs[part]
        if part in self._whole:
            return self._whole[part][start:stop]
        first, last, _ = slice(start, stop).indices(spec.shape[0]) if spec.shape else (0, 1, 1)
        shape = (last - first, *spec.shape[1:]) if spec.shape else ()
        return self._read(part, first, last, prod(spec.shape[1:])).reshape(shape)

    def joined(self, part: str, start: int, stop: int, *, lent: bool = False) -> Array:
        """Return rows of a part as it is stored, (n, columns); the next such call overwrites what is `lent`."""
        shape = self._module.specs[part].shape
        if part in self._whole:
            return self._whole[part].reshape(-1, shape[-1])[start:stop]
        return self._read(part, start, stop, shape[-1], lent).reshape(stop - start, shape[-1])

    def _read(self, part: str, first: int, last: int, columns: int, lent: bool = False) -> Array:
        import numpy as np

        spec = self._module.specs[part]
        if part not in self._open:
            self._open[part] = self._stack.enter_context(files.opened(spec))
        size = columns * dtypes.bits(spec.dtype) // 8
        nbytes = (last - first) * size
        held = self._lent if lent else {}
        if len(raw := held.get(part, bytearray())) < nbytes:
            raw = held[part] = bytearray(nbytes)
        self._open[part](memoryview(raw)[:nbytes], first * size)
        return np.frombuffer(memoryview(raw)[:nbytes], _NUMPY.get(spec.dtype, "<u1"))

    def raw(self, part: str, start: int, stop: int, *, lent: bool = False) -> Array:
        """Return the bytes [start:stop) of a part, uint8; `lent` as `joined` has it."""
        import numpy as np

        spec = self._module.specs[part]
        size = dtypes.bits(spec.dtype) // 8
        first = start // size
        stored = self._read(part, first, -(-stop // size), 1, lent).view(np.uint8)
        return stored[start - first * size : stop - first * size]

    def matrix(self, part: str, index: int) -> Array:
        """Return part[index] as it is stored; the one that was asked for last is kept."""
        if self._matrices.get(part, (-1,))[0] != index:
            self._matrices[part] = (index, self.rows(part, index, index + 1)[0])
        return self._matrices[part][1]

    def numbers(self, part: str, start: int = 0, stop: int | None = None) -> Array:
        """Return part[start:stop] along its first side in float32, whatever float dtype it is stored in."""
        from loratools.storage.codecs.tables import numbers

        stored = self.whole(part) if (start, stop) == (0, None) else self.rows(part, start, stop)
        return numbers(stored, self._module.specs[part].dtype)

    def constants(self, part: str) -> Array:
        """Return all of a part as `numbers` does; those that are stored as bytes are E8M0. Made once, and read-only."""
        import numpy as np

        from loratools.storage.codecs.tables import numbers

        if part not in self._numbers:
            dtype = "F8_E8M0" if self.whole(part).dtype == np.uint8 else self._module.specs[part].dtype
            self._numbers[part] = np.array(numbers(self.whole(part), dtype))
            self._numbers[part].setflags(write=False)
        return self._numbers[part]


class Encoder(Protocol):
    """Makes codes of one weight again, tile by tile, rows in order."""

    @property
    def needs_pass(self) -> bool:
        """Whether `observe` must see all tiles before the first is encoded."""

    def observe(self, first: int, W: Array) -> None:
        """Take in the rows of W, float32 (n, columns), of which the first is `first`, if `needs_pass`."""

    def encode(self, first: int, W: Array) -> Array:
        """Take the rows of W, and return the numbers, float32 (n, columns), that their codes stand for."""

    def finish(self) -> Mapping[str, Array]:
        """Return the parts that changed, in the dtype and shape in which they are stored."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoding(ABC):
    """A weight that is stored as codes: how it becomes numbers, and numbers codes again.

    `module`   the module as it is stored
    `shape`    of the weight as the module has it: (out, in), with more sides before them in a stack
    `label`    scheme, bits and group in a few words, as `inspect` prints it: "FP8 E4M3, blocks of 128 × 128"
    `bits`     of one code; `group`, the numbers that share a scale, as (rows, columns), None for all of a tensor
    `together` rows that share something: tiles for an encoder are multiples of it
    """

    module: Module
    shape: tuple[int, ...]
    label: str
    bits: int
    group: tuple[int, int] | None = None
    together: int = 1

    @property
    def name(self) -> str:
        """The name of the weight where it is stored plainly."""
        return self.module.path if len(self.shape) > 2 else f"{self.module.path}.weight"

    @property
    def dtype(self) -> str:
        """The 16-bit dtype that it becomes where it is stored plainly: BF16 or F16."""
        return self.module.dtype

    @property
    def columns(self) -> int:
        """The last side: all others are rows."""
        return self.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all its stored parts."""
        return sum(spec.nbytes for spec in self.module.specs.values())

    @abstractmethod
    def decode(self, parts: Parts, first: int, out: Array) -> None:
        """Write the rows from `first` on, as many as `out` (n, columns), float32, has: the scheme's formula, unrounded.

        Rows are those of the weight with all sides but the last joined.
        """

    def written(self) -> Encoding:
        """Return the encoding that the weight gets where it becomes codes again: its own, or one near it."""
        return self

    def encoder(self, parts: Parts, grid: Grid, draw: Callable[[tuple[int, ...]], Array] | None = None) -> Encoder:
        """Return what makes codes of it again, on its own grid or with fresh scales.

        `draw` makes uniform numbers in [0, 1) of a shape, for rounding at random; None rounds to the nearest.
        Raises `UnsupportedAdapter` for a scheme that is read only.
        """
        raise self.module.refuse("loratools reads it, and does not write it", "Use --quantized dequantize or partial.")

    @contextmanager
    def parts(self) -> Iterator[Parts]:
        """Open the stored parts; `BadFile` where a file cannot be opened."""
        with ExitStack() as stack:
            yield Parts(self.module, stack)

    @contextmanager
    def reader(self) -> Iterator[files.Read]:
        """Open the weight for reading as float32, piece by piece; see `files.opened`."""
        import numpy as np

        columns = max(1, self.columns)
        with self.parts() as parts:

            def read(buffer: memoryview, offset: int) -> None:
                first, left = divmod(offset // 4, columns)
                count = len(buffer) // 4
                if not count:
                    return
                rows = -(-(left + count) // columns)
                whole = not left and rows * columns == count
                out = np.frombuffer(buffer, "<f4").reshape(rows, columns) if whole else np.empty((rows, columns), "<f4")
                self.decode(parts, first, out)
                if not whole:
                    np.frombuffer(buffer, "<f4")[:] = out.reshape(-1)[left : left + count]

            yield read


class Codec(Protocol):
    """A codec's module, as the docstring of `loratools.storage.codecs` describes it."""

    def opened(self, module: Module) -> Encoding:
        """Return how the module's weight is stored."""

    def plain(self, statement: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
        """Return config.json's statement with these modules listed as plain."""


def get(name: str) -> Codec:
    """Return a codec by the name of its file."""
    return cast(Codec, import_module(f"loratools.storage.codecs.{name}"))


def encoded(encoding: Encoding) -> TensorSpec:
    """Return the tensor that stands for a weight which is stored as codes: float32, decoded when it is read."""
    stored = encoding.module.specs
    file = stored.get("weight", next(iter(stored.values()))).file
    return TensorSpec("F32", encoding.shape, file, _NOWHERE, _NOWHERE + 4 * prod(encoding.shape), encoding)
