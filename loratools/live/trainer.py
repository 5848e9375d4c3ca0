"""A mixin for `transformers.Trainer`: its checkpoints hold the trainable adapters alone, and it resumes from them.

Without it a Trainer saves the base, which nothing trains, and would resume with untrained factors; loading such a
checkpoint into a model with trainable adapters is an error (`site.Bank`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from loratools.errors import LoraToolsError
from loratools.format.clauses import ADAPTER_FILE
from loratools.live.handle import Lora, handle_of
from loratools.live.restore import restore


class TrainerMixin:
    """Stands before `Trainer` in the bases of a class: `class Mine(live.TrainerMixin, transformers.Trainer): ...`.

    One trainable adapter is saved in the checkpoint's folder itself, as PEFT does it; several in folders of their own.

    Example:
        >>> class Mine(TrainerMixin, transformers.Trainer): ...  # doctest: +SKIP
        >>> Mine(model, arguments, train_dataset=data).train(resume_from_checkpoint=True)  # doctest: +SKIP
    """

    model: Any
    args: Any
    state: Any
    processing_class: Any

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        lora, names = _trainable(self.model)
        for name in names:
            target = folder / name
            lora.save(target, name, force=True)
            if len(names) == 1:
                for file in target.iterdir():
                    file.replace(folder / file.name)
                shutil.rmtree(target)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        lora, names = _trainable(self.model if model is None else model)
        folder = Path(resume_from_checkpoint)
        for name in names:
            inside = folder if len(names) == 1 else folder / name
            if not (inside / ADAPTER_FILE).is_file():
                raise LoraToolsError(
                    f"{inside}: no {ADAPTER_FILE}, from which the adapter {name!r} could go on",
                    hint="Resume from a checkpoint that a Trainer with live.TrainerMixin wrote.",
                )
            restore(lora, name, inside)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _trainable(model: Any) -> tuple[Lora, list[str]]:
    lora = handle_of(model)
    names = [name for name, entry in lora.entries.items() if entry.trainable]
    if not names:
        raise LoraToolsError("this model has no trainable adapter, so there is nothing to save or to resume")
    return lora, names
