"""The scales of a folded base: read from norms, exactly, or estimated from weights where none holds them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from loratools.adapter.naming.wrappers import Names
from loratools.errors import WrongBase, counted
from loratools.storage import dtypes, files
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.codecs import Encoding
from loratools.storage.codecs.floats import Array, unsigned, widen
from loratools.storage.header import TensorSpec
from loratools.surgery.folding.table import ONE_PLUS, Folds

_TILE = 1 << 21  # elements
_SAME = 1e-2  # scales nearer to 1 everywhere are the rounding of norms
_SHARED = 1e-2  # spread of scales that two estimates share, below which they are the noise of the quantization
_CHECKED = 32  # rows
_ROUNDED = 2.0**-10  # of a bias in 16 bit

_Estimate = tuple[Array, Array]  # log s and its variance, for each channel


@dataclass(slots=True, eq=False)
class Scales:
    """What is folded into the weights of `base`, beside `original`; both show quantized weights as weights.

    A weight of the base is diag(1/rows)·W·diag(columns), W being the original's.
    """

    base: Checkpoint
    original: Checkpoint
    _folds: Folds = field(init=False)
    _names: Names = field(init=False)
    _one_plus: bool = field(init=False)
    _found: dict[str, Array | None] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        types = _types(self.base)
        self._folds = Folds(next(iter(types), ""), {name.rpartition(".")[0] for name in self.base.specs})
        self._names = Names(self.original.specs, self.original.config)
        self._one_plus = bool(ONE_PLUS & types)

    def in_norms(self) -> bool:
        """Tell whether any norm, or activation, of the base holds scales."""
        return any(self._of(source) is not None for source in self._folds.behind if not self._is_linear(source))

    def concerns(self, path: str) -> bool:
        """Tell whether scales may be folded into a module, by its name."""
        return self._folds.concerns(path)

    def columns(self, path: str) -> Array | None:
        """Return the scales that the columns of a module are multiplied by; None where there are none."""
        source = self._folds.before.get(path)
        return None if source is None else self._of(source)

    def rows(self, path: str) -> Array | None:
        """Return the scales that the rows of a module, or the numbers of a norm, are divided by; None where none."""
        behind = self._folds.behind.get(path)
        scales = self._of(path) if behind and f"{path}.scales" not in self.base.specs else None
        spec = self.base.specs.get(f"{path}.weight")
        if scales is None or spec is None or spec.shape[0] == len(scales):
            return scales
        return np.concatenate([np.ones(spec.shape[0] - len(scales)), scales])

    def of_norm(self, path: str, weight: Array) -> Array:
        """Return the numbers of a norm that take the place of `weight` beside the base."""
        scales = self.rows(path)
        shift = 1.0 if self._one_plus else 0.0
        return weight if scales is None else (weight + shift) / scales - shift

    def check(self, tensors: Collection[str]) -> None:
        """Raise `WrongBase` unless weights of the base are the original's with the scales, but for a quantization."""
        problems = [problem for name in sorted(tensors) if (problem := self._unlike(name))]
        if problems:
            damaged = ", or its norms, which multiply by 1 + w, were divided as if by w" if self._one_plus else ""
            raise WrongBase(
                f"{self.original.path} is not the model that was folded into {self.base.path}, or it was folded in "
                f"another way than AWQ and SmoothQuant do{damaged}: "
                f"{counted(len(problems), 'weight differs', 'weights differ')}",
                problems[:20],
                hint="Give the model that the base was quantized from; --trained-on folded for an adapter of the base.",
            )

    def of_original(self, name: str) -> TensorSpec | None:
        """Return the original's tensor of a name of the base, past wrappers; None where it has none, or several."""
        path, _, parameter = name.rpartition(".")
        if name in self.original.specs:
            return self.original.specs[name]
        candidates = self._names.find(path, parameter)
        return self.original.specs[candidates[0]] if len(candidates) == 1 else None

    def _is_linear(self, path: str) -> bool:
        spec = self.base.specs.get(f"{path}.weight")
        return spec is not None and len(spec.shape) == 2

    def _of(self, source: str) -> Array | None:
        """Return the scales of a source, worked out once."""
        if source not in self._found:
            if self._is_linear(source):
                self._found[source] = self._of_linear(source)
            elif (spec := self.base.specs.get(f"{source}.scales")) is not None:
                self._found[source] = _numbers(spec)
            else:
                self._found[source] = self._of_norm(source)
        return self._found[source]

    def _of_norm(self, path: str) -> Array | None:
        """Return norm_original/norm_folded; 1 where both are zero."""
        spec, own = self.base.specs.get(f"{path}.weight"), self.of_original(f"{path}.weight")
        if spec is None or own is None or spec.shape != own.shape or len(spec.shape) != 1:
            return None
        shift = 1.0 if self._one_plus else 0.0
        folded, before = _numbers(spec) + shift, _numbers(own) + shift
        with np.errstate(divide="ignore", invalid="ignore"):
            s = np.where((folded == 0) & (before == 0), 1.0, before / folded)
        if not (np.isfinite(s) & (s > 0)).all():
            at = int(np.argmin(np.isfinite(s) & (s > 0)))
            raise WrongBase(
                f"{path}.weight is {folded[at]:g} in {self.base.path} and {before[at]:g} in {self.original.path} "
                f"(channel {at}), which no scale that is folded could make of it",
                hint="Give the model that the base was quantized from.",
            )
        return s if np.abs(s - 1).max(initial=0) > _SAME else None

    def _of_linear(self, path: str) -> Array | None:
        """Return scales between two linear layers: s of least error on the rows before and on the columns behind.

        Both estimates have the noise of the quantization, each its own; where they share no spread nothing is folded.
        """
        estimates = [estimate for into in self._folds.behind[path] if (estimate := self._by_columns(into)) is not None]
        if not estimates:
            return None
        count = len(estimates[0][0])
        of_rows = self._by_rows(path, count)
        if of_rows is None or any(len(log) != count for log, _ in estimates):
            return None
        of_columns = _joined(estimates)
        known = np.isfinite(of_rows[1]) & np.isfinite(of_columns[1])
        shared = float((of_rows[0] * of_columns[0])[known].mean()) if known.any() else 0.0
        if shared < _SHARED**2:
            return None
        bias = self._by_bias(path, count)
        return np.exp(_joined([of_rows, of_columns, *([bias] if bias else [])])[0])

    def _by_rows(self, path: str, count: int) -> _Estimate | None:
        """Return the estimate of the last `count` rows of a module: W_folded = W·diag(columns)/s + noise."""
        pair = self._pair(f"{path}.weight")
        if pair is None or pair[0].shape[0] < count:
            return None
        first = pair[0].shape[0] - count
        columns = self.columns(path)
        scale = 1.0 if columns is None else columns
        sums = [
            (np.einsum("ij,ij->i", F, W * scale), np.square(W * scale).sum(1), np.square(F).sum(1))
            for F, W in _tiles(*pair, first)
        ]
        log, variance = _fitted(pair[0].shape[1], *(np.concatenate(each) for each in zip(*sums, strict=True)))
        return -log, variance

    def _by_columns(self, path: str) -> _Estimate | None:
        """Return the estimate of the columns of a module: W_folded = W·diag(s) + noise."""
        pair = self._pair(f"{path}.weight")
        if pair is None:
            return None
        products, own, folded = (np.zeros(pair[0].shape[1]) for _ in range(3))
        for F, W in _tiles(*pair):
            products += np.einsum("ij,ij->j", F, W)
            own += np.square(W).sum(0)
            folded += np.square(F).sum(0)
        return _fitted(pair[0].shape[0], products, own, folded)

    def _by_bias(self, path: str, count: int) -> _Estimate | None:
        """Return what a bias that was divided with the rows says, exact but for its rounding."""
        spec, own = self.base.specs.get(f"{path}.bias"), self.of_original(f"{path}.bias")
        if spec is None or own is None or spec.shape != own.shape or spec.shape[0] < count:
            return None
        folded, before = _numbers(spec)[-count:], _numbers(own)[-count:]
        known = folded * before > 0
        log = np.log(np.divide(before, folded, out=np.ones(count), where=known))
        return log, np.where(known, _ROUNDED**2, np.inf)

    def _pair(self, name: str) -> tuple[TensorSpec, TensorSpec] | None:
        spec, own = self.base.specs.get(name), self.of_original(name)
        if spec is None or own is None or own.shape != spec.shape or len(spec.shape) != 2:
            return None
        return (spec, own) if spec.encoding or spec.dtype in dtypes.FLOATS else None

    def _unlike(self, name: str) -> str | None:
        """Return a sentence where some rows of a weight are further from the original's than its quantization is."""
        path = name.rpartition(".")[0]
        pair = self._pair(name)
        if pair is None:
            own = self.of_original(name)
            has = "no such tensor" if own is None else f"it as {own.dtype} of shape {list(own.shape)}"
            return f"{name}: the original has {has}"
        rows, columns = self.rows(path), self.columns(path)
        error = norm = 0.0
        with reader(pair[0]) as read_folded, reader(pair[1]) as read:
            count = pair[0].shape[0]
            for row in np.linspace(0, count - 1, min(count, _CHECKED)).astype(int):
                F, W = read_folded(int(row), 1), read(int(row), 1)
                W = W if columns is None else W * columns
                W = W if rows is None else W / rows[row]
                error += float(np.square(F - W).sum())
                norm += float(np.square(F).sum())
        distance = (error / norm) ** 0.5 if norm else 0.0
        return f"{name}: differs by {distance:.0%} of it" if distance > _allowed(pair[0]) else None


def _allowed(spec: TensorSpec) -> float:
    """Return the relative distance that a quantization of so many bits can have, with room; plain weights have 16."""
    bits = min(8, cast(Encoding, spec.encoding).bits if spec.encoding else 8)
    return float(min(0.7, max(0.1, 5 * 2.0**-bits)))


def _types(model: Checkpoint) -> set[str]:
    inner = model.config.get("text_config")
    stated = (model.config.get("model_type"), inner.get("model_type") if isinstance(inner, dict) else None)
    return {kind for kind in stated if isinstance(kind, str)}


def _fitted(count: int, products: Array, own: Array, folded: Array) -> _Estimate:
    """Return log r of folded = r·own + noise by least squares, and its variance: infinite where nothing tells r."""
    with np.errstate(divide="ignore", invalid="ignore"):
        r = products / own
        noise = np.maximum(folded - r * products, 0) / max(count - 1, 1)
        known = np.isfinite(r) & (r > 0)
        log = np.log(np.where(known, r, 1.0))
        variance = np.where(known, noise / (own * r * r) + 1e-14, np.inf)
    return log, variance


def _joined(estimates: list[_Estimate]) -> _Estimate:
    """Return the mean of estimates, each weighted by the inverse of its variance."""
    weights = [1 / variance for _, variance in estimates]
    total = np.asarray(sum(weights))
    mean = np.asarray(sum(log * weight for (log, _), weight in zip(estimates, weights, strict=True)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total > 0, mean / total, 0.0), np.where(total > 0, 1 / total, np.inf)


@contextmanager
def reader(spec: TensorSpec) -> Iterator[Callable[[int, int], Array]]:
    """Open a matrix, or a vector as one row, and yield what reads rows of it in float64: of the first, so many."""
    dtype, columns = "F32" if spec.encoding else spec.dtype, spec.shape[-1] if spec.shape else 1
    width = columns * dtypes.bits(dtype) // 8
    with files.opened(spec) as read:

        def rows(first: int, count: int) -> Array:
            raw = memoryview(bytearray(count * width))
            read(raw, first * width)
            return widen(np.frombuffer(raw, unsigned(dtype)), dtype, np.float64).reshape(count, columns)

        yield rows


def _numbers(spec: TensorSpec) -> Array:
    with reader(spec) as read:
        values: Array = read(0, 1)[0]
        return values


def _tiles(first: TensorSpec, second: TensorSpec, start: int = 0) -> Iterator[tuple[Array, Array]]:
    """Yield the same rows of two matrices from `start` on, a tile at a time."""
    rows, columns = first.shape
    step = max(1, _TILE // columns)
    with reader(first) as read, reader(second) as read_second:
        for row in range(start, rows, step):
            count = min(step, rows - row)
            yield read(row, count), read_second(row, count)
