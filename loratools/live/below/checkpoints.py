"""Checkpoints of a training that hold the base alone, for adapters are in no `state_dict`: said, or refused."""

from __future__ import annotations

from functools import cache

from loratools.decisions import warned
from loratools.errors import LoraToolsError
from loratools.live.below.stack import calling

_LOADERS = {
    ("_load_from_checkpoint", "transformers.trainer"),
    ("load_accelerator_state", "accelerate.checkpointing"),
    ("_load_model_state_dict", "torch.distributed.checkpoint.state_dict"),
}
"""Functions, each with its module, that read the checkpoint of a training."""

_SAVERS = {
    ("_save", "transformers.trainer"),
    ("save_state", "accelerate.accelerator"),
    ("_get_model_state_dict", "torch.distributed.checkpoint.state_dict"),
}
"""Functions, each with its module, that write one."""


def saved() -> None:
    """Warn, once, where a `state_dict` of a model with trainable adapters becomes the checkpoint of a training."""
    if caller := calling(_SAVERS):
        _say_saved(caller)


def resumed() -> None:
    """Look at who loads a `state_dict` into a model with trainable adapters, whose factors it cannot have.

    Raises `LoraToolsError` where a Trainer resumes: its training would go on from untrained factors. With others, who
    may have brought the adapter back already, it is a warning, once.
    """
    caller = calling(_LOADERS)
    if caller == "transformers.trainer":
        raise LoraToolsError(
            "this checkpoint has the base and no adapter, so training would start from untrained factors",
            hint="Train with live.TrainerMixin before Trainer: its checkpoints hold the adapters.",
        )
    if caller:
        _say_resumed(caller)


@cache
def _say_saved(caller: str) -> None:
    """Warn of a checkpoint without factors, once: every module has a reason to."""
    warned(
        "this checkpoint of %s holds the base alone, for adapters are in no state_dict: `lora.save` keeps them, and "
        "with transformers' Trainer live.TrainerMixin does",
        caller,
    )


@cache
def _say_resumed(caller: str) -> None:
    warned(
        "this checkpoint of %s holds the base alone: the adapter's factors stay as they are now; `lora.save` keeps "
        "them, and `live.load(..., trainable=True)` before the optimizer is made brings them back",
        caller,
    )
