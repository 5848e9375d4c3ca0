"""The names of the tensors of PEFT's other types: which module and part, or what all modules share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from loratools.dialects.peft import types
from loratools.dialects.peft.names import Groups, unwrap
from loratools.format import keys
from loratools.storage.lazy import LazyTensor


def by_module(tensors: Mapping[str, LazyTensor], module: Any, *, biases: bool) -> tuple[Groups, dict[str, LazyTensor]]:
    """Sort tensors by module; return them with those that all modules share."""
    groups, shared = Groups(), dict[str, LazyTensor]()
    own, common = _pattern(module.__name__, "PARTS"), _pattern(module.__name__, "SHARED")
    strangers = []
    for name, lazy in tensors.items():
        path = unwrap(name)
        if match := common.fullmatch(path):
            shared[match["first"] + match["rest"]] = lazy
            continue
        if not path.startswith(keys.PREFIX):
            strangers.append(name)
            continue
        path = path.removeprefix(keys.PREFIX)
        if match := own.fullmatch(path):
            groups.add(name, match["module"], match["first"] + match["rest"], match["adapter"], lazy)
        else:
            groups.add_whole(name, path, lazy, biases=biases)
    groups.check_names(tensors, strangers)
    return groups, shared


@cache
def _pattern(module: str, table: str) -> re.Pattern[str]:
    """Return what matches a module's part, or the name of a shared tensor, with an adapter's name in it or without.

    The name stands behind the first segment, where PEFT puts it into raw state dicts.
    """
    parts = getattr(types.get(module.rpartition(".")[2].upper()), table, {})
    firsts: set[str] = set()
    rests: dict[str, list[str]] = {}
    for part in sorted(parts, key=len, reverse=True):
        first, dot, rest = part.partition(".")
        firsts.add(first)
        rests.setdefault(first, []).append(
            (re.escape(dot + rest)).replace(r"\{n\}", r"\d+").replace(r"\{word\}", r"[^.]+")
        )
    if not firsts:
        return re.compile(r"(?!)")
    each = "|".join(
        rf"{re.escape(first)}(?=(?:\.[^.]+)?(?:{'|'.join(rests[first])})$)" for first in sorted(firsts, reverse=True)
    )
    ends = "|".join(sorted({rest for group in rests.values() for rest in group}, key=len, reverse=True))
    begin = r"base_model\.(?:model\.)?" if table == "SHARED" else r"(?P<module>.+)\."
    return re.compile(rf"{begin}(?P<first>{each})(?:\.(?P<adapter>(?!\d+$)[^.]+))??(?P<rest>{ends})")


def name_of(module: Any, place: str, part: str) -> str | None:
    """Return the name in a file of a part of an update at `place`; None for one that the type does not have."""
    renamed = getattr(module, "RENAMED", {}).get(part, part)
    place = place.removesuffix(getattr(module, "PLACE", "{module}").removeprefix("{module}"))
    if _pattern(module.__name__, "SHARED").fullmatch(name := f"base_model.{renamed}"):
        return name
    match = _pattern(module.__name__, "PARTS").fullmatch(f"{place}.{renamed}")
    return keys.join(place, renamed) if match and match["module"] == place and not match["adapter"] else None
