"""MLX-LM: `adapters.safetensors` with transposed factors, and a scale that is the scaling itself.

    lora_a (in, r)     lora_b (r, out)     ΔW = scale·(lora_a·lora_b)ᵀ
    lora_a (V, r)      lora_b (r, d)       an embedding: the same without the transpose
    lora_a (E, r, in)  lora_b (E, out, r)  a switch layer, the experts of one projection stacked
    m (out,)                               DoRA's magnitude

`adapter_config.json` is the trainer's whole command line; its `lora_parameters.scale` counts, and mlx-lm ignores an
`alpha` beside it (mlx-lm 0.32, `mlx_lm/tuner/utils.py`). PEFT's file of that name has `peft_type`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from loratools.adapter import factors
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter, BaseIdentity, Loss
from loratools.adapter.parts import A_EMBEDDING, B_EMBEDDING, MAGNITUDE, A, B
from loratools.decisions import warned
from loratools.dialects._frame.build import (
    Draft,
    Groups,
    both,
    check_faults,
    check_gathered,
    check_read,
    factors_of,
    is_embedding,
)  # fmt: skip
from loratools.dialects._frame.listing import Evidence, Listing
from loratools.dialects._frame.losses import IDENTITY, common_losses, left, update_losses, without
from loratools.dialects._frame.metadata import carried, settings_with
from loratools.dialects._frame.numbers import is_number, most_common
from loratools.dialects.peft.fields import unknown
from loratools.errors import BadFile, UnsupportedAdapter, counted
from loratools.storage.lazy import LazyTensor

SUMMARY = "MLX-LM: adapters.safetensors (lora_a, lora_b) beside an adapter_config.json with lora_parameters"
EXTRA = None
FILES = ()
CANNOT = (*IDENTITY, "DoRA on embeddings, and on some modules only", "convolutions", "biases of B")

T = TypeVar("T")
_CONFIG, _FILE = "adapter_config.json", "adapters.safetensors"
_PARAMETERS = frozenset({"rank", "scale", "dropout", "keys", "alpha"})
_ARGUMENTS = frozenset({
    "model", "train", "fine_tune_type", "optimizer", "optimizer_config", "data", "seed", "num_layers", "lora_layers",
    "batch_size", "iters", "val_batches", "learning_rate", "steps_per_report", "steps_per_eval", "adapter_path",
    "resume_adapter_file", "save_every", "test", "test_batches", "max_seq_length", "config", "grad_checkpoint",
    "grad_accumulation_steps", "clear_cache_threshold", "lr_schedule", "lora_parameters", "mask_prompt", "report_to",
    "project_name", "trust_remote_code", "use_dora", "wandb", "use_chat_template", "prompt_feature",
    "completion_feature", "text_feature", "chat_feature", "hf_dataset",
})  # fmt: skip
"""Arguments of mlx-lm's trainer: those that `read` asks for, and those that only say how it was trained."""
_NAME = r"(.+)\.(lora_a|lora_b|m)"
_SWITCH = r"(.+)\.switch_mlp\.(\w+)"
_EXPERT = r"(.+)\.experts\.(\d+)\.(\w+)"


def detect(listing: Listing) -> Evidence | None:
    """Look for `lora_a` and `lora_b` in the header, and for `lora_parameters` in the config."""
    name = _file(listing)
    header = listing.header(name) if name else None
    if header is None:
        return None
    count = sum(1 for tensor in header.tensors if tensor.endswith((".lora_a", ".lora_b")))
    seen = f"{count} of the tensors in {name} end in lora_a or lora_b"
    if count and "lora_parameters" in (listing.json(_CONFIG) or {}):
        return Evidence(90, f"{_CONFIG} has lora_parameters, and {seen}")
    return Evidence(60, seen) if count else None


def read(listing: Listing) -> Adapter:
    """Read an adapter; the scaling of every module is `lora_parameters.scale`, alpha is scale·r.

    Raises `BadFile` for a missing or wrong config and for names that mlx-lm does not write, `UnsupportedAdapter` for
    whole fine-tunes, and for DoRA on embeddings, which divides by another norm than PEFT's.
    """
    name, path = _file(listing), listing.folder / _CONFIG
    config = listing.json(_CONFIG)
    if name is None or config is None:
        raise BadFile(f"{path}: no such file, and without it the scale is unknown")
    if config.get("fine_tune_type") == "full":
        raise UnsupportedAdapter(f"{path}: fine_tune_type is full: whole weights, no adapter")
    scale = _scale(config, path) if listing.alpha is None else None
    for note in _notes(config):
        warned("%s: %s", path, note)
    draft, tensors = Draft(listing.path, alpha=listing.alpha), listing.tensors(name)
    check_gathered(listing.path, tensors)
    for tensor, lazy in tensors.items():
        if match := re.fullmatch(_NAME, tensor):
            draft.add(match[1], match[2], lazy, tensor)
        else:
            draft.faults.append(f"{tensor}: expected a name that ends in .lora_a, .lora_b or .m")
    draft.convert(_to_peft)
    draft.check()
    odd = [module for module, parts in draft.groups.items() if MAGNITUDE in parts and A_EMBEDDING in parts]
    why = "DoRA on an embedding has a magnitude for each token in mlx-lm, one for each dimension in PEFT"
    check_read(listing.path, [f"{module}: {why}" for module in odd[:1]])
    if scale is None:
        warned("%s: alpha %g, which the call gives, is taken in place of %s", path, listing.alpha, _recorded(config))
    dora = config.get("fine_tune_type") == "dora" or config.get("use_dora")
    hollow = [module for module, parts in draft.groups.items() if dora and MAGNITUDE not in parts]
    check_faults(listing.path, [f"{module}: no magnitude (m), and the config says dora" for module in hollow])
    updates = draft.build(draft.usual if scale is None else lambda _, rank: (scale, scale * rank))
    header = listing.header(name)
    settings = settings_with(header.metadata if header else {}, lambda key: key != "format")
    return Adapter(updates, base=BaseIdentity.of_name(config.get("model")), dialect="mlx", settings=settings)


def losses(adapter: Adapter) -> list[Loss]:
    """List what mlx-lm has no place for; ranks and scalings that differ are made equal without changing any ΔW."""
    parts = (A, B, A_EMBEDDING, B_EMBEDDING, MAGNITUDE)
    lost = update_losses(adapter, "mlx-lm", ("lora", "embedding", "dora"), parts)
    sayable = without(adapter, lost).updates
    complete = _complete(sayable)
    dora = {module for module, update in sayable.items() if MAGNITUDE in update.parts}
    for module in sorted(sayable):
        if module in dora and A_EMBEDDING in sayable[module].parts:
            lost.append(Loss(module, "mlx-lm's DoRA of an embedding has a magnitude for each token, not dimension"))
        elif dora and module not in dora:
            lost.append(Loss(module, "it has no magnitude, and mlx-lm's dora is one switch for all modules"))
        elif (stack := _stack(module)) and stack[0] not in complete:
            lost.append(Loss(module, f"not all experts of {stack[0]} have an update of one shape"))
        elif A_EMBEDDING in sayable[module].parts and not is_embedding(module):
            lost.append(Loss(module, "an embedding that its name does not show to be one"))
    return lost + common_losses(adapter, "mlx-lm")


def write(adapter: Adapter, target: Path, *, force: bool = False) -> Adapter:
    """Write `adapters.safetensors` and its `adapter_config.json`.

    mlx-lm has one rank, the largest here, and one scale, the most common here. Zeros fill up smaller ranks, and lora_b
    takes the ratio of another scaling to the scale (in float32, unless it is a power of two).
    """
    adapter = left(adapter, losses(adapter), target)
    updates = adapter.updates
    rank = max((update.rank for update in updates.values()), default=8)
    if filled := sum(update.rank < rank for update in updates.values()):
        warned(
            "%s: mlx-lm has one rank for all modules, so zeros fill %s to rank %d, the largest: the file is larger, "
            "and no change is another", target, counted(filled, "module"), rank,
        )  # fmt: skip
    scale = most_common((update.scaling for update in updates.values()), smallest=True)
    groups = _stacked({module: _of_peft(update, rank, scale) for module, update in updates.items()})
    config: dict[str, Any] = {
        "fine_tune_type": "dora" if any("m" in parts for parts in groups.values()) else "lora",
        # mlx-lm counts layers for keys that are suffixes; the keys below are whole names, which it looks up.
        "num_layers": -1,
        "lora_parameters": {"keys": sorted(groups), "rank": rank, "scale": scale, "dropout": 0.0},
    }
    if adapter.base and adapter.base.id:
        config["model"] = adapter.base.id
    tensors = {f"{module}.{part}": lazy for module, parts in groups.items() for part, lazy in parts.items()}
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    metadata = {**carried(adapter, tensors, "format"), "format": "mlx"}
    from loratools.storage import save

    save.save(target, _FILE, tensors, metadata, force=force, beside={_CONFIG: text})
    return adapter


def _file(listing: Listing) -> str | None:
    if listing.single:
        return listing.files[0] if listing.files[0].endswith(".safetensors") else None
    return _FILE if _FILE in listing.files else None


def _scale(config: Mapping[str, Any], path: Path) -> float:
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not is_number(scale):
        raise BadFile(f"{path}: lora_parameters.scale: expected a number, found {scale!r}")
    return float(scale)  # type: ignore[arg-type]


def _recorded(config: Mapping[str, Any]) -> str:
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    return "a scale that the file does not record" if scale is None else f"lora_parameters.scale = {scale}"


def _notes(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a user must know of a config: an alpha that mlx-lm ignores, and fields that are not known."""
    parameters = config.get("lora_parameters")
    inner = parameters if isinstance(parameters, dict) else {}
    if "alpha" in inner:
        yield f"lora_parameters.alpha = {str(inner['alpha'])[:80]} has no effect in mlx-lm, where the scale counts"
    names = [f"lora_parameters.{name}" for name in unknown(inner, _PARAMETERS)]
    if names := names + unknown(config, _ARGUMENTS):
        yield f"fields that are not known here, and have no effect: {', '.join(names)[:500]}"


def _to_peft(module: str, parts: Mapping[str, LazyTensor]) -> Groups:
    """Return PEFT's parts of a module, or of each expert in it."""
    a, b = both(parts, "lora_a", "lora_b")
    dimensions = (len(a.shape), len(b.shape))
    if dimensions == (3, 3):
        return _experts(module, a, b)
    if dimensions != (2, 2):
        raise ValueError(f"lora_a {a.shape} and lora_b {b.shape}: expected (in, r) and (r, out)")
    names = (A_EMBEDDING, B_EMBEDDING) if is_embedding(module) else (A, B)
    return {
        module: {names[0]: factors.turned(a), names[1]: factors.turned(b)}
        | ({MAGNITUDE: parts["m"]} if "m" in parts else {})
    }


def _experts(module: str, a: LazyTensor, b: LazyTensor) -> Groups:
    match = re.fullmatch(_SWITCH, module)
    if match is None or a.shape[0] != b.shape[0]:
        raise ValueError(f"lora_a {a.shape} and lora_b {b.shape} are no stacked experts of a switch_mlp")
    return {
        f"{match[1]}.experts.{i}.{match[2]}": {A: factors.item(a, i), B: factors.item(b, i)} for i in range(a.shape[0])
    }


def _of_peft(update: Update, rank: int, scale: float) -> dict[str, LazyTensor]:
    """Return mlx-lm's tensors of an update, with this rank and scale."""
    a, b = factors_of(update)
    b = factors.scaled(b, update.scaling / scale)
    parts = {"lora_a": factors.turned(factors.padded(a, 0, rank)), "lora_b": factors.turned(factors.padded(b, 1, rank))}
    return parts | ({"m": update.parts[MAGNITUDE]} if MAGNITUDE in update.parts else {})


def _stack(module: str) -> tuple[str, int] | None:
    """Return the switch layer that an expert's module belongs to, and the expert's number."""
    match = re.fullmatch(_EXPERT, module)
    return (f"{match[1]}.switch_mlp.{match[3]}", int(match[2])) if match else None


def _by_stack(values: Mapping[str, T]) -> dict[str, dict[int, T]]:
    """Return the values of experts by their switch layer and number."""
    stacks: dict[str, dict[int, T]] = defaultdict(dict)
    for module, value in values.items():
        if at := _stack(module):
            stacks[at[0]][at[1]] = value
    return stacks


def _complete(updates: Mapping[str, Update]) -> set[str]:
    """Return the switch layers whose experts all have an update, plain and of one shape."""
    return {
        stack
        for stack, experts in _by_stack(updates).items()
        if sorted(experts) == list(range(len(experts)))
        and {(update.kind, update.shape) for update in experts.values()} == {("lora", experts[0].shape)}
    }


def _stacked(groups: Mapping[str, dict[str, LazyTensor]]) -> Groups:
    """Put the experts of one projection together, as mlx-lm's models hold them."""
    stacked = {module: parts for module, parts in groups.items() if not _stack(module)}
    for module, numbered in _by_stack(groups).items():
        stacked[module] = {
            part: factors.stacked([factors.turned(numbered[i][part]) for i in sorted(numbered)])
            for part in ("lora_a", "lora_b")
        }
    return stacked
