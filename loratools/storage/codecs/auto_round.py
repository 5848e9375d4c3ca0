"""AutoRound: weights packed as GPTQ or as AWQ packs them, which config.json's `packing_format` and the tensors tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratools.storage import codecs
from loratools.storage.codecs import Encoding, Module
from loratools.storage.codecs.state import by_module

_PACKINGS = {
    "auto_round:auto_gptq": "gptq", "auto_round:gptq": "gptq", "auto_round:auto_awq": "awq", "auto_round:awq": "awq",
}  # fmt: skip


def opened(module: Module) -> Encoding:
    """Return how the weight is stored; raise `UnsupportedAdapter` for another packing, or other parts than it has."""
    stated = str(module.statement.get("packing_format") or "auto_round:auto_gptq").lower()
    packing = _PACKINGS.get(stated)
    if packing is None:
        raise module.refuse(f"its packing_format is {stated}, of which {', '.join(_PACKINGS)} are read")
    return codecs.get(packing).opened(module)


def plain(statement: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Return the statement with 16 bits for these modules in `extra_config`, as AutoRound and vLLM read it."""
    extra = {**by_module(statement, "extra_config"), **{module: {"bits": 16, "data_type": "fp"} for module in modules}}
    return {**statement, "extra_config": extra}
