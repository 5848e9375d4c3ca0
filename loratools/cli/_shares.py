"""A verb whose work several processes share: --workers, and --part for one of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from loratools.cli._show import Report, fields, plain, size
from loratools.errors import counted

if TYPE_CHECKING:
    from loratools.parallel import Progress
    from loratools.parallel.call import Call


def crew(
    verb: str, arguments: Mapping[str, Any], workers: str | None, progress: Progress
) -> AbstractContextManager[None]:
    """Return a context in which a verb shares its work with workers, if there are any: nothing is imported else."""
    if workers is None:
        return nullcontext()
    from loratools.surgery import sharing

    return sharing.crew(verb, arguments, workers, progress)


def files_shared(call: Call, workers: str, progress: Progress) -> Any:
    """Have the files of an output written by workers; return what the verb returns."""
    from loratools.surgery.merge.shared import merge_shared

    return merge_shared(call, workers, progress=progress)


def files_of(call: Call, part: str) -> Report:
    """Write one part of the files of an output, and say which they are."""
    from loratools.surgery.merge.parts import merge_part

    report = merge_part(call, part)
    text = fields(
        ("part", report.part),
        ("wrote", [*report.files] or "nothing: there are more parts than files"),
        ("kept", [*report.kept] or None),
        ("size", size(report.nbytes)),
        ("next", f"loratools gather {call.arguments['output']}, when all {report.part.partition('/')[2]} are done"),
    )
    return Report(plain(report), text)


def part_of(verb: str, arguments: Mapping[str, Any], part: str) -> Report:
    """Do one part of a verb's tensors, and say what is next."""
    from loratools.surgery.sharing import call_of, write_part

    written = write_part(call_of(verb, arguments), part)
    text = fields(
        ("part", written.part),
        ("did", counted(written.items, "tensor")),
        ("next", f"loratools gather {arguments['output']}, when all {written.part.partition('/')[2]} are done"),
    )
    return Report(plain(written), text)
