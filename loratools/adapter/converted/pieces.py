"""What transformers' operations do with tensors, as pieces: which numbers of a model's tensor lie where in its files.

An operation is a function on blocks, tensors made of pieces of others, and touches no number. Operations are those of
`transformers.core_model_loading` by their names in `naming/conversions.json`; every other is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from loratools.adapter.naming.conversions import Made
from loratools.adapter.site import NoPlace

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Numbers `begin` to `end` along one axis of a block: those of a piece's `axis` from `start` on, `step` apart.

    Where the axis is None the piece has none there: it is one of those stacked.
    """

    begin: int
    end: int
    axis: int | None = None
    start: int = 0
    step: int = 1

    def within(self, begin: int, end: int) -> Span | None:
        """Return the part of this span in [`begin`, `end`), None where there is none."""
        low, high = max(begin, self.begin), min(end, self.end)
        start = self.start + (low - self.begin) * self.step
        return Span(low, high, self.axis, start, self.step) if low < high else None

    def moved(self, by: int) -> Span:
        """Return the same numbers, `by` further on in the block."""
        return Span(self.begin + by, self.end + by, self.axis, self.start, self.step) if by else self


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a block that lies in one tensor of the files; a span for each axis of the block."""

    tensor: str
    spans: tuple[Span, ...]

    def along(self, axis: int, span: Span) -> Piece:
        """Return the piece with another span along one axis."""
        return Piece(self.tensor, (*self.spans[:axis], span, *self.spans[axis + 1 :]))


@dataclass(frozen=True, slots=True)
class Block:
    """A tensor of a model, or on the way to one: its shape, and the pieces that cover it."""

    shape: Shape
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, tensor: str, shape: Shape) -> Block:
        """Return a tensor of the files as it is."""
        return cls(shape, (Piece(tensor, tuple(Span(0, size, axis) for axis, size in enumerate(shape))),))

    def cut(self, axis: int, begin: int, end: int) -> Block:
        """Return [`begin`, `end`) of the block along one axis."""
        kept = ((piece, piece.spans[axis].within(begin, end)) for piece in self.pieces)
        pieces = (piece.along(axis, span.moved(-begin)) for piece, span in kept if span is not None)
        return Block((*self.shape[:axis], end - begin, *self.shape[axis + 1 :]), tuple(pieces))

    def strided(self, axis: int, start: int, count: int, step: int) -> Block:
        """Return `count` numbers along one axis, from `start` on and `step` apart."""
        pieces = []
        for piece in self.pieces:
            span = piece.spans[axis]
            low, high = (min(count, max(0, -((start - end) // step))) for end in (span.begin, span.end))
            if low < high:
                at = span.start + (start + low * step - span.begin) * span.step
                pieces.append(piece.along(axis, Span(low, high, span.axis, at, span.step * step)))
        return Block((*self.shape[:axis], count, *self.shape[axis + 1 :]), tuple(pieces))


_Blocks = Mapping[str, Sequence[Block]]
"""Blocks by the pattern that they are under: sources first, then targets."""


def joined(blocks: Sequence[Block], axis: int) -> Block:
    """Return blocks one after another along an axis; pieces that go on in one another become one."""
    shape = blocks[0].shape
    pieces: list[Piece] = []
    at = 0
    for block in blocks:
        sides = zip(shape, block.shape, strict=False)
        if len(block.shape) != len(shape) or any(a != b for i, (a, b) in enumerate(sides) if i != axis):
            raise ValueError(f"shapes {shape} and {block.shape}")
        pieces += (piece.along(axis, piece.spans[axis].moved(at)) for piece in block.pieces)
        at += block.shape[axis]
    return Block((*shape[:axis], at, *shape[axis + 1 :]), tuple(_merged(pieces, axis)))


def _merged(pieces: Sequence[Piece], axis: int) -> Iterator[Piece]:
    last: Piece | None = None
    for piece in pieces:
        if last is not None and (span := _together(last, piece, axis)) is not None:
            last = last.along(axis, span)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last


def _together(first: Piece, second: Piece, axis: int) -> Span | None:
    """Return one span for two pieces that lie one after another, None where they do not."""
    a, b = first.spans[axis], second.spans[axis]
    if first.tensor != second.tensor or a.axis != b.axis or a.axis is None or a.end != b.begin:
        return None
    if any(x != y for i, (x, y) in enumerate(zip(first.spans, second.spans, strict=True)) if i != axis):
        return None
    gap = b.start - (a.start + (a.end - a.begin - 1) * a.step)
    steps = {span.step for span in (a, b) if span.end - span.begin > 1} or {gap}
    return replace(a, end=b.end, step=gap) if steps == {gap} and gap > 0 else None


def _axis(settings: Mapping[str, Any], key: str = "dim", otherwise: int = 0) -> int:
    return int(settings.get(key, otherwise))


def _only(blocks: _Blocks) -> Block:
    every = [block for listed in blocks.values() for block in listed]
    if len(every) != 1:
        raise ValueError(f"{len(every)} tensors, expected one")
    return every[0]


@dataclass(frozen=True, slots=True)
class _Context:
    """What an operation may ask for: the rule's names, the targets that they stand for, and the model's config."""

    made: Made
    config: Mapping[str, Any]


def _stack(blocks: _Blocks, settings: Mapping[str, Any], context: _Context) -> _Blocks:
    axis = _axis(settings)
    return {key: [_stacked(listed, axis)] for key, listed in blocks.items()}


def _stacked(blocks: Sequence[Block], axis: int) -> Block:
    if any(block.shape != blocks[0].shape for block in blocks):
        raise ValueError(f"shapes {' and '.join(map(str, sorted({block.shape for block in blocks})))}")
    pieces = (
        Piece(piece.tensor, (*piece.spans[:axis], Span(i, i + 1), *piece.spans[axis:]))
        for i, block in enumerate(blocks)
        for piece in block.pieces
    )
    return Block((*blocks[0].shape[:axis], len(blocks), *blocks[0].shape[axis:]), tuple(pieces))


def _concatenate(blocks: _Blocks, settings: Mapping[str, Any], context: _Context) -> _Blocks:
    every = [block for listed in blocks.values() for block in listed]
    return {context.made.rule.targets[0]: [joined(every, _axis(settings))]}


def _chunk(blocks: _Blocks, settings: Mapping[str, Any], context: _Context) -> _Blocks:
    targets, axis, block = context.made.rule.targets, _axis(settings), _only(blocks)
    size = ceil(block.shape[axis] / len(targets))
    if size * len(targets) != block.shape[axis]:
        raise ValueError(f"{block.shape[axis]} is no multiple of {len(targets)}")
    return {target: [block.cut(axis, i * size, (i + 1) * size)] for i, target in enumerate(targets)}


def _split(blocks: _Blocks, settings: Mapping[str, Any], context: _Context) -> _Blocks:
    """Split as the model's own parameters are large: q, k and v by the numbers of heads."""
    targets, axis, block = context.made.rule.targets, _axis(settings), _only(blocks)
    text = next((part for part in _configs(context.config) if "num_key_value_heads" in part), {})
    heads, groups = text.get("num_attention_heads"), text.get("num_key_value_heads")
    if len(targets) != 3 or not isinstance(heads, int) or not isinstance(groups, int):
        raise ValueError("no num_attention_heads and num_key_value_heads in config.json")
    size, rest = divmod(block.shape[axis], heads + 2 * groups)
    if rest:
        raise ValueError(f"{block.shape[axis]} is no multiple of {heads + 2 * groups} heads")
    ends = [heads * size, (heads + groups) * size, (heads + 2 * groups) * size]
    starts = [0, *ends[:-1]]
    return {target: [block.cut(axis, start, end)] for target, start, end in zip(targets, starts, ends, strict=True)}


def _configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from (value for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping))
    yield config


def _interleave(blocks: _Blocks, settings: Mapping[str, Any], context: _Context) -> _Blocks:
    axis, block = _axis(settings), _only(blocks)
    half, rest = divmod(block.shape[axis], 2)
    if rest or settings.get("inverse"):
        raise ValueError(f"{block.shape[axis]} along axis {axis}" if rest else "it is the inverse")
    parts = [block.strided(axis, start, half, 2) for start in (0, 1)]
    return {context.made.rule.targets[0]: [joined(parts, axis)]}


def _transpose(blocks: _Blocks, settings: Mapping[str, Any], context: _Context) -> _Blocks:
    if settings.get("check_dims"):
        raise ValueError("only the model's own shape tells whether it is applied")
    first, second = _axis(settings, "dim0"), _axis(settings, "dim1", 1)
    block = _only(blocks)
    order = list(range(len(block.shape)))
    order[first], order[second] = order[second], order[first]
    pieces = tuple(replace(piece, spans=tuple(piece.spans[i] for i in order)) for piece in block.pieces)
    return {context.made.rule.targets[0]: [Block(tuple(block.shape[i] for i in order), pieces)]}


def _permute_for_rope(blocks: _Blocks, settings: Mapping[str, Any], context: _Context) -> _Blocks:
    names, part = settings.get("permute_layer_names"), settings.get("subconfig_key")
    inner = context.config.get(part, context.config) if part else context.config
    heads = next((inner[key] for key in ("num_attention_heads", "num_heads", "n_head") if key in inner), None)
    if not isinstance(heads, int) or heads < 1 or settings.get("inverse"):
        raise ValueError(f"no num_attention_heads in config.json{f' in {part}' if part else ''}")
    return {
        key: [_permuted(block, heads) for block in listed] if names is None or any(n in key for n in names) else listed
        for key, listed in blocks.items()
    }


def _permuted(block: Block, heads: int) -> Block:
    size, rest = divmod(block.shape[0], 2 * heads)
    if rest:
        raise ValueError(f"{block.shape[0]} rows are no multiple of {heads} heads")
    starts = [head * 2 * size + i for head in range(heads) for i in (0, 1)]
    return joined([block.strided(0, start, size, 2) for start in starts], 0)


def _fuse_and_split_experts(blocks: _Blocks, settings: Mapping[str, Any], context: _Context) -> _Blocks:
    """Give each target an equal share of the experts, each with all projections, as Ernie 4.5 VL has them."""
    targets, stack, beside = context.made.rule.targets, _axis(settings, "stack_dim"), _axis(settings, "concat_dim", 1)
    shares: dict[str, list[Block]] = {target: [] for target in targets}
    for listed in blocks.values():
        share = ceil(len(listed) / len(targets))
        for i, target in enumerate(targets):
            shares[target].append(_stacked(listed[i * share : (i + 1) * share], stack))
    return {target: [joined(each, beside)] for target, each in shares.items()}


_OPERATIONS: Mapping[str, Callable[[_Blocks, Mapping[str, Any], _Context], _Blocks]] = {
    "stack": _stack, "concatenate": _concatenate, "chunk": _chunk, "split": _split, "interleave": _interleave,
    "transpose": _transpose, "permute_for_rope": _permute_for_rope, "fuse_and_split_experts": _fuse_and_split_experts,
}  # fmt: skip


def blocks_of(made: Made, shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> dict[str, Block]:
    """Return every tensor of a model that a rule makes, by name, as pieces of those of the files.

    `shapes` are those of the rule's sources, `config` is the model's config.json, which has numbers of heads.

    Raises `NoPlace` that names the operation, for shapes that it does not take and for what the files lack.
    """
    if missing := [made.rule.sources[i] for i, names in enumerate(made.sources) if not names]:
        raise NoPlace(f"transformers makes it of {' and '.join(made.rule.sources)}; the base has no {missing[0]}")
    blocks: _Blocks = {
        pattern: [Block.of(name, shapes[name]) for name in names]
        for pattern, names in zip(made.rule.sources, made.sources, strict=True)
    }
    for name, settings in made.rule.operations:
        operation = _OPERATIONS.get(name)
        if operation is None:
            raise NoPlace(f"transformers makes it by {name}, which is not known")
        try:
            blocks = operation(blocks, settings, _Context(made, config))
        except (ValueError, IndexError) as error:
            raise NoPlace(f"transformers makes it by {name} of {made.sources[0][0]}: {error}") from None
    ended = [blocks[target] if target in blocks else next(iter(blocks.values())) for target in made.rule.targets]
    return {target: listed[0] for target, listed in zip(made.targets, ended, strict=True)}
