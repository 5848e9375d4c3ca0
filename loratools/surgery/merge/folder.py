"""The files beside the weights: tokenizer, config, card, index. They come along with a merged model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.engine.plan import MergePlan
from loratools.storage.companions import RECORD, copy_companions, json_text
from loratools.storage.layout import index_json
from loratools.storage.strict_json import read_json
from loratools.surgery.merge.card import card


def write_companions(plan: MergePlan, sources: Mapping[str, Path], record: Mapping[str, Any], folder: Path) -> None:
    """Write everything beside the weights into `folder`; the index comes last."""
    texts: dict[str, str | None] = {}
    if "config.json" in sources and plan.config:
        texts["config.json"] = json_text({**read_json(sources["config.json"]), **plan.config})
    if sources:
        own = sources.get("README.md")
        texts["README.md"] = card(own.read_text(encoding="utf-8", errors="replace") if own else "", record)
    copy_companions(sources, folder, texts | {RECORD: json_text(record)})
    _write_indexes(plan, folder)


def _write_indexes(plan: MergePlan, folder: Path) -> None:
    """Write the index of every sharded part; a model in one file has none."""
    if plan.laid_out:
        for path, index in plan.base.indexes.items():
            parent = path.relative_to(plan.base.root).parent
            part = [file for file in plan.files if Path(file.name).parent == parent]
            prefix = next((s.prefix for s in plan.base.shards if s.path.parent == path.parent), "")
            metadata = index.get("metadata") if isinstance(index.get("metadata"), dict) else None
            weight_map = {slot.name.removeprefix(prefix): Path(file.name).name for file in part for slot in file.slots}
            document = {**index_json(part, metadata), "weight_map": dict(sorted(weight_map.items()))}
            _write(folder / parent / path.name, document)
    elif len(plan.files) > 1:
        _write(folder / "model.safetensors.index.json", index_json(plan.files))


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json_text(document), encoding="utf-8")
