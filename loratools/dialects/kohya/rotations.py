"""Rotations of inputs in a file without a config: `oft_R.weight`, by OneTrainer and sd-scripts' `networks.oft_v2`.

Both make R = I + 2Q + 2Q² + 2Q³ + Q⁴ of each block, take one block for a shared one, and have W' = W·Rᵀ for a linear
layer but W·R for a kernel, which PEFT has not. Only the header says that training held ‖Q‖ down (`coft`, `coft_eps`).
OneTrainer's scaled OFT, which an `oft_R.scaled_oft` tells, divides the numbers by 2·√(b − 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from loratools.adapter import factors
from loratools.adapter.kinds.oft_input import PART, OftInputUpdate
from loratools.dialects._frame import alphas
from loratools.dialects._frame.build import Draft

_SCALED = "oft_R.scaled_oft"
_TERMS, _EPS = 5, 6e-5
_ON = ("true", "1", "yes", "y", "on")


def layouts(draft: Draft, header: Mapping[str, str]) -> Callable[[str, str], Mapping[str, Any]]:
    """Return what a module of a kind is built with besides, from a header; scaled numbers become plain ones."""
    arguments = alphas.network_arguments(header)
    constrained = str(arguments.get("oft_coft", arguments.get("coft", ""))).lower() in _ON
    eps = {"eps": alphas.number(arguments.get("coft_eps")) or _EPS} if constrained else {}
    for parts in draft.groups.values():
        if PART in parts and parts.pop(_SCALED, None) is not None and len(parts[PART].shape) == 2:
            size = (1 + math.isqrt(1 + 8 * parts[PART].shape[1])) // 2
            parts[PART] = factors.scaled(parts[PART], 1 / (2 * math.sqrt(max(size - 1, 1))))

    def layout(module: str, kind: str) -> Mapping[str, Any]:
        if kind != OftInputUpdate.kind:
            return {}
        share = {"share": True} if draft.groups[module][PART].shape[0] == 1 else {}
        return {"layout": {"terms": _TERMS, "turned_kernels": True} | share | eps}

    return layout
