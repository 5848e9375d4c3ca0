"""LoRA in a model that runs: attach, train, save, switch, serve many, merge, and take it out again.

    from loratools import live

    lora = live.attach(model, rank=8, alpha=16, targets=["q_proj", "v_proj"], seed=0)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-3)
    ...                                           # a training loop like any other
    lora.save("adapter")                          # sealed with the weights that it was trained on
    lora.add("poet", "hf://org/poet-lora")        # any dialect
    lora.use("poet")                              # microseconds; lora.use(None) is the base
    lora.detach()                                 # the model is what it was

The entries:

    handle.py     `Lora`, what `attach`, `load` and `of` return         acting.py    its half that lets adapters act
    fresh/        a new adapter: targets, and how A and B start         opened.py    an adapter of any dialect
    place.py      what of an adapter goes where                         uses/        by name, by row, stacked, merged
    site.py       how a module's class is swapped, and back             modules/     one file a type of module
    product.py    the autograd function of y = W·x + s·B·A·x            whole.py     what takes a parameter's place
    identity.py   is this the sealed base?                              watch.py     targets that never run
    export.py     back to an `Adapter`, and to a file                   summary.py   what `print(lora)` says
    trainer.py    a mixin for transformers' Trainer                     restore.py   how a training resumes
    cost.py       `estimate`: what a LoRA costs, beforehand         below/       classes, devices, repeated forwards
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from loratools.adapter.model import Adapter, Step
from loratools.dialects import InMemory
from loratools.format.record import TOOL
from loratools.live import fresh
from loratools.live.acting import Entry
from loratools.live.cost import estimate
from loratools.live.fresh import Bias, Fresh
from loratools.live.fresh.start import Init
from loratools.live.fresh.targets import choose
from loratools.live.fresh.tokens import Tokens
from loratools.live.handle import Lora, find_handle, handle_of
from loratools.live.modules._slices import STEP
from loratools.live.trainer import TrainerMixin
from loratools.options import CheckBase
from loratools.storage.sources import Location

__all__ = ["Lora", "TrainerMixin", "attach", "estimate", "load", "of"]


def attach(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16,
    targets: str | Sequence[str] = "all-linear",
    seed: int = 0,
    init: Init = "kaiming",
    dropout: float = 0.0,
    dora: bool = False,
    rslora: bool = False,
    bias: Bias = "none",
    dtype: torch.dtype = torch.float32,
    name: str = "default",
    tokens: Tokens = None,
) -> Lora:
    """Freeze a model and put trainable factors beside modules of it: y = W·x + s·B·A·x, s = α/r (Hu et al. 2021).

    The adapter acts at once, and changes nothing before it is trained. A model that has adapters gets another one.

    Args:
        model: Any `nn.Module`. Its parameters keep their names, bits and keys in a `state_dict`.
        rank: Rank r of every A (r, in) and B (out, r). Default: 8.
        alpha: Numerator of the scaling, above 0. Default: 16.
        targets: Modules by name, each a path or what follows one of its dots; a regular expression for whole paths; or
            `"all-linear"`, every linear layer but the output head. A projection that the model has only as a slice of a
            fused weight is named as if it stood alone: `"q_proj"` and `"v_proj"` of GPT-2, in whose `c_attn` k then
            stays as it is; `save` writes both as one update of `c_attn`, which PEFT reads. Default: `"all-linear"`.
        seed: Seed of the factors' start, which is recorded. Default: 0.
        init: How A and B start: `"kaiming"`, `"gaussian"` (the paper's), `"pissa"` or `"olora"`. Default: `"kaiming"`.
        dropout: Probability with which an input of A is dropped in training, in [0, 1). Default: 0.
        dora: Train a magnitude for each output besides (DoRA, arXiv 2402.09353). Default: no.
        rslora: s = α/√r (rank-stabilized LoRA, arXiv 2312.03732). Default: s = α/r.
        bias: Biases that are trained besides: `"none"`, `"all"`, `"lora_only"` (those of the targets). They are copies;
            the base keeps its own. Default: `"none"`.
        dtype: Dtype of the factors. Default: `torch.float32`, whatever the model's.
        name: What to call the adapter. Default: `"default"`.
        tokens: Tokens whose rows of the input embedding are trained whole besides, by index, and with them those of a
            head that is tied to it (PEFT's `trainable_token_indices`); or by the embedding's name. `targets` can then
            be empty. They are copies. Default: none.

    Returns:
        The model's handle.

    Raises:
        InvalidOption: An option cannot be, the name is taken, or a target names nothing; the model is untouched.
        IncompatibleAdapter: A target cannot have factors.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> attach(model, rank=2, alpha=4, targets=["0"]).names
        ('default',)
    """
    options = Fresh(rank, alpha, targets, seed, init, dropout, dora, rslora, bias, dtype, tokens)
    lora = find_handle(model) or Lora(model)
    lora.ready(name)
    with torch.inference_mode(False):  # a tensor that is made there cannot be trained
        alone = tokens and not isinstance(targets, str) and not targets
        chosen = [] if alone else choose(model, targets)
        places = fresh.places(model, chosen, options)
    settings: dict[str, Any] = {"bias": bias} if bias != "none" else {}
    settings |= {"lora_dropout": dropout} if dropout else {}
    slices = sorted({target.name.rpartition(".")[2] for target in chosen if target.part})
    stated = options.parameters() | ({STEP: slices} if slices else {})
    lora.install(name, places, Entry(True, None, Step("attach", TOOL, stated, (), seed), settings))
    lora.use(name)
    return lora


def load(
    model: nn.Module, adapter: Location | Adapter | InMemory, *, name: str = "default", trainable: bool = False,
    check_base: CheckBase = "strict",
) -> Lora:  # fmt: skip
    """Put an adapter into a running model, in use at once.

    Args:
        model: Any `nn.Module`.
        adapter: A path to a file or folder of any dialect, an `hf://` reference, an `Adapter`, or one held
            in memory: (state dict, config), a `PeftModel`, the handle of another model.
        name: What to call it. Default: `"default"`.
        trainable: Whether its factors become parameters in float32, and the base is frozen. Default: no.
        check_base: `"strict"`, `"warn"` or `"off"`: what happens where the weights are not those of the base that the
            adapter was sealed with. Default: `"strict"`, an error.

    Returns:
        The model's handle.

    Raises:
        As `Lora.add`; the model is untouched then.

    Example:
        >>> lora = load(model, "my-lora", name="poet")  # doctest: +SKIP
    """
    lora = find_handle(model) or Lora(model)
    lora.add(name, adapter, trainable=trainable, check_base=check_base)
    lora.use(name)
    return lora


def of(model: nn.Module) -> Lora:
    """Return the handle of a model with adapters, also after pickle or deepcopy, or inside a wrapper such as DDP.

    Raises `LoraToolsError` for a model without any.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8))
        >>> attach(model, targets=["0"]) is of(model)
        True
    """
    return handle_of(model)
