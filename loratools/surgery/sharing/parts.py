"""A verb without a scheduler: each part is written down beside the output, and one call makes the output of all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from loratools.decisions import warned
from loratools.errors import BadFile, InvalidOption, counted
from loratools.parallel import Progress, no_progress, shared
from loratools.parallel.call import Call
from loratools.parallel.plain import from_plain, to_plain
from loratools.parallel.shares import Part
from loratools.storage import atomic, digest
from loratools.storage.beside import making
from loratools.storage.sources import session
from loratools.storage.strict_json import MAX_INDEX, read_json
from loratools.surgery.sharing import verbs
from loratools.surgery.sharing.task import Enough, Helper, check_stamps, key_of, stamps

FILE = ".part.json"


@dataclass(frozen=True, slots=True)
class Written:
    """What one part of a verb did: `folder` has it, `items` counts them; `arithmetic` names what computed it."""

    part: str
    folder: str
    items: int
    arithmetic: str


@session()
def write_part(call: Call, part: Part | str, *, progress: Progress | None = None) -> Written:
    """Do one part of a verb's items, and write down what comes of them beside the output; `gather` makes that.

    Args:
        call: The verb and its arguments, as `call_of` returns it.
        part: Which part: a `Part`, or a text such as `"3/16"`, counted from 1. Items are shared out by their size.
        progress: Called with the bytes that were worked on since the last call. Default: nobody is told.

    Raises:
        InvalidOption: The part cannot be, or the verb writes no output.
        LoraToolsError: Whatever the verb raises.

    Example:
        >>> call = call_of("extract-svd", {"base": "base", "tuned": "tuned", "output": "out"})
        >>> write_part(call, "1/2").items  # doctest: +SKIP
        19
    """
    part = Part.parse(part) if isinstance(part, str) else part
    verb = verbs.verb(call.verb)
    if not verb.output:
        raise InvalidOption(f"{call.verb} writes no output that parts could be gathered in", hint="Use --workers.")
    output, arithmetic = Path(call.arguments["output"]), verb.arithmetic()
    hasher = digest.new()
    hasher.update(json.dumps(call.to_json(), sort_keys=True).encode())
    token = f"{hasher.hexdigest()[:8]}{part.number:04x}{part.of:04x}"
    with atomic.part_folder(output, token) as folder:
        for path in folder.iterdir():  # of a part that was interrupted
            atomic.remove(path)
        try:
            with shared.by(Helper(part, folder)):
                verbs.run(call, progress=progress or no_progress)
        except Enough as enough:
            done = enough.done
            document: dict[str, Any] = {
                "call": call.to_json(), "part": str(part), "key": enough.key, "arithmetic": arithmetic,
                "stamps": stamps(), "results": to_plain(dict(done.results)), "warnings": done.warnings,
            }  # fmt: skip
            if part.number == 1 and (account := making.account()):
                document["account"] = dict(account)
            fresh = folder / f"{FILE}.new"
            fresh.write_text(json.dumps(document), encoding="utf-8", newline="\n")
            fresh.replace(folder / FILE)
            return Written(str(part), str(folder), len(done.results), arithmetic)
    raise RuntimeError(f"{call.verb} shares nothing")


def verb_of(output: str | Path) -> str:
    """Return the verb whose parts lie beside an output, as its command is called; "merge" where there are none."""
    with atomic.part_folders(Path(output)) as folders:
        for folder in folders:
            if (folder / FILE).is_file():
                return Call.from_json(read_json(folder / FILE, most=MAX_INDEX).get("call"), folder / FILE).verb
    return "merge"


@session()
def gather(output: str | Path, *, progress: Progress | None = None) -> Any:
    """Make the output of a verb of which all parts are written, and return what the verb returns.

    Args:
        output: The output that the parts were written for.
        progress: Called with the bytes that are worked on since the last call. Default: nobody is told.

    Returns:
        Of the parts of a merge its `MergeReport`, of those of an extraction its `Extraction`.

    Raises:
        OutputRefused: Another process works on a part.
        BadFile: There is no part, one is missing or not complete, or they are not of one call on the same inputs.
        LoraToolsError: Whatever the verb raises.

    Example:
        >>> gather("merged").output  # doctest: +SKIP
        'merged'
    """
    atomic.sweep(output)
    output = Path(output)
    if of_files := verbs.FILES.get(verb_of(output)):
        return import_module(of_files).gather(output, progress=progress)
    with atomic.part_folders(output) as folders:
        read = {folder: read_json(folder / FILE, most=MAX_INDEX) for folder in folders if (folder / FILE).is_file()}
        document = checked(output, folders, read)
        call = Call.from_json(document["call"], output)
        call.check_version()
        call = replace(call, arguments={**call.arguments, "output": str(output)})
        for each in read.values():
            for warning in each["warnings"]:
                warned("%s", warning)
        account = next((each["account"] for each in read.values() if isinstance(each.get("account"), dict)), None)
        made = making.making(lambda: account) if account else nullcontext()
        with made, shared.by(_Gathered(list(read.values()))):
            report = verbs.run(call, progress=progress or no_progress)
        for folder in folders:
            atomic.remove(folder)
    return report


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Has the results of all items from the documents of all parts."""

    documents: Sequence[Mapping[str, Any]]

    def share(self, work: shared.Work, items: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
        """Return the results; raise `BadFile` where the inputs or the items are others by now."""
        for document in self.documents:
            check_stamps(document["stamps"])
            if document["key"] != key_of(sizes):
                raise BadFile(f"part {document['part']} is of other work: its inputs have changed")
        return {name: each for document in self.documents for name, each in from_plain(document["results"]).items()}

    def room(self) -> Path | None:
        """Return None: it writes the output."""

    def agreed(self, value: int) -> int:
        """Return the number as it is: no verb with an output draws one."""
        return value


def checked(output: Path, folders: Sequence[Path], read: Mapping[Path, Any]) -> Any:
    """Return the document of one part; raise `BadFile` unless all parts are there, complete, and of one call."""
    if not read:
        hint = "Each part is written by the command with --part, such as --part 1/16."
        raise BadFile(f"{output}: no part of it is complete", hint=hint)
    problems = [f"{folder}: not complete" for folder in folders if folder not in read]
    first = next(iter(read.values()))
    parts = {folder: Part.parse(str(document.get("part"))) for folder, document in read.items()}
    of = next(iter(parts.values())).of
    for folder, document in read.items():
        if document.get("key") != first.get("key") or parts[folder].of != of:
            problems.append(f"{folder}: part {parts[folder]} of another call: other inputs, options or parts")
        elif document.get("arithmetic") != first.get("arithmetic"):
            problems.append(f"{folder}: computed by {document.get('arithmetic')}, others by {first.get('arithmetic')}")
    there = {part.number for part in parts.values()}
    problems += [f"part {Part(number, of)} is missing" for number in range(1, of + 1) if number not in there]
    if problems:
        raise BadFile(f"{output}: {counted(len(problems), 'part')} cannot be taken", problems)
    return first
