"""The residual of a merge: what rounding destroyed, coded so compactly that it can always be kept.

`unmerge.residual` beside a merged model, `NAME.residual` beside one that is the file `NAME.safetensors`, is a
safetensors file with one U8 tensor for each tensor of the base that is not in the model as it was. Its
metadata say how the base was laid out, and in which way each tensor is coded:

    predicted   factors g of DoRA, then a block (`engine/residual/codes.py`) for each tile, each after its u32 length;
                the tiles' predictions are made from the merged tensor and the adapters (`engine/residual/predict.py`)
    direct      blocks alone: what a cast changed, or a tensor that was trained whole, is predicted to be as it now is
    stored      the base's bytes, deflated: where the merged model has nothing to predict them from

Equal merges give equal residuals, whatever the number of threads. `keep` writes the file after a merge, with
what `meanwhile` coded while it ran, and `restore` writes the base again from it.
`tiles` makes blocks and reads them, in C where that serves.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from loratools.adapter.placement.resolve import Placement
from loratools.engine.residual.predict import Step
from loratools.errors import BadFile
from loratools.parallel.memory import Room
from loratools.storage import dtypes, files
from loratools.storage.atomic import names
from loratools.storage.codecs.floats import unsigned, widen
from loratools.storage.header import MAX_HEADER, MAX_SIDES, TensorSpec, parse_header, read_header
from loratools.storage.layout import plan_file
from loratools.storage.strict_json import parse_json_object

Array = np.ndarray[Any, np.dtype[Any]]

VERSION = 2
READ = (1, 2)
"""Versions that are read; in 1 all exceptions of a block are deflated."""
ELEMENTS = 1 << 17  # of a tile: its float64 product stays in the core's cache
HEADED = (".safetensors", ".sft")
"""Endings of files that have a header."""
LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True, eq=False)
class Lost:
    """One tensor of the base that the merged model does not hold as it was.

    `after` is what the model has under its name; None where there is nothing to predict it from. `placements` are the
    updates that made the change, with the weights of their adapters.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    after: TensorSpec | None
    placements: tuple[tuple[Placement, float], ...] = ()

    @property
    def mode(self) -> str:
        """Return how the tensor is coded; see the head of this file."""
        return "stored" if self.after is None else "predicted" if self.placements else "direct"

    @property
    def matrix(self) -> tuple[int, int]:
        """Return how the tensor is seen: the view that its sites share, or first side × rest."""
        views = {placement.site.matrix for placement, _ in self.placements}
        if len(views) == 1:
            return views.pop()
        rows = self.shape[0] if self.shape else 1
        return (rows, prod(self.shape) // rows) if rows else (0, 0)

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of the rows of each tile: by the shape alone."""
        rows, columns = self.matrix
        step = max(1, ELEMENTS // max(1, columns))
        return ((start, min(start + step, rows)) for start in range(0, rows, step))


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """One of the base's files of tensors: `(name, dtype, shape)` in order, string metadata, prefix of its component.

    `header` are the bytes before its first tensor, where they are not those that the others make.
    """

    name: str
    tensors: Sequence[tuple[str, str, tuple[int, ...]]]
    metadata: Mapping[str, str]
    prefix: str
    header: bytes | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Residual:
    """An opened residual: the base's `layout`, and what a merge changed in `config` and `indexes` as it was before.

    A field of the config that is null was not there; `indexes` are the metadata of each index by its relative path.
    """

    path: Path
    tensors: Mapping[str, TensorSpec]
    modes: Mapping[str, str]
    layout: Sequence[Layout]
    config: Mapping[str, Any] = field(default_factory=dict)
    indexes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Residual:
        """Open the residual of a merged model from its header; raise `BadFile`."""
        header = read_header(path)
        document = parse_json_object(header.metadata.get("residual", "{}").encode(), path, constants=True)
        if document.get("version") not in READ:
            raise BadFile(f"{path}: a residual of version {document.get('version')}, this loratools reads 1 and 2")
        try:
            headers = dict(document.get("headers") or {})
            layout = [
                Layout(str(name), [_described(*tensor) for tensor in tensors], _texts(metadata), str(p))
                for name, tensors, metadata, p in document["layout"]
            ]
            layout = [replace(file, header=_header(headers.get(file.name), file, path)) for file in layout]
            modes, config, indexes = (dict(document[field]) for field in ("modes", "config", "indexes"))
        except (KeyError, TypeError, ValueError, OverflowError):
            raise BadFile(f"{path}: its description of the base's layout is damaged") from None
        listed = {name for file in layout for name, _, _ in file.tensors}
        paths = [Path(name) for name in [*(file.name for file in layout), *indexes]]
        bad = [path for path in paths if path.is_absolute() or ".." in path.parts or "\0" in str(path)]
        names.check([name.as_posix() for name in paths], path)
        if bad or modes.keys() != header.tensors.keys() or not modes.keys() <= listed:
            raise BadFile(f"{path}: its description of the base's layout does not fit its tensors")
        return cls(path, header.tensors, modes, layout, config, indexes)

    def as_one(self, name: str) -> Residual:
        """Return the residual of the same base whose tensors are all in one file of this name."""
        if len(self.layout) == 1:
            return replace(self, layout=[replace(self.layout[0], name=name)], indexes={})
        tensors = [tensor for file in self.layout for tensor in file.tensors]
        return replace(self, layout=[Layout(name, tensors, self.layout[0].metadata, "")], indexes={})


def description(layout: Sequence[Layout], indexes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the metadata of a residual say of the files of a base, as `Residual.open` reads it."""
    headers = {file.name: file.header for file in layout if file.header is not None}
    return {
        "layout": [[file.name, file.tensors, dict(file.metadata), file.prefix] for file in layout],
        "headers": {name: base64.b64encode(zlib.compress(header)).decode() for name, header in headers.items()},
        "indexes": dict(indexes),
    }


def _header(packed: Any, file: Layout, path: Path) -> bytes | None:
    """Return the header of a file of the base; raise `ValueError` unless it says what `file` does."""
    if packed is None:
        return None
    inflater = zlib.decompressobj()
    try:
        header = inflater.decompress(base64.b64decode(packed, validate=True), MAX_HEADER + 8)
    except zlib.error:
        raise ValueError from None
    plan = plan_file(file.name, file.tensors, header=header)
    parsed = parse_header(header[8:], plan.size, path)
    specs = [(f"{file.prefix}{name}", spec.dtype, spec.shape) for name, spec in parsed.tensors.items()]
    sized = int.from_bytes(header[:8], "little") == len(header) - 8
    if not sized or specs != list(file.tensors) or parsed.metadata != file.metadata:
        raise ValueError
    return header


def _described(name: Any, dtype: Any, shape: Any) -> tuple[str, str, tuple[int, ...]]:
    """Return a tensor of the base as the residual describes it; raise `ValueError` for what no tensor can be."""
    sides = tuple(shape)
    if type(name) is not str or not dtypes.is_known(dtype) or len(sides) > MAX_SIDES:
        raise ValueError
    if not all(type(side) is int and 0 <= side < 2**63 for side in sides) or prod(sides) >= 2**63:
        raise ValueError
    return name, dtype, sides


def _texts(metadata: Any) -> dict[str, str]:
    texts = dict(metadata)
    if not all(type(text) is str for pair in texts.items() for text in pair):
        raise ValueError
    return texts


def prediction(lost: Lost, after: Array, steps: Sequence[Step], start: int) -> Array:
    """Return W' − ΔW of a tile, flat; in float64 where one of the dtypes is, else in float32."""
    assert lost.after is not None
    work = np.float64 if "F64" in (lost.dtype, lost.after.dtype) else np.float32
    W = widen(after, lost.after.dtype, work).reshape(-1, lost.matrix[1])
    with np.errstate(all="ignore"):
        for step in reversed(steps):
            step.take_back(W, start)
    return W.reshape(-1)


def read_bits(source: int, spec: TensorSpec, start: int, stop: int, room: Room) -> Array:
    """Return the bits of elements [`start`, `stop`) of a tensor, in memory that the next call overwrites."""
    dtype = np.dtype(unsigned(spec.dtype))
    at = spec.start + start * dtype.itemsize
    raw = room.of((stop - start) * dtype.itemsize, at)
    files.read_into(source, raw, at, spec.file)
    return np.frombuffer(raw, dtype)
