"""Random mixtures of kinds, ranks, weights, dtypes, shardings, threads and tile sizes, against float64."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratools.adapter import kinds
from loratools.adapter.input import AdapterInput
from loratools.adapter.model import Adapter
from loratools.engine.device import TILES
from loratools.engine.run import Settings, write_weights
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.lazy import LazyTensor
from loratools.surgery.merge.options import MergeOptions
from loratools.surgery.merge.plan import plan_merge
from tests.surgery.models import DTYPES, PRECISION, load, random, save_base

LINEAR, CONV, EXPERTS, NORM = (10, 12), (6, 4, 3, 3), (3, 8, 6), (12,)
LAYERS = {"a.linear": LINEAR, "b.linear": LINEAR, "c.conv": CONV, "d.experts": EXPERTS, "e.norm": NORM}
KINDS = {
    LINEAR: ["lora", "dora", "loha", "lokr", "full", "ia3", "glora", "wdora"],
    CONV: ["conv", "loha", "locon", "full", "oft"],
    EXPERTS: ["experts"],
    NORM: ["norm"],
}

Parts = dict[str, Tensor]
Mixture = list[tuple[float, dict[str, tuple[str, int, int]]]]


def parts_of(kind: str, shape: tuple[int, ...], r: int, seed: int) -> Parts:
    """Return random tensors of a kind for a weight of this shape."""
    sizes: dict[str, tuple[int, ...]] = {}
    out, inner, *kernel = (*shape, 1)[:2] if len(shape) < 3 else shape
    if kind in ("lora", "dora", "wdora", "conv"):
        sizes = {"lora_A.weight": (r, inner, *kernel), "lora_B.weight": (out, r, *(1 for _ in kernel))}
        sizes |= {"dora": {"lora_magnitude_vector": (out,)}, "wdora": {"dora_scale": (1, inner)}}.get(kind, {})
    elif kind == "loha":
        flat = inner * torch.Size(kernel).numel()
        sizes = {"hada_w1_a": (out, r), "hada_w1_b": (r, flat), "hada_w2_a": (out, r), "hada_w2_b": (r, flat)}
    elif kind == "lokr":
        sizes = {"lokr_w1": (2, 3), "lokr_w2_a": (out // 2, r), "lokr_w2_b": (r, inner // 3)}
    elif kind == "locon":
        sizes = {"lora_A.weight": (r, inner, 1, 1), "lora_mid.weight": (2, r, *kernel), "lora_B.weight": (out, 2, 1, 1)}
    elif kind == "glora":
        sizes = {"a1.weight": (inner, r), "a2.weight": (r, inner), "b1.weight": (out, r), "b2.weight": (r, inner)}
    elif kind == "experts":
        sizes = {"lora_A.weight": (3 * r, 6), "lora_B.weight": (8, 3 * r)}
    elif kind == "ia3":
        sizes = {"weight": (inner,)}
    elif kind == "oft":
        sizes = {"oft_blocks": (2, out // 2, out // 2)}
    else:
        sizes = {{"full": "diff", "norm": "w_norm"}[kind]: shape}
    found = {name: random(*size, seed=seed + i, scale=0.4) for i, (name, size) in enumerate(sizes.items())}
    return found | ({"on_input": torch.tensor(1)} if kind == "ia3" else {})


def delta(kind: str, p: Parts, shape: tuple[int, ...]) -> Tensor:
    """Return ΔW/s of an additive kind, as its definition has it."""
    P = {name: tensor.double() for name, tensor in p.items()}
    if kind in ("full", "norm"):
        return next(iter(P.values()))
    if kind == "loha":
        return ((P["hada_w1_a"] @ P["hada_w1_b"]) * (P["hada_w2_a"] @ P["hada_w2_b"])).reshape(shape)
    if kind == "lokr":
        return torch.kron(P["lokr_w1"], P["lokr_w2_a"] @ P["lokr_w2_b"])
    A, B = P["lora_A.weight"], P["lora_B.weight"]
    if kind == "locon":
        return torch.einsum("om,mnkl,ni->oikl", B[:, :, 0, 0], P["lora_mid.weight"], A[:, :, 0, 0])
    if kind == "experts":
        return torch.einsum("ore,eri->eoi", B.reshape(8, -1, 3), A.reshape(3, -1, 6))
    return torch.einsum("or,r...->o...", B.flatten(1), A)


def changed(W: Tensor, base: Tensor, kind: str, p: Parts, s: float, w: float) -> Tensor:
    """Return what one update of weight w makes of W: the reference."""
    P = {name: tensor.double() for name, tensor in p.items()}
    if kind == "dora":
        D = w * s * delta("lora", p, W.shape)
        return P["lora_magnitude_vector"][:, None] / (base + D).norm(dim=1, keepdim=True) * (W + D)
    if kind == "wdora":
        D = s * delta("lora", p, W.shape)
        return (W + D) * (1 + w * (P["dora_scale"] / (base + D).norm(dim=0) - 1))
    if kind == "ia3":
        return W * (1 + w * P["weight"])
    if kind == "glora":
        return W + w * s * (W @ P["a1.weight"] @ P["a2.weight"] + P["b1.weight"] @ P["b2.weight"])
    if kind == "oft":
        Q, one = P["oft_blocks"] - P["oft_blocks"].mT, torch.eye(W.shape[0] // 2, dtype=torch.float64)
        R = (one + Q) @ (one - Q).inverse()
        turned = torch.einsum("kjm,kj...->km...", one + w * (R - one), W.reshape(2, W.shape[0] // 2, *W.shape[1:]))
        return turned.reshape(W.shape)
    return W + w * (1.0 if kind in ("full", "norm") else s) * delta(kind, p, W.shape)


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    """Draw one to three adapters: a weight, and for some layers a kind, a rank and a seed."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        layers = draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=5, unique=True))
        chosen = {
            name: (draw(st.sampled_from(KINDS[LAYERS[name]])), draw(st.integers(1, 3)), draw(st.integers(0, 9)))
            for name in layers
        }
        found.append((draw(st.sampled_from([1.0, 0.7, -0.3])), chosen))
    return found


@given(
    mixture=mixtures(),
    dtype=st.sampled_from(sorted(DTYPES)),
    shards=st.integers(1, 3),
    threads=st.integers(1, 3),
    tile=st.sampled_from([16, 50, 200, 1 << 20]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_mixture_is_its_definition_in_float64(
    mixture: Mixture, dtype: str, shards: int, threads: int, tile: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TILES, "cpu", tile)  # of blocks in torch too, which do not go by the tiles of a run
        check(mixture, dtype, shards, Settings(threads))


@pytest.mark.gpu
@given(mixture=mixtures(), dtype=st.sampled_from(sorted(DTYPES)), tile=st.sampled_from([50, 1 << 20]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_mixture_is_its_definition_on_a_gpu_too(mixture: Mixture, dtype: str, tile: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TILES, "cuda", tile)
        check(mixture, dtype, 2, Settings(2, "cuda"))


def check(mixture: Mixture, dtype: str, shards: int, how: Settings) -> None:
    """Merge a mixture into a base of this dtype, and hold every element against float64."""
    weights, inputs = {}, []
    for i, (name, shape) in enumerate(LAYERS.items()):
        tensor = f"{name}.down_proj" if shape == EXPERTS else f"{name}.weight"
        weights[tensor] = random(*shape, seed=i, dtype=DTYPES[dtype])
    wanted = {tensor: W.double() for tensor, W in weights.items()}
    for weight, layers in mixture:
        built: dict[str, Any] = {}
        for name, (kind, r, seed) in layers.items():
            shape, tensor = LAYERS[name], f"{name}.down_proj" if name == "d.experts" else f"{name}.weight"
            parts = parts_of(kind, shape, r, 100 * seed + 7)
            layout = {"layout": {"experts": 3, "parameter": "down_proj"}} if kind == "experts" else {}
            lazy = {part: LazyTensor.of(value) for part, value in parts.items()}
            built[name] = kinds.get(kind).build(lazy, 1.5, 0.0 if kind == "oft" else 3.0, **layout)
            wanted[tensor] = changed(wanted[tensor], weights[tensor].double(), kind, parts, 1.5, weight)
        inputs.append(AdapterInput(Adapter(built), weight, str(len(inputs))))
    with tempfile.TemporaryDirectory() as place:
        base = save_base(Path(place) / "base", weights, shards, model_type="llama")
        plan = plan_merge(Checkpoint.open(base), inputs, MergeOptions())
        out = Path(place) / "out"
        out.mkdir()
        write_weights(plan, out, how, lambda _: None)
        found = load(out)
    assert found.keys() == wanted.keys()
    for tensor, W in wanted.items():
        error = (found[tensor].double() - W).abs()
        sums = 2e-15 if dtype == "F64" else 2e-6
        allowed = 2.0 ** -PRECISION[DTYPES[dtype]] * W.abs() + sums * float(W.abs().max() + 1)
        assert bool((error <= allowed).all()), tensor
