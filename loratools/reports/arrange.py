"""Modules in grids of layer × projection, as a heat map shows them; any names, and no more cells than a page holds.

`model.layers.3.self_attn.q_proj` stands in row `model.layers.3` and column `self_attn.q_proj`. Which of a name's
numbers is the layer is chosen for all names together: the one that leaves the fewest empty cells.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loratools.adapter.naming.compact import natural

MOST_ROWS, MOST_COLUMNS, MOST_CELLS = 48, 12, 348
"""A grid of more has several layers in a row, and the columns of fewest modules as one; all grids share the cells."""
_LEVELS, _MOST_GRIDS, _LEAST = 3, 5, 24
_MANY_ROWS = 160  # a level of more rows than this is that of experts
_OTHER = "other"
_ORDER = ("q", "k", "v", "qkv", "o", "out", "gate", "up", "fc1", "down", "fc2")
"""Words in which names of projections end, in the order of a forward pass; others come after them."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Modules by row and column; `heading` has what all rows share, `*` for what they do not; no cell is empty.

    `labels` are the columns in short: their last segments, where those tell them apart.
    `together` tells how many layers a row stands for, 1 for all but the tallest.
    """

    heading: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    members: Mapping[tuple[int, int], tuple[str, ...]]
    together: int = 1


def arranged(modules: Iterable[str]) -> list[Grid]:
    """Return the grids of modules: one, or where their layers have different projections, one for each sort of layer.

    Every module is in exactly one cell. Same modules, same grids, whatever their order.

    Example:
        >>> grid = arranged(f"layers.{i}.{side}_proj" for i in range(3) for side in "qv")[0]
        >>> grid.heading, grid.rows, grid.columns, grid.members[2, 1]
        ('layers.*', ('0', '1', '2'), ('q_proj', 'v_proj'), ('layers.2.v_proj',))
    """
    names = sorted(set(modules), key=natural)
    layers = _layers(names)
    tables = [_families({name: _split(name, layers[name], level) for name in names}) for level in range(1, _LEVELS + 1)]
    best = max(tables, key=lambda table: (_fill(table), -len(table), -_segments_of(table)))
    several = sorted((family for family in best if not _single(family)), key=len, reverse=True)[:_MOST_GRIDS]
    families = [family for family in best if family in several]
    rest = [name for name in names if not any(name in family for family in families)]
    if rest:  # the head, the embedding, a norm: a row each
        families.append({name: (name, "") for name in rest})
    return [_grid(family, max(_LEAST, MOST_CELLS * len(family) // len(names))) for family in families]


_Places = dict[str, tuple[str, str]]
"""Module -> its row and column."""


def _segments(name: str) -> tuple[str, list[str]]:
    """Return what stands between the segments of a name, and the segments; kohya's names have `_` there."""
    between = "." if "." in name else "_"
    return between, name.split(between)


def _layers(names: Sequence[str]) -> dict[str, list[int]]:
    """Return for each name the places of its numbers that count layers, or experts: not those of a Sequential's parts.

    Numbers count where several have something of one name below them, or the only one has several things.
    """
    below: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    places: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        between, segments = _segments(name)
        starred = ["*" if segment.isdigit() else segment for segment in segments]
        places[name] = [
            (i, between.join(starred[: i + 1])) for i, segment in enumerate(segments[:-1]) if segment.isdigit()
        ]
        for i, parent in places[name]:
            below[parent][segments[i]].add(between.join(starred[i + 1 :]))
    counting = {
        parent
        for parent, parts in below.items()
        if len(set().union(*parts.values())) < sum(map(len, parts.values()))
        or (len(parts) == 1 and max(map(len, parts.values())) > 1)
    }
    return {name: [i for i, parent in found if parent in counting] for name, found in places.items()}


def _split(name: str, layers: Sequence[int], level: int) -> tuple[str, str]:
    """Return the row and the column of a module where the number of a `level` (1, 2, …) is its layer."""
    if not layers:
        return name, ""
    between, segments = _segments(name)
    cut = layers[min(level, len(layers)) - 1] + 1
    return between.join(segments[:cut]), between.join(segments[cut:])


def _families(places: _Places) -> list[_Places]:
    """Return the modules by sort of layer: rows that differ in numbers alone; sorts with the same columns are one."""
    sorts: dict[str, _Places] = defaultdict(dict)
    for name, place in places.items():
        sorts[re.sub(r"\d+", "*", place[0])][name] = place
    families: list[_Places] = []
    for family in sorted(sorts.values(), key=lambda family: -len({column for _, column in family.values()})):
        columns = {column for _, column in family.values()}
        whole = next((other for other in families if columns <= {column for _, column in other.values()}), None)
        if whole is None or columns == {""}:
            families.append(dict(family))
        else:
            whole |= family
    return sorted(families, key=lambda family: natural(next(iter(family))))


def _segments_of(families: Sequence[_Places]) -> int:
    """Return how long the names of all columns are: the shorter, the more the rows say."""
    return sum(column.count(".") for family in families for _, column in family.values())


def _single(family: _Places) -> bool:
    return len({row for row, _ in family.values()}) == 1 or {column for _, column in family.values()} == {""}


def _fill(families: Sequence[_Places]) -> float:
    """Return which share of all cells has a module, 0 where a level has too many rows."""
    rows = [len({row for row, _ in family.values()}) for family in families]
    columns = [len({column for _, column in family.values()}) for family in families]
    cells = sum(row * column for row, column in zip(rows, columns, strict=True))
    few = sum(rows) <= _MANY_ROWS or all(count == 1 for count in columns)
    return round(sum(map(len, families)) / cells, 6) if cells and few else 0.0


def _grid(family: _Places, cells: int) -> Grid:
    rows = sorted({row for row, _ in family.values()}, key=natural)
    columns = {column: column for _, column in family.values()}
    if len(columns) > MOST_COLUMNS:  # experts, parts of a Sequential
        columns = {column: re.sub(r"(?<![^._])\d+(?![^._])", "*", column) for column in columns}
    shown = _few([columns[column] for _, column in family.values()])
    together = -(-len(rows) // min(MOST_ROWS, cells // len(shown)))
    row_at = {row: i // together for i, row in enumerate(rows)}
    column_at = {column: i for i, column in enumerate(shown)}
    members: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, (row, column) in family.items():
        members[row_at[row], column_at.get(columns[column], len(shown) - 1)].append(name)
    heading, short = _common(rows)
    labels = [short[i : i + together] for i in range(0, len(short), together)]
    return Grid(
        heading, tuple(part[0] if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in labels), tuple(shown),
        tuple(_in_short(shown)),
        {cell: tuple(names) for cell, names in sorted(members.items())}, together,
    )  # fmt: skip


def _few(columns: Sequence[str]) -> list[str]:
    """Return the columns in their usual order, those of fewest modules as one at the end."""
    kinds = sorted(set(columns), key=_in_order)
    if len(kinds) <= MOST_COLUMNS:
        return kinds
    most = sorted(kinds, key=lambda column: (-columns.count(column), natural(column)))[: MOST_COLUMNS - 1]
    return [*(column for column in kinds if column in most), _OTHER]


def _in_short(columns: Sequence[str]) -> list[str]:
    last = [column.rpartition(".")[2] for column in columns]
    return last if len(set(last)) == len(last) and not any(word.isdigit() for word in last) else list(columns)


def _in_order(column: str) -> tuple[int, str]:
    words = re.split(r"[._]", column.removesuffix("_proj"))
    return min((_ORDER.index(word) for word in words if word in _ORDER), default=len(_ORDER)), natural(column)


def _common(rows: Sequence[str]) -> tuple[str, list[str]]:
    """Return what all rows have in common, with `*` for the rest of each, and that rest."""
    if len(rows) < 2:
        return "", list(rows)
    between, _ = _segments(rows[0])
    split = [row.split(between) for row in rows]
    head = tail = 0
    while all(len(parts) > head + 1 and parts[head] == split[0][head] for parts in split):
        head += 1
    while all(len(parts) > head + tail + 1 and parts[-1 - tail] == split[0][-1 - tail] for parts in split):
        tail += 1
    end = len(split[0]) - tail
    pattern = between.join([*split[0][:head], "*", *split[0][end:]]) if head or tail else ""
    return pattern, [between.join(parts[head : len(parts) - tail]) for parts in split]
