"""Tensors trained whole: where they go in a base, and which fields of config.json change with them.

Trainers save them as `modules_to_save`, a new head, biases, or the embedding and the head of a resized vocabulary. The
output gains a tensor that the base lacks; a tensor outside the numbered layers may have more or fewer rows than the
base's. Everything here goes by names and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loratools.adapter.model import Adapter
from loratools.adapter.naming.wrappers import Names
from loratools.adapter.placement.shared import EMBEDDINGS, HEADS, last_segment, main_tensor
from loratools.errors import IncompatibleAdapter, counted
from loratools.storage.lazy import LazyTensor

Shapes = Mapping[str, tuple[int, ...]]

FOLLOWED = ("architectures", "num_labels", "id2label", "label2id", "problem_type")
"""Fields of an adapter's own config.json that a new head brings with it."""

# PEFT's task types with a head of their own -> what transformers calls such a model
_TASKS = {
    "SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}  # fmt: skip
_LABELLED = ("SEQ_CLS", "TOKEN_CLS")


def resolve_replacements(
    adapter: Adapter, shapes: Shapes, config: Mapping[str, Any] | None = None
) -> dict[str, LazyTensor]:
    """Return output tensor name -> the tensor that takes its place, or is added under its own path.

    `shapes` are the base's tensors, `config` its config.json, which tells how transformers names what it loads.

    Raises `IncompatibleAdapter` that lists every tensor which is ambiguous, which does not fit, or which the base lacks
    although it belongs to a numbered layer or an embedding, so that it is no new head.
    """
    names, replaced, problems = Names(shapes, config), {}, []
    for path, lazy in adapter.replacements.items():
        module, _, parameter = path.rpartition(".")
        tensors = names.find(module, parameter) if module else [path] if path in shapes else []
        if len(tensors) > 1:
            problems.append(f"{path}: ambiguous: {', '.join(tensors)}")
        elif not tensors and names.loaded and (made := names.loaded.made(path)):
            parts = made[1].rule.sources
            problems.append(
                f"{path}: transformers makes it of {' and '.join(parts)}, and it cannot take their place whole"
            )
        elif not tensors and (_in_layer(path) or last_segment(module) in EMBEDDINGS):
            problems.append(f"{path}: not in the base")
        elif tensors and not _fits(tensors[0], lazy.shape, shapes[tensors[0]]):
            problems.append(f"{path}: trained with shape {lazy.shape}, the base has {shapes[tensors[0]]}")
        elif (name := tensors[0] if tensors else path) in replaced:
            problems.append(f"{path}: a second tensor for {name}")
        else:
            replaced[name] = lazy
    if problems:
        misfits = counted(len(problems), "tensor trained whole does", "tensors trained whole do")
        raise IncompatibleAdapter(f"{misfits} not fit this base model", problems)
    return replaced


def check_vocabulary(shapes: Shapes, replaced: Shapes) -> None:
    """Raise `IncompatibleAdapter` if embedding and head had one number of rows and now do not.

    `shapes` are the base's, `replaced` those of the tensors that take their place.
    """
    embedding, head = main_tensor(shapes, EMBEDDINGS), main_tensor(shapes, HEADS)
    if embedding is None or head is None or shapes[embedding][0] != shapes[head][0]:
        return
    rows = {name: replaced.get(name, shapes[name])[0] for name in (embedding, head)}
    if rows[embedding] != rows[head]:
        raise IncompatibleAdapter(
            "the adapter resizes the vocabulary, but brings only one of embedding and output head",
            [f"{name}: {count} rows after the merge" for name, count in rows.items()],
            hint="Save it with both: save_pretrained(..., save_embedding_layers=True).",
        )


def follow(
    config: Mapping[str, Any], shapes: Shapes, replaced: Shapes, adapter: Adapter, own: Mapping[str, Any] | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of config.json that change with tensors trained whole, and notes on them.

    `vocab_size` becomes the number of the embedding's rows. With a head that is new, or has another number of rows, the
    architecture and the labels become those of `own`, the adapter's own config.json. Without `own`, PEFT's task type
    and the head's rows tell them, as far as they can.
    """
    changes: dict[str, Any] = {}
    embedding = main_tensor(shapes, EMBEDDINGS)
    if embedding and embedding in replaced and replaced[embedding][0] != shapes[embedding][0]:
        changes |= _vocabulary(config, replaced[embedding][0])
    changed = {name: shape for name, shape in replaced.items() if shapes.get(name) != shape}
    heads = {name: shape for name, shape in changed.items() if last_segment(name) not in EMBEDDINGS + HEADS}
    if not heads or not config:
        return changes, []
    if own and (brought := {key: own[key] for key in FOLLOWED if key in own}):
        return changes | brought, [f"{', '.join(brought)} of config.json are those of the adapter's own"]
    derived = _derived(config, heads, str(adapter.settings.get("task_type") or ""))
    if derived:
        fields = ", ".join(derived)
        return changes | derived, [f"{fields} of config.json are told by the task type and the rows of the head"]
    names = ", ".join(sorted(heads))
    return changes, [f"config.json says nothing of {names}: the adapter brings no config of its own"]


def _derived(config: Mapping[str, Any], heads: Shapes, task: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    names = config.get("architectures")
    if task in _TASKS and isinstance(names, list) and names and isinstance(names[0], str):
        stem = re.sub(r"(LMHeadModel|Model|For[A-Z]\w*)$", "", names[0])
        fields["architectures"] = [stem + _TASKS[task]]
    counts = [shape[0] for name, shape in heads.items() if name.endswith("weight") and len(shape) == 2]
    labels = config.get("id2label")
    if task in _LABELLED and counts and (not isinstance(labels, dict) or len(labels) != min(counts)):
        fields["id2label"] = {str(i): f"LABEL_{i}" for i in range(min(counts))}
        fields["label2id"] = {f"LABEL_{i}": i for i in range(min(counts))}
    return fields


def _vocabulary(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    changes: dict[str, Any] = {"vocab_size": rows} if "vocab_size" in config else {}
    inner = config.get("text_config")
    if isinstance(inner, Mapping) and "vocab_size" in inner:
        changes["text_config"] = {**inner, "vocab_size": rows}
    return changes


def _fits(name: str, shape: tuple[int, ...], stored: tuple[int, ...]) -> bool:
    return shape == stored or (not _in_layer(name) and len(shape) == len(stored) > 0 and shape[1:] == stored[1:])


def _in_layer(path: str) -> bool:
    return re.search(r"\.\d+\.", f".{path}") is not None
