"""A merge that several processes share: each writes some of the tensors, and one makes the output of the files.

Every process decides the same merge from the same call, and shows by the merge's fingerprint that it has. The files lie
in one hidden folder beside the output, long from the beginning, and each process writes its tensors where they will
lie: others write the rest. What is done of a part is told in a folder of its own, with a journal as a resumed merge has
it; `gather` renames the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from loratools.errors import BadFile, LoraToolsError, OutputRefused, counted
from loratools.parallel import Progress, no_progress
from loratools.parallel.call import Call
from loratools.parallel.shares import Part
from loratools.storage import atomic
from loratools.storage.atomic import leftovers
from loratools.storage.beside import making
from loratools.storage.layout import FilePlan
from loratools.storage.sources import Location, session
from loratools.storage.strict_json import read_json
from loratools.surgery.inputs import as_asked
from loratools.surgery.merge.options import MergeOptions
from loratools.surgery.merge.planned import PLACES, VERB, VERBS, Planned, decide_call
from loratools.surgery.merge.prepare import Merge, prepare
from loratools.surgery.merge.resume import Journal
from loratools.surgery.merge.run import MergeReport, execute, write_tensors

_CALL = ".part.json"


@dataclass(frozen=True, slots=True)
class PartReport:
    """What one part of a merge wrote: `files`, whole or some of their tensors, and those kept of an earlier run.

    `folder` has the list of them; they lie in `room`. `key` is the merge's fingerprint; `arithmetic` names what
    computes, where that decides the last bit.
    """

    part: str
    folder: str
    room: str
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
        part: Which part: a `Part`, or a text such as `"3/16"`, counted from 1. Tensors are shared out by their
            bytes, small ones of a file together.
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
    planned = Planned.of(call, prepared)
    room, token = _room(prepared.output, planned.key, part.of), f"{planned.key[:8]}{part.number:04x}{part.of:04x}"
    try:
        return write_part(planned, prepared, part, token, progress or no_progress, room)
    except LoraToolsError:
        if leftovers.parts_of(prepared.output.absolute()) == [room.absolute()]:  # nobody else's lies there
            with suppress(OutputRefused), atomic.part_folders(prepared.output, [room.absolute()]):  # nor will
                atomic.remove(room)
        raise


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
        call, account, room = _whole(Path(output), folders)
        call = replace(call, arguments={**call.arguments, "output": str(output)})
        with making.making(lambda: account) if account else nullcontext():
            own = [folder for folder in folders if (folder / _CALL).is_file()]
            report = execute(decide_call(call), progress=progress, parts=own, room=room)
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


def write_part(
    planned: Planned, prepared: Merge, part: Part, token: str, progress: Progress, room: Path, *, durable: bool = True
) -> PartReport:  # fmt: skip
    """Write the tensors of a part into the files in `room`, unless they are there already.

    A folder of that token, beside the output, has the list of them. Without `durable` they go to the output before
    anything else can happen to them.
    """
    mine = planned.parts(prepared, part.of)[part.number - 1]
    # The room of workers is their caller's, who removes it to call them off.
    kept_room = atomic.part_room(room, prepared.output) if durable else nullcontext()
    with atomic.part_folder(prepared.output, token) as folder, kept_room:
        journal = Journal(folder, planned.key, durable=durable, passing=not durable, room=room)
        kept = tuple(file.name for file in mine if file.name in journal.kept)
        files = tuple(file for file in mine if file.name not in kept)
        progress(sum(_nbytes(file) for file in mine if file.name in kept))
        write = replace(prepared, plan=replace(prepared.plan, files=files))
        write_tensors(write, room, progress, finished=journal.add)
        journal.flush()
        document: dict[str, Any] = {**planned.to_json(), "part": str(part)}
        if part.number == 1 and (account := making.account()):
            document["account"] = dict(account)
        (folder / _CALL).write_text(json.dumps(document), encoding="utf-8", newline="\n")
    names, nbytes = tuple(file.name for file in mine), sum(_nbytes(file) for file in mine)
    return PartReport(
        str(part), str(folder), str(room), names, kept, nbytes, planned.key, planned.arithmetic
    )  # fmt: skip


def _nbytes(file: FilePlan) -> int:
    return sum(slot.nbytes for slot in file.slots)


def _room(output: Path, key: str, of: int) -> Path:
    """Return the folder, that of a part 0, in which so many parts of a merge write the files."""
    return output.with_name(f".{output.name}.part-{key[:8]}0000{of:04x}")


def _whole(output: Path, folders: Sequence[Path]) -> tuple[Call, dict[str, Any] | None, Path]:
    """Return the call of all parts, how the output is made, and where the files are.

    Raises `BadFile` unless all parts are there, of one merge.
    """
    read: dict[Path, Any] = {folder: read_json(folder / _CALL) for folder in folders if (folder / _CALL).is_file()}
    if not read:
        hint = "Each part is written by the command with --part, such as --part 1/16."
        raise BadFile(f"{output}: no part of it is complete", hint=hint)
    folders = [folder for folder in folders if folder.name[-8:-4] != "0000"]
    problems = [f"{folder}: not complete" for folder in folders if folder not in read]
    planned = {folder: Planned.from_json(document, folder / _CALL) for folder, document in read.items()}
    one = planned[next(iter(read))]
    parts = {folder: Part.parse(str(document.get("part"))) for folder, document in read.items()}
    of = parts[next(iter(read))].of
    for folder in read:
        if (planned[folder].key, planned[folder].piece, parts[folder].of) != (one.key, one.piece, of):
            problems.append(f"{folder}: part {parts[folder]} of another merge: other inputs, options or parts")
        elif planned[folder].arithmetic != one.arithmetic:
            problems.append(f"{folder}: computed by {planned[folder].arithmetic}, others by {one.arithmetic}")
    there = {part.number for part in parts.values()}
    problems += [f"part {Part(number, of)} is missing" for number in range(1, of + 1) if number not in there]
    if problems:
        raise BadFile(f"{output}: {counted(len(problems), 'part')} of the merge cannot be taken", problems)
    accounts = [document["account"] for document in read.values() if isinstance(document.get("account"), dict)]
    return one.call, accounts[0] if accounts else None, _room(output, one.key, of)
