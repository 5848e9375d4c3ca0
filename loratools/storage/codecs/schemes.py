"""Quantized models: which tensors are codes, or give codes their meaning, and the name of the scheme they follow.

A weight that is stored as codes is no number to add to, and its scales, zero points, maps and code books are no numbers
to cast. The tensors decide, for their names and dtypes are what a loader reads; config.json adds its name for it.

    Scheme    one way of quantizing: the name that people know it by, and the parts that only it has
    Codes     what of a model is quantized
    find      looks for it, by names, dtypes and config.json
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from loratools.storage import dtypes
from loratools.storage.codecs import unread
from loratools.storage.codecs.state import comfy_layers, statement
from loratools.storage.gguf.types import CODES as _GGML
from loratools.storage.header import TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class Scheme:
    """One way of quantizing: its name, parts of a module that only it has, and dtypes of `weight` that are its own.

    A module is of the first scheme of `SCHEMES` all of whose `parts` it has, if its weight has one of the `dtypes`,
    where there are any, and config.json's `quant_method` is one of the `methods`, where there are any. `codec` is the
    file of this folder that reads it; None where none does.
    """

    name: str
    parts: frozenset[str]
    dtypes: frozenset[str] = frozenset()
    methods: frozenset[str] = frozenset()
    codec: str | None = None

    def is_of(self, parts: Set[str], dtype: str | None, method: str) -> bool:
        """Tell whether a module with these parts, and a weight of this dtype, is quantized so."""
        return (
            self.parts <= parts
            and (not self.dtypes or dtype in self.dtypes)
            and (not self.methods or method in self.methods)
        )


_F8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})

_CODES = frozenset({"U8", "I8", "I16", "U16", "I32", "U32", "F4", "F6_E2M3", "F6_E3M2", *_F8, *_GGML})


def _scheme(
    name: str, parts: str, stored: Set[str] = frozenset(), methods: str = "", codec: str | None = None
) -> Scheme:
    return Scheme(name, frozenset(parts.split()), frozenset(stored), frozenset(methods.split()), codec)


SCHEMES = (
    _scheme("bitsandbytes NF4", "nf4", codec="bitsandbytes"),
    _scheme("bitsandbytes FP4", "fp4", codec="bitsandbytes"),
    _scheme("bitsandbytes 4 bit", "absmax", codec="bitsandbytes"),
    _scheme("bitsandbytes int8 (LLM.int8)", "SCB", codec="bitsandbytes"),
    _scheme("ComfyUI", "comfy_quant", codec="comfy"),
    _scheme("SVDQuant (nunchaku)", "qweight wscales"),
    _scheme("FP-Quant", "qweight scales", methods="fp_quant"),
    _scheme("AWQ", "qweight scales", methods="awq", codec="awq"),
    _scheme("GPTQ", "qweight scales", methods="gptq", codec="gptq"),
    _scheme("AutoRound", "qweight scales", methods="auto-round auto_round intel/auto-round", codec="auto_round"),
    _scheme("GPTQ", "qweight g_idx", codec="gptq"),
    _scheme("AWQ or GPTQ", "qweight scales"),
    _scheme("MXFP4", "blocks scales", codec="mxfp4"),
    _scheme("NVFP4 with SVDQuant (modelopt)", "weight_scale svdquant_lora_a", codec="modelopt"),
    _scheme("NVFP4 (modelopt)", "weight_scale_2", codec="modelopt"),
    _scheme("modelopt", "weight_scale", methods="modelopt modelopt_fp4 modelopt_fp8 modelopt_mixed", codec="modelopt"),
    _scheme("compressed-tensors", "weight_packed", codec="compressed_tensors"),
    _scheme("MLX", "scales", {"U32"}, codec="mlx"),
    _scheme("torchao", "qdata", codec="torchao"),
    _scheme("HQQ", "W_q", codec="hqq"),
    _scheme("EXL3", "trellis"),
    _scheme("EXL2", "q_weight"),
    _scheme("quanto", "_data"),
    _scheme("AQLM", "codes codebooks"),
    _scheme("VPTQ", "centroids"),
    _scheme("SpQR", "dense_weights"),
    _scheme("HIGGS", "tables"),
    _scheme("EETQ int8", "weight_scales", {"I8"}),
    _scheme("compressed-tensors", "weight_scale", methods="compressed-tensors", codec="compressed_tensors"),
    _scheme("FP8 with scales", "weight_scale_inv", codec="fp8"),
    *(_scheme("FP8 with scales", scale, _F8, codec="fp8") for scale in ("weight_scale", "scale", "qscale_weight")),
    _scheme("scaled FP8 (ComfyUI)", "scale_weight", codec="comfy_scaled"),
    _scheme("FP8 without scales", "", _F8, codec="fp8_cast"),
    _scheme("GGUF", "", _GGML, codec="gguf"),
)

# Last parts of names that only quantized models have. With `True`, they are part of the tensor in the segment before.
_PARTS: Mapping[str, bool] = {
    **dict.fromkeys(
        ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "_data", "_scale", "_shift", "_zero_point"), True
    ),
    **dict.fromkeys(
        ("SCB", "weight_format", "qweight", "qzeros", "g_idx", "wscales", "wzeros", "weight_packed", "weight_scale",
         "weight_scale_2", "weight_scale_inv", "weight_scales", "weight_zero_point", "weight_global_scale",
         "weight_shape", "weight_g_idx", "input_scale", "input_zero_point", "input_global_scale", "output_scale",
         "output_zero_point", "activation_scale", "pre_quant_scale", "W_q", "trellis", "q_weight", "scale_weight",
         "scale_input", "comfy_quant", "k_scale", "v_scale", "k_zero_point", "v_zero_point", "svdquant_lora_a",
         "svdquant_lora_b", "scaled_fp8"), False
    ),
}  # fmt: skip

# Parts that other models have too, and that mean codes where config.json names this method.
_OF_METHOD = {
    "aqlm": ("codes", "codebooks"), "vptq": ("centroids",), "spqr": ("dense_weights",), "higgs": ("tables",),
    "fp_quant": ("dqweight",), "metal": ("qbiases",),
}  # fmt: skip

# Parts that mean codes only beside another one.
_BESIDE = {"W_q": "scale", "blocks": "scales", "scales": "blocks"}

# Stacked tensors of experts, which have no `weight` of their own.
_STACKS = ("gate_up_proj", "down_proj", "gate_proj", "up_proj", "w1", "w2", "w3", "w13", "mlp1_weight", "mlp2_weight")

# Ends of the names of what belongs to a stacked or flattened tensor: `gate_up_proj_scale_inv`.
_ENDS = (
    "_weight_scale", "_input_scale", "_activation_scale", "_scale_inv", "_packed", "_zero_point", "_global_scale",
    "_scale", "_scale_2", "_qdata", "_shape",
)  # fmt: skip

# What torchao makes of a weight, each under the weight's name: `_weight_qdata`.
_TORCHAO = frozenset({
    "qdata", "scale", "zero_point", "scale_and_zero", "per_tensor_scale", "act_pre_scale", "act_quant_scale",
    "act_quant_zero_point",
})  # fmt: skip

# What modules of FP8 have under names that mean something only there: scales of DeepSeek-V4, of Mistral.
_OF_FP8 = frozenset({"weight", "scale", "qscale_weight", "qscale_act"})

# What a calibration of activations leaves, beside codes and beside plain weights.
_CALIBRATION = frozenset({
    "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point", "activation_scale",
    "k_scale", "v_scale", "k_zero_point", "v_zero_point", "amax", "scale_input", "scaled_fp8",
})  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """What of a model is quantized: module -> the name of its scheme, and all tensors that belong to a quantization.

    A module is the path before `weight`; of stacked experts that of the stack. `parts` has for each module the names of
    its stored tensors by part, and `codecs` the file that reads it, None where none does. `stated` is config.json's own
    name. `calibration` are the tensors that a calibration left beside plain weights, or once for the whole model.
    """

    modules: Mapping[str, str] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()
    stated: str | None = None
    parts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    codecs: Mapping[str, str | None] = field(default_factory=dict)
    calibration: frozenset[str] = frozenset()

    def named(self, schemes: Iterable[str] = ()) -> str:
        """Return the commonest of these schemes (default: of all modules), with what config.json says of it."""
        return self._with_stated(Counter(schemes or self.modules.values()).most_common(1)[0][0])

    def of_tensor(self, name: str) -> str:
        """Return the name of the scheme that a tensor belongs to."""
        module = name.rpartition(".")[0]
        owners = (name, module, module.removesuffix(".quant_state"), name.partition(".weight.")[0])
        return next((self.modules[owner] for owner in owners if owner in self.modules), "no scheme that is known")

    def _with_stated(self, scheme: str) -> str:
        return f"{scheme} (config.json: {self.stated})" if self.stated else scheme


def find(specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> Codes:
    """Return which tensors of a model are codes, or belong to them; from names, dtypes and config.json alone.

    Biases of quantized modules are numbers like others, and belong to nothing.
    """
    stated = statement(config)
    method = str(stated.get("quant_method") or ("modelopt" if stated.get("quant_algo") else "")).lower()
    owners = {name: owner_and_part for name in specs if (owner_and_part := _marked(name, _OF_METHOD.get(method, ())))}
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    for name, (owner, part) in owners.items():
        parts[owner][part] = name
    for name, spec in specs.items():
        if name not in owners and spec.dtype in _CODES and len(spec.shape) > 1 and _is_weight(name):
            parts[name.removesuffix(".weight")]["weight"] = name
    if refused := unread.unread(stated):
        for name, owner, part in unread.codes(specs):
            if name not in owners:
                parts[owner].setdefault(part, name)
    modules: dict[str, str] = {}
    stray = set()
    for owner, named in parts.items():
        marks = named.keys()
        weight = specs.get(f"{owner}.weight") or specs.get(owner)
        is_number = weight is not None and weight.dtype in dtypes.FLOATS
        alone = {mark for mark in marks & _BESIDE.keys() if not {_BESIDE[mark]} & marks}
        if marks == {mark for mark in alone if f"{owner}.{_BESIDE[mark]}" not in specs}:
            stray.add(owner)
        elif not marks <= _CALIBRATION and not (is_number and not stated and not marks & _IN_ANY_DTYPE):
            modules[owner] = weight.dtype if weight else ""
    tensors = {name for name, (owner, _) in owners.items() if owner not in stray}
    tensors |= {name for name in specs if stated and name.endswith(".scales")}  # also AWQ's of an activation
    casts = {owner for owner, dtype in modules.items() if dtype in _F8 and parts[owner].keys() == {"weight"}}
    for name in specs:  # `scales`, `zero`, `biases`: names that mean something only in a module of codes
        module, _, parameter = name.rpartition(".")
        if module in modules and parameter != "bias" and not (module in casts and parameter not in _OF_FP8):
            if name not in owners:  # which has it under its part
                parts[module].setdefault(parameter, name)
            tensors.add(name)
        elif name in modules:
            parts[name]["weight"] = name
            tensors.add(name)
    for name, spec in specs.items():  # a model whose weights are cast to FP8 is cast in all its tensors
        if casts and not method and spec.dtype in _F8 and spec.shape and name not in tensors:
            modules[owner := name.removesuffix(".weight")] = spec.dtype
            parts[owner]["weight"] = name
            tensors.add(name)
    layers = comfy_layers(config)
    schemes: dict[str, str] = {}
    codecs: dict[str, str | None] = {}
    for owner, dtype in modules.items():
        there = parts[owner].keys() | ({"comfy_quant"} if owner in layers else set())
        known = next((scheme for scheme in SCHEMES if scheme.is_of(there, dtype, method)), None)
        schemes[owner] = refused or (known.name if known else method or f"{dtype or 'unknown'} codes")
        codecs[owner] = known.codec if known and not refused else None
    kept = {owner: parts[owner] for owner in modules}
    alone = {name for name, (owner, part) in owners.items() if part in _CALIBRATION and owner not in modules}
    return Codes(schemes, frozenset(tensors), _stated(stated), kept, codecs, frozenset(alone))


_IN_ANY_DTYPE = frozenset({"absmax", "nf4", "fp4"})
"""Parts of a scheme that may store codes as the bytes of floats."""


def _marked(name: str, more: tuple[str, ...]) -> tuple[str, str] | None:
    """Return the module that a name is part of a quantization of, and which part; None for any other name."""
    module, _, last = name.rpartition(".")
    if last in _PARTS or last in more:
        return (module.removesuffix(".weight") if _PARTS.get(last) else module), last
    if last.startswith("bitsandbytes__"):
        return module.removesuffix(".quant_state").removesuffix(".weight"), last.removeprefix("bitsandbytes__")
    if last == "_amax":
        return module, "amax"
    if last.startswith("_"):  # of torchao
        named = ((f"_{stack}_", f"{module}.{stack}") for stack in _STACKS)
        for start, owner in (("_weight_", module), *named):
            if (part := last.removeprefix(start)) in _TORCHAO:
                return owner, part
    if last.endswith(("_blocks", "_scales")):
        stem, _, end = last.rpartition("_")
        return f"{module}.{stem}", end
    if last.endswith(_ENDS):
        end = next(end for end in _ENDS if last.endswith(end))
        stem = last.removesuffix(end)
        if stem in _STACKS:
            return f"{module}.{stem}", end[1:] if end[1:] in _PARTS else f"weight{end}"
    return None


def _is_weight(name: str) -> bool:
    return name.endswith((".weight", *(f"experts.{stack}" for stack in _STACKS)))


def _stated(stated: Mapping[str, Any]) -> str | None:
    """Return config.json's statement in a few words: method, format, bits."""
    words = [str(stated[key]) for key in ("quant_method", "quant_algo", "format", "mode") if stated.get(key)]
    bits = stated.get("bits") or next((n for n in (4, 8) if stated.get(f"load_in_{n}bit")), None)
    return ", ".join([*words, *([f"{bits} bits"] if bits else [])]) or None
