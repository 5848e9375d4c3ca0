"""Find targets that never run: code that reads a module's weight without calling it passes over its adapter in silence.

The first whole forward is watched, in each mode that the model runs in (training or not, with gradients or not, for
fused fast paths depend on it; the hooks stay, for nn.TransformerEncoderLayer takes no fast path
while it has any). A target that was not called although the module that holds it was is an error; where
the holder did not run either, as an idle expert or tower, it is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registry

from loratools.errors import IncompatibleAdapter, counted
from loratools.live.modules import type_of
from loratools.live.place import output_head, walk
from loratools.live.site import Handle


class Watch:
    """The watch over one model: which sites were called so far, and in which modes a whole forward was looked at."""

    def __init__(self, lora: Handle) -> None:
        self.lora = lora
        self.called: set[str] = set()
        self.looked: set[tuple[bool, bool]] = set()
        self.running: Any = None
        self.hooks: list[Any] = []
        # Path, children of the parent, name among them, and the site.
        self.seats: list[tuple[str, dict[str, Any], str, Any]] = []
        # Path and site of those that may be resized, what tells the shape, and the shape.
        self.tables: list[tuple[str, Any, Callable[[Any], tuple[int, ...]], tuple[int, ...]]] = []

    def begin(self) -> None:
        """Watch the next forward of the model, and the first in each other mode."""
        self.end()
        self.looked.clear()
        modules = dict(walk(self.lora.model))
        self.seats = [
            (path, modules[parent]._modules, name, site)
            for path, site in self.lora.sites.items()
            for parent, _, name in [path.rpartition(".")]
            if path
        ]
        head: Any = output_head(self.lora.model)
        self.tables = [
            (path, site, known.shape, known.shape(site))
            for path, site in self.lora.sites.items()
            if isinstance(site, nn.Embedding) or site is head
            if (known := type_of(site)) is not None
        ]
        self.hooks = [
            self.lora.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.lora.model.register_forward_hook(self._after, always_call=True),
        ]

    def end(self) -> None:
        """Watch no more."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def _before(self, model: nn.Module, args: Any, settings: Any) -> None:
        if getattr(model, "_is_replica", False):  # a thread of nn.DataParallel has a copy of every module
            if self.lora.routes and self.lora.active is self.lora.routes[-1]:
                self.lora.active.begin(args, settings)
            return
        if not torch.compiler.is_compiling():
            self.seated()
            active = self.lora.active
            if self.lora.routes and active is self.lora.routes[-1]:
                active.begin(args, settings)
            if torch.is_grad_enabled():
                self.lora.replay.begin(active, self.changes())
        mode = model.training, torch.is_grad_enabled()
        if torch.compiler.is_compiling() or self.running or mode in self.looked:
            return
        ran = {id(model)}  # whose own call began before
        hook = registry.register_module_forward_pre_hook(lambda module, _: ran.add(id(module)))
        self.running = mode, ran, hook

    def changes(self) -> int | None:
        """Return a number that an optimizer's step changes, None where nothing is trained."""
        for _, child, _, _ in self.lora.children():
            for parameter in child.parameters():
                if parameter.requires_grad and not parameter.is_inference():
                    return int(parameter._version)
        return None

    def seated(self) -> None:
        """Raise where another module has taken the place of one with an adapter, whose adapter would be passed over.

        A wrapper around it, as torch.compile makes, is none. Raise where an embedding or a head was made longer.
        """
        resized = [
            f"{path}: {was} at that time, {now} now"
            for path, site, shape, was in self.tables
            if (now := shape(site)) != was
        ]
        if resized:
            raise IncompatibleAdapter(
                "the weights of these modules have another shape than when their adapter was put there", resized,
                hint="Detach, then call `resize_token_embeddings`, then attach or load.",
            )  # fmt: skip
        gone = [
            path
            for path, children, name, site in self.seats
            if (child := children.get(name)) is not site
            and self.lora.sites.get(path) is site
            and not (child is not None and any(inner is site for inner in child.modules()))
        ]
        if gone:
            raise IncompatibleAdapter(
                "other modules have taken the place of modules with an adapter, which acts no more", gone,
                hint="`resize_token_embeddings` makes a new output head, for one: resize before you attach or load.",
            )  # fmt: skip

    def _after(self, model: nn.Module, _: Any, output: Any) -> None:
        if not self.running or getattr(model, "_is_replica", False):
            return
        (mode, ran, hook), self.running = self.running, None
        hook.remove()
        if output is None:  # the forward failed
            return
        self.looked.add(mode)
        modules = dict(walk(model))
        self.called |= {path for path, site in self.lora.sites.items() if id(site) in ran}
        acted = {id(child) for site in self.lora.sites.values() if id(site) in ran for child in site.lora.children()}
        passed = [
            path
            for path, site in self.lora.sites.items()
            if id(site) not in ran
            and path
            and id(modules[path.rpartition(".")[0]]) in ran
            # T5's `shared` lends its weight to others and never runs: rows of tokens act in those.
            and any(id(child) not in acted for child in site.lora.children())
        ]
        if passed:
            raise passed_over(passed)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "running": None}


def passed_over(paths: list[str]) -> IncompatibleAdapter:
    """Return the exception for targets whose weight is read without calling them."""
    return IncompatibleAdapter(
        f"{counted(len(paths), 'module')} with an adapter did not run, although what holds each did: the adapter is "
        "passed over",
        paths,
        hint="The model's code reads their weights itself, as fused fast paths do. Merge the adapter (`lora.merge`), "
        "or choose other targets.",
    )
