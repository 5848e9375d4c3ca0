"""The modules of a base in the order of its code, for what PEFT draws for one after the other and does not store.

No file has that order: transformers' class of the model does, built from config.json without numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.dialects.peft.targets import Targets
from loratools.dialects.peft.types import Order
from loratools.errors import BadFile, IncompatibleAdapter, MissingExtra
from loratools.storage import dtypes
from loratools.storage.codecs.turned import CONV1D

if TYPE_CHECKING:
    from loratools.storage.checkpoint import Checkpoint


def in_code(path: Path, base: Checkpoint | None, targets: Targets, why: str) -> Order:
    """Return the linear layers and embeddings that a config targets, in the order of the code.

    `why` says what needs them, as a sentence without its end, and `path` whose it is. Raises `BadFile` without a base,
    or where the config does not name its targets, `MissingExtra` without transformers, and `IncompatibleAdapter` for a
    base that it has no class for.
    """
    why = f"{path}: {why}"
    if base is None:
        hint = "It is read with its base model at hand: by merge, unmerge and verify, and with --base by others."
        raise BadFile(why, hint=hint)
    if targets.modules is None:
        raise BadFile(f"{why}, and its config does not name the modules that it targets")
    if not base.shards:  # a running model, whose tensors come in the order of its code
        return Order(_of_tensors(base, targets), "F32")
    try:
        import torch

        transformers: Any = import_module("transformers")
    except ImportError:
        raise MissingExtra(
            f"{why}, and transformers, which knows the order, is not installed", hint="pip install transformers"
        ) from None
    model = _built(transformers, torch, base, why)
    shapes = {}
    for name, module in model.named_modules():
        turned = type(module).__name__ == "Conv1D"
        if turned or isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            out, inner = module.weight.shape[::-1] if turned else module.weight.shape
            if targets.select(name):
                shapes[name] = (out, inner)
    found = Counter(spec.dtype for spec in base.specs.values() if len(spec.shape) == 2 and spec.dtype in dtypes.FLOATS)
    return Order(shapes, found.most_common(1)[0][0] if found else "F32")


def _of_tensors(base: Checkpoint, targets: Targets) -> dict[str, tuple[int, int]]:
    turned = CONV1D.get(str(base.config.get("model_type")), frozenset())
    shapes = {}
    for name, spec in base.specs.items():
        module = name.removesuffix(".weight")
        if module != name and len(spec.shape) == 2 and targets.select(module):
            out, inner = spec.shape[::-1] if module.rpartition(".")[2] in turned else spec.shape
            shapes[module] = (out, inner)
    return shapes


def _built(transformers: Any, torch: Any, base: Checkpoint, why: str) -> Any:
    """Return the model of a base's config.json, on no device; remote code is never run."""
    config: Mapping[str, Any] = base.config
    fields = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    names = [name for name in fields.get("architectures") or () if isinstance(name, str)]
    kind = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if kind is None:
        raise IncompatibleAdapter(
            f"{why}, and transformers has no class {names[0]}, which the base's config.json names"
        )
    try:
        known = transformers.AutoConfig.for_model(**fields)
        with torch.device("meta"):
            return kind.from_config(known) if kind is transformers.AutoModel else kind(known)
    except (ValueError, TypeError, KeyError) as error:
        text = " ".join(str(error).split())[:200]
        raise IncompatibleAdapter(f"{why}, and transformers makes no model of the base's config.json: {text}") from None
