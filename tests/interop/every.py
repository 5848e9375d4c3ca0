"""Every model type of transformers, built small: a merge on disk against PEFT's in memory. A line for each.

    python -m tests.interop.every results.jsonl [TYPE …]

makes the table that `tests/interop/test_every.py` draws its sample from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WHERE = ("attention", "linear", "experts")
"""What is trained: linear layers of the attention, all linear layers, stacked weights of experts."""

CLOSE = 1e-5
"""How far a weight may be from PEFT's, as part of its largest element."""

_ATTENTION = re.compile(r"(?i)att|(^|\.)mixer\.|(^|[._])(q|k|v|o|qkv|kv)(_proj|_b_proj|_a_proj)?$|query|key|value")


def outcomes(model: Any, folder: Path) -> dict[str, str]:
    """Return for each of `WHERE` what became of a merge: `right`, `none` (nothing to train), or `REASON: …`.

    `refused` is our error, `wrong` a tensor that differs, `peft` what PEFT or transformers cannot do themselves.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        model.save_pretrained(folder / "base")
        loaded = type(model).from_pretrained(folder / "base")
        loaded.save_pretrained(folder / "again")
        base, again = load(folder / "base"), load(folder / "again")
    except Exception as error:
        return dict.fromkeys(WHERE, f"peft: transformers does not save and load it: {_short(error)}")
    if base.keys() != again.keys():
        return dict.fromkeys(WHERE, "peft: transformers saves what it loads under other names")
    return {where: _outcome(loaded, where, folder) for where in WHERE}


def _outcome(model: Any, where: str, folder: Path) -> str:
    from loratools.errors import LoraToolsError
    from loratools.surgery.merge import merge

    chosen = targets(model, where)
    if not any(chosen.values()):
        return "none"
    for name in ("adapter", "peft", "ours"):
        shutil.rmtree(folder / name, ignore_errors=True)
    try:
        save_by_peft(model, chosen, folder)
    except Exception as error:
        return f"peft: {_short(error)}"
    try:
        merge(folder / "base", [folder / "adapter"], folder / "ours")
    except LoraToolsError as error:
        return f"refused: {error.message} | {'; '.join(error.problems[:3])}"
    base, ours, theirs = (load(folder / name) for name in ("base", "ours", "peft"))
    if ours.keys() != theirs.keys():
        return f"peft: it saves other names: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    again = load(folder / "again")  # loading alone may change what an adapter does not: rows of padding
    touched = [name for name in ours if not same(again[name], theirs[name])]
    far = [name for name in ours if not near(ours[name], theirs[name] if name in touched else base[name])]
    return f"wrong: {len(far)} of {len(touched)}: {far[:3]}" if far else "right" if touched else "none"


def targets(model: Any, where: str) -> dict[str, list[str]]:
    """Return what to train of a model, as settings of PEFT's LoraConfig."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if where == "experts":
        names = [name for name, each in model.named_parameters() if each.dim() == 3 and "experts" in name]
        return {"target_parameters": names, "target_modules": []}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = [
        name
        for name, module in model.named_modules()
        if type(module) in (torch.nn.Linear, Conv1D) and module is not head and module.weight.numel()
    ]
    return {"target_modules": linear if where == "linear" else [name for name in linear if _ATTENTION.search(name)]}


def save_by_peft(model: Any, chosen: Mapping[str, Any], folder: Path) -> None:
    """Save an adapter with random factors, and the model that PEFT merges it into."""
    import copy

    import torch
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, lora_alpha=5, **chosen))
    generator = torch.Generator().manual_seed(7)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    peft.save_pretrained(folder / "adapter", save_embedding_layers=False)
    merged = peft.merge_and_unload()
    merged._weight_conversions = getattr(model, "_weight_conversions", None)
    merged.save_pretrained(folder / "peft")


def near(ours: Any, theirs: Any) -> bool:
    """Tell whether two tensors agree to `CLOSE` of the largest element."""
    if same(ours, theirs) or ours.shape != theirs.shape or not ours.is_floating_point():
        return same(ours, theirs)
    return float((ours.double() - theirs.double()).abs().max()) <= CLOSE * float(theirs.double().abs().max())


def same(first: Any, second: Any) -> bool:
    """Tell whether two tensors have the same bytes."""
    import torch

    return first.shape == second.shape and torch.equal(
        first.contiguous().flatten().view(torch.uint8), second.contiguous().flatten().view(torch.uint8)
    )


def load(folder: Path) -> dict[str, Any]:
    """Return every tensor of a model in a folder."""
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def main(arguments: list[str]) -> None:
    """Write a line for each model type, and count them."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "critical", "HF_HUB_OFFLINE": "1"}
    warnings.filterwarnings("ignore")
    from transformers.utils.logging import disable_progress_bar

    from tests.make.small import built, types

    disable_progress_bar()
    counts: Counter[tuple[str, str]] = Counter()
    with Path(arguments[0]).open("a", encoding="utf-8") as out, tempfile.TemporaryDirectory() as folder:
        for model_type, cls in types().items():
            if arguments[1:] and model_type not in arguments[1:]:
                continue
            try:
                became = outcomes(built(cls), Path(folder) / "model")
            except Exception as error:
                became = dict.fromkeys(WHERE, f"unbuilt: {_short(error)}")
            counts.update((where, text.partition(":")[0]) for where, text in became.items())
            out.write(json.dumps({"type": model_type, "class": cls.__name__, **became}) + "\n")
            out.flush()
    for (where, text), count in sorted(counts.items()):
        print(where, text, count)


if __name__ == "__main__":
    main(sys.argv[1:])
