"""Single numbers at places of a matrix, as kinds hold them that train few elements of a weight."""

from __future__ import annotations

from dataclasses import dataclass

from loratools.adapter.kinds import Tensor
from loratools.errors import BadFile


@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """Numbers `values` (n,) at `rows` and `columns` of a matrix of `shape`, rows ascending; twice in a place they add.

    Raises `BadFile` for a place outside of the matrix.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, places: tuple[Tensor, Tensor], values: Tensor, shape: tuple[int, int]) -> Sparse:
        """Return the numbers at (rows, columns), sorted by row."""
        rows, columns = (at.to(values.device) for at in places)
        for name, at, count in (("row", rows, shape[0]), ("column", columns, shape[1])):
            if len(at) and not 0 <= int(at.min()) <= int(at.max()) < count:
                found = int(at.min()) if int(at.min()) < 0 else int(at.max())
                raise BadFile(f"a number at {name} {found} of a weight of {count} {name}s")
        order = rows.argsort(stable=True)
        return cls(rows[order], columns[order], values[order], shape)

    def transposed(self) -> Sparse:
        """Return the same numbers of the transposed matrix."""
        return Sparse.of((self.columns, self.rows), self.values, self.shape[::-1])

    def tile(self, rows: slice) -> Tensor:
        """Return some rows as a dense matrix."""
        import torch

        ends = torch.tensor([rows.start, rows.stop], device=self.rows.device)
        first, last = torch.searchsorted(self.rows, ends).tolist()
        inside = slice(first, last)
        tile = self.values.new_zeros(rows.stop - rows.start, self.shape[1])
        at = (self.rows[inside] - rows.start, self.columns[inside])
        return tile.index_put_(at, self.values[inside], accumulate=True)
