"""Where a verb lets others share its work: alone it does all, and a crew decides who does what."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools.parallel import shared


def doubled(some: Mapping[str, int]) -> dict[str, int]:
    return {name: 2 * number for name, number in some.items()}


@dataclass
class Backwards:
    """Does the items in the other order, and remembers their sizes."""

    sizes: dict[str, int] = field(default_factory=dict)

    def share(self, work: shared.Work, items: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
        self.sizes |= sizes
        return {name: result for name in reversed(items) for name, result in work({name: items[name]}).items()}

    def room(self) -> Path | None:
        return Path("room")

    def agreed(self, value: int) -> int:
        return value + 1


def test_alone_a_verb_does_all() -> None:
    assert shared.shared(doubled, {"a": 1, "b": 2}, abs) == {"a": 2, "b": 4}
    assert shared.agreed(3) == 3
    with shared.place(nullcontext(Path("output"))) as folder:
        assert folder == Path("output")


def test_a_crew_shares_the_first_work_of_a_verb_and_its_order_is_kept() -> None:
    crew = Backwards()
    with shared.by(crew):
        assert shared.agreed(3) == 4
        with shared.place(nullcontext(Path("output"))) as folder:
            assert folder == Path("room")
        assert list(shared.shared(doubled, {"a": -1, "b": 2}, abs).items()) == [("a", -2), ("b", 4)]
        assert crew.sizes == {"a": 1, "b": 2}
        shared.shared(doubled, {"c": 3}, abs)
    assert crew.sizes == {"a": 1, "b": 2}
    shared.shared(doubled, {"d": 3}, abs)
    assert crew.sizes == {"a": 1, "b": 2}
