"""From what became of each tensor to one adapter that PEFT loads, with its record and its card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratools.adapter.model import Adapter, BaseIdentity, Step
from loratools.adapter.placement.owners import task_of
from loratools.adapter.placement.shared import ties_of
from loratools.engine.device import described
from loratools.errors import counted
from loratools.format import manifest
from loratools.format.record import DEVICE, TOOL
from loratools.storage.beside.links import refuse_outside
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import stored_names
from loratools.storage.companions import tokenizer_files
from loratools.storage.lazy import LazyTensor
from loratools.surgery.extract.layers import Layer, to_json, total
from loratools.surgery.extract.options import ROUNDED, ExtractOptions
from loratools.surgery.extract.pairs import HEAD_OF_TASK, Pair, Pairing
from loratools.surgery.extract.spool import Spooled
from loratools.surgery.extract.updates import build, module_names

CLASSES = {
    "factored": "as B·A",
    "rows": "as the few rows that changed",
    "whole": "saved whole",
    "unchanged": "the same in both",
    "dropped": "left out on request",
}
"""What can become of a tensor; every tensor of the fine-tune is in exactly one class."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of one tensor: its class, why, ‖W' − W‖_F² (‖W'‖_F² where there was nothing to compare with).

    `rows` counts changed rows of tensors that were not factored; `rounded` tells that products in bfloat16 found what
    was factored.
    """

    pair: Pair
    outcome: str
    shape: tuple[int, ...]
    dtype: str
    norm2: float
    why: str = ""
    rows: int = 0
    rank: int = 0
    layer: Layer | None = None
    factors: Spooled | None = field(default=None, repr=False)
    rounded: bool = False

    @property
    def path(self) -> str:
        """The path of its pair."""
        return self.pair.path

    @property
    def module(self) -> str:
        """The path of the module that it is a parameter of."""
        return self.path if self.pair.plan == "factor" else self.path.rpartition(".")[0]


def assemble(
    base: Checkpoint, tuned: Checkpoint, pairing: Pairing, outcomes: Iterable[Outcome], identity: BaseIdentity,
    tuned_root: str, options: ExtractOptions,
) -> tuple[Adapter, tuple[Outcome, ...], str, tuple[str, ...]]:  # fmt: skip
    """Return the adapter of these outcomes, the outcomes as they are in the end, its card, and what to tell the user.

    PEFT saves modules whole, never single parameters, so a norm whose weight changed brings its bias along. Biases of
    linear layers stand alone, under PEFT's `bias` setting.
    """
    outcomes = tuple(sorted(_with_siblings(list(outcomes)), key=lambda tensor: (tensor.path, tensor.pair.name)))
    factored = [tensor for tensor in outcomes if tensor.outcome in ("factored", "rows")]
    whole = [tensor for tensor in outcomes if tensor.outcome == "whole"]
    names = module_names(tensor.pair for tensor in factored)
    built = {
        names[tensor.path]: build(tensor.pair, tensor.shape, tensor.rank, _factors(tensor, options))
        for tensor in factored
        if tensor.factors
    }
    kept = {tensor.path: LazyTensor.stored(tuned.specs[tensor.pair.name]) for tensor in whole}
    touched = sorted({tensor.pair.base for tensor in (*factored, *whole) if tensor.pair.base})
    stored = sorted({part for name in touched for part in stored_names(name, base)})
    weights = {name: identity.weights[name] for name in touched if name in identity.weights}
    identity = replace(identity, tensors={name: identity.tensors[name] for name in stored}, weights=weights)
    layers = [tensor.layer for tensor in factored if tensor.layer]
    if _has_main(whole, base):  # one weight of several names, which PEFT saves under each
        one = {tensor.pair.name: kept[tensor.path] for tensor in whole}
        kept |= {path: one.get(name) or LazyTensor.stored(tuned.specs[name]) for path, name in pairing.shared.items()}
    step = _step(layers, outcomes, pairing, options, identity, tuned_root)
    settings = _settings(base, tuned, pairing, factored, whole)
    orientation = {names[tensor.path]: tensor.pair.transposed for tensor in factored if names[tensor.path] in built}
    adapter = Adapter(built, kept, identity, (step,), "loratools", settings, orientation=orientation)
    return adapter, outcomes, _card(identity, outcomes, layers), tuple(_notes(base, outcomes, pairing))


def companion_files(base: Checkpoint, tuned: Checkpoint, outcomes: Iterable[Outcome]) -> list[Path]:
    """Return files of the fine-tune that belong to the change: tokenizer files that the base lacks or has otherwise.

    Its config.json comes along where tensors are new or have another shape, for `merge` to follow.
    """
    reshaped = any(tensor.outcome == "whole" and tensor.pair.reshaped for tensor in outcomes)
    companions = tokenizer_files(tuned.root) if tuned.path.is_dir() else []
    companions += [tuned.root / "config.json"] if reshaped and (tuned.root / "config.json").is_file() else []
    refuse_outside(companions, tuned.root)
    old = {path: base.root / path.name for path in companions}
    return [path for path in companions if not (old[path].is_file() and old[path].read_bytes() == path.read_bytes())]


def errors(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Return how far base + adapter is from the fine-tune, and what of that was left out, in norms of the whole change.

    error = √((Σ‖ΔW − s·B̃·Ã‖² + Σ_dropped ‖ΔW‖²)/Σ‖ΔW‖²), dropped = √(Σ_dropped ‖ΔW‖²/Σ‖ΔW‖²), over all tensors.
    """
    energy = math.fsum(tensor.norm2 for tensor in outcomes)
    lost2 = math.fsum(tensor.norm2 for tensor in outcomes if tensor.outcome == "dropped")
    layers = [tensor.layer for tensor in outcomes if tensor.layer]
    factors2 = math.fsum((layer.error * layer.delta_norm) ** 2 for layer in layers)
    return (math.sqrt((factors2 + lost2) / energy), math.sqrt(lost2 / energy)) if energy else (0.0, 0.0)


def _factors(tensor: Outcome, options: ExtractOptions) -> tuple[LazyTensor, LazyTensor]:
    """Return (B, A) in the dtype that was asked for; rows that are exact stay as they are."""
    assert tensor.factors is not None
    return tensor.factors.lazy(tensor.rank, options.stored if tensor.layer else tensor.factors.A.dtype)


def _with_siblings(outcomes: list[Outcome]) -> list[Outcome]:
    """Return the outcomes with unchanged parameters of modules that are saved whole saved too."""
    factored = {tensor.path for tensor in outcomes if tensor.factors}
    weights = [tensor for tensor in outcomes if tensor.path.endswith(".weight")]
    matrices = {tensor.module for tensor in weights if len(tensor.shape) > 1}
    matrices -= {tensor.module for tensor in weights if tensor.outcome == "whole"}
    alone = factored | matrices  # their biases need not bring the weight along
    modules = {tensor.module for tensor in outcomes if tensor.outcome == "whole"} - alone - {""}

    def along(tensor: Outcome) -> bool:
        kept = tensor.pair.plan == "whole" and (tensor.module in modules or tensor.pair.why == HEAD_OF_TASK)
        return kept and tensor.outcome == "unchanged"

    return [replace(each, outcome="whole", why="comes with its module") if along(each) else each for each in outcomes]


def _has_main(tensors: Iterable[Outcome], base: Checkpoint) -> bool:
    """Tell whether one of these is the embedding that the head is tied to."""
    embedding = ties_of(base.specs, base.config).embedding
    return embedding is not None and any(tensor.pair.base == embedding for tensor in tensors)


def _settings(
    base: Checkpoint, tuned: Checkpoint, pairing: Pairing, factored: list[Outcome], whole: list[Outcome]
) -> dict[str, Any]:
    """Return what PEFT's config has to say beyond ranks, and which base tensor belongs to which module."""
    paths = {tensor.path for tensor in factored if tensor.pair.kind != "experts"}
    (task, heads), (task_of_base, heads_of_base) = task_of(tuned.config), task_of(base.config)
    tops = {_upto(tensor.path, {*heads, *heads_of_base}) for tensor in whole} - {None}
    saved = {tensor.module for tensor in whole if not tensor.path.endswith(".bias")}
    settings: dict[str, Any] = {"task_type": task or task_of_base}
    if any(tensor.path.endswith(".bias") and tensor.module not in saved for tensor in whole):
        settings["bias"] = "all"
    if tops:
        settings["modules_to_save"] = sorted(tops)
    if stacks := sorted(tensor.path for tensor in factored if tensor.pair.kind == "experts"):
        settings["target_parameters"] = stacks
    if any(tensor.pair.transposed and tensor.pair.kind == "linear" for tensor in factored):
        settings["fan_in_fan_out"] = True
    # Of embeddings that encoder and decoder share, PEFT would make the wrong ones one; each is saved, and so the same.
    if len(pairing.shared) == 1 and _has_main((*factored, *whole), base):
        settings["ensure_weight_tying"] = True
    short = {path.rpartition(".")[2] for path in paths}
    modules = {".".join(parts[:i]) for name in base.specs for parts in [name.split(".")] for i in range(1, len(parts))}
    if not any(module.rpartition(".")[2] in short and module not in paths for module in modules):
        settings["target_modules"] = sorted(short)
    names = module_names(tensor.pair for tensor in factored)
    origin = {
        group: {
            names.get(each.path, each.path): {"tensor": stored_names(each.pair.base, base)[0]}
            for each in part
            if each.pair.base
        }
        for group, part in (("modules", factored), ("replacements", whole))
    }
    return settings | {manifest.ORIGIN: origin}


def _upto(path: str, names: set[str]) -> str | None:
    """Return a path up to the first segment that is one of these names."""
    segments = path.split(".")
    return next((".".join(segments[: i + 1]) for i, segment in enumerate(segments) if segment in names), None)


def _step(
    layers: list[Layer], outcomes: tuple[Outcome, ...], pairing: Pairing, options: ExtractOptions,
    identity: BaseIdentity, tuned_root: str,
) -> Step:  # fmt: skip
    counts = {name: sum(tensor.outcome == name for tensor in outcomes) for name in CLASSES}
    error, dropped = errors(outcomes)
    parameters = {
        "method": "block Krylov", "products": ROUNDED if any(tensor.rounded for tensor in outcomes) else "float32",
        "ranks": options.rank_choice.to_json(),
        "dtype": options.stored, "tolerance": options.tolerance,
        "tensors": counts | {"missing": len(pairing.missing)},
        "error": float(f"{error:.6g}"), "dropped": float(f"{dropped:.6g}"),
        "certificate": to_json(layers), **({"tight": True} if options.tight else {}),
    } | ({DEVICE: on} if (on := described(options.computes_on)) else {})  # fmt: skip
    inputs: tuple[Mapping[str, Any], ...] = ({"digest": identity.root}, {"digest": tuned_root})
    return Step("extract-svd", TOOL, parameters, inputs, options.seed)


def _notes(base: Checkpoint, outcomes: tuple[Outcome, ...], pairing: Pairing) -> Iterator[str]:
    """Say what is new, and what PEFT will refuse to load although `merge` takes it."""
    whole = [tensor for tensor in outcomes if tensor.outcome == "whole"]
    if new := [tensor.path for tensor in whole if tensor.pair.base is None]:
        yield f"{counted(len(new), 'tensor is', 'tensors are')} new, and no part of the base: {', '.join(new[:5])}"
    inner = {".".join(parts[:i]) for tensor in outcomes if tensor.factors
             for parts in [tensor.path.split(".")] for i in range(1, len(parts))}  # fmt: skip
    if loose := [tensor.path for tensor in whole if tensor.module in inner]:
        yield f"PEFT cannot load {', '.join(loose[:5])}: it saves modules whole, and there are factored ones inside"


def _card(identity: BaseIdentity, outcomes: tuple[Outcome, ...], layers: list[Layer]) -> str:
    """Return a README with what the adapter is, in Hugging Face's form."""
    sums = total(layers)
    head = ["library_name: peft", "tags: [lora, loratools]"]
    if identity.id:
        head.insert(0, f"base_model: {manifest.canonical(identity.id)}\nbase_model_relation: adapter")
    rows = "\n".join(f"| {CLASSES[name]} | {sum(o.outcome == name for o in outcomes)} |" for name in CLASSES)
    return (
        "---\n" + "\n".join(head) + "\n---\n\n"
        "# Extracted from a full fine-tune\n\n"
        f"Made by `loratools extract-svd` from the base model {identity.id or 'named by its hash'}"
        f"{f' at {identity.revision}' if identity.revision else ''} (`{identity.root}`).\n\n"
        f"| tensors | count |\n|---|---|\n{rows}\n\n"
        f"Of the change in the {sums.layers} factored layers, {sums.captured:.2%} of the energy is kept; the relative "
        f"error is {sums.error:.4f}; of the whole change, with what was left out, it is {errors(outcomes)[0]:.4f}. "
        "The certificate of each layer is in the header of the safetensors file.\n"
    )
