"""A GGUF base becomes a GGUF file: types and offsets anew, fields as they are, the merge's record among them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loratools.adapter.placement.gguf import stored_name
from loratools.engine.plan import MergePlan, Recoded
from loratools.errors import InvalidOption
from loratools.format.record import IN_FILE
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.dtypes import FLOATS
from loratools.storage.gguf.container import Container, nbytes, read_container
from loratools.storage.gguf.types import CODES, FILE_TYPES
from loratools.storage.header import TensorSpec
from loratools.storage.layout import FilePlan, Slot
from loratools.surgery.merge.options import MergeOptions


def plan_gguf(
    base: Checkpoint, sources: Mapping[str, TensorSpec], recoded: Mapping[str, Recoded], dtype: str | None
) -> FilePlan:
    """Return the plan of the one file: `base` shows as weights what is written in 16 bit, F16 or the `dtype`.

    `sources` are tensors that are new, which come last, or take the place of the base's; the others stay in order.
    """
    container = read_container(base.path)
    order = {base.origin(name): name for name in base.specs}
    names = [order[name] for name in container.tensors if name in order]
    names += [name for name in sources if name not in base.specs]
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for name in names:
        spec = base.specs[name] if name in base.specs else sources[name]
        kind = dtype if dtype and (spec.encoding or _is_cast(name, spec, base)) else spec.plain_dtype
        if name in recoded:
            kind = recoded[name].encoding.label
        tensors.append((name, kind, sources.get(name, spec).shape))
    return _file(base, container, tensors)


def _is_cast(name: str, spec: TensorSpec, base: Checkpoint) -> bool:
    """Tell whether a plain tensor takes another dtype: a matrix that is not F32 where others are narrower.

    llama.cpp asks for vectors in F32, and for the matrices that its converter keeps in F32.
    """
    narrow = any(each.dtype != "F32" for each in base.specs.values() if len(each.shape) > 1)
    keeps = spec.dtype == "F32" and (narrow or "_inp" in base.origin(name) or "position_embd" in base.origin(name))
    return len(spec.shape) > 1 and spec.dtype in FLOATS and not keeps


def _file(base: Checkpoint, container: Container, tensors: list[tuple[str, str, tuple[int, ...]]]) -> FilePlan:
    stored = [(stored_name(name, base), kind, shape) for name, kind, shape in tensors]
    header = container.header(stored, _file_type(container, tensors))
    slots = [
        Slot(name, kind, shape, len(header) + offset, nbytes(kind, shape))
        for (name, kind, shape), offset in zip(tensors, container.offsets(stored), strict=True)
    ]
    return FilePlan(base.path.name, header, tuple(slots))


def _file_type(container: Container, tensors: list[tuple[str, str, tuple[int, ...]]]) -> dict[str, int]:
    """Return `general.file_type` for the type of most bytes, where the file has that field and the type a number."""
    if container.get("general.file_type") is None:
        return {}
    sizes: dict[str, int] = {}
    for _, kind, shape in tensors:
        if len(shape) > 1:
            sizes[kind] = sizes.get(kind, 0) + nbytes(kind, shape)
    before: dict[str, int] = {}
    for spec in container.tensors.values():
        if len(spec.shape) > 1:
            before[spec.dtype] = before.get(spec.dtype, 0) + spec.nbytes
    most = max(sizes, key=lambda kind: sizes[kind])
    unchanged = most in CODES and most == max(before, key=lambda kind: before[kind])
    return {} if unchanged or most not in FILE_TYPES else {"general.file_type": FILE_TYPES[most]}


def with_record(plan: MergePlan, record: Mapping[str, Any]) -> MergePlan:
    """Return the plan of a merge into a GGUF file with the record of it among the fields."""
    file = plan.files[0]
    container = read_container(plan.base.path).with_text(IN_FILE, json.dumps(record, ensure_ascii=False))
    return replace(plan, files=(_file(plan.base, container, [(s.name, s.dtype, s.shape) for s in file.slots]),))


def refuse_what_needs_a_folder(options: MergeOptions) -> None:
    """Raise `InvalidOption` for options that a single file cannot serve."""
    asked = {
        "max_shard_size": options.max_shard_size is not None, "keep_residual": options.keep_residual,
        "resume": options.resume, "keep_loss": options.keep_loss is not None,
    }  # fmt: skip
    if wrong := [name for name, is_set in asked.items() if is_set]:
        raise InvalidOption(f"{', '.join(wrong)}: a GGUF file is written in one piece, and nothing lies beside it")
