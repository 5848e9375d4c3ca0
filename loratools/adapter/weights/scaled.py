"""An adapter with a weight for each of its modules taken into their scalings, for a merge."""

from __future__ import annotations

from dataclasses import replace

from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.adapter.weights import Weight, example
from loratools.decisions import warned
from loratools.errors import LoraToolsError, UnsupportedAdapter, counted


def scaled(adapter: Adapter, words: str, name: str) -> Adapter:
    """Return an adapter, called `name`, with each module's scaling times the weight that `words` give it.

    A module with weight 0 is left out, with a warning. Raises `LoraToolsError` for patterns that name no module and for
    a list that is not for the model's blocks, `UnsupportedAdapter` with every module whose change no weight scales.
    """
    weight = Weight.parse(words).bound(adapter, name)
    if unmatched := weight.unmatched([*adapter.updates, *adapter.replacements]):
        shown = example(adapter.updates)
        problems = [f"{name}: {pattern} names none of its modules{shown}" for pattern in unmatched]
        raise LoraToolsError(
            f"{counted(len(unmatched), 'weight or pattern is', 'weights or patterns are')} for nothing", problems
        )
    updates: dict[str, Update] = {}
    refused, out = [], [path for path in adapter.replacements if weight.of(path) == 0]
    for module, update in adapter.updates.items():
        number = weight.of(module)
        made = update if number == 1 else update.weighted(number)
        if number == 0:
            out.append(module)
        elif made is None:
            refused.append(f"{module}: kind {update.kind} with weight {number:g}")
        else:
            updates[module] = made
    whole = {path: lazy for path, lazy in adapter.replacements.items() if path not in out}
    refused += [f"{path}: a tensor trained whole, with weight {weight.of(path):g}" for path in whole
                if weight.of(path) != 1]  # fmt: skip
    if refused:
        raise UnsupportedAdapter(
            f"{name}: no weight but 0 and 1 can be given to {counted(len(refused), 'change')}", refused,
            hint="One number for the whole adapter is taken by every kind.",
        )  # fmt: skip
    if out:
        warned("%s: left out, with weight 0: %s, the first is %s", name, counted(len(out), "module"), out[0])
    return replace(adapter, updates=updates, replacements=whole)
