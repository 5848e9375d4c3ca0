"""What is told of an adapter that holds NaN or infinity."""

from __future__ import annotations

from loratools.adapter.model import Adapter
from loratools.decisions import warned
from loratools.dialects._frame.build import some


def warn_not_finite(adapter: Adapter) -> None:
    """Warn of modules and tensors with NaN or infinity: a merge or a combination would refuse them."""
    from loratools.storage.codecs.floats import is_finite

    odd = [
        name
        for name, parts in (
            *((module, update.parts) for module, update in adapter.updates.items()),
            *((path, {path: lazy}) for path, lazy in adapter.replacements.items()),
        )
        if not all(is_finite(lazy.chunks(name), lazy.dtype) for lazy in parts.values())
    ]
    if odd:
        warned("%s: NaN or infinite numbers, which no merge takes: the training diverged, or the file is damaged",
               some(sorted(odd)))  # fmt: skip
