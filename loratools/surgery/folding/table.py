"""Where scales are folded, by the names that modules have: AutoAWQ's, llm-compressor's and SmoothQuant's mappings.

Of a source the rows are divided by scales, and the columns of the modules behind it are multiplied by them. A source is
a norm, a linear layer, of which the last rows count (up of gate and up), or an activation that divides by scales of its
own (AutoAWQ's `ScaledActivation`). The nearest module of a name counts, from beside a module out to its layer.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

OPERATION = "carry"
"""What the provenance of a carried adapter calls it."""

_LAYER = re.compile(r"^(.*?\.\d+)(?=\.)")


@dataclass(frozen=True, slots=True)
class Fold:
    """Modules into whose columns the scales of one source go: the first of `sources` that their layer has."""

    sources: tuple[str, ...]
    into: tuple[str, ...]

    def takes(self, path: str) -> bool:
        """Tell whether a module is among those whose columns are multiplied."""
        return any(path == name or path.endswith(f".{name}") for name in self.into)


_FOLDS = (
    Fold(("encoder_attn_layer_norm",), ("encoder_attn.q_proj",)),
    Fold((), ("encoder_attn.k_proj", "encoder_attn.v_proj", "cross_attn.k_proj", "cross_attn.v_proj")),
    Fold(("q_a_layernorm",), ("q_b_proj",)),
    Fold(("kv_a_layernorm",), ("kv_b_proj",)),
    Fold(
        ("input_layernorm", "self_attn_layer_norm", "ln_attn", "ln_1", "norm_1", "attention_norm"),
        ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa", "qkv_proj", "W_pack", "Wqkv", "wqkv",
         "query_key_value", "attn.c_attn", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "in_proj_qkvz",
         "in_proj_ba"),
    ),
    Fold(
        ("pre_feedforward_layernorm", "pre_mlp_layernorm", "ln_mlp", "post_attention_layernorm", "final_layer_norm",
         "ln_2", "norm_2", "ffn_norm", "input_layernorm", "ln_1"),
        ("gate_proj", "up_proj", "gate_up_proj", "gate", "shared_expert_gate", "w1", "w3", "c_fc", "c_fc_0", "c_fc_1",
         "dense_h_to_4h", "fc1", "fc_in"),
    ),
    Fold(("v_proj", "qkv_proj", "W_pack"), ("o_proj",)),
    Fold(("v_proj", "Wqkv"), ("out_proj",)),
    Fold(("act", "up_proj", "gate_up_proj"), ("down_proj",)),
    Fold(("w3",), ("w2",)),
    Fold(("act", "c_fc_1", "c_fc"), ("mlp.c_proj",)),
    Fold(("act", "activation_fn", "fc1"), ("fc2",)),
    Fold(("act",), ("fc_out",)),
    Fold(("gelu_impl", "act"), ("dense_4h_to_h",)),
)  # fmt: skip

_OF_TYPES = {
    "qwen": (
        Fold(("ln_1",), ("attn.c_attn",)),
        Fold(("ln_2",), ("mlp.w1", "mlp.w2")),
        Fold(("w1",), ("mlp.c_proj",)),
    ),
}

SCALED_ACTIVATIONS = (".act.scales", ".gelu_impl.scales", ".activation_fn.scales")
"""Ends of the names of the scales by which AutoAWQ's `ScaledActivation` divides."""

ONE_PLUS = frozenset({
    "gemma", "gemma2", "gemma3", "gemma3_text", "minimax_m3_vl", "nemotron", "qwen3_5", "qwen3_5_text", "qwen3_5_moe",
    "qwen3_5_moe_text", "qwen3_next", "recurrent_gemma", "t5gemma", "t5gemma2", "vaultgemma",
})  # fmt: skip
"""Model types whose norms multiply by 1 + w."""


class Folds:
    """The folds of a model: where a module's columns get their scales, and where its rows leave theirs."""

    def __init__(self, model_type: str, modules: Collection[str]) -> None:
        """Match the paths of all modules of a model of a type."""
        self._every = _OF_TYPES.get(model_type, _FOLDS)
        self._modules = modules
        self.before: dict[str, str] = {}
        """Module -> that whose scales its columns may hold."""
        self.behind: dict[str, list[str]] = {}
        """Module -> those whose columns may hold the scales by which its rows are divided, the other way round."""
        for path in sorted(modules):
            if (source := self._source(path)) is not None:
                self.before[path] = source
                self.behind.setdefault(source, []).append(path)

    def concerns(self, path: str) -> bool:
        """Tell whether scales may be folded into a module, by its name."""
        last = path.rpartition(".")[2]
        return any(last in fold.sources or fold.takes(path) for fold in self._every)

    def _source(self, path: str) -> str | None:
        """Return the nearest of the first source that there is, from beside a module out to its layer."""
        fold = next((fold for fold in self._every if fold.takes(path)), None)
        match = _LAYER.match(path)
        if fold is None or match is None:
            return None
        parents = [path]
        while parents[-1] != match[1]:
            parents.append(parents[-1].rpartition(".")[0])
        candidates = (f"{parent}.{name}" for name in fold.sources for parent in parents[1:])
        return next((module for module in candidates if module in self._modules and module != path), None)
