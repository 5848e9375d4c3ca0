"""Module names: the wrappers that trainers and models put before them, and the projections that some models fuse.

Where a base's config.json tells which model of transformers it is, `conversions` says how its modules are named; what
is here by hand serves where none does: files without a config, two adapters side by side, models of remote code, and
what transformers 4 had in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratools.adapter.naming.loaded import Loaded

# Leading segments that only wrap a model: `language_model.model.layers.0…`, `model.language_model.layers.0…` and
# `layers.0…` are one module. Names of towers (`vision_tower`, `encoder`, …) are no wrappers: they tell modules apart.
WRAPPERS = frozenset({
    "base_model", "model", "module", "language_model", "transformer", "backbone", "gpt_neox", "bert", "roberta",
    "deberta", "electra", "distilbert", "albert", "camembert", "mpnet", "esm", "biogpt", "longformer", "rembert",
    "roformer", "mobilebert", "nomic_bert", "layoutlm", "layoutlmv3", "vit", "deit", "beit", "dinov2", "swin",
    "dinov2_with_registers", "segformer",
    "wav2vec2", "hubert", "wavlm", "_orig_mod", "_fsdp_wrapped_module",
})  # fmt: skip

# What transformers 5 renamed: checkpoints keep the old name, adapters trained since have the new one.
RENAMED = (("embed_out", "lm_head"), ("vision_tower.vision_model", "vision_tower"))

# The same inside the layers of image encoders: ViT, DeiT, BEiT, MAE, DINOv2, Swin, SegFormer. Other models' names that
# look like the old ones change too, in the adapter and in the base alike, so that equal names stay equal.
_INSIDE = (
    (r"encoder\.block\.(\d+)\.(?=\d)", r"stages.\1.blocks."),
    (r"encoder\.layer\.", "layers."),
    (r"\battention\.(?:attention|self)\.query\b", "attention.q_proj"),
    (r"\battention\.(?:attention|self)\.key\b", "attention.k_proj"),
    (r"\battention\.(?:attention|self)\.value\b", "attention.v_proj"),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
    (r"\bmlp\.dense([12])\b", r"mlp.fc\1"),
    (r"\bintermediate\.dense\b", "mlp.fc1"),
    (r"\boutput\.dense\b", "mlp.fc2"),
)
_SIGNS = ("encoder.", "attention.", "dense")  # every name that _INSIDE changes has one, most names have none


@cache
def _inside() -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(old), new) for old, new in _INSIDE)


def normalized(path: str) -> str:
    """Return a path without its leading wrappers, and by new names where some were changed.

    >>> normalized("model.language_model.layers.0.mlp.up_proj")
    'layers.0.mlp.up_proj'
    >>> normalized("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight")
    'vision_tower.encoder.layers.0.mlp.fc1.weight'
    >>> normalized("vit.encoder.layer.0.attention.attention.query")
    'layers.0.attention.q_proj'
    """
    segments = path.split(".")
    while len(segments) > 1 and segments[0] in WRAPPERS:
        segments.pop(0)
    bare = ".".join(segments)
    for old, new in RENAMED:
        if bare == old or bare.startswith(f"{old}."):
            return new + bare.removeprefix(old)
    if any(sign in bare for sign in _SIGNS):
        for pattern, new in _inside():
            bare = pattern.sub(new, bare)
    return bare


_QUESTIONS, _CANDIDATES, _LONGEST = 20, 1_000, 200
"""Bounds of the search for near names, whose time grows with the product of all three."""


class Names:
    """The module names of a base model, looked up exactly, by transformers' own rules, or past their wrappers.

    `config` is the base's config.json: it tells which model of transformers this is, and so how its modules are named.
    """

    def __init__(self, tensors: Iterable[str], config: Mapping[str, Any] | None = None) -> None:
        self._tensors = frozenset(tensors)
        self.config = config or {}
        self._by_last: dict[str, list[str]] = {}
        self._asked = 0

    @cached_property
    def _by_normalized(self) -> dict[str, list[str]]:
        """The tensors by their names past wrappers: nobody asks where exact names serve."""
        by_normalized: dict[str, list[str]] = {}
        for tensor in sorted(self._tensors):
            by_normalized.setdefault(normalized(tensor), []).append(tensor)
        return by_normalized

    @cached_property
    def loaded(self) -> Loaded | None:
        """These tensors as transformers loads them; None where it does not know the model."""
        from loratools.adapter.naming.conversions import conversion  # of no use where exact names serve
        from loratools.adapter.naming.loaded import Loaded

        rules = conversion(self.config)
        return None if rules is None else Loaded(rules, self._tensors)

    def find(self, module: str, parameter: str = "weight") -> list[str]:
        """Return the tensors that could be `module.parameter`: one when it is clear, none, or several candidates.

        An exact name always wins, then what transformers' own rules say of the model.
        """
        both = f"{module}.{parameter}", module
        for wanted in both:
            if wanted in self._tensors:
                return [wanted]
        for wanted in both if self.loaded else ():
            if self.loaded and (tensor := self.loaded.find(wanted)):
                return [tensor]
        for wanted in both:
            if tensors := self._by_normalized.get(normalized(wanted)):
                return tensors
        return []

    def nearest(self, module: str, count: int = 3) -> list[str]:
        """Return the names of the base that look most like `module`, for an error message.

        [] once it was asked `_QUESTIONS` times: what is so wrong a base is told by the first of its problems. Compared
        are `_CANDIDATES` names, those that begin alike, and none that is longer than names are.
        """
        from bisect import bisect
        from difflib import get_close_matches

        self._asked += 1
        if self._asked > _QUESTIONS or len(module) > _LONGEST:
            return []
        if not self._by_last:
            for name in sorted({tensor.removesuffix(".weight") for tensor in self._tensors}):
                if len(name) <= _LONGEST:
                    for last in (name.rpartition(".")[2], ""):
                        self._by_last.setdefault(last, []).append(name)
        alike = self._by_last.get(module.rpartition(".")[2]) or self._by_last.get("", [])
        at = max(0, bisect(alike, module) - _CANDIDATES // 2)
        return get_close_matches(module, alike[at : at + _CANDIDATES], n=count, cutoff=0.3)


@dataclass(frozen=True, slots=True, eq=False)
class Fusion:
    """Projections that a model stores in one weight, in this order along the output features.

    `parts` lists for each projection its possible names. `models` are the model types whose layout is simply one
    block after the other; None means every model. `by_head` are those that store q, k, v of each head in turn.
    """

    fused: str
    parts: tuple[tuple[str, ...], ...]
    models: frozenset[str] | None = None
    by_head: frozenset[str] = frozenset()

    def position(self, name: str) -> int | None:
        """Return which of the parts a projection is, or None."""
        return next((i for i, names in enumerate(self.parts) if name in names), None)

    def is_of(self, model_type: str) -> bool:
        """Tell whether models of a type store the projections in this order."""
        return self.models is None or model_type in self.models or model_type in self.by_head

    def fits(self, rows: int, position: int, total: int, config: Mapping[str, Any]) -> bool:
        """Tell whether a part can have `rows` of `total`: q at least as many as k and v each, gate as many as up."""
        if len(self.parts) == 2:
            return 2 * rows == total
        key_rows = (total - rows) / 2 if position == 0 else rows
        heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
        if isinstance(heads, int) and isinstance(groups, int) and heads > 0 < groups:
            return key_rows * (heads + 2 * groups) == total * groups
        return key_rows == int(key_rows) and 0 < 3 * key_rows <= total


_QKV = (("q_proj", "query", "q"), ("k_proj", "key", "k"), ("v_proj", "value", "v"))

FUSIONS = (
    Fusion("qkv_proj", _QKV, frozenset({"phi3", "phi4", "phi4_multimodal", "phi3_v"})),
    Fusion("query_key_value", _QKV, frozenset({"chatglm"}), frozenset({"bloom", "gpt_neox", "gpt_neox_japanese"})),
    Fusion("c_attn", _QKV, frozenset({"gpt2", "decision_transformer", "imagegpt", "openai-gpt"})),
    Fusion("Wqkv", _QKV, frozenset({"mpt", "modernbert"})),
    Fusion("W_pack", _QKV, frozenset({"baichuan"})),
    Fusion("gate_up_proj", (("gate_proj",), ("up_proj",))),
    Fusion("dense_h_to_4h", (("gate_proj",), ("up_proj",)), frozenset({"chatglm"})),
)

# Model types of transformers that have layers of these names which are nn.Linear, stored [out, in]. Other types, of
# remote code, are told by evidence.
LINEAR = frozenset({"gpt_bigcode", "gpt_neo", "starcoder2"})
