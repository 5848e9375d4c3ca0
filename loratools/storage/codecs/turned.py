"""Weights of GPT-2 and its kin: stored [in, out] where they are plain, and [out, in] where bitsandbytes quantized them.

transformers' Conv1D holds its weight the other way round; its bitsandbytes layer is a linear one, and turns it first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratools.storage.codecs import Module

CONV1D: Mapping[str, frozenset[str]] = dict.fromkeys(
    ("gpt2", "decision_transformer", "imagegpt", "openai-gpt", "clvp"),
    frozenset({"c_attn", "q_attn", "c_fc", "c_proj"}),
)
"""Model types whose linear layers are transformers' Conv1D, stored [in, out]; the names of those layers."""


def is_turned(module: Module) -> bool:
    """Tell whether a module whose codes are [out, in] has a plain weight of [in, out]."""
    return module.path.rpartition(".")[2] in CONV1D.get(module.model_type, ())
