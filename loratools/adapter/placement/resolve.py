"""From an adapter's modules to the tensors of a base and the rectangles of them, by names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any

from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.adapter.naming.image.components import one_weight, widening
from loratools.adapter.naming.wrappers import FUSIONS, Names
from loratools.adapter.placement import stacks
from loratools.adapter.placement.conv1d import Conv1D, fitted
from loratools.adapter.site import NoPlace, Site, clashes
from loratools.decisions import decided, detailed
from loratools.errors import IncompatibleAdapter, counted
from loratools.storage.codecs.turned import CONV1D

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """One update (or a part of it) on one site of the base.

    Of a stack it is the update of one `expert`, by number; `bias` marks what is added to the bias beside a weight.
    """

    module: str
    update: Update
    site: Site
    expert: int | None = None
    bias: bool = False


def resolve(adapter: Adapter, shapes: Shapes, config: Mapping[str, Any] | None = None) -> list[Placement]:
    """Place every update of an adapter on the tensors of a base.

    `shapes` are the base's tensors; `config` is its config.json, whose `model_type` decides what shapes cannot: the
    orientation of square Conv1D weights, the order within fused projections.

    Raises `IncompatibleAdapter` that lists every module without a place, every shape that does not fit and every
    ambiguity with its candidates; also for an adapter that would change nothing.
    """
    if not adapter.updates and not adapter.replacements:
        raise IncompatibleAdapter("the adapter has no updates: it would change nothing")
    names = Names(shapes, config)
    adapter, ambiguous = stacks.settled(adapter, names, shapes, config or {})
    swapped = adapter.settings.get("fan_in_fan_out") is True
    model_type = (config or {}).get("model_type")
    conv1d = Conv1D.of(shapes, model_type if isinstance(model_type, str) else "")
    resolver = _Resolver(names, shapes, config or {}, conv1d, swapped)
    updates = resolver.among(adapter.updates)
    placements: list[Placement] = []
    problems = [f"{module}: {reason}" for module, reason in ambiguous.items()]
    for module, update in ((module, updates[module]) for module in updates if module not in ambiguous):
        try:
            stated = adapter.orientation.get(module)
            own = resolver if stated is None else replace(resolver, stated=stated)
            placements += own.place(module, update)
        except NoPlace as error:
            problems.append(f"{module}: {error}")
    problems += [
        f"{second}: lands on the same part of {tensor} as {first}"
        for tensor, first, second in clashes((each.module, each.site) for each in placements)
        if not one_weight(first, second)
    ]
    if problems:
        from loratools.adapter.naming.image.models import explained  # families of image models, for an error alone

        raise IncompatibleAdapter(
            f"the adapter does not fit this base model: {counted(len(problems), 'problem')} in "
            f"{counted(len(adapter.updates), 'module')}",
            explained(problems, adapter.updates, shapes),
        )
    for placement in placements:
        detailed("%s: %s of the base", placement.module, placement.site.tensor)
    for placement in placements[:1]:
        decided(
            "%d modules change %d tensors of the base; %s is %s, rows %d:%d and columns %d:%d of %d x %d%s",
            len(adapter.updates), len({each.site.tensor for each in placements}), placement.module,
            placement.site.tensor, *placement.site.rows[:2], *placement.site.columns[:2], *placement.site.matrix,
            ", transposed" if placement.site.transposed else "",
        )  # fmt: skip
    return placements


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class _Resolver:
    """What places the updates of one adapter on one base."""

    names: Names
    shapes: Shapes
    config: Mapping[str, Any]
    conv1d: Conv1D
    swapped: bool  # whether the adapter's config says fan_in_fan_out: trained on weights stored (in, out)
    stated: bool | None = None  # whether the base stores this module's weight (in, out), where the adapter says it

    def among(self, updates: Mapping[str, Update]) -> Mapping[str, Update]:
        """Return the updates, those that depend on the shapes of all weights of their adapter with these."""
        if not any(update.needs_all for update in updates.values()):
            return updates
        paths = (stacks.path_of(module) for module in updates)
        shapes = [each[0] for path in paths if (each := self._shapes_of(path, self._tensor_of(path, path)))]
        return {module: update.among(shapes) if update.needs_all else update for module, update in updates.items()}

    def place(self, module: str, update: Update) -> list[Placement]:
        """Return the placements of an update: on the weight, or parts of it, and on the bias if it has one."""
        path = stacks.path_of(module)
        if update.members:
            return self._experts(module, path, update)
        tensor = self._tensor_of(path, path)
        if shapes := self._shapes_of(path, tensor):
            update = fitted(update, shapes)
        placed = [Placement(module, update, site) for site in self.sites(path, update, tensor)]
        if update.bias is not None:
            from loratools.adapter.kinds._bias import BiasUpdate

            added = BiasUpdate(update.bias, update.scaling, update.alpha)
            made = None if tensor else self._made(path, added, "bias")
            biases = [self._bias(p.site) for p in placed] if made is None else made
            placed += [Placement(module, added, site, bias=True) for site in biases]
        if (beside := update.on_bias) is not None:
            sites = filter(None, [self._beside(weight.site) for weight in placed])
            placed += [Placement(module, beside, site, bias=True) for site in sites]
        return placed

    def _shapes_of(self, path: str, tensor: str | None) -> tuple[tuple[int, ...], ...]:
        """Return the shapes that a module's weight may have, likelier first: by its tensor, or by transformers."""
        if tensor:
            return self.conv1d.of_weight(tensor, self.swapped, self.stated)
        from loratools.adapter.converted import sites  # as in `_made`

        made = sites.block_of(self.names, self.shapes, path)
        return (made[1].shape,) if made else ()

    def _made(self, path: str, update: Update, parameter: str = "weight") -> list[Site] | None:
        """Return where an update lies in what transformers makes a tensor of; None where it makes none."""
        from loratools.adapter.converted import sites  # of no use where the base has a tensor of the name

        made = sites.block_of(self.names, self.shapes, path, parameter)
        return sites.sites_of(made[1], made[0], update, self.shapes) if made else None

    def _beside(self, site: Site) -> Site | None:
        """Return where the outputs of a weight's site lie in the bias beside it; None where there is none."""
        return self._bias(site) if site.tensor.removesuffix("weight") + "bias" in self.shapes else None

    def _experts(self, module: str, path: str, update: Update) -> list[Placement]:
        """Return the placements of the experts of a stack, one by one."""
        from loratools.adapter.placement import experts

        for spelled in stacks.spellings(path):
            if sites := experts.stack_sites(spelled, update, self.names, self.shapes):
                members = update.members
                return [Placement(module, members[expert], site, expert) for expert, site in sites]
        raise NoPlace(f"no {update.layout['parameter']} of its experts in the base, neither stacked nor one by one")

    def _bias(self, site: Site) -> Site:
        """Return where the outputs of a weight's site lie in the bias beside it."""
        name = site.tensor.removesuffix("weight") + "bias"
        out, rows = (site.matrix[1], site.columns) if site.transposed else (site.matrix[0], site.rows)
        if name == site.tensor or self.shapes.get(name) != (out,):
            raise NoPlace(
                f"trained with a bias, and the base has no {name} with {out} numbers to add it to; "
                f"found {self.shapes.get(name, 'none')}"
            )
        return Site(name, (out, 1), rows, (0, 1, 1), site.part)

    def sites(self, module: str, update: Update, tensor: str | None) -> list[Site]:
        """Return where an update lies: on `tensor`, the module's own weight, or in or around fused projections."""
        if tensor:
            return [self._orient(module, tensor, update, (0, update.shape[0]), self.shapes[tensor])]
        if (made := self._made(module, update)) is not None:
            return made
        from loratools.adapter.converted.sites import inside
        from loratools.adapter.placement import experts

        if sites := inside(self.names, self.shapes, module, update):
            return sites
        sites = self._into_fused(module, update) or self._out_of_fused(module, update)
        if not sites and (site := experts.expert_site(module, update, self.names, self.shapes, self.config)):
            return [site]
        if not sites:
            nearest = ", ".join(self.names.nearest(module))
            raise NoPlace(f"not in the base; nearest: {nearest}" if nearest else "not in the base")
        return sites

    def _tensor_of(self, module: str, asked: str) -> str | None:
        spelled = (tensors for path in stacks.spellings(module) if (tensors := self.names.find(path)))
        tensors = next(spelled, []) or self.names.find(module, "in_proj_weight")  # nn.MultiheadAttention
        if len(tensors) > 1:
            raise NoPlace(f"ambiguous: {asked} could be any of {', '.join(tensors)}")
        return tensors[0] if tensors else None

    def _orient(
        self, module: str, tensor: str, update: Update, part: tuple[int, int], region: tuple[int, ...], start: int = 0
    ) -> Site:
        """Place rows `part` of an update on `region` (a shape in the tensor's own orientation) from `start` on."""
        shape = self.shapes[tensor]
        wanted = (part[1] - part[0], *update.shape[1:])
        if len(shape) == 1 and wanted == shape:
            return Site(tensor, (shape[0], 1), (0, shape[0], 1), (0, 1, 1), part)
        comparable = len(wanted) == len(shape) >= 2
        turned = comparable and len(shape) == 2 and self._stored_in_out(tensor, wanted, region)
        if not comparable or wanted != (region[::-1] if turned else region):
            stored = " (stored [in, out])" if turned else ""
            why = widening(module, wanted, region)
            raise NoPlace(f"its delta weight has shape {wanted}, {tensor}{stored} has {shape}{why}")
        matrix, outputs = (shape[0], prod(shape[1:])), (start, start + wanted[0], 1)
        if turned:
            return Site(tensor, matrix, (0, shape[0], 1), outputs, part, True)
        return Site(tensor, matrix, outputs, (0, matrix[1], 1), part)

    def _stored_in_out(self, tensor: str, wanted: tuple[int, ...], region: tuple[int, ...]) -> bool:
        """Tell whether the base stores a weight [in, out]: as sealed, else as `Conv1D` says."""
        if self.stated is not None:
            return self.stated
        try:
            return self.conv1d.stored_in_out(tensor, wanted, region, self.swapped)
        except ValueError as error:
            raise NoPlace(f"{error}; {stacks.MODEL_TYPE}; or fan_in_fan_out in the adapter's config does") from None

    def _into_fused(self, module: str, update: Update) -> list[Site]:
        """Place a split projection (q_proj) in a base that stores it fused (qkv_proj)."""
        parent, _, last = module.rpartition(".")
        for fusion in FUSIONS:
            position = fusion.position(last)
            fused = f"{parent}.{fusion.fused}".removeprefix(".")
            if position is None or not (tensor := self._tensor_of(fused, module)):
                continue
            shape, rows = self.shapes[tensor], update.shape[0]
            turned = fusion.fused in CONV1D.get(self.model_type, ()) if self.stated is None else self.stated
            axis = int(turned)
            if len(shape) != 2 or len(update.shape) != 2:
                raise NoPlace(f"its delta weight has shape {update.shape}, {tensor} has {shape}")
            total, count = shape[axis], len(fusion.parts)
            if not fusion.is_of(self.model_type):
                config = f"model_type {self.model_type!r} in config.json" if self.model_type else "no config.json"
                order = f"and {config} does not tell in which order"
                raise NoPlace(f"ambiguous: the base stores it inside {tensor}, {order}")
            if self.model_type in fusion.by_head:
                return self._by_heads(tensor, update, position, count)
            # The first part begins at 0; the later ones (k and v, or up) are equally large and end at the end.
            first = 0 if position == 0 else total - (count - position) * rows
            if not fusion.fits(rows, position, total, self.config):
                raise NoPlace(f"its {rows} output features are no part of {tensor} with shape {shape}")
            region = (shape[0], rows) if axis else (rows, shape[1])
            return [self._orient(fused, tensor, update, (0, rows), region, first)]
        return []

    def _by_heads(self, tensor: str, update: Update, position: int, count: int) -> list[Site]:
        rows, (total, columns) = update.shape[0], self.shapes[tensor]
        heads = next((h for key in ("num_attention_heads", "n_head") if isinstance(h := self.config.get(key), int)), 0)
        if heads < 1 or rows * count != total or rows % heads or update.shape[1] != columns:
            stored = f"{tensor} {(total, columns)} with {heads} heads"
            raise NoPlace(f"its delta weight {update.shape} is no third of {stored}")
        size = rows // heads
        starts = [(head * count + position) * size for head in range(heads)]
        return [
            Site(tensor, (total, columns), (at, at + size, 1), (0, columns, 1), (head * size, (head + 1) * size))
            for head, at in enumerate(starts)
        ]

    def _out_of_fused(self, module: str, update: Update) -> list[Site]:
        """Place a fused projection (qkv_proj) in a base that stores it split (q_proj, k_proj, v_proj)."""
        parent, _, last = module.rpartition(".")
        for fusion in FUSIONS:
            if fusion.fused != last:
                continue
            named = (
                (self._tensor_of(f"{parent}.{name}".removeprefix("."), module) for name in aliases)
                for aliases in fusion.parts
            )
            split = [tensor for candidates in named if (tensor := next(filter(None, candidates), None))]
            if len(split) < len(fusion.parts):
                continue
            if fusion.by_head:
                raise NoPlace(
                    f"ambiguous: the base stores {', '.join(split)}, and some models fuse {last} head by head "
                    f"({', '.join(sorted(fusion.by_head))}), others block by block"
                )
            rows = [self.shapes[tensor][0] for tensor in split]
            if sum(rows) != update.shape[0]:
                raise NoPlace(f"its {update.shape[0]} output features are not the {rows} of {', '.join(split)}")
            return [
                self._orient(module, tensor, update, (stop - count, stop), self.shapes[tensor])
                for tensor, count, stop in zip(split, rows, accumulate(rows), strict=True)
            ]
        return []

    @property
    def model_type(self) -> str:
        """The base's `model_type`, "" where its config.json says none."""
        return self.conv1d.model_type
