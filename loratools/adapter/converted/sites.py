"""Updates on tensors that transformers makes of a base's own as it loads them, by its rules for the model.

An adapter of such a module lands on the tensors that the module's is made of: slices of a fused weight, experts one by
one, permuted rows. The other way round, an update under a name of files lands inside the tensor of a base that was
saved as transformers has it in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from loratools.adapter.converted.pieces import Block, Piece, Span, blocks_of
from loratools.adapter.kinds import Update
from loratools.adapter.naming.wrappers import Names
from loratools.adapter.site import NoPlace, Site

Shapes = Mapping[str, tuple[int, ...]]


def block_of(names: Names, shapes: Shapes, path: str, parameter: str = "weight") -> tuple[str, Block] | None:
    """Return a tensor that transformers makes of others of the base, by its name in transformers; None where it is one.

    Raises `NoPlace` that names the operation which cannot be applied.
    """
    loaded = names.loaded
    made = loaded and (loaded.made(f"{path}.{parameter}") or loaded.made(path))
    if not loaded or not made:
        return None
    name, how = made
    if id(how) not in loaded.blocks:
        of = {each: shapes[loaded.tensor(each)] for listed in how.sources for each in listed}
        loaded.blocks[id(how)] = {
            target: _in_files(block, names) for target, block in blocks_of(how, of, names.config).items()
        }
    blocks: dict[str, Block] = loaded.blocks[id(how)]
    return name, blocks[name]


def _in_files(block: Block, names: Names) -> Block:
    """Return a block whose pieces bear the names of the files."""
    loaded = names.loaded
    assert loaded is not None
    return Block(block.shape, tuple(Piece(loaded.tensor(piece.tensor), piece.spans) for piece in block.pieces))


def sites_of(block: Block, name: str, update: Update, shapes: Shapes) -> list[Site]:
    """Return where an update of a linear layer, a convolution or a bias lies in the files.

    Raises `NoPlace` where its shape is another, or a part of its columns would lie apart.
    """
    if update.shape != block.shape:
        raise NoPlace(f"its delta weight has shape {update.shape}, {name} in transformers has {block.shape}")
    return [_site(piece, block.shape, 0, shapes[piece.tensor], name) for piece in block.pieces]


def stack_sites_of(
    block: Block, name: str, update: Update, transposed: bool, shapes: Shapes
) -> Iterator[tuple[int, Site]]:
    """Yield each expert of a stack (E, out, in), or `transposed` (E, in, out), with a site; an expert may have several.

    Raises `NoPlace` where the stack is for another number of experts, or a part of its columns would lie apart.
    """
    if update.shape[0] != block.shape[0]:
        raise NoPlace(f"it is for {update.shape[0]} experts, {name} in transformers has {block.shape[0]}")
    for piece in block.pieces:
        first = piece.spans[0]
        for expert in range(first.begin, first.end):
            one = first.within(expert, expert + 1)
            assert one is not None
            yield expert, _site(piece.along(0, one), block.shape, 2 if transposed else 1, shapes[piece.tensor], name)


def _site(piece: Piece, shape: tuple[int, ...], out: int, stored: tuple[int, ...], name: str) -> Site:
    """Return the site of a piece: its axis `out` are the output features, those after a stacked one are the inputs."""
    inputs = [i for i in range(len(shape)) if i != out and (len(shape) != 3 or out == 0 or i != 0)]
    whole = all((piece.spans[i].begin, piece.spans[i].end) == (0, shape[i]) for i in inputs)
    part, matrix, before = piece.spans[out], stored, 0
    if len(stored) == 3 and out:  # a stack of the files: each expert is rows of one matrix
        lead = next((span for span in piece.spans if span.axis == 0), None)
        if lead is not piece.spans[0] or lead.end - lead.begin != 1:
            raise NoPlace(f"{name} in transformers is {piece.tensor} with its experts along another axis")
        matrix, before = (stored[0] * stored[1], stored[2]), lead.start * stored[1]
    own = {span.axis: span for span in piece.spans}
    last = len(stored) - 1
    apart = out == 0 and len(stored) > 2 and not all(_covers(own[i], i, stored) for i in range(1, last + 1))
    if apart or not whole:
        raise NoPlace(f"{name} in transformers has only a part of the inputs from {piece.tensor}")
    if len(stored) == 1:
        return Site(piece.tensor, (stored[0], 1), _range(part), (0, 1, 1), (part.begin, part.end))
    if out == 0 and len(stored) > 2:
        return Site(
            piece.tensor, (stored[0], prod(stored[1:])), _range(part), (0, prod(stored[1:]), 1), (part.begin, part.end)
        )
    rows, columns = own[last - 1], own[last]
    begin, end, step = _range(rows)
    return Site(
        piece.tensor, (matrix[0], matrix[1]), (before + begin, before + end, step), _range(columns),
        (part.begin, part.end), part is columns,
    )  # fmt: skip


def _covers(span: Span, axis: int, stored: tuple[int, ...]) -> bool:
    return (span.axis, span.start, span.step, span.end - span.begin) == (axis, 0, 1, stored[axis])


def _range(span: Span) -> tuple[int, int, int]:
    """Return the numbers of a span along the axis of its tensor."""
    count = span.end - span.begin
    return span.start, span.start + (count - 1) * span.step + 1, span.step


def inside(names: Names, shapes: Shapes, module: str, update: Update) -> list[Site]:
    """Return where an update under a name of files lies in a base that has what transformers makes of it, or [].

    Raises `NoPlace` that names the operation where it cannot be turned round.
    """
    part = names.loaded and (names.loaded.part(f"{module}.weight") or names.loaded.part(module))
    if not part:
        return []
    found = {target: tensors[0] for target in part.targets if len(tensors := names.find(target)) == 1}
    if not found:
        return []
    experts = sum(shapes[tensor][0] for tensor in found.values() if shapes[tensor])
    blocks = blocks_of(part.made(experts), _Same(update.shape), names.config)
    sites = []
    for target, block in blocks.items():
        pieces = [piece for piece in block.pieces if piece.tensor == part.own]
        if pieces and (target not in found or shapes[found[target]] != block.shape):
            other = shapes[found[target]] if target in found else "no such tensor"
            raise NoPlace(f"transformers makes {target} {block.shape} of it, and the base has {other}")
        tensor, operation = found.get(target, ""), part.rule.operations[-1][0]
        sites += [_turned(piece, shapes[tensor], tensor, operation) for piece in pieces]
    return sites


class _Same(dict[str, tuple[int, ...]]):
    """The shape of one update under any name: the sources of a rule are alike."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._shape = shape

    def __missing__(self, key: str) -> tuple[int, ...]:
        return self._shape


def _turned(piece: Piece, stored: tuple[int, ...], tensor: str, operation: str) -> Site:
    """Return the site in a model's own tensor of rows of an update that a piece takes."""
    out = next((i for i, span in enumerate(piece.spans) if span.axis == 0), None)
    part = piece.spans[out] if out is not None else None
    inputs = [span for span in piece.spans if span.axis not in (None, 0)]
    if part is None or part.step != 1 or any(span != Span(span.begin, span.end, span.axis) for span in inputs):
        raise NoPlace(f"transformers takes it apart by {operation}, and the base has what comes of it, {tensor}")
    rows = (part.start, part.start + part.end - part.begin)
    if len(stored) == 1:
        return Site(tensor, (stored[0], 1), (part.begin, part.end, 1), (0, 1, 1), rows)
    if out == 0:
        columns = prod(stored[1:])
        return Site(tensor, (stored[0], columns), (part.begin, part.end, 1), (0, columns, 1), rows)
    before = piece.spans[0].begin * stored[-2] if len(stored) == 3 else 0
    matrix = (prod(stored[:-1]), stored[-1])
    spans = piece.spans[-2:]
    begin, end = spans[0].begin, spans[0].end
    return Site(
        tensor, matrix, (before + begin, before + end, 1), (spans[1].begin, spans[1].end, 1), rows, part is spans[1]
    )
