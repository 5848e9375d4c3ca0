"""One adapter for each row of a batch: two batched products a module, whatever the number of adapters.

Each row's A and B are gathered, padded with zeros to one rank, with the scaling in B; then u = x·Aᵀ and y + u·Bᵀ for
all rows at once, as Punica's BGMV does (Chen et al. 2023, arXiv 2310.18547). Where nothing is trained they are gathered
once. A module that works otherwise computes the rows of each adapter one adapter after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loratools.errors import IncompatibleAdapter
from loratools.live.modules._affine import AffineSite
from loratools.live.modules._slices import joinable, joined
from loratools.live.site import Piece, Site
from loratools.live.uses.named import ByName

Own = Mapping[str, tuple[Piece, ...]]
"""What adapters have on a module, by their name: factors of the whole, or of slices."""


class Rows:
    """The adapter of each row, by name; None is the base."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        self.distinct = tuple(dict.fromkeys(name for name in self.names if name is not None))
        self.kept: dict[int, tuple[Any, ...]] = {}

    @property
    def pairs(self) -> tuple[tuple[str, float], ...]:
        """What some row has, each with the weight 1."""
        return tuple((name or "the base", 1.0) for name in dict.fromkeys(self.names))

    def forward(self, site: Site, *args: Any, **settings: Any) -> Any:
        """Compute a module, each row of its input with its own adapter."""
        bank = site.lora
        acting = [name for name in self.distinct if name in bank.pieces or name in bank.whole]
        if not acting:
            return site.plain_forward(*args, **settings)
        if len(self.distinct) == 1 and None not in self.names:
            return ByName(((self.distinct[0], 1.0),)).forward(site, *args, **settings)
        if isinstance(site, AffineSite) and not bank.whole and len(args) == 1 and not settings:
            pieces = {name: bank.pieces[name] for name in acting}
            if all(_simple(own) for own in pieces.values()):
                return self._together(site, pieces, args[0])
        return self._apart(site, args, settings)

    def check(self, site: Site, x: Tensor) -> None:
        """Raise where the first side of a module's input is not the rows of the batch, for all that can be told."""
        path = site._lora.path_of(site)
        inside = any(part == "experts" for part in path.split(".")) and x.dim() < 3
        if inside or x.shape[:1] != (len(self.names),):
            what = "tokens of the whole batch, chosen by a router" if inside else f"{tuple(x.shape)}"
            raise IncompatibleAdapter(
                f"{path}: its input is {what}, and the batch has {len(self.names)} rows, so it cannot be told which "
                "adapter goes with which",
                hint="Serve the rows of each adapter apart (`lora.use`), or leave this module out of the adapters.",
            )

    def _together(self, site: AffineSite, pieces: Own, x: Tensor) -> Tensor:
        self.check(site, x)
        y: Tensor = site.plain_forward(x)
        kept = self.kept.get(id(site))
        every = [piece for own in pieces.values() for piece in own]
        trained = torch.is_grad_enabled() and any(piece.A.requires_grad for piece in every)
        # Factors that were trained since, and tensors of inference mode where gradients are wanted, are gathered anew.
        factors = (p for piece in every for p in piece._parameters.values() if p is not None)
        state = x.dtype, torch.is_inference_mode_enabled(), *((p.data_ptr(), p._version) for p in factors)
        if kept is None or kept[0] != state or trained:
            kept = state, *self._gathered(site, pieces, x, y.shape[-1])
            if not trained:
                self.kept[id(site)] = kept
        _, At, Bt, gains = kept
        flat = x.reshape(len(x), -1, x.shape[-1])
        dropped = self._dropped(pieces, flat) if site.training else flat  # type: ignore[attr-defined]
        u = torch.bmm(dropped, At)
        if gains is None and not (y.requires_grad or u.requires_grad) and y.is_contiguous():
            y.view(len(x), -1, y.shape[-1]).baddbmm_(u, Bt)
            return y
        delta = torch.bmm(u, Bt)
        if gains is not None:
            bias = 0 if site.bias is None else site.bias.to(y.dtype)
            straight = y.reshape(delta.shape) - bias
            if dropped is not flat:
                straight = torch.nn.functional.linear(dropped, site.matrix().to(x.dtype))  # type: ignore[union-attr]
            delta = (gains - 1) * straight + gains * delta
        return y + delta.reshape(y.shape).to(y.dtype)

    def _gathered(self, site: AffineSite, pieces: Own, x: Tensor, outputs: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return Aᵀ (rows, in, r), s·Bᵀ (rows, r, out) and g (rows, 1, out), which is None where no row has DoRA."""
        factors = [joined([(piece, 1.0) for piece in own], outputs) for own in pieces.values()]
        rank, inputs = max(len(A) for A, _ in factors), factors[0][0].shape[1]
        As, Bs, gs = [x.new_zeros(rank, inputs)], [x.new_zeros(outputs, rank)], [x.new_ones(outputs)]
        for own, (A, B) in zip(pieces.values(), factors, strict=True):
            more = rank - len(A)
            As.append(torch.nn.functional.pad(A.to(x.dtype), (0, 0, 0, more)))
            Bs.append(torch.nn.functional.pad(B.to(x.dtype), (0, more)))
            gs.append(gs[0] if own[0].magnitude is None else site.gains(own[0], 1.0).to(x.dtype))
        order = {name: i for i, name in enumerate((None, *pieces))}
        index = torch.tensor([order.get(name, 0) for name in self.names], device=x.device)
        At, Bt = (torch.stack(each).index_select(0, index).transpose(1, 2) for each in (As, Bs))
        dora = any(own[0].magnitude is not None for own in pieces.values())
        gains = torch.stack(gs).index_select(0, index).unsqueeze(1) if dora else None
        if torch.is_grad_enabled():
            return At, Bt, gains
        return At.contiguous(), Bt.contiguous(), gains

    def _dropped(self, pieces: Own, x: Tensor) -> Tensor:
        chances = [pieces[name][0].dropout if name is not None and name in pieces else 0.0 for name in self.names]
        if not any(chances):
            return x
        keep = 1 - torch.tensor(chances, dtype=x.dtype, device=x.device).view(-1, 1, 1)
        return x * (torch.bernoulli(keep.expand_as(x)) / keep)

    def _apart(self, site: Site, args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        """Compute the rows of each adapter by themselves, and put them together again."""
        for value in (*args, *settings.values()):
            if isinstance(value, Tensor):
                self.check(site, value)
        parts, places = [], []
        for name in dict.fromkeys(self.names):
            at = [i for i, own in enumerate(self.names) if own == name]
            take: Callable[[Any], Any] = lambda v, at=at: v[at] if isinstance(v, Tensor) else v  # type: ignore[misc]  # noqa: E731
            use = ByName(() if name is None else ((name, 1.0),))
            out = use.forward(site, *map(take, args), **{key: take(value) for key, value in settings.items()})
            if not isinstance(out, Tensor):
                path = site._lora.path_of(site)
                raise IncompatibleAdapter(f"{path}: returns more than one tensor, so rows cannot be put together")
            parts.append(out)
            places += at
        order = torch.tensor(places, device=parts[0].device).argsort()
        return torch.cat(parts).index_select(0, order)


def _simple(pieces: tuple[Piece, ...]) -> bool:
    first = pieces[0]
    alone = len(pieces) == 1 and first.spans is None and first.bias is None and first.A0 is None
    return alone or joinable(pieces)
