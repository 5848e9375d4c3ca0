"""How a model is quantized, from its headers: schemes, bits and groups, what is plain, what it was made from."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter.naming.compact import compact
from loratools.decisions import warned
from loratools.errors import LoraToolsError
from loratools.storage import dtypes
from loratools.storage.beside.cards import read_card
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import encodings, logical
from loratools.storage.codecs import Encoding, schemes
from loratools.storage.gguf.types import CODES
from loratools.storage.header import TensorSpec

_FRONT = re.compile(r"\A---\n(.{0,20000}?)\n---", re.DOTALL)
_PARENT = re.compile(r"^base_model:[ \t]*(?:\n[ \t]*-[ \t]*)?[\"']?([^\s\"'\[\]]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Scheme:
    """Modules that are quantized alike.

    `scheme` is its name, `label` says bits and group in a few words, `bits` of one code, `group` the numbers that share
    a scale as (rows, columns), None for all of a tensor or where it is not known. `targets` are the modules in few
    lines, `nbytes` what they take, `parameters` how many numbers they have; 0 where the scheme is not read.
    """

    scheme: str
    label: str
    bits: int | None
    group: tuple[int, int] | None
    modules: int
    parameters: int
    nbytes: int
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight as its module has it, whatever it is stored as: name, shape, and the name of its scheme."""

    name: str
    shape: tuple[int, ...]
    scheme: str


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a model is quantized; `plain` are the modules with matrices that are no codes, in few lines.

    `parent` is the model that it was made from, where config.json, the model card or a record says so.
    """

    schemes: tuple[Scheme, ...]
    plain: tuple[str, ...]
    parent: str | None
    parameters: int
    weights: tuple[Weight, ...]


def quantization(model: Checkpoint, record: Mapping[str, Any] | None = None) -> Quantization | None:
    """Return how a model is quantized, None where none of its weights is stored as codes.

    Only headers are read, and of bitsandbytes the small tensor that holds a weight's shape. A warning says where a
    module is stored in a way that its codec does not read. `record` is what loratools.json says.
    """
    stored = model.stored or model
    codes = schemes.find(stored.specs, stored.config)
    if not codes.modules:
        return None
    try:
        view = logical(stored)
    except LoraToolsError as error:
        warned("%s: shapes and bits are not told: %s", model.path, error.message)
        view = stored
    every = encodings(view)
    groups: dict[tuple[str, str, int | None, tuple[int, int] | None], list[Encoding]] = defaultdict(list)
    for encoding in every.values():
        groups[encoding.module.scheme, encoding.label, encoding.bits, encoding.group].append(encoding)
    found = [
        Scheme(
            *key, len(members), sum(view.specs[encoding.name].parameters for encoding in members),
            sum(encoding.nbytes for encoding in members), tuple(compact([each.module.path for each in members])),
        )
        for key, members in groups.items()
    ]  # fmt: skip
    read = {encoding.module.path for encoding in every.values()}
    unread: dict[str, list[str]] = defaultdict(list)
    for path, scheme in codes.modules.items():
        if path not in read:
            unread[scheme].append(path)
    for scheme, paths in unread.items():
        nbytes = sum(stored.specs[name].nbytes for path in paths for name in codes.parts.get(path, {}).values())
        found.append(Scheme(scheme, "not read", None, None, len(paths), 0, nbytes, tuple(compact(paths))))
    left = schemes.find(view.specs, view.config).tensors
    plain = [
        name.removesuffix(".weight")
        for name, spec in view.specs.items()
        if spec.encoding is None and name not in left and len(spec.shape) > 1 and spec.dtype in dtypes.FLOATS
    ]
    return Quantization(
        tuple(sorted(found, key=lambda each: (-each.modules, each.scheme, each.label))), tuple(compact(plain)),
        _parent(stored, record or {}),
        sum(spec.parameters for name, spec in view.specs.items() if name not in left),
        tuple(Weight(name, view.specs[name].shape, encoding.module.scheme) for name, encoding in every.items()),
    )  # fmt: skip


def _parent(model: Checkpoint, record: Mapping[str, Any]) -> str | None:
    """Return what the record, the card or config.json names as the model that this one was made from."""
    base = record.get("base")
    stated = base.get("id") if isinstance(base, Mapping) else None
    if isinstance(stated, str) and stated:
        return stated
    card = model.root / "README.md"
    if model.path.is_dir() and card.is_file():
        try:
            front = _FRONT.match(read_card(card).replace("\r\n", "\n"))
        except LoraToolsError as error:
            warned("%s", error.message)
            front = None
        if front and (named := _PARENT.search(front[1])):
            return named[1]
    in_gguf = model.config.get("gguf")
    name = in_gguf.get("parent") if isinstance(in_gguf, Mapping) else model.config.get("_name_or_path")
    return name if isinstance(name, str) and name else None


def stated_codes(config: Mapping[str, Any]) -> str | None:
    """Return what a config.json says of quantization: the method and its bits."""
    stated = config.get("quantization_config") or config.get("quantization")
    if not isinstance(stated, Mapping):
        return None
    method = str(stated.get("quant_method") or stated.get("quant_algo") or "of an unnamed method")
    bits = stated.get("bits") or next((n for n in (4, 8) if stated.get(f"load_in_{n}bit")), None)
    return f"{method}, {bits} bits" if bits else method


def gguf_codes(specs: Mapping[str, TensorSpec]) -> str | None:
    """Return the quantized types of a GGUF file, that of most bytes first."""
    sizes: dict[str, int] = defaultdict(int)
    for spec in specs.values():
        sizes[spec.dtype] += spec.nbytes if spec.dtype in CODES else 0
    kinds = sorted((kind for kind, size in sizes.items() if size), key=lambda kind: -sizes[kind])
    return f"GGUF, {', '.join(kinds)}" if kinds else None
