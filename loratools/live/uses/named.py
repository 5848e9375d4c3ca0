"""Which adapters act while the model runs: by name, each with a weight. `rows.py` and `stacks.py` have other ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from loratools.live.site import Site, shadowed


class Use(Protocol):
    """A way to choose what acts on a site; `pairs` are the adapters that act, each with its weight."""

    @property
    def pairs(self) -> tuple[tuple[str, float], ...]: ...

    def forward(self, site: Site, *args: Any, **settings: Any) -> Any:
        """Compute a site's module with what acts on it."""
        ...


@dataclass(frozen=True, slots=True)
class ByName:
    """Adapters by name, each with a weight on its scaling, in the order in which they were added."""

    pairs: tuple[tuple[str, float], ...]

    def forward(self, site: Site, *args: Any, **settings: Any) -> Any:
        """Compute the module with the pieces of these adapters."""
        bank = site.lora
        pieces = [(piece, weight) for name, weight in self.pairs for piece in bank.pieces.get(name, ())]
        if not bank.whole:
            return site.changed(pieces, *args, **settings)
        with shadowed(site, bank.shadows(site, self.pairs)):  # type: ignore[arg-type]
            return site.changed(pieces, *args, **settings)
