"""Every model type of transformers, built small: a merge on disk against PEFT's in memory. A line for each.

    python -m tests.interop.every results.jsonl [TYPE …]
    python -m tests.interop.every table results.jsonl

The first writes a line for each model type as it goes; the second makes of them the table `every.json`, of which
`tests/interop/test_every.py` runs a sample. What is not right there has its reason.
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

WHERE = ("attention", "experts", "linear", "older")
"""What is trained: linear layers of the attention, stacked weights of experts, all linear layers; and those again, the
adapter under the names of files and the base as transformers has it in memory."""

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
    became = {where: _outcome(loaded, where, folder) for where in WHERE[:-1]}
    return became | {"older": _older(loaded, folder) if became["linear"] == "right" else "none"}


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
        return f"refused: {_short(' | '.join([error.message, *error.problems[:2]]))}"
    base, ours, theirs = (load(folder / name) for name in ("base", "ours", "peft"))
    if ours.keys() != theirs.keys():
        return f"peft: it saves other names: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    again = load(folder / "again")  # loading alone may change what an adapter does not: rows of padding
    touched = [name for name in ours if not same(again[name], theirs[name])]
    far = [name for name in ours if not near(ours[name], theirs[name] if name in touched else base[name])]
    return f"wrong: {len(far)} of {len(touched)}: {far[:3]}" if far else "right" if touched else "none"


def _older(model: Any, folder: Path) -> str:
    """Return what became of the adapter of linear layers under names of files, on a base of names of modules."""
    from safetensors.torch import load_file, save_file

    from loratools.errors import LoraToolsError
    from loratools.surgery.merge import merge

    files = _files_of_modules(model, load(folder / "base"))
    tensors = {}
    for key, tensor in load_file(folder / "adapter" / "adapter_model.safetensors").items():
        module, part = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB]\.weight)", key).groups()  # type: ignore[union-attr]
        file = files.get(f"{module}.weight", f"{module}.weight").removesuffix(".weight")
        tensors[f"base_model.model.{file}.{part}"] = tensor
    if tensors.keys() == load_file(folder / "adapter" / "adapter_model.safetensors").keys():
        return "none"
    for name in ("older", "memory", "ours"):
        shutil.rmtree(folder / name, ignore_errors=True)
    shutil.copytree(folder / "adapter", folder / "older")
    save_file(tensors, folder / "older" / "adapter_model.safetensors")
    config = json.loads((folder / "older" / "adapter_config.json").read_text(encoding="utf-8"))
    config["target_modules"] = sorted(
        {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    )
    (folder / "older" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "memory").mkdir()
    shutil.copy(folder / "base" / "config.json", folder / "memory")
    base = _in_memory(model)
    save_file(base, folder / "memory" / "model.safetensors")
    theirs = _in_memory(type(model).from_pretrained(folder / "peft"))
    try:
        merge(folder / "memory", [folder / "older"], folder / "ours")
    except LoraToolsError as error:
        return f"refused: {_short(' | '.join([error.message, *error.problems[:2]]))}"
    ours = load(folder / "ours")
    far = [name for name in ours if not near(ours[name], theirs[name])]
    return f"wrong: {len(far)} of {len(ours)}: {far[:3]}" if far else "right"


def _in_memory(model: Any) -> dict[str, Any]:
    """Return a model's tensors under the names of its modules, each once."""
    once = {tensor.data_ptr(): name for name, tensor in reversed(model.state_dict().items())}
    return {name: each.contiguous() for name, each in model.state_dict().items() if once[each.data_ptr()] == name}


def _files_of_modules(model: Any, base: Mapping[str, Any]) -> dict[str, str]:
    """Return parameter -> tensor of the files for all that transformers only renames."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    mapping = get_model_conversion_mapping(model)
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    renamings = [each for each in mapping if not isinstance(each, WeightConverter)]
    inside = model.state_dict()
    files = {}
    for name in sorted(base):
        new, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, inside)
        if converter is None and new in inside and name not in inside:
            files[new] = name
    return files


_NO_OUT_PROJ = ("falcon_h1", "falcon_mamba", "mamba", "mamba2")
"""Model types whose `out_proj` PEFT refuses to change."""


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
        if type(module) in (torch.nn.Linear, Conv1D)
        and module is not head
        and module.weight.numel()
        and not (model.config.model_type in _NO_OUT_PROJ and name.endswith("out_proj"))
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


def _short(error: Exception | str) -> str:
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return re.sub(r"/\S+/model/", "", " ".join(text.split()))[:160]


TABLE = Path(__file__).with_name("every.json")
"""What became of each model type: [class, outcome for each of `WHERE`]; the last line of each in the results counts."""


def write_table(results: Path) -> None:
    """Make the table of the results of a whole run."""
    lines = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    rows = {line["type"]: [line["class"], *(line[where] for where in WHERE)] for line in lines}
    each = (f"{json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(rows.items()))
    TABLE.write_text("{\n" + ",\n".join(each) + "\n}\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Write a line for each model type, and count them; or make the table."""
    if arguments[0] == "table":
        write_table(Path(arguments[1]))
        return
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
