"""Alphas that no tensor holds: those of the header are taken, where there are none the scaling is 1; both is said.

Loaders take 1 where a module has no alpha, whatever the header says; the trainer that wrote it there meant it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from loratools.adapter import kinds
from loratools.decisions import warned
from loratools.dialects._frame.build import Draft, some
from loratools.dialects._frame.metadata import ALPHAS
from loratools.dialects._frame.numbers import is_number
from loratools.errors import BadFile
from loratools.storage.lazy import LazyTensor

_WITHOUT_ALPHA = ("boft", "boft_output", "oft", "oft_input")  # where there is an alpha, it is a constraint


def fill(draft: Draft, header: Mapping[str, str], *, apart: frozenset[str] = frozenset()) -> None:
    """Give each module that has a rank and no alpha that of the header, and warn of it, or of there being none.

    `apart` are the modules that have a scaling from elsewhere. Raises `BadFile` where the header states two alphas.
    """
    ranks = {m: rank for m, parts in draft.groups.items() if m not in apart and (rank := _rank(parts))}
    missing = sorted(ranks.keys() - draft.alphas.keys())
    if draft.alpha is not None or not missing:
        return
    alpha, where = stated(header, draft)
    if alpha is None:
        warned("%s: the file records no scale for %s; 1 is applied, as loaders do", draft.path, some(missing))
        return
    arguments = network_arguments(header)
    root = str(arguments.get("rs_lora", "")).lower() in ("true", "1")  # LyCORIS has it in the alphas that it stores
    root = root or any(config.get("use_rslora") is True for _, config in _configs(header))
    of_convolutions = number(arguments.get("conv_alpha"))
    for module in missing:
        kernel = any(len(lazy.shape) == 4 and lazy.shape[2:] != (1, 1) for lazy in draft.groups[module].values())
        of_module = of_convolutions if kernel and of_convolutions is not None else alpha
        draft.alphas[module] = of_module * (math.sqrt(ranks[module]) if root else 1.0)
    if any(draft.alphas[module] != ranks[module] for module in missing):
        warned(
            "%s: no tensor holds the alpha of %s; that of the header, %s, is taken", draft.path, some(missing), where
        )


def stated(header: Mapping[str, str], draft: Draft) -> tuple[float | None, str]:
    """Return the alpha that a header states, and the entries that do, None and "" where there is none."""
    values = {name: value for name in ALPHAS if (value := number(header.get(name))) is not None}
    values |= {f"{name}.lora_alpha": value for name, config in _configs(header)
               if (value := number(config["lora_alpha"])) is not None}  # fmt: skip
    entries = ", ".join(f"{name} = {value:g}" for name, value in values.items())
    if len(set(values.values())) > 1:
        raise BadFile(f"{draft.path}: its header states two alphas, and its tensors hold none: {entries}")
    return next(iter(values.values()), None), entries


def _configs(header: Mapping[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """Return the entries of a header that hold a config with `lora_alpha` as JSON, by name."""
    objects = ((name, json_object(text)) for name, text in header.items() if '"lora_alpha"' in text)
    return [(name, config) for name, config in objects if "lora_alpha" in config]


def network_arguments(header: Mapping[str, str]) -> dict[str, Any]:
    """Return sd-scripts' `ss_network_args`, {} where they are no JSON object."""
    return json_object(header.get("ss_network_args", "{}"))


def json_object(text: str) -> dict[str, Any]:
    """Return the JSON object that an entry of a header is, {} where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def number(text: object) -> float | None:
    """Return the finite number that an entry of a header is, None for anything else ("None", "Dynamic")."""
    try:
        value = float(text) if isinstance(text, str | int | float) else None
    except ValueError:
        return None
    return value if is_number(value) else None


def _rank(parts: Mapping[str, LazyTensor]) -> int:
    """Return the rank by which an alpha is divided; 0 where none is, and for parts of no kind, which are refused."""
    kind = kinds.claim(parts)
    try:
        return 0 if kind is None or kind in _WITHOUT_ALPHA else int(kinds.get(kind).build(parts, 1.0, 1.0).rank)
    except ValueError:
        return 0
