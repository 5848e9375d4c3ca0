"""Verbs on several processes or machines: everybody calls the same verb, and does a part of its items.

What a verb has to do for it is one call of `parallel.shared.shared`, and a row of `verbs.VERBS`. `merge` and
`dequantize` write files that anybody can write, and share those (`surgery/merge/parts.py`).

    verbs    which verbs share their work, and what has to be known of each
    task     a part as it travels, and what a helper does with it
    workers  the one who calls, on an executor
    parts    without a scheduler: a part is written down, and one call makes the output of all
"""

from __future__ import annotations

from loratools.surgery.sharing.parts import gather, write_part
from loratools.surgery.sharing.verbs import VERBS, call_of
from loratools.surgery.sharing.workers import crew, share

__all__ = ["VERBS", "call_of", "crew", "gather", "share", "write_part"]
