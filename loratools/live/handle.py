"""The handle of a model with adapters: `Lora`, which the sites share and which pickles and copies with the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loratools.adapter.model import Adapter, Step
from loratools.dialects import InMemory
from loratools.errors import IncompatibleAdapter, InvalidOption, LoraToolsError
from loratools.format.record import TOOL
from loratools.live.acting import Acting, Entry
from loratools.live.below.classes import foreign_forward
from loratools.live.export import adapter_of, save
from loratools.live.identity import check_base as check_identity
from loratools.live.modules import site_of
from loratools.live.modules._slices import taken_apart
from loratools.live.opened import opened as open_for
from loratools.live.place import Layout, Place, place, walk
from loratools.live.site import BANK, Bank, Piece, Site, restore, swap
from loratools.live.summary import summary
from loratools.live.uses.named import ByName
from loratools.live.uses.stacks import Stacks
from loratools.live.watch import Watch, passed_over
from loratools.live.whole import Stack
from loratools.options import CheckBase, Options
from loratools.storage.sources import Location


class Lora(Acting):
    """The handle of one model: adds, removes, trains and saves its adapters, and by `Acting` lets them act."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.thawed: list[str] = []
        self.watch = Watch(self)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order in which they were added."""
        return tuple(self.entries)

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all trainable adapters, each once, for an optimizer."""
        self._separate("train")
        every = (p for _, child, _, _ in self.children() for p in child.parameters() if p.requires_grad)
        return list({id(parameter): parameter for parameter in every}.values())

    def groups(self, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
        """Return two groups of parameters for an optimizer: B learns `ratio` times as fast as all else.

        LoRA+ (Hayou, Ghosh and Yu 2024, arXiv 2402.12354), which takes 16 for the ratio.
        """
        fast = {id(child.B) for _, child, _, _ in self.children() if isinstance(child, Piece | Stack)}
        every = self.parameters()
        slow, quick = ([p for p in every if (id(p) in fast) is wanted] for wanted in (False, True))
        return [group for group in ({"params": slow, "lr": lr}, {"params": quick, "lr": lr * ratio}) if group["params"]]

    def __repr__(self) -> str:
        return summary(self)

    def install(self, name: str, places: Mapping[str, Place], entry: Entry) -> None:
        """Put an adapter's pieces in their places; what could fail was done before, but for stacks, which are asked."""
        stacks = self.active if isinstance(self.active, Stacks) else None
        if stacks is not None:
            stacks.admit(name, places)
        own_child = [
            path for path, own in places.items() if not isinstance(own.module, Site) and _has(own.module, BANK)
        ]
        if own_child:
            raise IncompatibleAdapter(f"modules with a member {BANK!r} of their own cannot have adapters", own_child)
        patched = [
            path for path, own in places.items() if not isinstance(own.module, Site) and foreign_forward(own.module)
        ]
        if patched:
            raise IncompatibleAdapter(
                "something has put a forward of its own on these modules, which would pass their adapters over",
                patched,
                hint="Attach or load the adapter first, and patch the modules after.",
            )  # fmt: skip
        for path, own in places.items():
            module: Any = own.module
            if not isinstance(module, Site):
                swap(module, site_of(module), self)
            self.sites.setdefault(path, module)
            bank: Bank = module._modules[BANK]
            if own.pieces:
                bank.pieces[name] = tuple(own.pieces)
            if own.whole:
                bank.whole[name] = own.whole
            for child in (*own.pieces, *own.whole.values()):
                bank.put(name, child)
                if child.training != module.training:
                    child.train(module.training)
        self.entries[name] = entry
        if stacks is not None:
            stacks.put(name)
        if entry.trainable:
            self.freeze()
        self.watch.begin()

    def freeze(self) -> None:
        """Let no parameter of the base be trained; `detach` gives back what was."""
        for path, module in walk(self.model):
            for own, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    parameter.requires_grad_(False)
                    self.thawed.append(f"{path}.{own}" if path else own)

    def remove(self, name: str) -> None:
        """Take an adapter out; where it acts, it acts no more."""
        self._separate("remove an adapter")
        if name not in self.entries:
            raise self._unknown([name])
        if any(name in rows.distinct for rows in self.routes):
            raise InvalidOption(f"{name!r} is the adapter of a row in a `route` that runs: remove it after the block")
        if isinstance(self.active, Stacks):
            self.active.drop(name)
        elif isinstance(self.active, ByName):
            self.active = ByName(rest) if (rest := tuple(p for p in self.active.pairs if p[0] != name)) else None
        for path, module in list(self.sites.items()):
            module.lora.drop(name)
            if not module.lora.pieces and not module.lora.whole:
                restore(module)
                del self.sites[path]
        del self.entries[name]

    def detach(self) -> None:
        """Make the model what it was before the first adapter: classes, bits, flags and hooks."""
        if self.state is not None:
            self.unmerge()
        self.active = None
        for module in {id(module): module for module in self.sites.values()}.values():
            restore(module)
        for parameter in self._frozen():
            parameter.requires_grad_(True)
        self.watch.end()
        self.sites, self.entries, self.thawed = {}, {}, []

    def _frozen(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that `freeze` froze; of one that a parametrization has taken since, what it is made of.

        Those of modules that are gone are passed over.
        """
        modules = dict(walk(self.model))
        for name in self.thawed:
            path, _, own = name.rpartition(".")
            if path not in modules and ".parametrizations." in f".{path}":  # one that was taken away since
                path, _, own = path.rpartition("parametrizations.")
            held: Any = modules.get(path.rstrip("."), nn.Module())
            made = held._modules.get("parametrizations", {})
            if own in held._parameters:
                parts = [held._parameters[own]]
            elif own in made:
                parts = list(made[own].parameters(recurse=False))
            else:  # weight norm, spectral norm and pruning of the older kind: weight_g, weight_orig
                parts = [part for key, part in held._parameters.items() if key.startswith(f"{own}_")]
            yield from (part for part in parts if part is not None)

    def check(self) -> None:
        """Raise `IncompatibleAdapter` with the names of targets that no forward has called yet."""
        if missing := [path for path in self.sites if path not in self.watch.called]:
            raise passed_over(missing)

    def add(
        self, name: str, adapter: Location | Adapter | InMemory, *, trainable: bool = False,
        check_base: CheckBase = "strict",
    ) -> None:  # fmt: skip
        """Add an adapter, which does not act yet: `use` lets it.

        Args:
            name: What to call it; no other adapter of the model can have that name.
            adapter: A path to a file or folder of any dialect, an `hf://` reference, an `Adapter`, or one
                held in memory: (state dict, config), a `PeftModel`, the handle of another model.
            trainable: Whether its factors become parameters, in float32, and the base is frozen. Default: they are
                buffers in the dtype of the weights that they change.
            check_base: What happens where the model is not the base that the adapter was sealed with: `"strict"`, an
                error; `"warn"`; `"off"`, nothing is compared. Default: `"strict"`.

        Raises:
            InvalidOption: The name is taken, or an option cannot be.
            IncompatibleAdapter: It does not fit; every module that does not is listed. The model is untouched.
            WrongBase: The weights are not those of the sealed base.
            UnsupportedAdapter: It cannot be trained here, or repeats layers.
        """
        self.ready(name)
        Options().word("check_base", check_base, CheckBase).flag("trainable", trainable).done()
        layout = Layout.of(self.model)
        opened = open_for(adapter, layout)
        if trainable:
            opened = taken_apart(opened, layout.shapes, layout.config)
        with torch.inference_mode(False):  # what is made there cannot be part of a gradient later
            places = place(layout, opened, trainable=trainable)
        check_identity(opened.base, layout, check_base)
        step = Step("train", TOOL, {"from": name}) if trainable else None
        self.install(name, places, Entry(trainable, opened, step))

    def adapter(self, name: str = "default") -> Adapter:
        """Return an adapter as a value of its own, for every verb of the toolkit; later training does not change it."""
        if name not in self.entries:
            raise self._unknown([name])
        return adapter_of(self, name)

    def __loratools_adapter__(self) -> Adapter:
        """Return the adapter in use, for a verb that takes this handle for an adapter.

        Raises `InvalidOption` unless it is one, with its weight 1.
        """
        acting = self.acting()
        if len(acting) == 1 and acting[0][1] == 1:
            return self.adapter(acting[0][0])
        shown = ", ".join(name if weight == 1 else f"{name} with the weight {weight:g}" for name, weight in acting)
        raise InvalidOption(
            f"this handle stands for the one adapter in use, and in use is {shown or 'none'}",
            hint=f"Give one by its name: lora.adapter(NAME), of {', '.join(self.names) or 'none'}.",
        )

    def save(
        self, folder: str | PathLike[str], name: str = "default", base_id: str | None = None, *, force: bool = False
    ) -> Adapter:
        """Write an adapter in our format, which PEFT loads too; return what was written.

        It is sealed with the digests of the weights that it changes, and its provenance has the seed and the options
        that its training started with.

        Args:
            folder: The output: a folder, or a `.safetensors` file.
            name: The adapter. Default: `"default"`.
            base_id: Name of the base model to record, as on the Hub. Default: the one that the model's config states.
            force: Replace an output that exists. Default: that is an error.

        Raises:
            OutputRefused: The output exists.
        """
        self._separate("save an adapter")
        if name not in self.entries:
            raise self._unknown([name])
        return save(self, Path(folder), name, base_id, force)


def find_handle(model: nn.Module) -> Lora | None:
    """Return the handle of a model with adapters, also inside a wrapper; None for a model without."""
    held = (module.__dict__.get("_lora") for module in model.modules())
    return next((lora for lora in held if lora is not None), None)


def handle_of(model: nn.Module) -> Lora:
    """Return the handle of a model with adapters; raise `LoraToolsError` for one without."""
    lora = find_handle(model)
    if lora is None:
        raise LoraToolsError("this model has no adapters of loratools; `live.attach` or `live.load` puts one there")
    return lora


def _has(module: nn.Module, name: str) -> bool:
    """Tell whether a module has a member: `hasattr`, which costs an exception where it has not."""
    held = (module.__dict__, module._modules, module._parameters, module._buffers)
    return any(name in each for each in held) or hasattr(type(module), name)
