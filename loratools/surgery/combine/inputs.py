"""The inputs of a combination: adapters, open, and side by side: which of their modules are one module.

Each has a name for messages, a weight for each module, and a digest. What keeps them from being added up is told here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from loratools import dialects
from loratools.adapter import low_rank
from loratools.adapter.gathered import gathered, under_one_naming
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.adapter.naming.stacked import nested
from loratools.adapter.naming.wrappers import normalized
from loratools.adapter.weights import Weight, example
from loratools.errors import IncompatibleAdapter, InvalidOption, LoraToolsError, UnsupportedAdapter, counted
from loratools.format.digest import checked_digest
from loratools.storage.sources import is_reference
from loratools.surgery.inputs import AdapterSource, names_of

_SEAL = "`loratools convert ADAPTER -o OUTPUT --base BASE` writes each as its base has it; then combine these."


@dataclass(frozen=True, slots=True, eq=False)
class Input:
    """One adapter, open."""

    adapter: Adapter
    name: str
    weight: Weight
    digest: str


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One adapter's update of a module; `adapter` is its number from 0."""

    adapter: int
    update: Update


@dataclass(frozen=True, slots=True, eq=False)
class Aligned:
    """The modules of all adapters by one name each, and each adapter's own names -> that one, for modules and paths.

    Of a stack of experts the name is its parameter's, for PEFT's name of a wrapper depends on what else is wrapped.
    """

    modules: Mapping[str, tuple[Member, ...]]
    renamed: tuple[Mapping[str, str], ...]

    def path(self, adapter: int, parameter: str) -> str:
        """Return the common path of an adapter's parameter: that of its module, where it has an update."""
        module, _, last = parameter.rpartition(".")
        common = self.renamed[adapter].get(module)
        return f"{common}.{last}" if common and not self.modules[common][0].update.members else parameter

    def for_peft(self, kept: Collection[str]) -> Aligned:
        """Return the same with stacks under the names that PEFT gives their wrappers in an adapter of the `kept`."""
        stacks: dict[str, list[str]] = {}
        for path in kept:
            if (last := self.modules[path][0].update.path("")) and path.endswith(last):
                stacks.setdefault(path.removesuffix(last), []).append(last[1:])
        names = {f"{module}.{p}": name for module, own in stacks.items() for p, name in nested(module, own).items()}
        return Aligned(
            {names.get(path, path): members for path, members in self.modules.items()},
            tuple({own: names.get(path, path) for own, path in each.items()} for each in self.renamed),
        )


def open_inputs(
    adapters: Sequence[AdapterSource], weights: Sequence[float | str | Weight] | None, initial: AdapterSource | None,
    method: str,
) -> tuple[Input, ...]:  # fmt: skip
    """Open the adapters, with a weight each (1 where None); an `initial` one comes last, with the negated weight.

    Raises `InvalidOption` unless each adapter has one weight, and what opening raises.
    """
    parsed = [
        weight if isinstance(weight, Weight) else Weight.parse(weight) for weight in weights or [1.0] * len(adapters)
    ]
    if not adapters or len(parsed) != len(adapters):
        raise InvalidOption(
            f"{counted(len(adapters), 'adapter')} and {counted(len(parsed), 'weight')}; each adapter takes one weight"
        )
    sources = list(adapters)
    if initial is not None:
        if len(adapters) > 1 or method != "linear":
            raise InvalidOption("an initial adapter is taken away from one adapter, with method linear")
        sources, parsed = [*sources, initial], [parsed[0], parsed[0].negated()]
    opened = [dialects.open_adapter(source, initial=initial is not None) for source in sources]
    if initial is not None:
        opened[1] = _starting_point(*opened)
    names, given = names_of(sources), opened
    opened = under_one_naming(opened)
    parsed = [weight.bound(*each) for weight, each in zip(parsed, zip(opened, names, strict=True), strict=True)]
    digests = [checked_digest(adapter, name) for adapter, name in zip(given, names, strict=True)]
    try:
        opened = gathered(opened)
    except ValueError as error:
        raise IncompatibleAdapter("the adapters have the same experts in two ways", [str(error)]) from None
    return tuple(Input(*each) for each in zip(opened, names, parsed, digests, strict=True))


def align(inputs: Sequence[Input]) -> Aligned:
    """Put the updates of several adapters together, module by module.

    Modules are one where their names are, up to wrappers in front (`model.`, `base_model.`); the first adapter's name
    counts. Raises `UnsupportedAdapter` with every module whose update is no product, `IncompatibleAdapter` with every
    module whose updates differ in kind or shape, `LoraToolsError` with every pattern of a weight that names no module.
    """
    _refuse(inputs)
    modules: dict[str, list[Member]] = {}
    renamed: list[dict[str, str]] = []
    turned: list[str] = []
    bare_names: dict[str, str] = {}
    for number, each in enumerate(inputs):
        known = Counter(bare_names[path] for path in modules)
        by_normalized = {bare_names[path]: path for path in modules if known[bare_names[path]] == 1}
        paths = {module: update.path(module) for module, update in each.adapter.updates.items()}
        bare_names |= {path: normalized(path) for path in paths.values() if path not in bare_names}
        own = Counter(bare_names[path] for path in paths.values())
        common = {}
        for module, update in each.adapter.updates.items():
            path = paths[module]
            bare = bare_names[path]
            alone = path not in modules and own[bare] == 1
            common[module] = by_normalized.get(bare, path) if alone else path
            members = modules.setdefault(common[module], [])
            try:
                members.append(Member(number, low_rank.alike(members[0].update, update) if members else update))
            except ValueError as error:
                turned.append(f"{each.name}: {path}: {error}")
        renamed.append(common)
    if turned:
        raise IncompatibleAdapter(f"{counted(len(turned), 'stack')} of experts may lie in two ways", turned, hint=_SEAL)
    _refuse_differences([each.name for each in inputs], modules)
    unmatched = [
        f"{each.name}: {pattern} names none of its modules{example(common.values())}"
        for each, common in zip(inputs, renamed, strict=True)
        for pattern in each.weight.unmatched([*common.values(), *each.adapter.replacements])
    ]
    if unmatched:
        raise LoraToolsError(
            f"{counted(len(unmatched), 'weight or pattern is', 'weights or patterns are')} for nothing", unmatched
        )
    return Aligned({module: tuple(members) for module, members in modules.items()}, tuple(renamed))


def _refuse_differences(names: Sequence[str], modules: Mapping[str, Sequence[Member]]) -> None:
    problems = []
    for module, (first, *others) in modules.items():
        for other in others:
            kinds, shapes = (first.update.kind, other.update.kind), (first.update.shape, other.update.shape)
            what, (old, new) = ("shape", shapes) if kinds[0] == kinds[1] else ("kind", kinds)
            if old != new:
                problems.append(f"{module}: {what} {old} in {names[first.adapter]}, {new} in {names[other.adapter]}")
    if problems:
        raise IncompatibleAdapter(
            f"the adapters differ in {counted(len(problems), 'module')} that they share", problems
        )


def _starting_point(trained: Adapter, initial: Adapter) -> Adapter:
    """Return the updates of an initial adapter; raise `IncompatibleAdapter` unless it is of the same modules."""
    if other := sorted(trained.updates.keys() ^ initial.updates.keys()):
        raise IncompatibleAdapter(
            "the initial adapter is not that of the trained one: they have different modules",
            [f"{module}: only in the {'trained' if module in trained.updates else 'initial'} one" for module in other],
        )
    return Adapter(initial.updates, base=initial.base, dialect=initial.dialect, settings=initial.settings)


def _refuse(inputs: Sequence[Input]) -> None:
    """Raise `UnsupportedAdapter` where updates are no products: each reason of an input once, with its modules."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in inputs:
        for module, update in each.adapter.updates.items():
            if reason := low_rank.refusal(update):
                reasons.setdefault((each.name, reason), []).append(module)
    if not reasons:
        return
    count = sum(map(len, reasons.values()))
    problems = [
        f"{name}: {modules[0]}{f' and {len(modules) - 1} more' if modules[1:] else ''}: {reason}"
        for (name, reason), modules in reasons.items()
    ]
    name = next(iter(reasons))[0]
    refused = [
        update
        for each in inputs
        if each.name == name
        for whole in each.adapter.updates.values()
        for update in (whole.members or (whole,))
        if low_rank.refusal(update)
    ]
    base = " --base BASE" if any(update.unsettled or not update.additive for update in refused) else ""
    given = "needs the base model" if base else "needs no base model"
    known = Path(name).exists() or is_reference(name)  # else it came open
    made = f"{Path(name).name.removesuffix('.safetensors')}-lora"
    source, output = (quote(name), quote(made)) if known else ("ADAPTER", "OUTPUT")
    hint = (
        f"Make a LoRA of it first, which {given}: loratools convert {source} -o {output} --to-lora "
        f"--rank 16{base}. Or merge such an adapter into its base model instead."
    )
    raise UnsupportedAdapter(
        f"{counted(count, 'module')} cannot be combined or resized in factor space", problems, hint=hint
    )
