"""From what became of each tensor to one adapter that PEFT loads, with its record and its card."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratools.adapter.model import Adapter, BaseIdentity, Step
from loratools.adapter.placement.tied import EMBEDDINGS, main_tensor
from loratools.format import manifest
from loratools.format.record import TOOL
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.companions import TOKENIZER_FILES
from loratools.storage.lazy import LazyTensor
from loratools.surgery.extract.layers import Layer, to_json, total
from loratools.surgery.extract.options import ExtractOptions
from loratools.surgery.extract.pairs import HEAD_OF_TASK, Pair, Pairing, heads_of_task, task
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

    `rows` counts changed rows of tensors that were not factored.
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


@dataclass(frozen=True, slots=True, eq=False)
class Assembled:
    """The adapter, the outcomes as they are in the end, the text of its card, and what to tell the user."""

    adapter: Adapter
    outcomes: tuple[Outcome, ...]
    card: str
    notes: tuple[str, ...]


def assemble(
    base: Checkpoint, tuned: Checkpoint, pairing: Pairing, outcomes: Iterable[Outcome], identity: BaseIdentity,
    tuned_root: str, options: ExtractOptions,
) -> Assembled:  # fmt: skip
    """Return the adapter of these outcomes.

    PEFT saves modules whole, never single parameters, so a norm whose weight changed brings its bias along. Biases of
    linear layers stand alone, under PEFT's `bias` setting.
    """
    outcomes = tuple(sorted(_with_siblings(list(outcomes)), key=lambda one: (one.pair.path, one.pair.name)))
    factored = [one for one in outcomes if one.outcome in ("factored", "rows")]
    whole = [one for one in outcomes if one.outcome == "whole"]
    names = module_names(one.pair for one in factored)
    built = {
        names[one.pair.path]: build(one.pair, one.shape, one.rank, _factors(one, options))
        for one in factored
        if one.factors
    }
    kept = {one.pair.path: LazyTensor.stored(tuned.specs[one.pair.name]) for one in whole}
    touched = sorted({one.pair.base for one in (*factored, *whole) if one.pair.base})
    identity = replace(identity, tensors={name: identity.tensors[name] for name in touched})
    layers = [one.layer for one in factored if one.layer]
    if pairing.head:  # one weight, which PEFT saves under both names
        kept |= {path: kept[one.pair.path] for one in whole if _main(one, base) for path in [pairing.head]}
    step = _step(layers, outcomes, pairing, options, identity, tuned_root)
    adapter = Adapter(built, kept, identity, (step,), "loratools", _settings(base, tuned, pairing, factored, whole))
    return Assembled(adapter, outcomes, _card(identity, outcomes, layers), tuple(_notes(base, outcomes, pairing)))


def companion_files(base: Checkpoint, tuned: Checkpoint, outcomes: Iterable[Outcome]) -> list[Path]:
    """Return files of the fine-tune that belong to the change: tokenizer files that the base lacks or has otherwise.

    Its config.json comes along where tensors are new or have another shape, for `merge` to follow.
    """
    reshaped = any(one.outcome == "whole" and one.pair.reshaped for one in outcomes)
    names = sorted(TOKENIZER_FILES | ({"config.json"} if reshaped else set())) if tuned.path.is_dir() else []
    found = [tuned.root / name for name in names if (tuned.root / name).is_file()]
    old = {path: base.root / path.name for path in found}
    return [path for path in found if not (old[path].is_file() and old[path].read_bytes() == path.read_bytes())]


def _factors(one: Outcome, options: ExtractOptions) -> tuple[LazyTensor, LazyTensor]:
    """Return (B, A) in the dtype that was asked for; rows that are exact stay as they are."""
    assert one.factors is not None
    return one.factors.lazy(one.rank, options.stored if one.layer else one.factors.A.dtype)


def _with_siblings(outcomes: list[Outcome]) -> list[Outcome]:
    """Return the outcomes with unchanged parameters of modules that are saved whole saved too."""
    factored = {one.pair.path for one in outcomes if one.factors}
    matrices = {_module(one) for one in outcomes if one.pair.path.endswith(".weight") and len(one.shape) > 1}
    matrices -= {_module(one) for one in outcomes if one.outcome == "whole" and one.pair.path.endswith(".weight")}
    alone = factored | matrices  # their biases need not bring the weight along
    modules = {_module(one) for one in outcomes if one.outcome == "whole"} - alone - {""}

    def along(one: Outcome) -> bool:
        return one.pair.plan == "whole" and (_module(one) in modules or one.pair.why == HEAD_OF_TASK)

    return [
        replace(one, outcome="whole", why="comes with its module") if one.outcome == "unchanged" and along(one) else one
        for one in outcomes
    ]


def _main(one: Outcome, base: Checkpoint) -> bool:
    """Tell whether this is the embedding that the head is tied to."""
    return one.pair.base is not None and one.pair.base == main_tensor(base.specs, EMBEDDINGS)


def _module(one: Outcome) -> str:
    return one.pair.path if one.pair.plan == "factor" else one.pair.path.rpartition(".")[0]


def _settings(
    base: Checkpoint, tuned: Checkpoint, pairing: Pairing, factored: list[Outcome], whole: list[Outcome]
) -> dict[str, Any]:
    """Return what PEFT's config has to say beyond ranks, and which base tensor belongs to which module."""
    paths = {one.pair.path for one in factored if one.pair.kind != "experts"}
    heads = heads_of_task(tuned) | heads_of_task(base)
    saved = {_module(one) for one in whole if not one.pair.path.endswith(".bias")}
    settings: dict[str, Any] = {"task_type": task(tuned) or task(base)}
    if any(one.pair.path.endswith(".bias") and _module(one) not in saved for one in whole):
        settings["bias"] = "all"
    if tops := {_upto(one.pair.path, heads) for one in whole if heads & set(one.pair.path.split("."))}:
        settings["modules_to_save"] = sorted(tops)
    if stacks := sorted(one.pair.path for one in factored if one.pair.kind == "experts"):
        settings["target_parameters"] = stacks
    if any(one.pair.transposed and one.pair.kind == "linear" for one in factored):
        settings["fan_in_fan_out"] = True
    if pairing.head and any(_main(one, base) for one in (*factored, *whole)):
        settings["ensure_weight_tying"] = True
    short = {path.rpartition(".")[2] for path in paths}
    modules = {".".join(parts[:i]) for name in base.specs for parts in [name.split(".")] for i in range(1, len(parts))}
    if not any(module.rpartition(".")[2] in short and module not in paths for module in modules):
        settings["target_modules"] = sorted(short)
    names = module_names(one.pair for one in factored)
    origin = {
        group: {names.get(one.pair.path, one.pair.path): {"tensor": one.pair.base} for one in part if one.pair.base}
        for group, part in (("modules", factored), ("replacements", whole))
    }
    return settings | {manifest.ORIGIN: origin}


def _upto(path: str, names: frozenset[str]) -> str:
    """Return a path up to the first segment that is one of these names."""
    segments = path.split(".")
    return ".".join(segments[: 1 + next(i for i, segment in enumerate(segments) if segment in names)])


def _step(
    layers: list[Layer], outcomes: tuple[Outcome, ...], pairing: Pairing, options: ExtractOptions,
    identity: BaseIdentity, tuned_root: str,
) -> Step:  # fmt: skip
    ranks = options.rank_choice
    chosen: dict[str, Any] = {
        "minimum": ranks.minimum, "maximum": ranks.maximum, "multiple_of": ranks.multiple_of, "uniform": ranks.uniform,
        "budget": ranks.budget, "noise": ranks.noise or None,
        "rule": None if ranks.rule is None else f"{ranks.rule!r}",
    }  # fmt: skip
    counts = {name: sum(one.outcome == name for one in outcomes) for name in CLASSES}
    lost = sum(one.norm2 for one in outcomes if one.outcome == "dropped")
    everything = sum(one.norm2 for one in outcomes)
    parameters = {
        "method": "block Krylov", "ranks": {key: value for key, value in chosen.items() if value is not None},
        "dtype": options.stored, "tolerance": options.tolerance,
        "tensors": counts | {"missing": len(pairing.missing)},
        "dropped_energy": float(f"{lost / everything if everything else 0:.6g}"),
        "certificate": to_json(layers),
    }  # fmt: skip
    inputs: tuple[Mapping[str, Any], ...] = ({"digest": identity.root}, {"digest": tuned_root})
    return Step("extract-svd", TOOL, parameters, inputs, options.seed)


def _notes(base: Checkpoint, outcomes: tuple[Outcome, ...], pairing: Pairing) -> Iterator[str]:
    """Say what is new, and what PEFT will refuse to load although `merge` takes it."""
    whole = [one for one in outcomes if one.outcome == "whole"]
    if new := [one.pair.path for one in whole if one.pair.base is None]:
        yield f"{len(new)} tensor(s) are new, and no part of the base: {', '.join(new[:5])}"
    inner = {".".join(parts[:i]) for one in outcomes if one.factors
             for parts in [one.pair.path.split(".")] for i in range(1, len(parts))}  # fmt: skip
    if loose := [one.pair.path for one in whole if _module(one) in inner]:
        yield f"PEFT cannot load {', '.join(loose[:5])}: it saves modules whole, and there are factored ones inside"
    if pairing.head and task(base) != "CAUSAL_LM" and any(_main(one, base) for one in whole):
        yield "PEFT may refuse to load the embedding, which this kind of model ties in more places than the head"


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
        f"Made by `loratools extract-svd` from the base model {identity.id or 'named by its hash'} "
        f"(`{identity.root}`).\n\n"
        f"| tensors | count |\n|---|---|\n{rows}\n\n"
        f"Of the change in the {sums.layers} factored layers, {sums.captured:.2%} of the energy is kept; the relative "
        f"error is {sums.error:.4f}. The certificate of each layer is in the header of the safetensors file.\n"
    )
