"""Any other module: while it runs, tensors of an adapter stand for its parameters (`site.shadowed`)."""

from __future__ import annotations

from typing import Any

from loratools.live.site import Piece, Site


class WholeSite(Site):
    """A module whose own forward runs, with changed parameters."""

    def changed(self, pieces: list[tuple[Piece, float]], *args: Any, **settings: Any) -> Any:
        return self.plain_forward(*args, **settings)


SITE = WholeSite
