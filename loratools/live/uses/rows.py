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
from loratools.linalg.native import thin
from loratools.live.modules._affine import AffineSite
from loratools.live.modules._slices import joinable, joined
from loratools.live.site import Bank, Piece, Site
from loratools.live.uses import batch
from loratools.live.uses.named import ByName

Own = Mapping[str, tuple[Piece, ...]]
"""What adapters have on a module, by their name: factors of the whole, or of slices."""


class Rows:
    """The adapter of each row, by name; None is the base."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        self.distinct = tuple(dict.fromkeys(name for name in self.names if name is not None))
        self.alike = len(set(self.names)) == 1
        self.counted = False  # whether a forward of the whole model has shown that its batch has these rows
        self.repeats = 1  # times that `generate` has each row, one after the other
        self.apart: dict[int, str | None] = {}  # why a module's input is not the rows, by its id
        self.kept: dict[tuple[int, int], tuple[Any, ...]] = {}
        self.plans: dict[int, tuple[Bank, Own, bool]] = {}  # by a module's id: see `_plan`

    def __eq__(self, other: Any) -> bool:
        return type(other) is type(self) and bool(other.names == self.names)

    def __hash__(self) -> int:
        return hash(self.names)

    @property
    def pairs(self) -> tuple[tuple[str, float], ...]:
        """What some row has, each with the weight 1."""
        return tuple((name or "the base", 1.0) for name in dict.fromkeys(self.names))

    def begin(self, args: tuple[Any, ...], settings: Mapping[str, Any]) -> None:
        """Look at the inputs of a whole model: raise where its batch has other rows than there are names."""
        sizes, self.repeats = batch.sizes(args, settings), 1
        self.counted = any(map(self._fits, sizes))
        if sizes and not self.counted:
            raise batch.other_rows("the model", f"{sizes[0]} rows", len(self.names), sizes[0])

    def forward(self, site: Site, *args: Any, **settings: Any) -> Any:
        """Compute a module, each row of its input with its own adapter."""
        if self.alike and self.counted:
            pairs = ((name, 1.0) for name in self.distinct)
            return ByName(tuple(pairs)).forward(site, *args, **settings)
        names = self._names(site, next((v for v in (*args, *settings.values()) if isinstance(v, Tensor)), None))
        bank = site.lora
        plan = self.plans.get(id(site))
        if plan is None or plan[0] is not bank:
            plan = self.plans[id(site)] = bank, *self._plan(site)
        _, pieces, together = plan
        if not pieces:
            return site.plain_forward(*args, **settings)
        if self.alike:
            return ByName(((self.distinct[0], 1.0),)).forward(site, *args, **settings)
        if together and not bank.whole and len(args) == 1 and not settings:
            return self._together(site, pieces, names, args[0])  # type: ignore[arg-type]
        return self._apart(site, names, args, settings)

    def _plan(self, site: Site) -> tuple[Own, bool]:
        """Return what the rows' adapters have on a module, and whether that is computed for all rows together.

        No adapter of a row goes while its block runs, so this is found once for each module.
        """
        bank = site.lora
        acting = [name for name in self.distinct if name in bank.pieces or name in bank.whole]
        pieces = {name: bank.pieces.get(name, ()) for name in acting}
        simple = isinstance(site, AffineSite) and not bank.whole and all(map(_simple, pieces.values()))
        return pieces, simple

    def _fits(self, size: int) -> bool:
        """Tell whether a first side is the rows, or what `generate` makes of them, which is remembered then."""
        count = len(self.names)
        if size in (count, count * self.repeats):
            return True
        if count and size % count == 0 and batch.repeats() == size // count:
            self.repeats = size // count
            return True
        return False

    def _names(self, site: Site, x: Tensor | None) -> tuple[str | None, ...]:
        """Return the adapter of each row of a module's input; raise where it has other rows, as far as can be told."""
        key = id(site)
        if key not in self.apart:
            if not self.apart:  # all paths in one go: to look for each would be quadratic
                self.apart = {id(own): batch.apart(own, path) for path, own in site._lora.sites.items()}
            self.apart.setdefault(key, None)
        why = self.apart[key]
        if why is not None and (x is None or x.dim() < 3 or why == batch.SEQUENCE_FIRST):
            if self.alike:
                return self.names
            raise batch.other_rows(site._lora.path_of(site), why, len(self.names))
        size = len(x) if x is not None and x.dim() else 0
        if size != len(self.names) and not self._fits(size):
            shown = f"{() if x is None else tuple(x.shape)}"
            raise batch.other_rows(site._lora.path_of(site), shown, len(self.names), size)
        if size == len(self.names):
            return self.names
        return tuple(name for name in self.names for _ in range(self.repeats))

    def _together(self, site: AffineSite, pieces: Own, names: tuple[str | None, ...], x: Tensor) -> Tensor:
        y: Tensor = site.plain_forward(x)
        key = id(site), len(names)
        kept = self.kept.get(key)
        every = [piece for own in pieces.values() for piece in own]
        trained = torch.is_grad_enabled() and any(piece.A.requires_grad for piece in every)
        # Factors that were trained since, and tensors of inference mode where gradients are wanted, are gathered anew.
        factors = [p for piece in every for p in piece._parameters.values() if p is not None]
        state: list[Any] = [x.dtype, torch.is_inference_mode_enabled()]
        state += [p.data_ptr() for p in factors]
        state += [p._version for p in factors]
        if kept is None or kept[0] != state or trained:
            kept = state, *self._gathered(site, pieces, names, x, y.shape[-1])
            if not trained:
                self.kept[key] = kept
        _, At, Bt, gains = kept
        flat = x.reshape(len(x), -1, x.shape[-1])
        dropped = self._dropped(pieces, names, flat) if site.training else flat  # type: ignore[attr-defined]
        in_place = gains is None and y.is_contiguous() and y.dtype is x.dtype
        in_place = in_place and not any(t.requires_grad for t in (y, dropped, At, Bt))
        if in_place and At.shape[2] % thin.LANES == 0 and thin.serves_batch(dropped, y.shape[-1], At.shape[2]):
            thin.batch(dropped.contiguous(), y.view(len(x), -1, y.shape[-1]), At.contiguous(), Bt.contiguous())
            return y
        u = torch.bmm(dropped, At)
        if in_place:
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

    def _gathered(
        self, site: AffineSite, pieces: Own, names: tuple[str | None, ...], x: Tensor, outputs: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return Aᵀ (rows, in, r), s·Bᵀ (rows, r, out) and g (rows, 1, out), which is None where no row has DoRA."""
        factors = [joined([(piece, 1.0) for piece in own], outputs) for own in pieces.values()]
        rank, inputs = max(len(A) for A, _ in factors), factors[0][0].shape[1]
        if thin.serves_batch(x, outputs, rank):
            rank += -rank % thin.LANES
        As, Bs, gs = [x.new_zeros(rank, inputs)], [x.new_zeros(outputs, rank)], [x.new_ones(outputs)]
        for own, (A, B) in zip(pieces.values(), factors, strict=True):
            more = rank - len(A)
            As.append(torch.nn.functional.pad(A.to(x.dtype), (0, 0, 0, more)))
            Bs.append(torch.nn.functional.pad(B.to(x.dtype), (0, more)))
            gs.append(gs[0] if own[0].magnitude is None else site.gains(own[0], 1.0).to(x.dtype))
        order = {name: i for i, name in enumerate((None, *pieces))}
        index = torch.tensor([order.get(name, 0) for name in names], device=x.device)
        At, Bt = (torch.stack(each).index_select(0, index).transpose(1, 2) for each in (As, Bs))
        dora = any(own[0].magnitude is not None for own in pieces.values())
        gains = torch.stack(gs).index_select(0, index).unsqueeze(1) if dora else None
        if torch.is_grad_enabled():
            return At, Bt, gains
        return At.contiguous(), Bt.contiguous(), gains

    def _dropped(self, pieces: Own, names: tuple[str | None, ...], x: Tensor) -> Tensor:
        chances = [pieces[name][0].dropout if name is not None and name in pieces else 0.0 for name in names]
        if not any(chances):
            return x
        keep = 1 - torch.tensor(chances, dtype=x.dtype, device=x.device).view(-1, 1, 1)
        return x * (torch.bernoulli(keep.expand_as(x)) / keep)

    def _apart(self, site: Site, names: tuple[str | None, ...], args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        """Compute the rows of each adapter by themselves, and put them together again."""
        for value in (*args, *settings.values()):
            if isinstance(value, Tensor) and value.shape[:1] != (len(names),):
                raise batch.other_rows(site._lora.path_of(site), f"{tuple(value.shape)}", len(self.names))
        parts, places = [], []
        for name in dict.fromkeys(names):
            at = [i for i, own in enumerate(names) if own == name]
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
