"""AdaMSS: W' = W + ΔW, the rows of W in groups and a product for each group: ΔW[gᵢ] = Bᵢ·Aᵢ·V, as in PEFT.

`adamss_newB` is V (r, in), `adamss_A.{i}` are Aᵢ (q, r) and `adamss_B.{i}` Bᵢ (rows of the group, q). Which rows those
are is in no file: PEFT puts the rows of the base's left singular vectors, which `torch.svd_lowrank` gives for
`layout["seed"]`, into as many groups by the k-means of scikit-learn: centres drawn by its fixed seed, ten rounds. W is
the unchanged base, whatever other adapters have made of it.

PEFT takes a layer's bias for one more column of W. The bias is not known here, so such an adapter is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter.kinds import Device, DType, Tensor, Underlying
from loratools.adapter.kinds._onweight import Change, Changing
from loratools.adapter.kinds._vectors import sketched
from loratools.errors import IncompatibleAdapter
from loratools.storage.lazy import LazyTensor

V = "adamss_newB"
_A, _B = "adamss_A.{}", "adamss_B.{}"
_SEED, _ROUNDS, _TOLERANCE = 123456789, 10, 1e-4  # PEFT's, and scikit-learn's
_CLEAR = 1e-6  # of a row's squared length: nearer distances float32 does not tell apart


@dataclass(frozen=True, slots=True, eq=False)
class AdamssUpdate(Changing):
    """The products of all groups. Raises `ValueError` where they do not go together."""

    kind = "adamss"
    together = 0
    of_base = True

    def check(self) -> None:
        """Raise `ValueError` for factors that do not go together, or for a weight that they are not for."""
        shapes = {name: lazy.shape for name, lazy in self.tensors.items()}
        pairs = [(shapes.get(_A.format(i), ()), shapes.get(_B.format(i), ())) for i in range(self.groups)]
        fits = all(len(a) == len(b) == 2 and a[0] == b[1] and a[1] == self.rank for a, b in pairs)
        if len(shapes[V]) != 2 or not pairs or len(shapes) != 1 + 2 * len(pairs) or not fits:
            raise ValueError(f"AdaMSS' tensors do not go together: {shapes}")
        if self.weight_shape == (self.own_shape[0], self.own_shape[1] - 1):
            raise ValueError("it was trained on a layer with a bias, on which the groups of its rows depend")
        Changing.check(self)

    @property
    def groups(self) -> int:
        """Number of groups."""
        return (len(self.tensors) - 1) // 2

    @property
    def rank(self) -> int:
        return self.tensors[V].shape[0]

    @property
    def own_shape(self) -> tuple[int, ...]:
        return sum(self.tensors[_B.format(i)].shape[0] for i in range(self.groups)), self.tensors[V].shape[1]

    def _rows(self, W: Tensor) -> Tensor:
        """Return the rows of W, group after group; raise `IncompatibleAdapter` for groups of other sizes."""
        import torch

        U, _, _ = sketched(W.cpu(), self.rank, 2, self.layout["seed"])
        labels = _labels(U, self.groups)
        sizes = labels.bincount(minlength=self.groups).tolist()
        wanted = [self.tensors[_B.format(i)].shape[0] for i in range(self.groups)]
        if sizes != wanted:
            raise IncompatibleAdapter(
                f"the rows of the base's weight are in groups of {sizes}, those of the adapter in groups of {wanted}",
                hint="Check that this is the base model that the adapter was trained on.",
            )
        return torch.cat([(labels == i).nonzero()[:, 0] for i in range(self.groups)])

    def change(self, dtype: DType, device: Device) -> Change:
        """Return W with the products added to the rows of their groups."""
        import torch

        products = [self.number(_B.format(i)) @ self.number(_A.format(i)) for i in range(self.groups)]
        left, right = torch.cat(products).to(device, dtype), self.number(V).to(device, dtype)
        return lambda W, rows: W.index_add(0, self._rows(W).to(W.device), left @ right)

    def outputs(self, X: Tensor, under: Underlying) -> Tensor:
        """Return X·Wᵀ, and for each group ((X·Vᵀ)·Aᵢᵀ)·Bᵢᵀ added to the outputs that are its rows."""
        import torch

        at = self._rows(under.below(torch.eye(X.shape[1], dtype=X.dtype)).T)
        Y, through = under.below(X).clone(), X @ self.number(V).to(X).T
        first = 0
        for i in range(self.groups):
            B = self.number(_B.format(i)).to(X)
            Y[:, at[first : first + len(B)]] += (through @ self.number(_A.format(i)).to(X).T) @ B.T
            first += len(B)
        return Y


def _labels(U: Tensor, count: int) -> Tensor:
    """Return the group of each row as scikit-learn's `KMeans` numbers them (init="random", n_init=1, Lloyd)."""
    import numpy as np
    import torch

    X = U.numpy().astype(np.float32)
    X = X - X.mean(axis=0)
    centres = X[np.random.RandomState(_SEED).choice(len(X), count, replace=False, p=np.full(len(X), 1 / len(X)))]
    labels, stop = np.full(len(X), -1), _TOLERANCE * X.var(axis=0).mean()
    for _ in range(_ROUNDS):
        before, labels = labels, _nearest(X, centres)
        if (before == labels).all():
            return torch.from_numpy(labels)
        after = np.stack([X[labels == i].mean(axis=0) if (labels == i).any() else centres[i] for i in range(count)])
        moved, centres = float(((after - centres) ** 2).sum()), after
        if moved <= stop:
            break
    return torch.from_numpy(_nearest(X, centres))


def _nearest(X: Any, centres: Any) -> Any:
    """Return the nearest centre of each row; raise `IncompatibleAdapter` where rounding decides which that is."""
    import numpy as np

    distances = (centres**2).sum(axis=1) - 2 * (X @ centres.T)
    if len(centres) > 1:
        first, second = np.partition(distances, 1, axis=1)[:, :2].T
        if float((second - first).min()) < _CLEAR * float((X**2).sum(axis=1).mean()):
            raise IncompatibleAdapter(
                "rows of the base's weight are equally near to two groups, so that which rows the adapter changes "
                "depends on rounding",
                hint="Merge it with PEFT, on the machine that trained it.",
            )
    return distances.argmin(axis=1)


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are V and the factors of groups."""
    return V in parts and all(name.startswith(("adamss_A.", "adamss_B.", V)) for name in parts)


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> AdamssUpdate:
    """Return the update; it has no scaling. Without a layout the seed is PEFT's default, 0."""
    return AdamssUpdate(dict(parts), layout={"seed": (layout or {}).get("seed", 0)})
