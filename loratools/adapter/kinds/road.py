"""RoAd: W' = R·W and b' = R·b, output features rotated in pairs and scaled (arXiv 2409.00119), as in PEFT.

In each group of g features, feature j is paired with j + g/2, and with cosines c and sines s, of every feature its own,

    W'ⱼ = cⱼ·Wⱼ − sⱼ·Wⱼ₊g/₂        W'ⱼ₊g/₂ = cⱼ₊g/₂·Wⱼ₊g/₂ + sⱼ₊g/₂·Wⱼ

where c = α∘cos θ and s = α∘sin θ of `road_alpha` and `road_theta`: for `road_1` (out/2,) the same numbers for both of a
pair, for `road_2` (out,), for `road_4` (2·out,) others for cosines and for sines. `layout` has the variant and g. It
acts on the weight that it finds: the order counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loratools.adapter.kinds import Device, DType, Tensor, Underlying, Update
from loratools.adapter.kinds._onweight import Change, Changing
from loratools.storage.lazy import LazyTensor

THETA, ALPHA = "road_theta", "road_alpha"
_OUT = {"road_1": lambda size: 2 * size, "road_2": lambda size: size, "road_4": lambda size: size // 2}


@dataclass(frozen=True, slots=True, eq=False)
class RoadUpdate(Changing):
    """Angles and factors, the variant and the size of a group. Raises `ValueError` where they do not go together."""

    kind = "road"
    rank = 0

    def check(self) -> None:
        """Raise `ValueError` for shapes that differ, or features that are no whole groups."""
        theta, alpha = self.tensors[THETA].shape, self.tensors[ALPHA].shape
        group, out = self.layout["group"], self.own_shape[0]
        if theta != alpha or len(theta) != 1 or group % 2 or out % group:
            raise ValueError(f"{THETA} {theta} and {ALPHA} {alpha} are not for groups of {group} features")
        if self.weight_shape is not None and self.weight_shape[0] != out:
            raise ValueError(f"it rotates {out} features, the base's weight has shape {self.weight_shape}")

    @property
    def own_shape(self) -> tuple[int, ...]:
        return _OUT[self.layout["variant"]](self.tensors[THETA].shape[0]), 0

    @property
    def together(self) -> int:
        """Rows of a group."""
        size: int = self.layout["group"]
        return size

    @property
    def on_bias(self) -> Update:
        """The same rotation of the bias, a matrix of one column."""
        return replace(self, weight_shape=(self.own_shape[0], 1))

    def _numbers(self) -> tuple[Tensor, Tensor]:
        """Return c and s of each feature (groups, 2, g/2), in float64."""
        theta, alpha, half = self.number(THETA), self.number(ALPHA), self.together // 2
        if self.layout["variant"] == "road_1":
            theta, alpha = (v.reshape(-1, 1, half).expand(-1, 2, -1) for v in (theta, alpha))
            return alpha * theta.cos(), alpha * theta.sin()
        if self.layout["variant"] == "road_2":
            theta, alpha = (v.reshape(-1, 2, half) for v in (theta, alpha))
            return alpha * theta.cos(), alpha * theta.sin()
        theta, alpha = (v.reshape(-1, 2, 2, half) for v in (theta, alpha))
        return alpha[:, 0] * theta[:, 0].cos(), alpha[:, 1] * theta[:, 1].sin()

    def change(self, dtype: DType, device: Device) -> Change:
        """Return the rows, each with its partner's."""
        size = self.together
        c, s = self._numbers()
        s = s.clone()
        s[:, 0] *= -1
        c, s = c.to(device, dtype)[..., None], s.to(device, dtype)[..., None]

        def change(W: Tensor, rows: slice) -> Tensor:
            groups = slice(rows.start // size, rows.stop // size)
            pairs = W.reshape(-1, 2, size // 2, W.shape[1])
            return (c[groups] * pairs + s[groups] * pairs.flip(1)).reshape(W.shape)

        return change

    def outputs(self, X: Tensor, under: Underlying) -> Tensor:
        """Return X·Wᵀ with its outputs rotated, by the matrix of each group."""
        import torch

        half = self.together // 2
        c, s = (numbers.to(X) for numbers in self._numbers())
        R = torch.diag_embed(c.flatten(1))
        R[:, :half, half:] -= torch.diag_embed(s[:, 0])
        R[:, half:, :half] += torch.diag_embed(s[:, 1])
        Y = under.below(X).reshape(len(X), -1, self.together)
        return torch.einsum("gij,kgj->kgi", R, Y).flatten(1)


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are angles and factors."""
    return parts.keys() == {THETA, ALPHA}


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> RoadUpdate:
    """Return the update; raise `ValueError` where nothing says the variant and the size of a group."""
    if not layout or layout.get("variant") not in _OUT or not isinstance(layout.get("group"), int):
        raise ValueError(f"nothing says how features are paired (variant, one of {', '.join(_OUT)}, and group_size)")
    return RoadUpdate(dict(parts), layout={name: layout[name] for name in ("variant", "group")})
