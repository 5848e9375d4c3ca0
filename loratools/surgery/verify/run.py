"""A second opinion: run base and merged model in transformers; hold the merged one against the live adapter.

The adapter is applied beside the base's weights by PEFT, where it is installed and reads the file, else by the live
half under the adapter's own module names: reading, naming and orientation are judged by the model's own code. With y
the logits of seeded random tokens, computed in float32,

    effect     ‖y(base + adapter) − y(base)‖
    distance   ‖y(merged) − y(base + adapter)‖
    noise      ‖y(merged, each changed number moved by up to half a unit of its last place at random) − y(merged)‖

A merge that was only rounded is about as far away as the noise is large. An adapter whose effect is not above the noise
cannot be told from none at all, which is said. Remote code is never run.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loratools import live
from loratools.adapter.input import AdapterInput
from loratools.errors import MissingExtra, UnsupportedAdapter
from loratools.storage import dtypes
from loratools.storage.checkpoint import Checkpoint

ROWS, TOKENS = 2, 12
TIMES = 4.0  # the noise may be below what rounding did, for it is one draw
_TALKING = ("transformers", "torchao", "torch", "bitsandbytes", "peft", "accelerate", "huggingface_hub")
FLOOR = 2e-5  # of ‖y‖: float32 sums in another order


@dataclass(frozen=True, slots=True)
class Run:
    """What running the models tells: three norms of logits, who applied the adapter, the seed of the tokens.

    `ok` where the distance is no larger than rounding explains; `tells` unless the adapter's effect is below that.
    """

    ok: bool
    tells: bool
    effect: float
    distance: float
    noise: float
    applied_by: str
    seed: int


@contextmanager
def _others_are_quiet() -> Iterator[None]:
    """Let no library draw bars, or say less than an error, while the block runs: what counts is in the result."""
    bars = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(ImportError):  # which `_load` tells
            from transformers.utils import logging as transformers_talk

            bars = transformers_talk.is_progress_bar_enabled()
            if bars:
                transformers_talk.disable_progress_bar()  # type: ignore[no-untyped-call]
        # After the import, which sets levels of its own.
        loggers = [logging.getLogger(name) for name in _TALKING]
        levels = [logger.level for logger in loggers]
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(max(level, logging.ERROR))
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars:
                transformers_talk.enable_progress_bar()  # type: ignore[no-untyped-call]


@_others_are_quiet()
@torch.no_grad()
def run(model: Checkpoint, base: Checkpoint, inputs: Sequence[AdapterInput], changed: Sequence[str], seed: int) -> Run:
    """Run base, base + adapters and merged model on seeded tokens; `changed` are the tensors that the merge changed.

    Raises `MissingExtra` without transformers, `UnsupportedAdapter` for a model that transformers has no class for.
    """
    running = _load(base)
    given = _inputs(running, seed)
    before = _logits(running, given)
    applied_by, with_adapter = _apply(running, inputs)
    expected = _logits(with_adapter, given)
    del running, with_adapter
    merged = _load(model)
    after = _logits(merged, given)
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(merged.named_parameters())
    for name in changed:
        parameter = parameters.get(name)
        if parameter is not None:
            bits = dtypes.MANTISSA.get(model.specs[name].dtype, 24)
            moved = torch.rand(parameter.shape, generator=generator).sub_(0.5).mul_(2.0 ** (1 - bits))
            parameter.mul_(moved.add_(1))
    noise = float((_logits(merged, given) - after).norm())
    floor = FLOOR * float(after.norm())
    effect, distance = float((expected - before).norm()), float((after - expected).norm())
    allowed = TIMES * noise + floor
    return Run(distance <= allowed, effect > allowed, effect, distance, noise, applied_by, seed)


def _load(checkpoint: Checkpoint) -> Any:
    """Return the model in float32, built by the class that its config.json names."""
    try:
        import transformers
    except ImportError:
        raise MissingExtra("running a model takes transformers; install loratools[interop]") from None
    names = [name for name in checkpoint.config.get("architectures") or () if isinstance(name, str)]
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None or not checkpoint.root.is_dir():
        said = f"the class {names[0]}" if names else "no class"
        raise UnsupportedAdapter(
            f"{checkpoint.path}: config.json names {said}, which transformers does not have, so nothing can be run",
            hint="Remote code is never run; without --run everything else is verified.",
        )
    loaded = kind.from_pretrained(checkpoint.root, dtype=torch.float32, trust_remote_code=False, local_files_only=True)
    return loaded.eval()


def _inputs(model: Any, seed: int) -> dict[str, Tensor]:
    """Return random inputs of the kinds that a model's class takes: tokens, pixels, or features of sound."""
    generator = torch.Generator().manual_seed(seed)
    config, accepted = model.config, inspect.signature(model.forward).parameters
    main = model.main_input_name
    vision = getattr(config, "vision_config", config)
    embedding: Any = model.get_input_embeddings() if "input_ids" in accepted else None
    given: dict[str, Tensor] = {}
    if main == "pixel_values" or hasattr(model, "logit_scale"):
        side = getattr(vision, "image_size", 64)
        given["pixel_values"] = torch.rand(ROWS, getattr(vision, "num_channels", 3), side, side, generator=generator)
    if main == "input_features":
        given[main] = torch.rand(ROWS, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
    vocabulary = embedding.weight.shape[0] if isinstance(embedding, nn.Embedding) else getattr(config, "vocab_size", 0)
    if main == "input_ids" and vocabulary:
        given[main] = torch.randint(vocabulary, (ROWS, TOKENS), generator=generator)
    if getattr(config, "is_encoder_decoder", False) and vocabulary:
        given["decoder_input_ids"] = torch.randint(vocabulary, (ROWS, TOKENS), generator=generator)
    elif hasattr(model, "logit_scale"):
        given["input_ids"] = torch.randint(config.text_config.vocab_size, (ROWS, TOKENS), generator=generator)
    if not given:
        raise UnsupportedAdapter(f"{type(model).__name__} takes {main}, of which no random example is known here")
    return given


def _logits(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    output = model(**given)
    name = next((name for name in ("logits", "logits_per_image") if name in output), None)
    first: Tensor = output[name] if name else output[0]
    return first.double()


def _apply(model: Any, inputs: Sequence[AdapterInput]) -> tuple[str, nn.Module]:
    """Apply adapters beside the weights of a running model; return who did, and the model to call."""
    paths = [each.path for each in inputs if each.path is not None]
    alone = len(paths) == len(inputs) == 1 and inputs[0].weight == 1 and not inputs[0].words
    if alone and (paths[0] / "adapter_config.json").is_file() and inputs[0].adapter.dialect in ("peft", "loratools"):
        try:
            import peft

            return f"PEFT {peft.__version__}", peft.PeftModel.from_pretrained(model, paths[0]).eval()
        except ImportError:  # the live half can do it as well
            pass
    lora = live.Lora(model)
    for number, each in enumerate(inputs):
        lora.add(f"adapter {number + 1}", each.adapter, check_base="off")
    lora.use({f"adapter {number + 1}": each.weight for number, each in enumerate(inputs)})
    return "loratools.live", model
