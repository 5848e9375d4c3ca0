"""What became of every tensor of the adapters: none is left over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.adapter.model import AdapterInput
from loratools.errors import IncompatibleAdapter

if TYPE_CHECKING:
    from loratools.engine.plan import MergePlan


@dataclass(frozen=True, slots=True)
class Account:
    """What became of the tensors of one adapter; `tensors` is the sum of the other three.

    `applied` are parts of updates, `replaced` took the place of a tensor or were added, `passed_over` are copies of the
    base's own tensors, and a tied head's copy of the embedding.
    """

    tensors: int
    applied: int
    replaced: int
    passed_over: int


def accounts(plan: MergePlan, inputs: Sequence[AdapterInput]) -> list[Account]:
    """Return what became of every tensor of the adapters, which are as they were opened, with copies and all.

    Raises `IncompatibleAdapter` if a part of an update has no place in the plan: nothing is dropped in silence.
    """
    every, problems = [], []
    for i, each in enumerate(inputs):
        placed: set[tuple[str, str]] = set()
        for change in plan.changes.values():
            for j, placement in change.placements:
                update = placement.update
                if j == i:
                    own = update.parts.keys() - ({"lora_B.bias"} if update.bias is not None else set())
                    placed |= {(placement.module.replace(".base_layer", ""), part) for part in own}
        merged = plan.inputs[i].adapter
        parts = {(m.replace(".base_layer", ""), part) for m, update in merged.updates.items() for part in update.parts}
        problems += [f"adapter {i + 1}: {module}.{part}" for module, part in sorted(parts - placed)]
        total = len(each.adapter.tensors()) + len(each.adapter.copies)
        applied = sum(len(update.parts) for update in each.adapter.updates.values())
        every.append(Account(total, applied, len(merged.replacements), total - applied - len(merged.replacements)))
    if problems:
        raise IncompatibleAdapter("tensors of the adapter have no place in the plan of the merge", problems)
    return every
