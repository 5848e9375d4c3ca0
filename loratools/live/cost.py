"""What a LoRA costs before it exists: parameters, bytes, optimizer state; and the rank for a budget. Shapes suffice.

Rank r on a weight of `out` rows and `in` columns has r·(in + out) parameters, a stack of experts that for each of them,
a convolution r·(in/groups·kernel + out).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from loratools.adapter.naming.selection import matches
from loratools.adapter.placement.owners import Kinds
from loratools.adapter.placement.shared import HEADS
from loratools.adapter.placement.slices import slices
from loratools.errors import IncompatibleAdapter, InvalidOption, MissingExtra, counted
from loratools.options import Options
from loratools.storage import dtypes, sources
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import logical
from loratools.storage.header import TensorSpec
from loratools.storage.pickles import SUFFIXES
from loratools.storage.strict_json import read_json

ALL_LINEAR = "all-linear"
_ADAM = 2 * 4  # bytes for each trained parameter: two moments, in float32
_WEIGHTS = (".safetensors", ".gguf", *SUFFIXES)


@dataclass(frozen=True, slots=True)
class Estimate:
    """The cost of a LoRA, and of full fine-tuning beside it; all sizes are in bytes.

    `parameters` is |Θ|, of `modules` weights; `share` is its part of `base_parameters`. `nbytes` has the adapter's size
    by dtype, `optimizer` is Adam's state (two float32 moments a parameter), `base_optimizer` that of full fine-tuning.
    `tasks_with` is one base and an adapter of `dtype` for each of `tasks` tasks, `tasks_without` a model for each.
    """

    model: str
    rank: int
    targets: tuple[str, ...]
    modules: int
    parameters: int
    share: float
    nbytes: Mapping[str, int]
    optimizer: int
    dtype: str
    base_parameters: int
    base_nbytes: int
    base_optimizer: int
    tasks: int
    tasks_with: int
    tasks_without: int


@dataclass(frozen=True, slots=True)
class Shapes:
    """A model without its numbers: name -> shape, config.json, and the bytes that it takes as it is stored."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]
    nbytes: int


def estimate(
    model: sources.Location | Checkpoint,
    rank: int | None = None,
    targets: str | Sequence[str] = ALL_LINEAR,
    *,
    budget: int | None = None,
    dtype: str = "bf16",
    tasks: int = 100,
) -> Estimate:
    """Return what a LoRA of a rank would cost, or the largest rank for a budget of parameters.

    |Θ| = Σ r·(in + out) over the targets.

    Args:
        model: A path or an `hf://` reference, of which headers are read; an open `Checkpoint`; or a config.json, or a
            folder with nothing else, which needs transformers.
        rank: r, the same for every target. Default: 8, or the largest that fits the `budget`.
        targets: Modules by name, as PEFT's `target_modules`: each a path or what follows one of its dots, or a glob; or
            `"all-linear"`, every linear layer but embeddings and heads. A projection that is a slice of a fused weight
            is named as if it stood alone, as for `attach`. Default: `"all-linear"`.
        budget: The most parameters that the adapter may have; it chooses the rank. Default: `rank` decides.
        dtype: The dtype in which the adapters of `tasks` are stored: `"bf16"`, `"f16"`, `"f32"`. Default: `"bf16"`.
        tasks: For how many tasks the storage is told. Default: 100.

    Returns:
        Parameters and their share, bytes by dtype, Adam's state, and storage with and without LoRA.

    Raises:
        InvalidOption: A number is wrong, rank and budget are both given, or the budget does not reach for rank 1.
        IncompatibleAdapter: A target names no module that takes factors; all are listed.
        BadFile: The model cannot be read.
        MissingExtra: Shapes by config.json alone need transformers.

    Example:
        >>> estimate("base", 8, ["q_proj", "v_proj"]).parameters
        3584
    """
    options = Options().number("rank", rank, least=1, optional=True).number("budget", budget, least=1, optional=True)
    stored = options.number("tasks", tasks, least=1).parsed("dtype", dtypes.parse_float, dtype)
    if rank is not None and budget is not None:
        options.problems.append("rank and budget are both given; the budget chooses the rank")
    options.done()
    return cost(shapes_of(model), rank, targets, budget=budget, dtype=stored or "BF16", tasks=tasks)


def cost(
    model: Shapes, rank: int | None, targets: str | Sequence[str], *, budget: int | None = None, dtype: str = "BF16",
    tasks: int = 100,
) -> Estimate:  # fmt: skip
    """Return what `estimate` does, from shapes; parameters and errors are those of `estimate`."""
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    chosen = _chosen(model, names)
    per_rank = sum(map(_per_rank, chosen.values()))
    if budget is not None:
        rank = budget // per_rank
        if rank < 1:
            raise InvalidOption(f"budget is {budget}; rank 1 on these {len(chosen)} modules has {per_rank} parameters")
    rank = rank or 8
    parameters = rank * per_rank
    base = sum(math.prod(shape) for shape in model.shapes.values())
    sizes = {name: parameters * dtypes.bits(name) // 8 for name in ("F32", "BF16", "F16")}
    adapter = parameters * dtypes.bits(dtype) // 8
    return Estimate(
        model.name, rank, names, len(chosen), parameters, parameters / base, sizes, parameters * _ADAM, dtype, base,
        model.nbytes, base * _ADAM, tasks, model.nbytes + tasks * adapter, tasks * model.nbytes,
    )  # fmt: skip


def _per_rank(shape: tuple[int, ...]) -> int:
    """Return the parameters that each rank takes: in + out, for every expert of a stack."""
    if len(shape) == 3:
        return shape[0] * (shape[1] + shape[2])
    return shape[0] + math.prod(shape[1:])


def _chosen(model: Shapes, targets: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the weights that are meant; a slice of a fused one where no weight has the name."""
    nowhere = Path(model.name)
    specs = {name: TensorSpec("F32", shape, nowhere, 0, 0) for name, shape in model.shapes.items()}
    kinds = Kinds(specs, model.config)
    kind_of = {name: kinds.of(name, shape)[0] for name, shape in model.shapes.items()}
    if tuple(targets) == (ALL_LINEAR,):
        heads = {*HEADS, "decoder"} | kinds.heads  # BERT's head ends in .decoder
        able = [name for name, kind in kind_of.items() if kind == "linear" and name.split(".")[-2] not in heads]
        return {name: model.shapes[name] for name in able}
    able = [name for name, kind in kind_of.items() if kind != "other"]
    absent = [target for target in targets if not any(matches(target, name) for name in able)]
    inside = {f"{part.path}.weight": part for part in slices(model.shapes, model.config) if absent and part.shape}
    aliases = {name: part for name, part in inside.items() if any(matches(target, name) for target in absent)}
    once = {(part.fused, part.number): (name, part) for name, part in aliases.items()}
    parts = {name: part.shape for name, part in once.values() if part.shape}
    last = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in able})
    problems = [
        f"{target}: names no module that takes factors" + (f"; nearest: {', '.join(near)}" if near else "")
        for target in absent
        if not any(matches(target, name) for name in aliases)
        for near in [get_close_matches(target, last, cutoff=0.4)]
    ]
    if problems or not targets:
        named = counted(len(problems), "target names nothing", "targets name nothing") if problems else "no targets"
        raise IncompatibleAdapter(f"{model.name}: {named}", problems)
    meant = {name: model.shapes[name] for name in able if any(matches(target, name) for target in targets)}
    return meant | parts


def shapes_of(model: sources.Location | Checkpoint) -> Shapes:
    """Return the shapes of a model, from headers, or where there are no weights from config.json alone."""
    if not isinstance(model, Checkpoint):
        path = sources.local(model, "header")
        config = path / "config.json" if path.is_dir() else path
        alone = path.is_dir() and not any(each.suffix in _WEIGHTS for each in path.rglob("*"))
        if config.name == "config.json" and config.is_file() and (alone or path == config):
            return by_config(read_json(config), str(model))
        model = Checkpoint.open(path)
    view = logical(model)
    return Shapes(str(model.path), view.shapes, model.config, (model.stored or model).nbytes)


def by_config(config: Mapping[str, Any], name: str) -> Shapes:
    """Return the shapes that transformers' own class has for a config, on no device; remote code is never run."""
    try:
        import torch

        transformers: Any = import_module("transformers")
    except ImportError:
        raise MissingExtra(
            f"{name}: there are no weights, and transformers, which knows the shapes by config.json, is not installed",
            hint="pip install transformers, or name a model with its weights: only headers are read.",
        ) from None
    fields = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    try:
        known = transformers.AutoConfig.for_model(**fields)
        with torch.device("meta"):
            built = _class_of(transformers, config, known).from_config(known)
    except (ValueError, TypeError, KeyError) as error:
        text = " ".join(str(error).split())
        raise IncompatibleAdapter(f"{name}: transformers makes no model of this config.json: {text[:200]}") from None
    # A tied weight is there once.
    shapes = {path: tuple(parameter.shape) for path, parameter in built.named_parameters()}
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    bits = dtypes.bits(dtypes.parse_float(stored))
    return Shapes(name, shapes, config, sum(math.prod(shape) for shape in shapes.values()) * bits // 8)


def _class_of(transformers: Any, config: Mapping[str, Any], known: Any) -> Any:
    """Return the `Auto` class that makes the model of a config: with the head that its architecture names."""
    architectures = config.get("architectures") or [""]
    by_ending = {
        "ForConditionalGeneration": transformers.AutoModelForSeq2SeqLM,
        "ForMaskedLM": transformers.AutoModelForMaskedLM,
        "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
    }  # fmt: skip
    chosen = next((auto for ending, auto in by_ending.items() if str(architectures[0]).endswith(ending)), None)
    for auto in (chosen, transformers.AutoModelForCausalLM):
        if auto is not None and type(known) in auto._model_mapping:
            return auto
    return transformers.AutoModel
