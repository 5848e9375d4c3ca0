"""A model in one safetensors file: the record of its making in the header, and nothing else that a folder would hold.

The header comes first in the file and the digests in the record are known last, so room is left for them: spaces at the
end, which the safetensors format allows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratools.adapter.placement.gguf import is_gguf
from loratools.decisions import warned
from loratools.dialects._frame.metadata import OF_BYTES
from loratools.engine.plan import MergePlan
from loratools.errors import IncompatibleAdapter, InvalidOption, counted
from loratools.format.manifest import NO_DIGEST
from loratools.format.record import IN_FILE, SAYS
from loratools.format.record import read as read_record
from loratools.storage import atomic, files
from loratools.storage.beside import making
from loratools.storage.beside.along import residual_of
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import encodings
from loratools.storage.checkpoint.shard import Shard
from loratools.storage.codecs.state import HEADER
from loratools.storage.companions import Companions, beside_base, tokenizer_files
from loratools.storage.layout import FilePlan, plan_file
from loratools.storage.pickles import SUFFIXES as PICKLED
from loratools.surgery.merge.options import MergeOptions

ENDINGS = (".safetensors", ".sft")
"""Names that end so are files, all others folders."""

MAX_RECORD = 16_000_000
"""Bytes of a record in a header, which every program reads that lists the file; that of SDXL has 0.3 million."""

_SLACK = 4096  # bytes of the record that are known last and are no digests: numbers, and names of files
_LONG = 1000  # characters of an entry of an adapter's header; longer ones are pictures of older records


def is_single(output: Path, base: Checkpoint) -> bool:
    """Tell by its name whether an output is one safetensors file; that of a GGUF base is a matter of its own.

    Raises `InvalidOption` for the name of a file that is not written, or not of this base.
    """
    if is_gguf(base):
        if output.suffix in (*ENDINGS, *PICKLED):
            hint = f"Name it {output.with_suffix('.gguf').name}."
            raise InvalidOption(f"{output}: what is made of a GGUF base is a GGUF file", hint=hint)
        return False
    if output.suffix in (".gguf", *PICKLED):
        what = "a GGUF file is made of a GGUF base" if output.suffix == ".gguf" else "files of pickles are not written"
        hint = f"Name it {output.with_suffix('.safetensors').name}, or give the name of a folder."
        raise InvalidOption(f"{output}: {what}", hint=hint)
    if output.suffix not in ENDINGS:
        return False
    if base.components:
        raise InvalidOption(
            f"{output}: {base.path} is a pipeline of {len(base.components)} models "
            f"({', '.join(base.components)}), which become no single file",
            hint="Give the name of a folder.",
        )
    return True


def new_model(
    output: Path, *, single: bool, force: bool, durable: bool, key: str | None = None
) -> AbstractContextManager[Path]:
    """Return what opens the scratch folder of an output: it becomes the folder, or its one file the `single` file.

    `key` is that of `atomic.new_folder`, the others are those of `merge`.
    """
    if single:
        return atomic.new_files(output, [residual_of(output)], force=force, durable=durable)
    return atomic.new_folder(output, force=force, key=key, durable=durable)


def refuse_what_needs_a_folder(options: MergeOptions) -> None:
    """Raise `InvalidOption` for options that a single file cannot serve."""
    asked = {
        "max_shard_size": (options.max_shard_size is not None, "there is one file"),
        "resume": (options.resume, "one file has no parts that could be complete"),
        "keep_loss": (options.keep_loss is not None, "the adapter of what is lost lies beside a model, in its folder"),
    }
    if problems := [f"{name}: {why}" for name, (is_set, why) in asked.items() if is_set]:
        raise InvalidOption("the output is a single file", problems, hint="Give the name of a folder for it.")


def still_true(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what a header says that holds of a file with other numbers: no hashes of its bytes, no record of ours."""
    return {name: text for name, text in metadata.items() if name not in (*OF_BYTES, IN_FILE, making.ENTRY)}


def metadata_of(shards: Sequence[Shard]) -> dict[str, str]:
    """Return what the header of one file says that is made of these: what that of the base says and holds of it."""
    metadata = still_true(shards[0].metadata)
    whole = len(shards) == 1 and shards[0].path.suffix in ENDINGS
    return metadata if whole else {"format": "pt"} | metadata


def with_room(plan: MergePlan, record: Mapping[str, Any], taken: Sequence[str] = ()) -> MergePlan:
    """Return the plan of one file with room for the record in its header, as `write_record` will write it.

    `taken` are the words of the weights of adapters that are taken out, whose entries come into the record too. Raises
    `IncompatibleAdapter` where the record is too long.
    """
    codes = encodings(plan.base)
    modules = [codes[name].module for name in plan.touched() if name in codes]
    names = [plan.base.origin(name) for name in plan.touched()]
    names += [name for module in modules for name in module.names.values()]
    before = [read_record(plan.base)] if taken else []
    entries = [{"digest": NO_DIGEST, "weight": 1 / 3, "weights": words} for words in taken]
    draft = {**record, "digests": dict.fromkeys(names, NO_DIGEST), "before": before, "entries": entries}
    text = _text(draft) + "0" * _SLACK
    if len(text.encode()) > MAX_RECORD:
        raise IncompatibleAdapter(
            f"the record of this merge takes {len(text.encode())} bytes, and {MAX_RECORD} is the most that a header "
            "is to hold",
            hint="Give the name of a folder, beside whose weights the record lies.",
        )
    file = plan.files[0]
    header = _padded(_header(file, plan, text))
    entries_of = [(slot.name, slot.dtype, slot.shape) for slot in file.slots]
    return replace(plan, files=(plan_file(file.name, entries_of, header=header),))


def write_record(plan: MergePlan, record: Mapping[str, Any], folder: Path) -> None:
    """Write the record into the header of the finished file in `folder`, in the room that the plan has for it."""
    file = plan.files[0]
    header = _padded(_header(file, plan, _text(record)), len(file.header))
    with files.descriptor(folder / file.name, os.O_RDWR) as target:
        files.write_from(target, memoryview(header), 0)


def _header(file: FilePlan, plan: MergePlan, text: str) -> bytes:
    metadata = {**(plan.metadata or {}), IN_FILE: text}
    return plan_file(file.name, [(slot.name, slot.dtype, slot.shape) for slot in file.slots], metadata).header


def _padded(header: bytes, size: int | None = None) -> bytes:
    """Return a header with spaces at its end, `size` bytes long."""
    size = size or len(header)
    if len(header) > size:
        raise ValueError(f"a header of {len(header)} bytes, where {size} were planned")
    raw = header[8:].ljust(size - 8)
    return len(raw).to_bytes(8, "little") + raw


def _text(record: Mapping[str, Any]) -> str:
    """Return a record as it stands in a header, without pictures that the headers of adapters have."""
    adapters = []
    for entry in record["adapters"]:
        said = entry.get(SAYS)
        said = said if isinstance(said, Mapping) else {}
        short = {name: value for name, value in said.items() if len(str(value)) <= _LONG}
        adapters.append({**entry, SAYS: short} if said else entry)
    return json.dumps({**record, "adapters": adapters}, ensure_ascii=False)


def left_behind(base: Checkpoint, adapters: Sequence[Path | None]) -> Companions:
    """Return what a single file has beside it, which is nothing; warn of what lies beside the base and the adapters."""
    left = beside_base(base)
    folders = [path for path in adapters if path is not None and path.is_dir()]
    brought = [path for folder in folders for path in tokenizer_files(folder)]
    names = [*left, *map(str, brought)]
    if names:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        files = counted(len(names), "file")
        warned("%s: the output is one file; left behind, beside it: %s: %s", base.path, files, shown)
    return Companions(left=left)


def restated(plan: MergePlan) -> list[str]:
    """Return what a config.json has to say of the model in one file, where it has to say anything new."""
    fields = {key: value for key, value in plan.config.items() if key != HEADER}
    changed = [f"{key}: {json.dumps(value)}" for key, value in sorted(fields.items())]
    changed += [f"no {key}" for key in sorted(plan.dropped) if key != HEADER]
    return [f"a config.json of this file has to say {', '.join(changed)[:500]}"] if changed else []
