"""Recipes from Python: `loratools.run_recipe` and `loratools.recipe_of`, which know the commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from loratools.cli._catalog import catalog_of
from loratools.cli._talk import Talk
from loratools.options import Options
from loratools.recipe import chain
from loratools.recipe import run as runs
from loratools.recipe.chain import RecipeOf
from loratools.recipe.run import RecipeReport, StepReport
from loratools.storage.sources import Location, local, session


@session()
def run_recipe(
    recipe: Location,
    *,
    inputs: Mapping[str, Location] | None = None,
    search: Location | None = None,
    folder: Location | None = None,
    dry_run: bool = False,
    force: bool = False,
    allow_outside: bool = False,
    told: Callable[[StepReport], None] | None = None,
    talk: Talk | None = None,
) -> RecipeReport:
    """Make what a recipe says, in order: only what is not up to date, and nothing after the first step that fails.

    A step is up to date where the command, its options, the digests of all files of its inputs, the versions that bytes
    depend on, and the digest of the output's own files are those that were written beside the output when it was made.

    Args:
        recipe: A file of YAML with `inputs` and `steps`, or one of mergekit; "-" is what is piped in.
        inputs: Where inputs of the recipe are, by their names; an input that the recipe names by digest must have it.
            Default: where the recipe says.
        search: A folder in which inputs that are nowhere else are found by their digests. Default: none.
        folder: Where the outputs go. Default: the folder of the recipe.
        dry_run: Whether to plan every step, by the plan of its command where it has one, and to make nothing. Default:
            no.
        force: Whether to make every step, and to replace outputs that no recipe made. Default: no.
        allow_outside: Whether outputs may be absolute paths, and lie outside of `folder`: a recipe of a stranger could
            write anywhere then. Default: no.
        told: Called with the report of each step when it is done. Default: nobody is told.
        talk: How the commands show their progress. Default: they show none.

    Returns:
        What became of each step that was reached: made, up to date, planned or failed, with the document of its
        command, and the digests of its output. The last one has the `error` where it failed.

    Raises:
        InvalidOption: The recipe says what cannot be; every problem is listed, with its line and the nearest name.
        BadFile: It is no YAML, an input is nowhere, or another one than the recipe names by digest.
        MissingExtra: pyyaml is not installed.

    Example:
        >>> [step.state for step in run_recipe("recipe.yaml").steps]
        ['made', 'made']
    """
    checked = Options().flag("dry_run", dry_run).flag("force", force).flag("allow_outside", allow_outside)
    if not isinstance(inputs, Mapping | None):
        checked.problems.append(f"inputs is {inputs!r}; it can be a mapping of names to paths, or None")
    checked.done()
    return runs.run(
        local(recipe), catalog_of(talk), inputs={name: str(place) for name, place in (inputs or {}).items()},
        search=None if search is None else Path(search), folder=None if folder is None else Path(folder),
        dry_run=dry_run, force=force, outside=allow_outside, told=told or (lambda report: None),
    )  # fmt: skip


@session()
def recipe_of(output: Location, *, last: bool = False) -> RecipeOf:
    """Return the recipe that the record of an output tells: its command, options, and inputs by digest.

    Where an input has a record of its own, the steps that made it come first.

    Args:
        output: What a command of loratools wrote: a folder, a file, or an `hf://` reference.
        last: Whether to return the last step alone, with what it took in as inputs. Default: no, all steps.

    Returns:
        The recipe as data, and as YAML that `run_recipe` reads; it holds the digests of the inputs and of the output.

    Raises:
        LoraToolsError: The output has no record of how it was made.
        BadFile: There is no such output.

    Example:
        >>> recipe_of("merged").recipe["steps"]["merge"]["dtype"]
        'bf16'
    """
    Options().flag("last", last).done()
    return chain.recipe_of(local(output), catalog_of(), last=last)
