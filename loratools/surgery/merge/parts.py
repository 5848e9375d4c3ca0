"""A merge that several processes share: each writes some of the files, and one makes the output of them.

Every process decides the same merge from the same call, and shows by the merge's fingerprint that it has. The files of
a part lie in a hidden folder beside the output, with a journal as a resumed merge has it; `gather` renames them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from loratools.adapter.placement.gguf import is_gguf
from loratools.engine.device import described
from loratools.engine.run import in_torch
from loratools.errors import BadFile, InvalidOption, counted
from loratools.options import either
from loratools.parallel import Progress, no_progress
from loratools.parallel.call import Call
from loratools.parallel.shares import Part, balanced
from loratools.storage import atomic
from loratools.storage.beside import making
from loratools.storage.sources import Location, session
from loratools.storage.strict_json import read_json
from loratools.surgery.inputs import as_asked
from loratools.surgery.merge.options import MergeOptions
from loratools.surgery.merge.prepare import Merge, prepare
from loratools.surgery.merge.resume import Journal, fingerprint
from loratools.surgery.merge.run import MergeReport, execute, settings_of, write_tensors

VERB, PLACES = "merge", ("base", "adapters", "output", "original")
"""The verb, and its arguments that are paths or references."""

VERBS: Mapping[str, str] = {VERB: __name__, "dequantize": "loratools.surgery.dequantize"}
"""Verbs that decide a `Merge` and share its files: modules with `decided(arguments)` and `finished(arguments, report)`.

The first returns that `Merge`, the second what the verb returns.
"""

_CALL = ".part.json"


@dataclass(frozen=True, slots=True)
class PartReport:
    """What one part of a merge wrote: its `files`, and those that it kept of an earlier run; `folder` holds them.

    `key` is the merge's fingerprint; `arithmetic` names what computes, where that decides the last bit.
    """

    part: str
    folder: str
    files: tuple[str, ...]
    kept: tuple[str, ...]
    nbytes: int
    key: str
    arithmetic: str
    warnings: tuple[str, ...] = ()


def call_of(base: Location, adapters: Sequence[Location], output: Location, **arguments: Any) -> Call:
    """Return a merge as a value that travels: the arguments are those of `merge`.

    Raises `InvalidOption` where one is held in memory.
    """
    return Call.of(VERB, {"base": base, "adapters": list(adapters), "output": output, **arguments}, PLACES)


@session()
def merge_part(call: Call, part: Part | str, *, progress: Progress | None = None) -> PartReport:
    """Write one part of a merge, with no scheduler at all, as a job of an array does; `gather` makes the output.

    Args:
        call: The merge, as `call_of` returns it.
        part: Which part: a `Part`, or a text such as `"3/16"`, counted from 1. The files are shared out by their bytes.
        progress: Called with the bytes written since the last call, from any thread. Default: nobody is told.

    Raises:
        InvalidOption: The part or an option cannot be; the output is one file.
        LoraToolsError: Whatever `merge` raises.

    Example:
        >>> call = call_of("base", ["adapter"], "merged")
        >>> merge_part(call, "1/2").files  # doctest: +SKIP
        ('model-00001-of-00003.safetensors',)
    """
    part = Part.parse(part) if isinstance(part, str) else part
    prepared = decide_call(call)
    key = fingerprint(prepared.plan, settings_of(prepared))
    return write_part(call, prepared, part, f"{key[:8]}{part.number:04x}{part.of:04x}", progress or no_progress)


@session()
def gather(output: str | Path, *, progress: Progress | None = None) -> Any:
    """Make the output of a merge of which all parts are written.

    Each file has the digest that its part took down. Everything else (index, configuration, record) is written here.

    Args:
        output: The output that the parts were written for.
        progress: Called with the bytes written since the last call. Default: nobody is told.

    Raises:
        OutputRefused: Another process works on a part.
        BadFile: There is no part, one is missing or not complete, or they are not of one merge.
        LoraToolsError: Whatever `merge` raises.

    Example:
        >>> gather("merged").output  # doctest: +SKIP
        'merged'
    """
    atomic.sweep(output)
    with atomic.part_folders(Path(output)) as folders:
        call, account = _whole(Path(output), folders)
        call = replace(call, arguments={**call.arguments, "output": str(output)})
        with making.making(lambda: account) if account else nullcontext():
            report = execute(decide_call(call), progress=progress, parts=folders)
        for folder in folders:
            atomic.remove(folder)
        return finish(call, report)


def decided(arguments: Mapping[str, Any]) -> Merge:
    """Decide a merge of its arguments, as `merge` does."""
    given = dict(arguments)
    base, adapters, output = (given.pop(name) for name in ("base", "adapters", "output"))
    asked = {name: given.pop(name, None) for name in ("weights", "include", "exclude", "dialect", "alpha")}
    read, weights = as_asked(adapters, *asked.values())
    return prepare(base, read, output, weights=weights, options=MergeOptions(**given))


def finished(arguments: Mapping[str, Any], report: MergeReport) -> MergeReport:
    """Return what a merge returns."""
    return report


def finish(call: Call, report: MergeReport) -> Any:
    """Return what the verb of a call returns, of what was written."""
    return import_module(VERBS[call.verb]).finished(call.arguments, report)


def decide_call(call: Call) -> Merge:
    """Decide the merge of a call, as its verb does."""
    call.check_version()
    if call.verb not in VERBS:
        raise InvalidOption(f"{call.verb!r} is no verb whose parts are written here; expected {either(list(VERBS))}")
    prepared: Merge = import_module(VERBS[call.verb]).decided(call.arguments)
    if is_gguf(prepared.plan.base) or prepared.plan.single:
        raise InvalidOption(
            f"{prepared.output}: it is one file, and processes share a merge by its files",
            hint="Name a folder, and --max-shard-size where the base is one file; or merge in this process.",
        )
    if prepared.options.keep_loss:
        raise InvalidOption("keep_loss: what the codes lose is measured in one process", hint="Leave it out.")
    return prepared


def arithmetic_of(prepared: Merge) -> str:
    """Return what computes the merge, as far as that decides the last bit: the C code has the same everywhere."""
    if not in_torch(prepared.plan, settings_of(prepared)):
        return "C"
    if on := described(prepared.options.computes_on):
        return ", ".join(on.values())
    import torch

    return f"torch {torch.__version__.partition('+')[0]}, {torch.backends.cpu.get_cpu_capability()}"


def write_part(
    call: Call, prepared: Merge, part: Part, token: str, progress: Progress, *, durable: bool = True
) -> PartReport:
    """Write the files of a part into the folder of that token, beside the output, unless they are there already.

    Without `durable` they go to the output before anything else can happen to them.
    """
    plan = prepared.plan
    key, arithmetic = fingerprint(plan, settings_of(prepared)), arithmetic_of(prepared)
    names = balanced({file.name: file.size for file in plan.files}, part.of)[part.number - 1]
    with atomic.part_folder(prepared.output, token) as folder:
        journal = Journal(folder, key, durable=durable, passing=not durable)
        kept = tuple(name for name in journal.kept if name in names)
        files = tuple(file for file in plan.files if file.name in names and file.name not in kept)
        progress(sum(file.size for file in plan.files if file.name in kept))
        write_tensors(replace(prepared, plan=replace(plan, files=files)), folder, progress, finished=journal.add)
        journal.flush()
        document: dict[str, Any] = {"call": call.to_json(), "part": str(part), "key": key, "arithmetic": arithmetic}
        if part.number == 1 and (account := making.account()):
            document["account"] = dict(account)
        (folder / _CALL).write_text(json.dumps(document), encoding="utf-8", newline="\n")
    nbytes = sum(file.size for file in plan.files if file.name in names)
    return PartReport(str(part), str(folder), names, kept, nbytes, key, arithmetic)


def _whole(output: Path, folders: Sequence[Path]) -> tuple[Call, dict[str, Any] | None]:
    """Return the call of all parts, and how the output is made; raise `BadFile` unless all are there, of one merge."""
    read: dict[Path, Any] = {folder: read_json(folder / _CALL) for folder in folders if (folder / _CALL).is_file()}
    if not read:
        hint = "Each part is written by the command with --part, such as --part 1/16."
        raise BadFile(f"{output}: no part of it is complete", hint=hint)
    problems = [f"{folder}: not complete" for folder in folders if folder not in read]
    first = next(iter(read.values()))
    calls = {folder: Call.from_json(document.get("call"), folder / _CALL) for folder, document in read.items()}
    call = calls[next(iter(read))]
    parts = {folder: Part.parse(str(document.get("part"))) for folder, document in read.items()}
    of = parts[next(iter(read))].of
    for folder, document in read.items():
        if document.get("key") != first.get("key") or parts[folder].of != of:
            problems.append(f"{folder}: part {parts[folder]} of another merge: other inputs, options or parts")
        elif document.get("arithmetic") != first.get("arithmetic"):
            problems.append(f"{folder}: computed by {document.get('arithmetic')}, others by {first.get('arithmetic')}")
    there = {part.number for part in parts.values()}
    problems += [f"part {Part(number, of)} is missing" for number in range(1, of + 1) if number not in there]
    if problems:
        raise BadFile(f"{output}: {counted(len(problems), 'part')} of the merge cannot be taken", problems)
    accounts = [document["account"] for document in read.values() if isinstance(document.get("account"), dict)]
    return call, accounts[0] if accounts else None
