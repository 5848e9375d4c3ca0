"""A verb whose work several processes share: --workers, and --part for one of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from loratools.cli._show import Report, fields, plain
from loratools.errors import counted
from loratools.parallel import Progress


def crew(
    verb: str, arguments: Mapping[str, Any], workers: str | None, progress: Progress
) -> AbstractContextManager[None]:
    """Return a context in which a verb shares its work with workers, if there are any: nothing is imported else."""
    if workers is None:
        return nullcontext()
    from loratools.surgery import sharing

    return sharing.crew(verb, arguments, workers, progress)


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
