"""What an adapter keeps of a change, layer by layer and in total: numbers that are exact, and bounds that hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

_MOST = 1e140  # a number of a certificate that a file states: their squares are added up


@dataclass(frozen=True, slots=True)
class Layer:
    """The certificate of one factored layer.

    `base_norm` = ‖W‖_F and `delta_norm` = ‖ΔW‖_F with ΔW = W' − W. `captured` = 1 − error², with `error` =
    ‖ΔW − s·B̃·Ã‖/‖ΔW‖ for the factors as stored, after rounding. No adapter of this rank has an error below
    error/(1 + `excess_bound`), and error/(1 + `excess`) is where the iteration was heading. `noise` is the share of
    ‖ΔW‖² that rounding the fine-tune to its dtype alone explains, `stable_rank` = ‖ΔW‖_F²/σ₁².
    """

    module: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    parameters: int
    base_norm: float
    delta_norm: float
    captured: float
    error: float
    excess: float
    excess_bound: float
    noise: float
    stable_rank: float

    @property
    def change(self) -> float:
        """Return ‖ΔW‖/‖W‖, infinite where the base is zero."""
        return self.delta_norm / self.base_norm if self.base_norm else math.inf


@dataclass(frozen=True, slots=True)
class Total:
    """The sums over all layers: `error` = √(Σ‖ΔW − s·B̃·Ã‖²/Σ‖ΔW‖²), and the bounds in the same sense."""

    layers: int
    parameters: int
    base_norm: float
    delta_norm: float
    captured: float
    error: float
    excess: float
    excess_bound: float
    noise: float


def layer(
    module: str, kind: str, shape: tuple[int, ...], rank: int, parameters: int, *, base_norm2: float, norm2: float,
    error2: float, excess2: float, bound2: float, noise2: float, sigma1: float,
) -> Layer:  # fmt: skip
    """Return a layer's certificate from sums of squares (see `Layer`); `norm2` is not zero."""
    error2 = max(error2, 0.0)
    return Layer(
        module, kind, shape, rank, parameters, math.sqrt(base_norm2), math.sqrt(norm2), 1 - error2 / norm2,
        math.sqrt(error2 / norm2), _excess(error2, excess2), _excess(error2, bound2), noise2 / norm2,
        norm2 / sigma1**2 if sigma1 else math.inf,
    )  # fmt: skip


def total(layers: Iterable[Layer]) -> Total:
    """Add up layers."""
    layers = list(layers)
    energy = math.fsum(layer.delta_norm**2 for layer in layers)
    error2 = math.fsum((layer.error * layer.delta_norm) ** 2 for layer in layers)
    near2 = math.fsum((layer.error * layer.delta_norm / (1 + layer.excess)) ** 2 for layer in layers)
    least2 = math.fsum((layer.error * layer.delta_norm / (1 + layer.excess_bound)) ** 2 for layer in layers)
    noise2 = math.fsum(layer.noise * layer.delta_norm**2 for layer in layers)
    return Total(
        len(layers), sum(layer.parameters for layer in layers),
        math.sqrt(math.fsum(layer.base_norm**2 for layer in layers)), math.sqrt(energy),
        1 - error2 / energy if energy else 1.0, math.sqrt(error2 / energy) if energy else 0.0,
        _excess(error2, error2 - near2), _excess(error2, error2 - least2), noise2 / energy if energy else 0.0,
    )  # fmt: skip


def beside_optimum(sums: Total, hint: str = "") -> str:
    """Say in words what the best factors of the same ranks would leave, error/(1 + excess), and the proved least.

    `hint` is added where the bound on that least is not close to the error: how to have a closer one.

    Example:
        >>> beside_optimum(Total(1, 8, 1.0, 0.1, 0.75, 0.5, 0.25, 1.0, 0.0))
        'the best factors of these ranks would leave about 0.4, and none leave less than 0.25'
    """
    near, least = (sums.error / (1 + max(excess, 0.0)) for excess in (sums.excess, sums.excess_bound))
    shown, about, bound = (f"{error:.4g}" for error in (sums.error, near, least))
    if near == 0:
        return "that is rounding, for factors of these ranks can hold all of it" if sums.error else "nothing is missing"
    if bound == shown:
        return "no factors of these ranks leave less"
    found = "about as much" if about == shown else f"about {about}"
    lower = f"and none leave less than {bound}" if least else "and how much less is possible is not proved"
    return f"the best factors of these ranks would leave {found}, {lower}{hint}"


def to_json(layers: Iterable[Layer]) -> dict[str, Any]:
    """Return the certificate as the provenance keeps it: one row of numbers for each module, six digits."""
    columns = [field.name for field in fields(Layer) if field.name != "module"]
    rows = {layer.module: [_plain(getattr(layer, column)) for column in columns] for layer in layers}
    return {"columns": columns, "modules": rows}


def from_json(document: object) -> tuple[Layer, ...]:
    """Return the layers that `to_json` wrote, with its six digits; () for anything else, which a file may hold.

    A number that was not finite is infinite here; one that a manifest has no number for stands in it as text.
    """
    columns = [field.name for field in fields(Layer) if field.name != "module"]
    if not isinstance(document, Mapping) or document.get("columns") != columns:
        return ()
    modules: Any = document.get("modules")
    rows = modules.items() if isinstance(modules, Mapping) else ()
    layers: list[Layer] = []
    for module, row in rows:
        if not isinstance(row, Sequence) or len(row) != len(columns):
            return ()
        kind, shape, rank, parameters = row[:4]
        numbers = [math.inf if value is None else _of_text(value) for value in row[4:]]
        counts = [rank, parameters, *(shape if isinstance(shape, list) else [None])]
        sound = isinstance(kind, str) and all(isinstance(value, int) and value >= 0 for value in counts)
        if not sound or not all(
            isinstance(value, int | float) and (0 <= value <= _MOST or value == math.inf) for value in numbers
        ):
            return ()
        layers.append(Layer(module, kind, tuple(shape), rank, parameters, *map(float, numbers)))
    return tuple(layers)


def _excess(error2: float, excess2: float) -> float:
    """Return by which share an error exceeds what is left of it: error/√(error² − excess²) − 1."""
    least = error2 - min(max(excess2, 0.0), error2)
    if least > 0:
        return math.sqrt(error2 / least) - 1
    return math.inf if error2 > 0 else 0.0


def _of_text(value: Any) -> Any:
    """Return a number that canonical JSON has no form for, which stands as text (`format/canonical.py`)."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return list(value) if isinstance(value, tuple) else value
