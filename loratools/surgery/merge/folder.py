"""The files beside the weights: tokenizer, config, card, index. They come along with a merged model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.engine.plan import MergePlan
from loratools.storage.companions import RECORD
from loratools.storage.layout import index_json
from loratools.storage.strict_json import read_json
from loratools.surgery.merge.card import card


def write_companions(plan: MergePlan, sources: Mapping[str, Path], record: Mapping[str, Any], folder: Path) -> None:
    """Write everything beside the weights into `folder`; the index comes last."""
    for name, source in sources.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == "config.json" and plan.config:
            config = {**read_json(source), **plan.config}
            target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        elif name == "README.md":
            target.write_text(card(source.read_text(encoding="utf-8", errors="replace"), record), encoding="utf-8")
        else:
            shutil.copyfile(source, target)
    if "README.md" not in sources and sources:
        (folder / "README.md").write_text(card("", record), encoding="utf-8")
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_indexes(plan, folder)


def write_indexes(plan: MergePlan, folder: Path) -> None:
    """Write the index of every sharded part; a model in one file has none."""
    if plan.laid_out:
        for path, index in plan.base.indexes.items():
            parent = path.relative_to(plan.base.root).parent
            part = [file for file in plan.files if Path(file.name).parent == parent]
            prefix = next((s.prefix for s in plan.base.shards if s.path.parent == path.parent), "")
            found = index_json(part, index.get("metadata") if isinstance(index.get("metadata"), dict) else None)
            weight_map = {slot.name.removeprefix(prefix): Path(file.name).name for file in part for slot in file.slots}
            _dump(folder / parent / path.name, {**found, "weight_map": dict(sorted(weight_map.items()))})
    elif len(plan.files) > 1:
        _dump(folder / "model.safetensors.index.json", index_json(plan.files))


def _dump(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
