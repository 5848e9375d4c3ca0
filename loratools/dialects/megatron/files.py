"""Adapters of Megatron-Bridge and NeMo, read into an `Adapter`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools.adapter.model import Adapter
from loratools.adapter.parts import MAGNITUDE, A, B
from loratools.decisions import warned
from loratools.dialects._frame import pickles
from loratools.dialects._frame.build import Draft, check_gathered, check_read, some
from loratools.dialects._frame.listing import Evidence, Listing, by_convert
from loratools.dialects._frame.numbers import is_number, tell_alpha
from loratools.dialects.megatron import nemo
from loratools.dialects.megatron.names import FC1, Shape, place
from loratools.dialects.peft.fields import says_something, unknown
from loratools.errors import BadFile, UnsupportedAdapter, counted
from loratools.storage.lazy import LazyTensor

_FACTORS = {"linear_in.weight": A, "linear_out.weight": B, "weight_magnitude": MAGNITUDE}
_KNOWN = frozenset({
    "alpha", "adapter_dim", "dim", "target_modules", "exclude_modules", "canonical_mapping", "variant",
    "adapter_dropout", "dropout", "dropout_position", "column_init_method", "row_init_method", "lora_A_init_method",
    "lora_B_init_method", "layer_selection", "a2a_experimental", "lora_dtype", "enable_op_fuser", "network_alpha",
    "params_to_save", "peft_scheme", "restore_from_path", "_target_",
})  # fmt: skip
"""Fields of a LoRA in NeMo and Megatron-Bridge: the scaling, what the tensors show, and how it was trained."""
_REFUSED = {
    "weight_tying": "how the layers share their factors is not known here",
    "position_embedding_strategy": "it adds an embedding of the layer to shared factors",
    "use_rslora": "Megatron has no such scaling; whether the tensors hold it already is not known here",
}
_GATED = frozenset({"swiglu", "fast-swiglu", "geglu", "fast-geglu", "reglu", "fast-reglu"})  # NeMo's `activation`


def evidence(listing: Listing) -> Evidence | None:
    """Look for a `.nemo` archive, for `.distcp` shards, and for Megatron's names of an adapter's factors."""
    if archive := listing.only(nemo.ENDING):
        return Evidence(100, f"{archive} is called as NeMo's archives are")
    if shards := nemo.shards_of(listing):
        return Evidence(90, f"{counted(shards, 'file')} of a distributed checkpoint (.distcp)")
    if {nemo.WEIGHTS, nemo.CONFIG} <= set(listing.files):
        return Evidence(90, f"{nemo.CONFIG} beside {nemo.WEIGHTS}, as in NeMo's archives")
    name = listing.only(*nemo.TENSORS)
    header = listing.header(name) if name else None
    if header is None:
        return pickles.evidence(listing, 85, place)
    parts = [tensor for tensor in header.tensors if place(tensor)]
    return Evidence(85, f"{len(parts)} of the tensors in {name} are called as {parts[0]}") if parts else None


def read(listing: Listing) -> Adapter:
    """Read an adapter, and take its fused projections apart by rows, which is exact.

    Raises `UnsupportedAdapter` where alpha, the heads or the gate are not known, for experts and other layers, and for
    distributed checkpoints. Raises `BadFile` for what does not fit together.
    """
    tensors, document = nemo.read(listing)
    check_gathered(listing.path, tensors)
    shape, (alpha, dim) = _shape(document, listing), _numbers(document, listing)
    fused: dict[tuple[str, str], dict[str, LazyTensor]] = {}
    strangers = []
    for name, lazy in tensors.items():
        at = place(name)
        if at is not None:
            fused.setdefault(at[:2], {})[_FACTORS[at[2]]] = lazy
        elif not name.endswith("_extra_state"):
            strangers.append(name)
    if strangers:
        why = "no adapter of an attention or MLP layer (experts are not read)"
        check_read(listing.path, [f"{some(strangers)}: {why}"])
    ranks = _count(_model(document), "tensor_model_parallel_size") or 1
    if ranks > 1 and shape.gated and any(projection == FC1 for _, projection in fused):
        raise UnsupportedAdapter(
            f"{listing.path}: trained by {ranks} tensor-parallel ranks, and whether linear_fc1 has gate and up of each"
            " rank in turn is not recorded",
            hint="Save it again with tensor_model_parallel_size 1.",
        )
    draft = Draft(listing.path)
    for (block, projection), parts in fused.items():
        try:
            for name, part, lazy in _apart(projection, parts, shape):
                draft.add(f"{block}.{name}", part, lazy, f"{block}.{projection}")
        except LookupError as error:
            draft.unknown.append(f"{block}.{projection}: {error.args[0]}")
        except ValueError as error:
            draft.faults.append(f"{block}.{projection}: {error}")
    draft.check()
    if draft.unknown:
        hint = by_convert(listing, "--base BASE", "Give the base model, whose config.json and weights tell")
        raise UnsupportedAdapter(f"{listing.path}: fused projections cannot be taken apart", draft.unknown, hint=hint)

    def rule(module: str, rank: int) -> tuple[float, float]:
        if dim is not None and dim != rank:
            raise ValueError(f"its tensors have rank {rank}, the configuration says {dim}")
        return (1.0, float(rank)) if alpha is None else (alpha / rank, alpha)

    return Adapter(draft.build(rule), dialect="megatron")


def _apart(projection: str, parts: Mapping[str, LazyTensor], shape: Shape) -> list[tuple[str, str, LazyTensor]]:
    """Return (projection, PEFT's part, tensor) for each of transformers' projections in one of Megatron's."""
    if missing := sorted({A, B} - parts.keys()):
        raise ValueError(f"no {'linear_in' if missing[0] == A else 'linear_out'}, while its partner is there")
    rows = {part: shape.apart(projection, lazy) for part, lazy in parts.items() if part != A}
    return [
        entry
        for name in rows[B]
        for entry in ((name, A, parts[A]), *((name, part, of[name]) for part, of in rows.items()))
    ]


def _numbers(document: Mapping[str, Any], listing: Listing) -> tuple[float | None, int | None]:
    """Return alpha and dim. An alpha of None is that of a configuration without one, for which s = 1.

    Raises `UnsupportedAdapter` without a configuration and without the user's alpha.
    """
    peft = document.get("peft")
    tuning = peft.get("lora_tuning", peft) if isinstance(peft, Mapping) else None
    if not isinstance(tuning, Mapping):
        if listing.alpha is not None:
            return listing.alpha, None
        raise UnsupportedAdapter(
            f"{listing.path}: no configuration with peft.alpha beside it, and without it the scaling is unknown",
            hint=by_convert(
                listing, "--alpha NUMBER", f"Put {nemo.CONFIG} or run_config.yaml beside it, or give its alpha"
            ),
        )
    alpha, dim = tuning.get("alpha"), tuning.get("adapter_dim", tuning.get("dim"))
    if alpha is not None and not is_number(alpha):
        raise BadFile(f"{listing.path}: alpha of its configuration: expected a number, found {alpha!r}")
    scheme = peft.get("peft_scheme", "lora") if isinstance(peft, Mapping) else "lora"
    refused = [f"peft_scheme = {str(scheme)[:80]}: only lora is read"] if scheme not in ("lora", "qlora", None) else []
    refused += [f"{n} = {str(tuning[n])[:80]}: {why}" for n, why in _REFUSED.items() if says_something(tuning.get(n))]
    check_read(listing.path, refused)
    if names := unknown(tuning, _KNOWN, _REFUSED):
        warned("%s: fields of its configuration that are not known here, and have no effect: %s",
               listing.path, ", ".join(names)[:500])  # fmt: skip
    tell_alpha(listing.path, listing.alpha, [alpha])
    if listing.alpha is None and alpha is None:
        warned("%s: its configuration records no alpha; a scale of 1 is applied, as Megatron does", listing.path)
    alpha = alpha if listing.alpha is None else listing.alpha
    return (None if alpha is None else float(alpha)), (dim if type(dim) is int else None)


def _shape(document: Mapping[str, Any], listing: Listing) -> Shape:
    """Return heads, groups and gate of the configuration, and those of the base where it lacks them.

    Raises `BadFile` where the two contradict each other.
    """
    stated = _model(document)
    config = listing.base.config if listing.base else {}
    nested = config.get("text_config")
    config = {**config, **nested} if isinstance(nested, Mapping) else config
    ours = {**_attention(stated, "num_query_groups", "kv_channels"), "gated": _gated(stated)}
    base = {**_attention(config, "num_key_value_heads", "head_dim"), "gated": _gate_of_base(listing)}
    known = {what: base[what] if value is None else value for what, value in ours.items()}
    odd = [what for what, value in base.items() if value is not None and value != known[what]]
    if odd:
        lines = [f"{what}: {known[what]} here, {base[what]} in the base" for what in odd]
        raise BadFile(f"{listing.path}: its configuration is not that of the base", lines)
    return Shape(**known)


def _model(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the model's part of a configuration; NeMo 1.x writes it without a level of its own."""
    inner = document.get("model")
    return inner if isinstance(inner, Mapping) else document


def _attention(config: Mapping[str, Any], groups: str, head: str) -> dict[str, Any]:
    """Return query heads, key heads (as many where the configuration is silent) and the size of one."""
    heads, hidden = _count(config, "num_attention_heads"), _count(config, "hidden_size")
    size = _count(config, head) or (hidden // heads if hidden and heads else None)
    return {"heads": heads, "groups": _count(config, groups) or heads, "head": size}


def _count(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if type(value) is int and 0 < value < 1_000_000 else None


def _gated(config: Mapping[str, Any]) -> bool | None:
    if isinstance(config.get("gated_linear_unit"), bool):
        return bool(config["gated_linear_unit"])
    activation = config.get("activation")
    return activation in _GATED if isinstance(activation, str) else None


def _gate_of_base(listing: Listing) -> bool | None:
    names = listing.base.specs if listing.base else ()
    if any(".mlp.gate_proj." in name or ".mlp.gate_up_proj." in name for name in names):
        return True
    return False if any(".mlp.up_proj." in name for name in names) else None
