"""The inputs of a combination: adapters, open, with a name for messages, a weight for each module and a digest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.errors import IncompatibleAdapter, InvalidOption
from loratools.format.digest import checked_digest
from loratools.surgery.combine.weights import Weight
from loratools.surgery.inputs import AdapterSource


@dataclass(frozen=True, slots=True, eq=False)
class Input:
    """One adapter, open."""

    adapter: Adapter
    name: str
    weight: Weight
    digest: str


def open_inputs(
    adapters: Sequence[AdapterSource],
    weights: Sequence[float | str | Weight] | None,
    initial: AdapterSource | None,
    method: str,
) -> tuple[Input, ...]:
    """Open the adapters, with a weight each (1 where None); an `initial` one comes last, with the negated weight.

    Raises `InvalidOption` unless each adapter has one weight, and what opening raises.
    """
    parsed = [
        weight if isinstance(weight, Weight) else Weight.parse(weight) for weight in weights or [1.0] * len(adapters)
    ]
    if not adapters or len(parsed) != len(adapters):
        raise InvalidOption(f"{len(adapters)} adapter(s) and {len(parsed)} weight(s); each adapter takes one weight")
    sources = list(adapters)
    if initial is not None:
        if len(adapters) > 1 or method != "linear":
            raise InvalidOption("an initial adapter is taken away from one adapter, with method linear")
        sources, parsed = [*sources, initial], [parsed[0], parsed[0].negated()]
    opened = [
        source if isinstance(source, Adapter) else dialects.open_adapter(source, initial=initial is not None)
        for source in sources
    ]
    if initial is not None:
        opened[1] = _starting_point(*opened)
    names = [f"adapter {i + 1}" if isinstance(source, Adapter) else str(source) for i, source in enumerate(sources)]
    return tuple(
        Input(adapter, name, weight, checked_digest(adapter, name))
        for adapter, name, weight in zip(opened, names, parsed, strict=True)
    )


def _starting_point(trained: Adapter, initial: Adapter) -> Adapter:
    """Return the updates of an initial adapter; raise `IncompatibleAdapter` unless it is of the same modules."""
    if other := sorted(trained.updates.keys() ^ initial.updates.keys()):
        raise IncompatibleAdapter(
            "the initial adapter is not that of the trained one: they have different modules",
            [f"{module}: only in the {'trained' if module in trained.updates else 'initial'} one" for module in other],
        )
    return Adapter(initial.updates, base=initial.base, dialect=initial.dialect, settings=initial.settings)
