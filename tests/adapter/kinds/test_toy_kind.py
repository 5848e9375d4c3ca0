"""A new kind is one file: put beside the others, it is read, shown, merged, proved, unmerged, combined, and runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import loratools
from loratools.adapter import kinds
from loratools.adapter.kinds import Underlying, Update
from loratools.adapter.site import Site
from loratools.dialects import open_adapter
from loratools.engine.residual import Residual
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.companions import RESIDUAL
from loratools.storage.lazy import LazyTensor
from tests.make import tiny

PRODUCT = '''
"""Gated: ΔW = s·B·diag(d)·A, a product with one number for each rank."""

from dataclasses import dataclass

from loratools.adapter.kinds import Factors
from loratools.adapter.kinds._product import LowRank
from loratools.adapter.parts import A, B
from loratools.storage.lazy import LazyTensor


@dataclass(frozen=True, slots=True, eq=False)
class GatedUpdate(LowRank):
    A: LazyTensor
    B: LazyTensor
    d: LazyTensor
    scaling: float
    alpha: float

    kind = "gated"

    @property
    def rank(self):
        return self.A.shape[0]

    @property
    def shape(self):
        return self.B.shape[0], self.A.shape[1]

    @property
    def parts(self):
        return {A: self.A, B: self.B, "lora_gate": self.d}

    def factored(self):
        left = LazyTensor("F64", self.B.shape, lambda: self.B.load().double() * self.d.load().double())
        return Factors(left, self.A, self.scaling)


def claims(parts):
    return parts.keys() == {A, B, "lora_gate"}


def build(parts, scaling, alpha):
    return GatedUpdate(parts[A], parts[B], parts["lora_gate"], scaling, alpha)
'''

ON_WEIGHT = '''
"""Mirror: W' = W·(I − 2w·u·uᵀ/‖u‖²), inputs reflected; it depends on W, so no ΔW stands for it."""

from dataclasses import dataclass, replace
from typing import Any

from loratools.adapter.kinds import Term
from loratools.adapter.kinds._shared import OnWeight
from loratools.storage.lazy import LazyTensor


@dataclass(frozen=True, slots=True, eq=False)
class MirrorUpdate(OnWeight):
    u: LazyTensor
    rows: int = 1

    kind = "mirror"
    rank = 0
    scaling = alpha = 1.0

    def fitted(self, shape):
        return replace(self, rows=shape[0])

    @property
    def shape(self):
        return self.rows, self.u.shape[0]

    @property
    def parts(self):
        return {"lora_mirror": self.u}

    def term(self, site, weight, dtype, device):
        u = self.u.load().double()
        return Reflection((u * 2 * weight / u.square().sum()).to(device, dtype), u.to(device, dtype))

    def project(self, X, weight, under):
        u = self.u.load().to(X)
        return under.below(X - 2 * weight * (X @ u)[:, None] * u / (u @ u))


@dataclass(frozen=True, slots=True, eq=False)
class Reflection(Term):
    left: Any
    right: Any

    def apply_rows(self, W, rows, base):
        W.sub_((W @ self.left)[:, None] * self.right)


def claims(parts):
    return parts.keys() == {"lora_mirror"}


def build(parts, scaling, alpha):
    return MirrorUpdate(parts["lora_mirror"])
'''

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
SHAPES = {Q: (64, 64), UP: (96, 64)}
SCALING = 8 / 4


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2


GATED = {
    module: {
        "lora_A.weight": random(4, n, seed=n), "lora_B.weight": random(m, 4, seed=m), "lora_gate": random(4, seed=7),
    }
    for module, (m, n) in SHAPES.items()
}  # fmt: skip
MIRROR = {module: {"lora_mirror": random(n, seed=n + 1)} for module, (_, n) in SHAPES.items()}


def expected(W: Tensor, parts: dict[str, Tensor], weight: float = 1.0) -> Tensor:
    """Return W' in float64, by the definitions of the two kinds."""
    W, wide = W.double(), {part: tensor.double() for part, tensor in parts.items()}
    if "lora_gate" in wide:
        return W + weight * SCALING * wide["lora_B.weight"] @ wide["lora_gate"].diag() @ wide["lora_A.weight"]
    u = wide["lora_mirror"]
    return W @ (torch.eye(len(u), dtype=torch.float64) - 2 * weight * torch.outer(u, u) / u.square().sum())


def save(folder: Path, modules: dict[str, dict[str, Tensor]]) -> Path:
    """Write tensors under PEFT's names, beside PEFT's config."""
    tiny.save_peft(folder, {module: (torch.zeros(4, 1), torch.zeros(1, 4)) for module in modules})
    tensors = {f"base_model.model.{m}.{part}": tensor for m, parts in modules.items() for part, tensor in parts.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(autouse=True)
def two_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put two files beside the others of `kinds/`, where nothing else is changed."""
    (tmp_path / "kinds").mkdir()
    (tmp_path / "kinds" / "gated.py").write_text(PRODUCT)
    (tmp_path / "kinds" / "mirror.py").write_text(ON_WEIGHT)
    monkeypatch.setattr(kinds, "__path__", [*kinds.__path__, str(tmp_path / "kinds")])
    kinds.names.cache_clear()
    yield
    monkeypatch.undo()
    kinds.names.cache_clear()
    for name in ("gated", "mirror"):
        sys.modules.pop(f"{kinds.__name__}.{name}", None)


@pytest.fixture
def work(workplace: Path) -> Path:
    """The folder of `workplace`, with an adapter of each of the two kinds."""
    save(workplace / "gated", GATED)
    save(workplace / "mirror", MIRROR)
    return workplace


@pytest.mark.parametrize(("name", "modules"), [("gated", GATED), ("mirror", MIRROR)])
def test_it_is_inspected_merged_and_proved(name: str, modules: dict[str, dict[str, Tensor]], work: Path) -> None:
    (group,) = loratools.inspect(work / name).groups
    assert (group.kind, group.rank, group.modules) == (name, 4 if name == "gated" else 0, 2)
    loratools.merge(work / "base", work / name, work / "new", dtype="f32")
    base, new = Checkpoint.open(work / "base"), Checkpoint.open(work / "new")
    for module, parts in modules.items():
        W = expected(base.read(f"{module}.weight"), parts)
        torch.testing.assert_close(new.read(f"{module}.weight").double(), W, rtol=1e-5, atol=1e-6)
    loratools.merge(work / "base", work / name, work / "short")
    assert loratools.verify(work / "short", work / "base", work / name).ok
    assert not loratools.verify(work / "base", work / "base", work / name).ok


def test_it_is_taken_out_bit_for_bit(work: Path) -> None:
    """A product is undone with what the residual says of its prediction; another change is copied from the base."""
    loratools.merge(work / "base", work / "gated", work / "new", keep_residual=True)
    loratools.unmerge(work / "new", work / "gated", work / "old")
    loratools.merge(work / "base", work / "mirror", work / "mirrored")
    loratools.unmerge(work / "mirrored", work / "mirror", work / "copied", base=work / "base")
    base = Checkpoint.open(work / "base")
    modes = Residual.open(work / "new" / RESIDUAL).modes
    assert modes == {f"{module}.weight": "predicted" for module in GATED}
    for folder in ("old", "copied"):
        old = Checkpoint.open(work / folder)
        assert old.specs.keys() == base.specs.keys()
        assert all(torch.equal(old.read(tensor), base.read(tensor)) for tensor in base.specs)


def test_a_product_is_combined_and_measured(work: Path) -> None:
    loratools.combine([work / "gated", work / "gated"], work / "sum", weights=[2, -0.5])
    sum_ = open_adapter(work / "sum")
    zeros = {module: torch.zeros(shape) for module, shape in SHAPES.items()}
    for module, parts in GATED.items():
        update = sum_.updates[module]
        assert (update.kind, update.rank, update.scaling) == ("lora", 4, 1.0)
        change = expected(zeros[module], parts, 2 - 0.5)
        torch.testing.assert_close(update.delta_weight().double(), change, rtol=1e-4, atol=1e-6)
    alike = loratools.compare(work / "gated", work / "sum")
    assert alike.cosine == pytest.approx(1, abs=1e-9)
    assert alike.norms[1] == pytest.approx(1.5 * alike.norms[0], rel=1e-6)


@pytest.mark.parametrize(("name", "parts"), [("gated", GATED[UP]), ("mirror", MIRROR[UP])])
def test_it_acts_on_a_running_layer_as_if_it_were_merged(name: str, parts: dict[str, Tensor]) -> None:
    layer = torch.nn.Linear(64, 96, dtype=torch.float64)
    lazy = {part: LazyTensor.of(tensor) for part, tensor in parts.items()}
    kind = kinds.claim(lazy)
    assert kind == name
    update: Update = kinds.get(kind).build(lazy, SCALING, 8.0).fitted((96, 64))
    assert update.shape == (96, 64)
    merged = torch.nn.Linear(64, 96, dtype=torch.float64)
    merged.weight.data, merged.bias.data = expected(layer.weight.data, parts, 0.7), layer.bias.data
    site = Site.whole("w", (96, 64))

    def forward(module: torch.nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        W = module.weight.data
        return update.project(inputs[0], 0.7, Underlying(site, lambda: W, lambda X: X @ W.T)) + module.bias

    layer.register_forward_hook(forward)
    X = random(5, 64, seed=11).double()
    torch.testing.assert_close(layer(X), merged(X), rtol=1e-12, atol=1e-12)
