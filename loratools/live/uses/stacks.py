"""All adapters in one stack a module, chosen by an index tensor: a compiled model switches and never compiles again.

Every module has A (slots, r, in) and s·B (slots, out, r), padded with zeros; slot 0 is the base, the last one a mix.
Switching writes a number into a tensor of one element, on which no graph depends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loratools.errors import IncompatibleAdapter, InvalidOption, LoraToolsError
from loratools.live.modules._affine import AffineSite
from loratools.live.modules._slices import joinable, spread
from loratools.live.site import Handle, Piece, Site

_A, _B, _G = "stacked_A", "stacked_B", "stacked_gains"


class Stacks:
    """The way in which stacked adapters act; `slot` says which."""

    def __init__(self, lora: Handle, max_rank: int, max_adapters: int) -> None:
        self.lora, self.max_rank, self.max_adapters = lora, max_rank, max_adapters
        self.slots: dict[str, int] = {}
        self.acting: tuple[tuple[str, float], ...] = ()
        self.dora = any(child.magnitude is not None for _, child, _, _ in lora.children() if isinstance(child, Piece))
        self.check()
        devices = {site.weight.device for site in lora.sites.values()}
        self.slot = {str(device): torch.zeros(1, dtype=torch.long, device=device) for device in devices}
        for site in lora.sites.values():
            W, bank = site.matrix(), site.lora
            count = max_adapters + 2
            bank.register_buffer(_A, W.new_zeros(count, max_rank, W.shape[1]), persistent=False)
            bank.register_buffer(_B, W.new_zeros(count, W.shape[0], max_rank), persistent=False)
            if self.dora:
                bank.register_buffer(_G, W.new_ones(count, W.shape[0]), persistent=False)
        for name in lora.entries:
            self.put(name)

    @property
    def pairs(self) -> tuple[tuple[str, float], ...]:
        """What acts now, each with its weight."""
        return self.acting

    def check(self) -> None:
        """Raise `InvalidOption` with all that does not fit in the stacks, before anything is changed."""
        there = ((name, path, child) for name, child, path, _ in self.lora.children())
        self._refuse(len(self.lora.entries), there)

    def admit(self, name: str, places: Mapping[str, Any]) -> None:
        """Raise `InvalidOption` unless one more adapter fits, with what it brings by path, `place.Place`."""
        children = ((name, path, child) for path, own in places.items() for child in (*own.pieces, *own.whole.values()))
        self._refuse(len(self.lora.entries) + 1, children)

    def _refuse(self, count: int, children: Iterable[tuple[str, str, Any]]) -> None:
        problems = [f"{count} adapters, and max_adapters is {self.max_adapters}"] if count > self.max_adapters else []
        ranks: Counter[tuple[str, str]] = Counter()  # of all slices of a module together
        for name, path, child in children:
            site = self.lora.sites.get(path)
            plain = isinstance(child, Piece) and child.bias is None and child.A0 is None
            plain = plain and (child.spans is None or joinable([child]))
            if site is None:
                problems.append(f"{name}: {path} has no stack, for no adapter was there when they were made")
            elif not plain or not isinstance(site, AffineSite) or site.matrix() is None:
                problems.append(f"{name}: {path} cannot be stacked: only plain factors on linear layers can")
            elif child.magnitude is not None and not self.dora:
                problems.append(f"{name}: {path} has a magnitude, and none was there when the stacks were made")
            else:
                ranks[name, path] += child.rank
        problems += [
            f"{name}: rank {rank} on {path}, and max_rank is {self.max_rank}"
            for (name, path), rank in ranks.items()
            if rank > self.max_rank
        ]
        if problems:
            raise InvalidOption("these adapters do not fit in the stacks of a compiled model", problems)

    def put(self, name: str) -> None:
        """Copy an adapter's factors into a slot of its own."""
        free = next(i for i in range(1, self.max_adapters + 1) if i not in self.slots.values())
        self.slots[name] = free
        self._fill(free, ((name, 1.0),))

    def drop(self, name: str) -> None:
        """Empty the slot of an adapter, which acts no more, alone or in a mix."""
        if len(rest := tuple(pair for pair in self.acting if pair[0] != name)) < len(self.acting):
            self.choose(rest)
        self._fill(self.slots.pop(name), ())

    def choose(self, pairs: tuple[tuple[str, float], ...]) -> None:
        """Let adapters act, each with a weight; several, or a weight, take the slot of mixes."""
        if not pairs:
            number = 0
        elif len(pairs) == 1 and pairs[0][1] == 1:
            number = self.slots[pairs[0][0]]
        else:
            number = self.max_adapters + 1
            self._fill(number, pairs)
        self.acting = pairs
        for slot in self.slot.values():
            slot.fill_(number)

    @torch.no_grad()
    def _fill(self, number: int, pairs: tuple[tuple[str, float], ...]) -> None:
        mixed = {
            path: [(p, w) for name, w in pairs for p in site.lora.pieces.get(name, ())]
            for path, site in self.lora.sites.items()
        }
        for path, pieces in mixed.items():
            if sum(piece.rank for piece, _ in pieces) > self.max_rank:
                raise InvalidOption(
                    f"{path}: the ranks of a mix are {sum(p.rank for p, _ in pieces)}, max_rank is {self.max_rank}"
                )
            if len(pieces) > 1 and any(piece.magnitude is not None for piece, _ in pieces):
                raise InvalidOption(f"{path}: a mix with DoRA is no sum, and cannot be stacked")
        for path, pieces in mixed.items():
            site = self.lora.sites[path]
            A, B = site.lora.stacked_A[number].zero_(), site.lora.stacked_B[number].zero_()
            start = 0
            for piece, weight in pieces:
                stop = start + piece.rank
                A[start:stop] = piece.A
                B[:, start:stop] = spread(piece, piece.B * (piece.scaling * weight), len(B))
                start = stop
            if self.dora:
                g = site.lora.stacked_gains[number].fill_(1)
                for piece, weight in pieces:
                    if piece.magnitude is not None:
                        g.copy_(site.gains(piece, weight))

    def forward(self, site: Site, *args: Any, **settings: Any) -> Any:
        """Compute a linear layer with the factors in the slot that acts."""
        if site.training and torch.is_grad_enabled():  # type: ignore[attr-defined]
            raise LoraToolsError("stacked adapters are not trained: say lora.compiled(None) first")
        if not isinstance(site, AffineSite):
            raise IncompatibleAdapter("only linear layers can be stacked")
        x: Tensor = args[0]
        bank, slot = site.lora, self.slot.get(str(x.device))
        if slot is None:
            raise LoraToolsError(
                f"the adapters were stacked for {' and '.join(self.slot)}, and the model runs on {x.device} now",
                hint="Say lora.compiled(None), then lora.compiled(...) again.",
            )
        A = bank.stacked_A.index_select(0, slot)[0]  # type: ignore[operator]
        B = bank.stacked_B.index_select(0, slot)[0]  # type: ignore[operator]
        y: Tensor = site.plain_forward(x, *args[1:], **settings)
        delta = F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))
        if not self.dora:
            return y + delta
        g = bank.stacked_gains.index_select(0, slot)[0].to(y.dtype)  # type: ignore[operator]
        straight = y if site.bias is None else y - site.bias.to(y.dtype)
        return y + (g - 1) * straight + g * delta

    def close(self) -> None:
        """Give the memory of the stacks back."""
        for site in self.lora.sites.values():
            for name in (_A, _B, _G):
                site.lora._buffers.pop(name, None)
                site.lora._non_persistent_buffers_set.discard(name)
