"""What a model's parameters belong to: linear layers, convolutions, embeddings, experts; and the heads of its task.

By names, shapes and config.json alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools.adapter.naming.stacked import known_type
from loratools.adapter.naming.wrappers import Names
from loratools.adapter.placement import stacks
from loratools.adapter.placement.classes import model_class
from loratools.adapter.placement.conv1d import Conv1D
from loratools.adapter.placement.shared import EMBEDDINGS, HEADS, architectures
from loratools.storage.header import TensorSpec

# Ends of transformers' class names -> PEFT's task, and the heads that it then saves whole.
_TASKS = {
    "ForCausalLM": ("CAUSAL_LM", ()), "LMHeadModel": ("CAUSAL_LM", ()),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}  # fmt: skip

_EMBEDDINGS = frozenset({*EMBEDDINGS, "wpe", "relative_attention_bias"})


class Kinds:
    """Tells what the parameters of a model belong to, by names and shapes."""

    def __init__(self, specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> None:
        self._shapes = {name: spec.shape for name, spec in specs.items()}
        self._with_experts = {name.partition(".experts.")[0] for name in specs if ".experts." in name}
        self._conv1d = Conv1D.of(self._shapes, str(config.get("model_type") or ""))
        self.heads = frozenset(task_of(config)[1])
        self._known, self._names = known_type(config), Names(self._shapes)

    def of(self, path: str, shape: tuple[int, ...]) -> tuple[str, bool]:
        """Return one of `selection.KINDS` or `other`, and whether the weight is stored [in, out]."""
        module, _, parameter = path.rpartition(".")
        parent, _, last = module.rpartition(".")
        if len(shape) == 3 and module.endswith("experts"):
            return "experts", stacks.as_class_says(module, self._known, self._names, self._shapes)
        if parameter != "weight" or not 2 <= len(shape) <= 5 or 0 in shape:
            return "other", False
        if last in ("gate", "router") and parent in self._with_experts:
            return "other", False  # a router is a module of its own kind, which PEFT cannot give factors
        if len(shape) > 2:
            return "conv", False
        # An embedding has no bias; Flux's x_embedder, which is a linear layer, does.
        named = last in _EMBEDDINGS or ("embed" in last and last not in HEADS)
        if named and f"{module}.bias" not in self._shapes:
            return "embedding", False
        return "linear", self._conv1d.likely(module)


def task_of(config: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """Return PEFT's name for the task of a model, by the architecture in its config, and the heads it saves whole.

    A class that generates from sounds or images has none: PEFT would call it with the arguments of a text model.
    """
    name = next(iter(architectures(config)), "")
    if name.endswith("ForConditionalGeneration") and (model := model_class(config)) and not model.shares_words:
        return None, ()
    return next((known for ending, known in _TASKS.items() if name.endswith(ending)), (None, ()))
