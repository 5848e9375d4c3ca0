"""What a model card says of an adapter or a model: fields of the front matter, and the section in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from loratools.adapter.naming.image import readings
from loratools.format.record import made_by
from loratools.storage.beside.cards import code
from loratools.surgery.inspect import AdapterSummary, CheckpointSummary

# PEFT's task_type -> the Hub's pipeline_tag
_TASKS = {
    "CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering", "FEATURE_EXTRACTION": "feature-extraction",
}  # fmt: skip
_ROOTS = ("model.diffusion_model.", "diffusion_model.")  # what single files have before the names of an image model
_VAE = ("first_stage_model.", "vae.")
_VLLM_RANK = 16  # vLLM's default of --max-lora-rank
_RANKS = (16, 32, 64, 128, 256, 320, 512)  # those that it takes


def adapter_facts(base_model: str | None, task: str | None, base_card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the front matter of an adapter's card, without the fields that are unknown."""
    tags = [f"base_model:adapter:{base_model}"] if base_model else []
    return _known(
        base_card,
        [*tags, "lora", "loratools", *(["transformers"] if task == "CAUSAL_LM" else [])],
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        library_name="diffusers" if base_card.get("library_name") == "diffusers" else "peft",
        pipeline_tag=_TASKS.get(task or "") or base_card.get("pipeline_tag"),
    )


def checkpoint_facts(
    summary: CheckpointSummary, base_model: str | None, record: Mapping[str, Any], base_card: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the front matter of a model's card; `record` is that of the merge that made it, if one did."""
    adapters = record.get("adapters") if record.get("operation") in ("merge", "switch", "unmerge") else None
    several = isinstance(adapters, list) and len(adapters) > 1
    return _known(
        base_card,
        [*(["merge"] if adapters else []), "loratools"],
        base_model=base_model,
        base_model_relation=("merge" if several else "finetune") if base_model and adapters else None,
        library_name=_library(summary),
        pipeline_tag=base_card.get("pipeline_tag") or ("text-generation" if _is_causal(summary) else None),
    )


def _known(base_card: Mapping[str, Any], tags: list[str], **facts: Any) -> dict[str, Any]:
    """Return the facts that are known, with the base's licence: its name and address too, which `other` needs."""
    facts |= {name: base_card.get(name) or None for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in facts.items() if value is not None} | {"tags": tags}


def adapter_section(summary: AdapterSummary, repo: str, base_model: str | None, task: str | None) -> str:
    """Return the section of an adapter's card: what it is, what it belongs to, and how to load it."""
    lines = ["## The adapter", ""]
    lines += _table(
        ("kind", "rank", "alpha", "scaling", "modules", "target modules"),
        [
            (code(g.kind), g.rank, f"{g.alpha:g}", f"{g.scaling:.6g}", g.modules, "<br>".join(map(code, g.targets)))
            for g in summary.groups
        ],
    )
    lines += ["", *_table(("", ""), _identity(summary, base_model)), "", "## How to load it", ""]
    lines += list(_loading(summary, repo, base_model, task))
    return "\n".join(lines)


def checkpoint_section(summary: CheckpointSummary, repo: str, base_model: str | None, file: str | None = None) -> str:
    """Return the section of a model's card; `file` is the name of a model that is one file."""
    rows = [
        *([("architecture", code(summary.architecture))] if summary.architecture else []),
        *([("base model", code(base_model))] if base_model else []),
        ("parameters", f"{summary.total.parameters:,}"),
        ("dtypes", ", ".join(summary.dtypes)),
        ("schema hash", code(summary.schema)),
        *([("made by", code(made_by(record)))] if (record := summary.record) else []),
    ]
    lines = ["## The model", "", *_table(("", ""), rows)]
    if file:
        lines += ["", "## How to load it", "", *_of_file(summary, repo, file)]
    elif not (summary.components or summary.classes):
        load = "AutoModelForCausalLM" if _is_causal(summary) else "AutoModel"
        loading = _block("python", f"from transformers import {load}", "", f'model = {load}.from_pretrained("{repo}")')
        lines += ["", "## How to load it", "", *loading]
    return "\n".join(lines)


def _library(summary: CheckpointSummary) -> str | None:
    """Return the library that loads a model, as the Hub calls it; None where that is left to its files."""
    if summary.components or summary.classes:
        return "diffusers"
    if _is_gguf(summary):
        return None
    if _is_image(summary):
        return "diffusion-single-file"
    return "transformers" if summary.architecture or summary.model_type or len(summary.shards) > 1 else None


def _of_file(summary: CheckpointSummary, repo: str, file: str) -> list[str]:
    """Return the lines that load a model which is one file."""
    if _is_gguf(summary):
        return _block("sh", f"llama-cli -hf {repo} -hff {file}")
    if not _is_image(summary):
        get = f'weights = load_file(hf_hub_download("{repo}", "{file}"))'
        imports = ("from huggingface_hub import hf_hub_download", "from safetensors.torch import load_file")
        return _block("python", *imports, "", get)
    whole = any(tensor.name.startswith(_VAE) for tensor in summary.tensors)
    folder = "checkpoints" if whole else "diffusion_models"
    return _block("sh", f"hf download {repo} {file} --local-dir ComfyUI/models/{folder}")


def _is_gguf(summary: CheckpointSummary) -> bool:
    return all(name.endswith(".gguf") for name in summary.shards)


def _is_image(summary: CheckpointSummary) -> bool:
    """Tell whether most weights of a model in one file are those of a family of image models, by their names."""
    weights = [tensor.name for tensor in summary.tensors if len(tensor.shape) > 1 and tensor.name.endswith(".weight")]
    roots = (root for root in _ROOTS if any(name.startswith(root) for name in weights))
    root = next(roots, "")
    modules = [name.removeprefix(root).removesuffix(".weight") for name in weights if name.startswith(root)]
    return len(summary.shards) == 1 and readings.most(modules)[0] > len(modules) / 2


def _is_causal(summary: CheckpointSummary) -> bool:
    return (summary.architecture or "").endswith("ForCausalLM")


def _identity(summary: AdapterSummary, base_model: str | None) -> Iterator[tuple[str, str]]:
    yield "base model", code(base_model) if base_model else "not named"
    base = summary.base
    if base and base.revision:
        yield "base revision", code(base.revision)
    if base and base.sealed:
        tiers = [f"schema {code(base.schema)}"] if base.schema else []
        tiers += [f"root {code(base.root)}"] if base.root else []
        tiers += [f"logical {code(base.logical)}"] if base.logical else []
        tiers += [f"digests of {len(base.tensors)} tensors"] if base.tensors else []
        yield "base hash", "<br>".join(tiers)
    yield "parameters", f"{summary.total.parameters:,} ({', '.join(summary.dtypes)})"
    if summary.digest:
        yield "digest", code(summary.digest)
    if summary.provenance:
        yield "made by", "<br>".join(code(f"{step.operation}, {step.tool}") for step in summary.provenance)


def _loading(summary: AdapterSummary, repo: str, base_model: str | None, task: str | None) -> Iterator[str]:
    base = base_model or "BASE"
    if task == "CAUSAL_LM":
        yield from _block(
            "python", "from peft import PeftModel", "from transformers import AutoModelForCausalLM", "",
            f'model = AutoModelForCausalLM.from_pretrained("{base}")',
            f'model = PeftModel.from_pretrained(model, "{repo}")',
        )  # fmt: skip
        rank = max((group.rank for group in summary.groups), default=0)
        wide = f" --max-lora-rank {next((r for r in _RANKS if r >= rank), rank)}" if rank > _VLLM_RANK else ""
        name = repo.rpartition("/")[2]
        yield from ("", *_block("sh", f"vllm serve {base} --enable-lora{wide} --lora-modules {name}={repo}"))
    else:
        yield from _block(
            "python", "from peft import PeftModel", "", f'model = PeftModel.from_pretrained(model, "{repo}")'
        )
    target = f"hf://{base_model}" if base_model and "/" in base_model else "BASE"
    yield from ("", *_block("sh", f"loratools inspect hf://{repo}", f"loratools merge {target} hf://{repo} -o merged"))


def _block(language: str, *lines: str) -> list[str]:
    return [f"```{language}", *lines, "```"]


def _table(heading: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    heading = list(heading)
    body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [f"| {' | '.join(heading)} |", f"|{'---|' * len(heading)}", *body]
