"""What is told of an adapter that holds NaN or infinity."""

from __future__ import annotations

from loratools.adapter.model import Adapter
from loratools.decisions import warned
from loratools.dialects._frame.build import some
from loratools.storage.lazy import chunks_of_all, in_order_of_files


def warn_not_finite(adapter: Adapter) -> None:
    """Warn of modules and tensors with NaN or infinity: a merge or a combination would refuse them."""
    from loratools.storage.codecs.floats import is_finite

    tensors = dict(adapter.replacements)
    for path, update in adapter.updates.items():
        tensors |= {f"{path}\0{part}": lazy for part, lazy in update.parts.items()}
    read = chunks_of_all(in_order_of_files(tensors))
    odd = {name.partition("\0")[0] for name, pieces in read if not is_finite(pieces, tensors[name].dtype)}
    if odd:
        warned("%s: NaN or infinite numbers, which no merge takes: the training diverged, or the file is damaged",
               some(sorted(odd)))  # fmt: skip
