"""loratools validate"""

from __future__ import annotations

from collections.abc import Iterator
from shlex import quote
from typing import TYPE_CHECKING

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._group import command as make
from loratools.cli._show import Report
from loratools.cli._talk import Talk, pass_talk
from loratools.cli._words import UNSEALED
from loratools.errors import counted

_UNSEALED = "L-03"
"""The clause of what has no manifest: an adapter of another dialect, which nothing is wrong with."""
_NOT_SEALED = "not sealed in this format"

if TYPE_CHECKING:
    from loratools.storage.checkpoint import Checkpoint
    from loratools.surgery.validate import Validation


@make(section="Check", each="adapter")
@click.argument("adapter", type=options.INPUT)
@options.option("--base", type=options.INPUT, more="It is compared with the adapter's base hash.")
@options.option("--header-only", is_flag=True)
@options.threads_option
@pass_talk
def command(talk: Talk, adapter: str, base: str | None, header_only: bool, threads: int | None) -> Report:
    """Check an adapter against the loratools format, clause by clause.

    ADAPTER is a safetensors file or a folder. Every problem is printed with the clause of the specification that it
    breaks (spec/v1), and the exit code is 1 if there is any. An adapter of another dialect is not valid until it is
    sealed: loratools convert ADAPTER -o SEALED --to loratools --base BASE.

    \b
    Examples:
      loratools validate sealed
      loratools validate sealed --base base
      loratools validate sealed/adapter_model.safetensors --header-only --json
      loratools validate sealed sealed/adapter_model.safetensors -j 2
    """
    from loratools.surgery.validate import validate

    model = _opened(base) if base else None
    with talk.progress("hashing the base", model.nbytes if model else 0) as advance:
        validation = validate(adapter, model, data=not header_only, threads=threads, progress=advance)
    report = validation.report
    document = {
        "path": adapter, "valid": validation.valid, "sealed": validation.sealed,
        "format_version": report.format_version, "problems": report.problems, "clauses": report.clauses,
        "base": None if base is None else {"path": base, "differences": validation.differences},
    }  # fmt: skip
    return Report(document, _lines(adapter, base, validation), ok=validation.valid, line=_in_a_line(validation))


def _opened(base: str) -> Checkpoint:
    from loratools.storage.checkpoint import Checkpoint

    return Checkpoint.open(base)


def _unsealed(validation: Validation) -> bool:
    return [problem.clause for problem in validation.report.problems] == [_UNSEALED]


def _in_a_line(validation: Validation) -> str:
    report = validation.report
    if broken := [*map(str, report.problems), *(f"[base] {each}" for each in validation.differences or ())]:
        if _unsealed(validation):
            return f"{_NOT_SEALED}: it has no loratools manifest [{_UNSEALED}]"
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        return f"not valid: {broken[0]}{more}"
    base = "" if validation.differences is None else ", sealed with this base"
    base = base if validation.sealed else ", no base hash"
    modules, clauses = counted(report.modules, "module"), counted(len(report.clauses), "clause")
    return f"valid, format {report.format_version}, {modules}, {clauses}{base}"


def _lines(adapter: str, base: str | None, validation: Validation) -> Iterator[str]:
    report = validation.report
    yield from show.counted(map(str, report.problems))
    for difference in validation.differences or ():
        yield f"[base] {difference}"
    if report.problems:
        seal = f"{_NOT_SEALED}; to seal it: loratools convert {quote(adapter)} -o OUTPUT"
        broken = f"not valid: {counted(len(report.problems), 'problem')}"
        yield f"{adapter}: {seal if _unsealed(validation) else broken}"
        return
    yield (
        f"{adapter}: valid, format {report.format_version}: {counted(report.modules, 'module')}, "
        f"{counted(report.tensors, 'tensor')}, {counted(len(report.clauses), 'clause')} checked"
    )
    if not base and not validation.sealed:
        yield f"{adapter}: no base hash, {UNSEALED}"
    if base and validation.differences is not None:
        yield f"{base}: {'not ' if validation.differences else ''}the base model that the adapter was sealed with"
