"""The files beside the weights of a merged model: tokenizer, config, model card, index."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.engine.plan import MergePlan
from loratools.format.record import ERROR, SAYS, TRIGGERS
from loratools.storage.beside.cards import code, cut, read_card
from loratools.storage.codecs.state import BESIDE, HEADER
from loratools.storage.codecs.state import beside as beside_config
from loratools.storage.companions import RECORD, Companions, copy_companions, json_text
from loratools.storage.layout import index_json
from loratools.storage.strict_json import read_json
from loratools.surgery.merge.components import restated
from loratools.surgery.merge.single import write_record

_FRONT = (
    r"(?:base_model: .*\n)?(?:base_model_relation: merge\n)?library_name: transformers\ntags: \[loratools, [a-z]+\]\n"
)
_ALONE = f"---\n{_FRONT}---"  # the front matter that a record alone made
_SECTION = re.compile("<!-- loratools merge -->"), "<!-- /loratools merge -->", "\n"


def write_companions(plan: MergePlan, beside: Companions, record: Mapping[str, Any], folder: Path) -> None:
    """Write everything beside the weights into `folder`; indexes come last, and a model in one file has none.

    Of a model that is one safetensors file the record goes into its header, and nothing lies beside it.
    """
    if plan.single:
        write_record(plan, record, folder)
        return
    sources = beside.sources
    texts: dict[str, str | None] = {RECORD: json_text(record)}
    if "config.json" in sources and (plan.config or plan.dropped):
        fields = {**read_json(sources["config.json"]), **plan.config}
        not_its = {*plan.dropped, HEADER}
        texts["config.json"] = json_text({key: value for key, value in fields.items() if key not in not_its})
    texts |= {name: json_text(config) for name, config in restated(plan).items() if name in sources}
    if BESIDE in sources and (plan.config or plan.dropped):
        document = beside_config(read_json(sources[BESIDE]), plan.config, plan.dropped)
        texts[BESIDE] = None if document is None else json_text(document)
    if sources:
        own = sources.get("README.md")
        texts["README.md"] = card(read_card(own) if own else "", record)
    copy_companions(beside, folder, texts)
    indexes: dict[Path, dict[str, object]] = {}
    if plan.laid_out:
        for path, index in plan.base.indexes.items():
            name = path.relative_to(plan.base.root)
            prefix = next((shard.prefix for shard in plan.base.shards if shard.path.parent == path.parent), "")
            metadata = index.get("metadata")
            indexes[name] = index_json(plan.files, metadata if isinstance(metadata, dict) else {}, name.parent, prefix)
    elif len(plan.files) > 1:
        indexes[Path("model.safetensors.index.json")] = index_json(plan.files)
    for name, document in indexes.items():
        (folder / name).write_text(json_text(document), encoding="utf-8", newline="\n")


def card(text: str, record: Mapping[str, Any]) -> str:
    """Return a model card with a section on this merge; a person's own text stays as it is."""
    rows = "\n".join(
        f"| {_named(each, i)} | {each['kinds']} | {each['ranks']} | {_weight(each)} | `{each['digest']}` |"
        for i, each in enumerate(record["adapters"], 1)
    )
    base = record["base"]
    identity = base.get("id")
    named = _named(base) if identity else "named below by its hash"
    of_base = f"the base model {named} (schema hash `{base['schema']}`)"
    table = f":\n\n| adapter | kind | rank | weight | digest |\n|---|---|---|---|---|\n{rows}\n\n" if rows else ".\n\n"
    table += _words(record)
    if record.get("operation") == "dequantize":
        made = f"Made with {record['tool']} from {of_base}.\n\n"
        how = "Every quantized weight is stored as the number that its codes stand for, rounded once to 16 bit. "
    elif ERROR in record:
        holds = "with these adapters" if rows else "without an adapter"
        how = (
            f"Adapters were taken out by subtraction, which is approximate: no element is further than "
            f"{record[ERROR]:.3g} from the base model {holds}. "
        )
        what = "switch" if record.get("operation") == "switch" else "unmerge"
        made = f"An approximate {what} with {record['tool']}, of a merge into {of_base}{table}"
    else:
        how = "W' = W + Σ weight·scaling·B·A in float32, rounded once. "
        made = f"Merged with {record['tool']} from {of_base}{table}"
    section = (
        f"<!-- loratools merge -->\n## How this model was made\n\n{made}{how}The whole record: `{RECORD}`.\n"
        "<!-- /loratools merge -->\n"
    )
    relation = "base_model_relation: merge\n" if rows else ""
    front = f"base_model: {json.dumps(identity)}\n{relation}" if identity else ""
    tag = "merge" if rows else record.get("operation", "merge")
    alone = f"---\n{front}library_name: transformers\ntags: [loratools, {tag}]\n---"
    own = cut(text, *_SECTION)[0].rstrip("\n")
    own = "" if own and re.fullmatch(_ALONE, own) else own
    return f"{own or alone}\n\n{section}"


def _named(entry: Mapping[str, Any], number: int = 0) -> str:
    """Return the name of an adapter or a base in a record, and its commit where it is one of the Hub.

    Records hold no name of a folder, which is another where they are made again: without an id it has its `number`.
    """
    at = f" at {code(str(entry['revision']))}" if entry.get("revision") else ""
    return (code(str(entry["id"])) if entry.get("id") else f"adapter {number}") + at


def _words(record: Mapping[str, Any]) -> str:
    """Return the words that call what each adapter was trained on, as the headers of their files say them."""
    stated = [adapter.get(SAYS) for adapter in record["adapters"]]
    said = [entries if isinstance(entries, Mapping) else {} for entries in stated]  # a person may have edited it
    lines = [
        f"- adapter {i}: {code(words)}\n"
        for i, entries in enumerate(said, 1)
        if (words := ", ".join(dict.fromkeys(str(entries[name]) for name in TRIGGERS if entries.get(name))))
    ]
    return f"Trigger words:\n\n{''.join(lines)}\n" if lines else ""


def without_section(text: str, record: Mapping[str, Any]) -> str:
    """Return a model card as it was before a merge: without its section; empty if the merge wrote all of it."""
    return "" if text == card("", record) else cut(text, *_SECTION)[0].strip("\n") + "\n"


def _weight(adapter: Mapping[str, Any]) -> str:
    """Return the weight of an adapter in words: one number, or what its modules have."""
    return str(adapter.get("weights") or format(adapter["weight"], "g"))
