"""loratools run"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._group import command as make
from loratools.cli._talk import Talk, pass_talk

if TYPE_CHECKING:
    from loratools.recipe.run import RecipeReport, StepReport


@make(section="Change")
@click.argument("recipe", type=options.PATH)
@options.option("--input", "inputs", type=str, multiple=True)
@options.option("--search", type=options.PATH)
@options.option("--folder", type=options.PATH, more="[default: the recipe's]")
@options.option("--allow-outside", is_flag=True)
@options.dry_run_option
@options.option("--force", is_flag=True, more="Every step is made.")
@pass_talk
def command(
    talk: Talk, /, recipe: Path, inputs: tuple[str, ...], search: Path | None, folder: Path | None, dry_run: bool,
    force: bool, allow_outside: bool,
) -> show.Report:  # fmt: skip
    """Make what a recipe says: several commands, one after the other, and only what is not up to date.

    A recipe is YAML with inputs (names for what exists) and steps (a command each, with the long names of its options
    as keys). Where an option takes an adapter or a model, the name of an input or of an earlier step stands for it. A
    step is made again if its options, the files of its inputs, its output, or the versions that bytes depend on are
    not those noted beside its output. mergekit's YAML for adapters is read too. RECIPE
    can be -, for what is piped in, as `loratools recipe OUTPUT` prints it. It takes loratools[run].

    \b
    Examples:
      loratools run recipe.yaml --dry-run
      loratools run recipe.yaml
      loratools run recipe.yaml --input style=other --folder restyled
    """
    from loratools.cli._recipes import run_recipe

    named = dict(_split(each) for each in inputs)

    def told(step: StepReport) -> None:
        talk.tell(*_lines(step))

    report = run_recipe(
        recipe, inputs=named, search=search, folder=folder, dry_run=dry_run, force=force,
        allow_outside=allow_outside, talk=talk, told=told,
    )  # fmt: skip
    failed = next((step for step in report.steps if step.error), None)
    if failed and failed.error and not talk.json:
        error = failed.error
        talk.error(type(error).__name__, f"step {failed.step}: {error.message}", error.problems, error.hint)
    return show.Report(document(report), list(_table(report)), report.ok)


def document(report: RecipeReport) -> dict[str, Any]:
    """Return a run as data: every step with what became of it, and the document of its command."""
    plain: dict[str, Any] = show.plain(report)
    for step, each in zip(plain["steps"], report.steps, strict=True):
        error = each.error
        step["error"] = error and {
            "type": type(error).__name__, "message": error.message, "problems": list(error.problems),
            "hint": error.hint,
        }  # fmt: skip
        step["result"] = show.plain(each.result)
        del step["lines"]
    return plain


def _split(text: str) -> tuple[str, str]:
    name, sign, place = text.partition("=")
    if not (name and sign and place):
        raise click.UsageError(f"--input: expected NAME=PATH, found {text!r}")
    return name, place


def _lines(step: StepReport) -> Iterator[str]:
    """Yield what a step did, as it is done."""
    yield f"{step.step}: {step.command}, {step.state}{f' ({step.why})' if step.why else ''}"
    yield from (f"  {line}" for line in step.lines)


def _table(report: RecipeReport) -> Iterator[str]:
    rows = [(step.step, step.command, str(step.state), step.output or "", step.why) for step in report.steps]
    rows += [(name, "", "not reached", "", "") for name in report.left]
    yield from show.table(("step", "command", "state", "output", "why"), rows)
