"""Make what a recipe says, in order: only what is not up to date, and nothing after the first step that fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loratools.decisions import warned
from loratools.errors import BadFile, InvalidOption, LoraToolsError, OutputRefused, counted
from loratools.parallel import cores
from loratools.recipe import identity, made
from loratools.recipe.bind import Bound, bind
from loratools.recipe.catalog import Catalog
from loratools.recipe.read import read
from loratools.recipe.value import Recipe, Step
from loratools.storage.atomic.inputs import afresh
from loratools.storage.sources import is_reference, known_as, local

State = Literal["made", "checked", "up to date", "planned", "failed"]


@dataclass(frozen=True, slots=True)
class StepReport:
    """What became of a step: `why` it was made, or would be; `result` is the document of its command.

    `digest` and `files` are those of its output: of its tensors, and of all its files. `error` says why it failed.
    """

    step: str
    command: str
    state: State
    output: str | None
    why: str
    result: Mapping[str, Any] | None = None
    lines: tuple[str, ...] = ()
    digest: str | None = None
    files: str | None = None
    error: LoraToolsError | None = None


@dataclass(frozen=True, slots=True)
class RecipeReport:
    """What became of every step that was reached, in order; `inputs` are the places of the recipe's inputs."""

    recipe: str
    dry_run: bool
    inputs: Mapping[str, str]
    steps: tuple[StepReport, ...]
    left: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no step failed."""
        return all(step.state != "failed" for step in self.steps)


@dataclass(slots=True)
class _Run:
    """One run of a recipe. `outputs` maps steps to where their results are, `digests` paths to what lies there."""

    recipe: Recipe
    catalog: Catalog
    bound: Mapping[str, Bound]
    folder: Path
    force: bool
    outside: bool
    by: Mapping[str, str] = field(default_factory=made.decides)
    outputs: dict[str, Path] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)

    def place(self, step: Step) -> Path | None:
        """Return where the result of a step goes."""
        return None if step.output is None else self.folder / step.output

    def text(self, used: str) -> str:
        """Return what a command is given for a name of the recipe, or for a place that a step says itself."""
        if used in self.outputs:
            return str(self.outputs[used])
        if used in self.bound:
            return self.bound[used].text
        return used if is_reference(used) else str(self.recipe.path.parent / used)

    def arguments(self, step: Step, output: Path | None, *, dry_run: bool = False, replace: bool = False) -> list[str]:
        """Return the command line of a step."""
        given: list[str] = []
        positional: dict[str, list[str]] = {}
        for name, value in step.values.items():
            key = step.command.keys[name]
            if isinstance(value, bool):
                given += [f"--{name}"] if value else [f"--no-{name}"] if key.takes == "switch" else []
                continue
            texts = [self.text(each) if key.role else each for each in value]
            if key.positional:
                positional[name] = texts
            else:
                given += [f"--{name}={each}" for each in texts]
        given += [f"--output={output}"] if output is not None else []
        given += ["--dry-run"] if dry_run else []
        given += ["--force"] if replace and step.command.forces else []
        order = [name for name, key in step.command.keys.items() if key.positional]
        return [*given, "--", *(each for name in order for each in positional.get(name, ()))]

    def now(self, step: Step) -> dict[str, Any]:
        """Return what decides the result of a step: options as written, inputs by the digest of their files."""
        options = {
            name: value if isinstance(value, bool) else list(value)
            for name, value in sorted(step.values.items())
            if not step.command.keys[name].role and step.command.keys[name].recorded
        }
        inputs: dict[str, list[str]] = {}
        for name, used in step.inputs():
            inputs.setdefault(name, []).append(self.digest(self.text(used)))
        by = dict(self.by) | ({"threads": _threads(step)} if step.command.name == "extract-svd" else {})
        return {"step": step.name, "command": step.command.name, "options": options, "inputs": inputs, "by": by}

    def digest(self, place: str) -> str:
        """Return the digest of all files of an input."""
        if place not in self.digests:
            with afresh():
                self.digests[place] = identity.files_of(local(place) if is_reference(place) else Path(place))
        return self.digests[place]

    def why(self, step: Step, output: Path | None, now: Mapping[str, Any]) -> str | None:
        """Return why a step is to be done; None where it is up to date."""
        if self.force:
            return "--force"
        if output is None:
            return made.differs(made.read(self.folder / f"{step.name}.check"), now)
        if not output.exists():
            return "new"
        before = made.read(output)
        if reason := made.differs(before, now):
            return reason
        assert before is not None
        with afresh():  # it is replaced if it is not what was made
            files = identity.files_of(output)
        if files != before.get("output"):
            return "the output is not what was made"
        self.digests[str(output)] = files
        return None

    def refuse(self, step: Step) -> None:
        """Raise `OutputRefused` for an output without a recipe's record, or that lies elsewhere by a link."""
        if (output := self.place(step)) is None:
            return
        if output.exists() and not self.force and made.read(output) is None:
            what = "no recipe made it here: the record that a run of a recipe leaves beside its output is not there"
            hint = "Replace it with --force, or make the recipe's outputs elsewhere with --folder."
            raise OutputRefused(f"{output} exists, and {what}", hint=hint)
        root = self.folder.resolve()
        if not self.outside and root not in (parent := output.parent.resolve()).parents and root != parent:
            raise OutputRefused(f"{output} lies outside of {self.folder}, by a link", hint="See --allow-outside.")


def run(
    path: Path, catalog: Catalog, *, inputs: Mapping[str, str] | None = None, search: Path | None = None,
    folder: Path | None = None, dry_run: bool = False, force: bool = False, outside: bool = False,
    told: Callable[[StepReport], None] = lambda report: None,
) -> RecipeReport:  # fmt: skip
    """Do what a recipe says; `run_recipe` explains the parameters, `told` hears of each step when it is done.

    A step that fails is the last of the report, with its error. Raises what is wrong before the first step.
    """
    recipe = read(path, catalog, outside=outside)
    if folder is not None and not folder.is_dir():
        if folder.exists() or not folder.absolute().parent.is_dir():
            raise BadFile(f"{folder}: no such folder for outputs")
        if not dry_run:
            folder.mkdir()
    folder = path.parent if folder is None else folder
    bound = bind(recipe, inputs or {}, search, fetch=not dry_run)
    task = _Run(recipe, catalog, bound, folder, force, outside)
    task.outputs = {step.name: place for step in recipe.steps if (place := task.place(step)) is not None}
    problems = list[str]()
    refused = list[str]()
    for step in recipe.steps:
        try:
            catalog.check(step.command.name, task.arguments(step, task.place(step)))
            task.refuse(step)
        except LoraToolsError as error:
            (problems if isinstance(error, InvalidOption) else refused).append(f"step {step.name}: {error.line}")
    if refused:
        raise OutputRefused(
            f"{recipe.path}: {counted(len(refused), 'output is', 'outputs are')} refused", refused,
            hint="Choose another --folder, or replace what is there with --force.",
        )  # fmt: skip
    if problems:
        raise InvalidOption(
            f"{recipe.path}: {counted(len(problems), 'step says', 'steps say')} what cannot be", problems
        )
    reports: list[StepReport] = []
    places = {name: each.text for name, each in bound.items()}
    for number, step in enumerate(recipe.steps):
        try:
            report = _plan(task, step) if dry_run else _make(task, step)
        except LoraToolsError as error:
            output = task.place(step)
            reports.append(
                StepReport(step.name, step.command.name, "failed", str(output) if output else None, "", error=error)
            )
            told(reports[-1])
            left = tuple(each.name for each in recipe.steps[number + 1 :])
            return RecipeReport(str(path), dry_run, places, tuple(reports), left, recipe.notes)
        reports.append(report)
        told(report)
    return RecipeReport(str(path), dry_run, places, tuple(reports), notes=recipe.notes)


def _plan(task: _Run, step: Step) -> StepReport:
    """Return what would become of a step; where an input is still to be made, the command cannot be asked."""
    output = task.place(step)
    waiting = sorted({used for _, used in step.inputs() if used in task.absent})
    where = str(output) if output else None
    if waiting:
        task.absent.add(step.name)
        why = f"after {', '.join(waiting)}, which will be made first"
        return StepReport(step.name, step.command.name, "planned", where, why)
    fetched = not any(is_reference(task.text(used)) for _, used in step.inputs())
    reason = task.why(step, output, task.now(step)) if fetched else "its inputs are on the Hub"
    if reason is None:
        return StepReport(step.name, step.command.name, "up to date", where, "")
    task.absent.add(step.name)
    plan = None
    lines: tuple[str, ...] = ()
    if step.command.plans and (output is None or output.parent.is_dir()):
        result = task.catalog.run(
            step.command.name,
            task.arguments(step, output, dry_run=True, replace=output is not None and output.exists()),
        )
        plan, lines = result.document, result.lines
    return StepReport(step.name, step.command.name, "planned", where, reason, plan, lines)


def _make(task: _Run, step: Step) -> StepReport:
    """Do a step unless it is up to date; check its result against the recipe, and note how it was made."""
    output = task.place(step)
    now = task.now(step)
    why = task.why(step, output, now)
    where = str(output) if output else None
    if why is None:
        files = task.digests[str(output)] if output else None
        return StepReport(step.name, step.command.name, "up to date", where, "", files=files)
    replace = False
    if output is not None:
        task.refuse(step)
        replace = output.exists()
        output.parent.mkdir(parents=True, exist_ok=True)
        task.digests.pop(str(output), None)
    with afresh(), known_as(_on_the_hub(task, step)):
        result = task.catalog.run(step.command.name, task.arguments(step, output, replace=replace))
    if not result.ok:
        raise LoraToolsError(f"{step.command.name} says no", list(result.lines))
    if output is None:
        made.write(task.folder / f"{step.name}.check", now)
        return StepReport(step.name, step.command.name, "checked", where, why, result.document, result.lines)
    with afresh():
        digest, files = identity.tensors_of(output), identity.files_of(output)
    _check(step, output, digest, files)
    made.write(output, {**now, "output": files})
    task.digests[str(output)] = files
    return StepReport(
        step.name, step.command.name, "made", where, why, result.document, result.lines, digest, files
    )  # fmt: skip


def _on_the_hub(task: _Run, step: Step) -> dict[str, str]:
    """Return which inputs of a step are those of the Hub that the recipe names by digest, though they lie elsewhere."""
    places: dict[str, str] = {}
    for _, used in step.inputs():
        source, at = task.recipe.sources.get(used), task.bound.get(used)
        named = source and source.location and (source.digest or source.schema)
        if source and named and at and at.path and is_reference(source.location) and not is_reference(at.text):
            places[str(at.path.absolute())] = str(source.location)
    return places


def _check(step: Step, output: Path, digest: str | None, files: str) -> None:
    """Raise `BadFile` where an output is not the one that the recipe was made from."""
    if step.digest is not None and digest != step.digest:
        raise BadFile(
            f"{output}: its tensors are not those that the recipe names: digest {digest}, expected {step.digest}",
            hint="Another version of loratools or torch, another processor, or another input made it.",
        )
    if step.files is not None and files != step.files:
        warned(
            "%s: its tensors are those that the recipe names, and its files are not all, byte for byte: a file beside "
            "an input differs, or another version of loratools wrote the record", output,
        )  # fmt: skip


def _threads(step: Step) -> str:
    """Return the number of threads of a step, where the last bits depend on it."""
    stated = step.values.get("threads")
    return stated[0] if isinstance(stated, tuple) else str(cores())
