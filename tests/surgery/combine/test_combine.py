"""Combining adapters: against the dense sum in float64, by its laws, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from loratools.adapter import kinds
from loratools.adapter.model import Adapter, BaseIdentity
from loratools.adapter.weights import Weight
from loratools.adapter.weights.blocks import block_of
from loratools.dialects import open_adapter
from loratools.errors import IncompatibleAdapter, LoraToolsError, OutputRefused, UnsupportedAdapter, WrongBase
from loratools.format.validate import validate
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Energy, Fixed
from loratools.storage.lazy import LazyTensor
from loratools.surgery.combine import combine
from tests.make import tiny

Dense = dict[str, Tensor]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def update(kind: str, scaling: float, **parts: Tensor) -> Any:
    names = {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias", "EA": "lora_embedding_A",
             "EB": "lora_embedding_B", "m": "lora_magnitude_vector"}  # fmt: skip
    lazies = {names[part]: LazyTensor.of(tensor) for part, tensor in parts.items()}
    return kinds.get(kind).build(lazies, scaling, scaling * next(iter(parts.values())).shape[0])


def linear(out: int, r: int, columns: int, seed: int, scaling: float = 2.0) -> Any:
    return update("lora", scaling, A=random(r, columns, seed=seed), B=random(out, r, seed=seed + 1000))


def adapter(
    seed: int, r: int = 3, scaling: float = 2.0, modules: Mapping[str, tuple[int, int]] | None = None
) -> Adapter:
    shapes = modules or {"h.0.q_proj": (8, 6), "h.0.v_proj": (5, 6), "h.1.q_proj": (8, 6)}
    found = {name: linear(*(m, r, n), seed + i, scaling) for i, (name, (m, n)) in enumerate(shapes.items())}
    return Adapter(found, base=BaseIdentity("org/base"))


def dense(one: Adapter | Path) -> Dense:
    """Return ΔW of every module in float64, by the definition of each kind."""
    opened = one if isinstance(one, Adapter) else open_adapter(one)
    found = {}
    for module, u in opened.updates.items():
        parts = {name: lazy.load().double() for name, lazy in u.parts.items()}
        A, B = parts.get("lora_A.weight"), parts.get("lora_B.weight")
        if u.kind == "embedding":
            found[module] = u.scaling * (parts["lora_embedding_B"] @ parts["lora_embedding_A"]).T
        else:
            assert A is not None
            assert B is not None
            found[module] = u.scaling * torch.einsum("or,r...->o...", B.flatten(1), A)
    return found


@pytest.mark.parametrize("weight", [1e17, -3e20, 1e21])
def test_weights_that_a_manifest_has_no_numbers_for_are_said_in_text(weight: float, tmp_path: Path) -> None:
    adapters = [adapter(1), adapter(2)]
    combine(adapters, tmp_path / "sum", weights=[weight, 1.0])
    assert validate(tmp_path / "sum") == []
    assert distance(dense(tmp_path / "sum"), total(adapters, [weight, 1.0])) < 1e-6
    (step,) = open_adapter(tmp_path / "sum").provenance
    stated = [each.get("weight") for each in step.inputs]
    assert stated == ([weight, 1.0] if weight == 1e21 else [None, 1.0])
    assert step.parameters.get("weights") == (None if weight == 1e21 else [repr(weight), 1])
    again = combine([tmp_path / "sum", adapter(2)], tmp_path / "again")  # whose history has that step
    assert again.shares


def total(adapters: list[Adapter], weights: list[float]) -> Dense:
    found: Dense = {}
    for one, weight in zip(adapters, weights, strict=True):
        for module, D in dense(one).items():
            found[module] = found.get(module, torch.zeros_like(D)) + weight * D
    return found


def norm(matrices: Dense) -> float:
    return math.sqrt(sum(float(D.square().sum()) for D in matrices.values()))


def distance(one: Dense, other: Dense) -> float:
    """Return ‖one − other‖/‖other‖ over all modules of either."""
    zero = torch.zeros(())
    return norm({m: one.get(m, zero) - other.get(m, zero) for m in one.keys() | other.keys()}) / norm(other)


def best(matrices: Dense, ranks: Mapping[str, int]) -> float:
    """Return the least error of matrices of these ranks, by Eckart and Young, relative."""
    tails = [torch.linalg.svdvals(D.flatten(1))[ranks[m] :] for m, D in matrices.items()]
    return math.sqrt(sum(float(tail.square().sum()) for tail in tails)) / norm(matrices)


RANKS = [(4, 2.0), (2, 0.25), (7, -3.0)]


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -0.3], [0.5, 0.25, -2.0]])
def test_the_sum_is_exact_at_full_rank(weights: list[float], tmp_path: Path) -> None:
    adapters = [
        adapter(i, *rank, modules={"h.0.q": (40, 30), f"h.{i % 2}.k": (20, 30), "h.2.v": (9, 33)})
        for i, rank in zip(range(len(weights)), RANKS, strict=False)
    ]
    report = combine(adapters, tmp_path / "sum", weights=weights)
    expected = total(adapters, weights)
    found = dense(tmp_path / "sum")
    assert found.keys() == expected.keys()
    assert distance(found, expected) < 1e-6
    assert report.error == pytest.approx(distance(found, expected), rel=1e-3)
    assert report.norm == pytest.approx(norm(expected), rel=1e-12)
    for share in report.shares:
        assert share.rank == min(share.given, *expected[share.module].shape)
        assert open_adapter(tmp_path / "sum").updates[share.module].scaling == 1
    assert validate(tmp_path / "sum") == []


@pytest.mark.parametrize(
    "ranks",
    [Ranks(Fixed(3)), Ranks(Energy(0.8)), Ranks(budget=60), Ranks(Energy(0.9), uniform=True, multiple_of=2)],
    ids=["rank", "energy", "budget", "uniform"],
)
def test_truncation_is_optimal_and_its_error_is_the_printed_one(ranks: Ranks, tmp_path: Path) -> None:
    adapters, weights = [adapter(0, 5), adapter(50, 4, 0.7)], [1.0, -0.8]
    report = combine(adapters, tmp_path / "sum", weights=weights, ranks=ranks)
    expected = total(adapters, weights)
    measured = distance(dense(tmp_path / "sum"), expected)
    optimum = best(expected, {share.module: share.rank for share in report.shares})
    assert measured == pytest.approx(optimum, rel=1e-5)
    assert report.error == pytest.approx(measured, rel=1e-6)
    assert report.optimum == pytest.approx(optimum, rel=1e-6)
    if ranks.budget:
        assert report.parameters <= ranks.budget
        tails = {s.module: s for s in report.shares}
        assert len({share.rank for share in tails.values()}) > 1


def test_trained_adapters_of_other_ranks_and_scalings(real_models: Any, tmp_path: Path) -> None:
    names, weights = ["smol-lora", "smol-rslora"], [0.7, -1.3]
    adapters = [open_adapter(real_models / name) for name in names]
    expected = total(adapters, weights)
    report = combine([real_models / name for name in names], tmp_path / "sum", weights=weights)
    assert distance(dense(tmp_path / "sum"), expected) < 1e-6
    small = combine([real_models / name for name in names], tmp_path / "small", weights=weights, ranks=Ranks(Fixed(8)))
    measured = distance(dense(tmp_path / "small"), expected)
    assert small.error == pytest.approx(measured, rel=1e-6)
    some = {share.module: share for share in small.shares[::30]}  # a dense SVD of each takes its time
    for module, share in some.items():
        tail = torch.linalg.svdvals(expected[module])[share.rank :]
        assert share.error == pytest.approx(float(tail.norm()), rel=1e-5, abs=1e-7 * share.norm)
    assert report.optimum == 0


def test_half_precision_is_in_the_error_that_is_printed(tmp_path: Path) -> None:
    adapters = [adapter(0), adapter(9)]
    report = combine(adapters, tmp_path / "sum", dtype="BF16")
    measured = distance(dense(tmp_path / "sum"), total(adapters, [1, 1]))
    assert 1e-4 < measured < 1e-2
    assert report.error == pytest.approx(measured, rel=1e-9)
    assert report.optimum == 0


@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}}],
    ids=["plain", "rslora", "patterns"],
)
def test_one_adapter_is_reproduced(config: dict[str, object], tmp_path: Path) -> None:
    source = tiny.save_peft(tmp_path / "source", tiny.lora_factors(), alpha=6, **config)
    report = combine([source], tmp_path / "same")
    assert distance(dense(tmp_path / "same"), dense(source)) < 1e-6
    assert {share.rank for share in report.shares} == {4}
    written = json.loads((tmp_path / "same" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (4, 4, False)
    assert written["target_modules"] == ["q_proj", "v_proj"]
    assert written["task_type"] == "CAUSAL_LM"


def test_what_cancels_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    one = adapter(0)
    with pytest.raises(IncompatibleAdapter, match="the result is empty"):
        combine([one, one], tmp_path / "nothing", weights=[1, -1])
    with pytest.raises(IncompatibleAdapter, match="the result is empty"):
        combine([one], tmp_path / "nothing", weights=[0])
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_cancels_is_left_out_and_no_rank_is_zero(tmp_path: Path) -> None:
    one, other = adapter(0), adapter(9)
    same = replace(other, updates={**other.updates, "h.0.q_proj": one.updates["h.0.q_proj"]})
    report = combine([one, same], tmp_path / "sum", weights=[1, -1], ranks=Ranks(Energy(1e-9)))
    assert report.dropped == ("h.0.q_proj",)
    assert {share.rank for share in report.shares} == {1}
    written = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["h.0.v_proj", "h.1.q_proj"]


def test_near_cancellation_is_warned_about(tmp_path: Path) -> None:
    one = adapter(0)
    half = combine([one], tmp_path / "half", weights=[0.5])
    assert half.warnings == ()
    report = combine([one, tmp_path / "half"], tmp_path / "noise", weights=[1, -2])
    assert any("almost completely" in warning for warning in report.warnings)
    assert report.norm < 1e-6 * half.norm


def test_weights_by_pattern(tmp_path: Path) -> None:
    one, other = adapter(0), adapter(9)
    report = combine([one, other], tmp_path / "sum", weights=["0.5,h.0.q_proj=-1,q_proj=3", 2])
    D1, D2 = dense(one), dense(other)
    weights = {"h.0.q_proj": -1, "h.1.q_proj": 3, "h.0.v_proj": 0.5}
    expected = {m: weights[m] * D1[m] + 2 * D2[m] for m in D1}
    assert distance(dense(tmp_path / "sum"), expected) < 1e-6
    assert [dict(one) for one in report.inputs][1]["weight"] == 2
    assert "weight" not in report.inputs[0]
    recorded = open_adapter(tmp_path / "sum").provenance[-1].parameters["weights"]
    assert recorded == [{"default": 0.5, "patterns": {"h.0.q_proj": -1, "q_proj": 3}}, 2]
    with pytest.raises(LoraToolsError, match="for nothing") as caught:
        combine([one, other], tmp_path / "bad", weights=["k_proj=1", "o_proj=2"])
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("text", ["a", "1,2", "q_proj=x", "=1", "inf", "lbw:1,x", "lbw:"])
def test_weights_that_cannot_be_read(text: str) -> None:
    with pytest.raises(LoraToolsError):
        Weight.parse(text)


@pytest.mark.parametrize(
    ("module", "block", "weight17"),
    [
        ("unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q", "IN02", 3),
        ("unet.down_blocks.1.downsamplers.0.conv", "IN06", 0),
        ("unet.mid_block.attentions.0.proj_in", "MID", 8),
        ("unet.up_blocks.1.attentions.0.proj_in", "OUT03", 9),
        ("unet.up_blocks.3.attentions.2.proj_out", "OUT11", 17),
        ("input_blocks.4.1.proj_in", "IN04", 4),
        ("text_encoder.text_model.encoder.layers.3.self_attn.q_proj", "BASE", 1),
        ("unet.conv_in", "IN00", 0),
    ],
)
def test_block_weights_of_image_models(module: str, block: str, weight17: float) -> None:
    numbers = ",".join(str(i) for i in range(1, 18))  # BASE is 1, IN01 2, IN02 3, …, MID 8, OUT03 9, …
    assert block_of(module) == block
    assert Weight.parse(f"lbw:{numbers}").of(module) == weight17


@pytest.mark.parametrize(("module", "place"), [
    ("transformer.transformer_blocks.0.attn.to_q", 4), ("diffusion_model.double_blocks.18.img_attn.qkv", 22),
    ("transformer.single_transformer_blocks.0.proj_out", 23), ("diffusion_model.single_blocks.37.linear1", 60),
    ("text_encoder.text_model.encoder.layers.0.mlp.fc1", 1), ("text_encoder_2.encoder.block.0.layer.0.q", 2),
    ("transformer.x_embedder", 3), ("transformer.time_text_embed.timestep_embedder.linear_1", 3),
    ("diffusion_model.vector_in.in_layer", 3), ("transformer.proj_out", 61), ("diffusion_model.final_layer.linear", 61),
])  # fmt: skip
def test_block_weights_of_flux(module: str, place: int) -> None:
    weight = Weight.parse("lbw:" + ",".join(str(i) for i in range(1, 62)))
    assert weight.of(module) == place
    with pytest.raises(LoraToolsError, match="in no block of Flux"):
        weight.of("model.layers.0.mlp.up_proj")


def test_blocks_of_another_family_have_their_own_list(tmp_path: Path) -> None:
    modules = [f"diffusion_model.blocks.{block}.self_attn.q" for block in (0, 3)] + ["diffusion_model.text_embedding.0"]
    parts = {m: {"A": random(2, 6, seed=i), "B": random(4, 2, seed=9 + i)} for i, m in enumerate(modules)}
    adapter = Adapter({module: update("lora", 0.5, **each) for module, each in parts.items()})
    numbers = [0.25, 3.0, 0.0, 0.0, -2.0, *[0.0] * 26]
    combine(adapter, tmp_path / "one", weights="lbw:" + ",".join(map(str, numbers)))
    made = open_adapter(tmp_path / "one").updates
    for module, weight in zip(modules, (3.0, -2.0, 0.25), strict=True):
        expected = weight * 0.5 * (parts[module]["B"].double() @ parts[module]["A"].double())
        torch.testing.assert_close(made[module].delta_weight().double(), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(LoraToolsError, match=r"30 block weights.*expected 31 of Wan"):
        combine(adapter, tmp_path / "two", weights="lbw:" + ",".join(["1"] * 30))


def test_a_language_model_has_no_such_blocks() -> None:
    with pytest.raises(LoraToolsError, match="no block"):
        Weight.parse("lbw:" + ",".join("1" * 26)).of("model.layers.0.mlp.up_proj")


def test_convolutions_and_embeddings(tmp_path: Path) -> None:
    def one(seed: int, r: int) -> Adapter:
        conv = update("conv", 0.5, A=random(r, 3, 2, 2, seed=seed), B=random(6, r, 1, 1, seed=seed + 1))
        table = update("embedding", 3.0, EA=random(r, 6, seed=seed + 2), EB=random(6, r, seed=seed + 3))
        return Adapter({"conv": conv, "embed_tokens": table})

    adapters = [one(0, 2), one(20, 3)]
    report = combine(adapters, tmp_path / "sum", weights=[1, -0.5], ranks=Ranks(Fixed(4)))
    expected = total(adapters, [1, -0.5])
    found = open_adapter(tmp_path / "sum")
    assert {m: u.kind for m, u in found.updates.items()} == {"conv": "conv", "embed_tokens": "embedding"}
    assert {m: u.shape for m, u in found.updates.items()} == {"conv": (6, 3, 2, 2), "embed_tokens": (6, 6)}
    measured = distance(dense(tmp_path / "sum"), expected)
    assert measured == pytest.approx(best(expected, {"conv": 4, "embed_tokens": 4}), rel=1e-5)
    assert report.error == pytest.approx(measured, rel=1e-6)


def test_a_core_goes_into_the_factors_of_a_plain_convolution(tmp_path: Path) -> None:
    parts = {"lora_A.weight": random(2, 3, 1, 1, seed=0), "lora_B.weight": random(6, 4, 1, 1, seed=1)}
    parts["lora_mid.weight"] = random(4, 2, 3, 3, seed=2)
    core = kinds.get("locon").build({part: LazyTensor.of(tensor) for part, tensor in parts.items()}, 0.5, 1.0)
    combine([Adapter({"conv": core})], tmp_path / "plain", weights=[-2.0])
    (made,) = open_adapter(tmp_path / "plain").updates.values()
    assert (made.kind, made.rank, made.shape) == ("conv", 4, (6, 3, 3, 3))
    down, up, mid = (tensor.double() for tensor in parts.values())
    expected = -2.0 * 0.5 * torch.einsum("om,mnkl,ni->oikl", up.flatten(1), mid, down.flatten(1))
    torch.testing.assert_close(made.delta_weight().double(), expected, rtol=1e-5, atol=1e-6)


def test_names_are_one_past_their_wrappers(tmp_path: Path) -> None:
    one = adapter(0, modules={"model.layers.0.q_proj": (8, 6)})
    other = adapter(5, modules={"base_model.model.layers.0.q_proj": (8, 6)})
    combine([one, other], tmp_path / "sum")
    expected = dense(one)["model.layers.0.q_proj"] + dense(other)["base_model.model.layers.0.q_proj"]
    assert distance(dense(tmp_path / "sum"), {"model.layers.0.q_proj": expected}) < 1e-6


def test_what_is_no_product_is_refused_by_name(tmp_path: Path) -> None:
    dora = update("dora", 1.0, A=random(2, 6, seed=0), B=random(8, 2, seed=1), m=torch.ones(8))
    one = replace(adapter(0), updates={"h.0.q_proj": dora, "h.1.q_proj": dora})
    with pytest.raises(UnsupportedAdapter, match="2 module") as caught:
        combine([adapter(0), one], tmp_path / "sum")
    assert all("adapter 2: h." in problem and "dora" in problem for problem in caught.value.problems)
    asked = "which needs the base model: loratools convert ADAPTER -o OUTPUT --to-lora --rank 16 --base BASE"
    assert asked in (caught.value.hint or "")


def test_shapes_and_kinds_that_differ_are_all_named(tmp_path: Path) -> None:
    one = adapter(0, modules={"a": (8, 6), "b": (8, 6)})
    conv = update("conv", 1.0, A=random(2, 3, 1, 1, seed=0), B=random(6, 2, 1, 1, seed=1))
    other = Adapter({"a": linear(8, 2, 7, 0), "b": conv})
    with pytest.raises(IncompatibleAdapter) as caught:
        combine([one, other], tmp_path / "sum", check_base="off")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["a", "b"]
    assert "(8, 7)" in caught.value.problems[0]
    assert "conv" in caught.value.problems[1]


def test_numbers_that_are_not_finite_are_all_named(tmp_path: Path) -> None:
    broken = random(3, 6, seed=0)
    broken[1, 2] = float("nan")
    bad = update("lora", 1.0, A=broken, B=random(8, 3, seed=0))
    with pytest.raises(IncompatibleAdapter) as caught:
        combine([Adapter({"a": bad, "b": linear(8, 2, 6, 0), "c": bad})], tmp_path / "sum")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["a", "c"]
    assert list(tmp_path.iterdir()) == []


def test_biases_of_factors_add_up(tmp_path: Path) -> None:
    c = random(8, seed=3)
    biased = update("lora", 2.0, A=random(2, 6, seed=0), B=random(8, 2, seed=1), bias=c)
    idle = update("lora", 2.0, A=random(2, 6, seed=0), B=torch.zeros(8, 2), bias=c)
    one = Adapter({"a": biased, "b": linear(8, 2, 6, 9), "c": idle})
    combine([one, Adapter({"a": biased})], tmp_path / "sum", weights=[1, -0.25])
    found = open_adapter(tmp_path / "sum").updates
    got = {module: u.parts["lora_B.bias"].load() * u.scaling for module, u in found.items()}
    assert torch.allclose(got["a"], (1 - 0.25) * 2 * c)
    assert torch.count_nonzero(got["b"]) == 0  # PEFT's lora_bias is one switch for all modules
    assert torch.allclose(got["c"], 2 * c)
    assert found["c"].rank == 1


def whole(value: float, **more: Any) -> Adapter:
    return replace(adapter(0), replacements={"lm_head.weight": LazyTensor.of(torch.full((2, 3), value))}, **more)


def test_tensors_trained_whole_need_weights_that_sum_to_one(tmp_path: Path) -> None:
    report = combine([whole(1.0), whole(5.0)], tmp_path / "sum", weights=[0.25, 0.75])
    found = open_adapter(tmp_path / "sum").replacements["lm_head.weight"].load()
    assert found.unique().tolist() == [4.0]
    assert report.replaced == ("lm_head.weight",)
    combine([whole(1.0), adapter(4)], tmp_path / "kept", weights=[1, 0.5])
    assert open_adapter(tmp_path / "kept").replacements["lm_head.weight"].load().unique().tolist() == [1.0]
    with pytest.raises(UnsupportedAdapter, match="without the base") as caught:
        combine([whole(1.0), whole(5.0)], tmp_path / "bad")
    assert "lm_head.weight" in caught.value.problems[0]
    assert "sum to 2" in caught.value.problems[0]
    with pytest.raises(UnsupportedAdapter):
        combine([whole(1.0)], tmp_path / "bad", weights=[0.5])


def sealed(root: str = "", tensors: Mapping[str, str] | None = None, id: str | None = "org/base") -> BaseIdentity:
    digests = {name: f"blake3:{value * 64}" for name, value in (tensors or {}).items()}
    return BaseIdentity(id, None, None, digests, f"blake3:{root * 64}" if root else None)


def test_bases_agree_by_hash_or_by_name(tmp_path: Path) -> None:
    def run(*bases: BaseIdentity | None, check: str = "strict") -> Any:
        return combine(
            [replace(adapter(i), base=base) for i, base in enumerate(bases)],
            tmp_path / "sum",
            check_base=check,
            force=True,
        )

    by_hash = run(sealed("a", {"x": "1"}), sealed("a", {"x": "1", "y": "2"}, id="org/mirror"))
    assert by_hash.warnings == ()
    assert by_hash.base == BaseIdentity(None, None, None, sealed("", {"x": "1", "y": "2"}).tensors, sealed("a").root)
    with pytest.raises(WrongBase) as caught:
        run(sealed("a"), sealed("b"))
    assert "root" in caught.value.problems[0]
    with pytest.raises(WrongBase, match="different base") as caught:
        run(sealed("", {"x": "1"}), sealed("", {"x": "2"}))
    assert "x differs" in caught.value.problems[0]
    by_name = run(sealed("a", {"x": "1"}), sealed())
    assert ["by name only" in warning for warning in by_name.warnings] == [True]
    assert by_name.base == BaseIdentity(
        "org/base", root=sealed("a").root
    )  # its tensors do not cover the second adapter
    with pytest.raises(WrongBase):
        run(sealed(id="org/one"), sealed(id="org/two"))
    assert len(run(sealed(id="org/one"), sealed(id="org/two"), check="warn").warnings) == 1
    assert run(sealed("a"), sealed("b"), check="off").warnings == ()
    assert "does not say" in run(sealed(), None).warnings[0]


def test_the_provenance_names_inputs_weights_and_method(tmp_path: Path) -> None:
    combine([adapter(0)], tmp_path / "one")
    report = combine([tmp_path / "one", adapter(9)], tmp_path / "two", weights=[1, -0.5], ranks=Ranks(Fixed(2)))
    first, last = open_adapter(tmp_path / "two").provenance
    assert (first.operation, last.operation) == ("combine", "combine")
    origin = open_adapter(tmp_path / "one").settings["loratools"]
    assert last.inputs[0] == {"digest": origin["digest"], "weight": 1}
    assert last.inputs[1]["weight"] == -0.5
    assert last.parameters["method"] == "linear"
    assert last.parameters["ranks"]["rule"] == "Fixed(r=2)"
    assert last.parameters["error"] == pytest.approx(report.error, rel=1e-5)
    assert open_adapter(tmp_path / "two").settings["loratools"]["digest"] == report.digest


def test_names_of_base_tensors_are_kept(tmp_path: Path) -> None:
    tensors = {"modules": {"h.0.q_proj": {"tensor": "transformer.h.0.q.weight"}, "h.9.gone": {"tensor": "x"}}}
    one = replace(adapter(0), settings={"loratools": tensors})
    combine([one, adapter(3)], tmp_path / "sum")
    entries = open_adapter(tmp_path / "sum").settings["loratools"]["modules"]
    assert entries["h.0.q_proj"]["tensor"] == "transformer.h.0.q.weight"
    assert entries.keys() == one.updates.keys()


def test_the_output_is_reproducible_and_does_not_depend_on_threads(tmp_path: Path) -> None:
    adapters = [adapter(0, 5), adapter(7, 2)]
    files = [tmp_path / f"{threads}" / "adapter_model.safetensors" for threads in (1, 3)]
    for file in files:
        combine(adapters, file.parent, threads=int(file.parent.name))
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_output_that_is_an_input_is_refused(tmp_path: Path) -> None:
    combine([adapter(0)], tmp_path / "one")
    before = (tmp_path / "one" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputRefused, match="input"):
        combine([tmp_path / "one"], tmp_path / "one", force=True)
    assert (tmp_path / "one" / "adapter_model.safetensors").read_bytes() == before


def save_with_init(folder: Path, seed: int, init: object) -> Path:
    factors = {
        m: (random(*A.shape, seed=seed), random(*B.shape, seed=seed + 1)) for m, (A, B) in tiny.lora_factors().items()
    }
    return tiny.save_peft(folder, factors, alpha=6, init_lora_weights=init)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda"])
def test_training_that_changed_the_base_becomes_plain(init: str, tmp_path: Path) -> None:
    trained, start = save_with_init(tmp_path / "trained", 0, init), save_with_init(tmp_path / "start", 30, True)
    with pytest.raises(UnsupportedAdapter):
        combine([trained], tmp_path / "plain")
    report = combine([trained], tmp_path / "plain", initial=start)
    after, before = open_adapter(trained, initial=True), open_adapter(start)
    assert distance(dense(tmp_path / "plain"), total([after, before], [1, -1])) < 1e-6
    assert {share.rank for share in report.shares} == {8}
    assert [one["weight"] for one in report.inputs] == [1, -1]


def test_the_rank_of_what_hardly_moved_is_found(tmp_path: Path) -> None:
    start = tiny.lora_factors()
    moved = {m: (A, B + torch.ones(len(B), 1) * torch.tensor([1.0, 0, 0, 0])) for m, (A, B) in start.items()}
    trained = tiny.save_peft(tmp_path / "trained", moved, init_lora_weights="pissa")
    report = combine([trained], tmp_path / "plain", initial=tiny.save_peft(tmp_path / "start", start))
    # B + 1·eᵀ is rounded to float32, so the change is of rank 1 and, far below it, what rounding left.
    for share in report.shares:
        sigma = torch.linalg.svdvals(dense(tmp_path / "plain")[share.module])
        assert float(sigma[1]) < 1e-6 * float(sigma[0])


def test_an_initial_adapter_of_other_modules_is_refused(tmp_path: Path) -> None:
    trained = save_with_init(tmp_path / "trained", 0, "pissa")
    other = tiny.save_peft(tmp_path / "other", tiny.lora_factors(["mlp.up_proj"]))
    with pytest.raises(IncompatibleAdapter, match="different modules") as caught:
        combine([trained], tmp_path / "plain", initial=other)
    assert len(caught.value.problems) == 6
    with pytest.raises(LoraToolsError, match="one adapter"):
        combine([trained, trained], tmp_path / "plain", initial=other)


numbers = st.floats(-2, 2, allow_nan=False).filter(lambda x: abs(x) > 1e-3)
law = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@law
@given(st.lists(numbers, min_size=2, max_size=2), numbers)
def test_law_linear_in_the_weights(tmp_path: Path, weights: list[float], factor: float) -> None:
    adapters = [adapter(0), adapter(40, 2)]
    combine(adapters, tmp_path / "one", weights=weights, force=True)
    combine(adapters, tmp_path / "other", weights=[factor * weight for weight in weights], force=True)
    scaled = {module: factor * D for module, D in dense(tmp_path / "one").items()}
    assert distance(dense(tmp_path / "other"), scaled) < 1e-6


@law
@given(st.integers(0, 999), numbers)
def test_law_factors_may_be_exchanged_for_equal_ones(tmp_path: Path, seed: int, weight: float) -> None:
    one, other = adapter(0), adapter(40, 2)
    M = torch.eye(3, dtype=torch.float64) + 0.3 * random(3, 3, seed=seed).double().tanh()
    changed = {}
    for module, u in one.updates.items():
        A, B = (u.parts[f"lora_{name}.weight"].load().double() for name in "AB")
        changed[module] = update("lora", u.scaling, A=torch.linalg.solve(M, A), B=B @ M)
    ranks = Ranks(Fixed(3))
    combine([one, other], tmp_path / "one", weights=[1, weight], ranks=ranks, force=True)
    combine([Adapter(changed), other], tmp_path / "two", weights=[1, weight], ranks=ranks, force=True)
    assert distance(dense(tmp_path / "two"), dense(tmp_path / "one")) < 1e-5


@law
@given(st.permutations([0, 1, 2]), st.integers(1, 8))
def test_law_order_does_not_matter(tmp_path: Path, order: list[int], rank: int) -> None:
    adapters, weights = [adapter(10 * i, 2 + i) for i in range(3)], [1.0, -0.5, 2.0]
    ranks = Ranks(Fixed(rank))
    combine(adapters, tmp_path / "one", weights=weights, ranks=ranks, force=True)
    combine(
        [adapters[i] for i in order], tmp_path / "two", weights=[weights[i] for i in order], ranks=ranks, force=True
    )
    assert distance(dense(tmp_path / "two"), dense(tmp_path / "one")) < 1e-6


def test_what_is_no_product_is_told_once_with_the_way_to_a_lora(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_{each}" for each in "qkv"]
    tensors = {f"{name}.{part}": torch.randn(shape, generator=generator) for name in names
               for part, shape in (("hada_w1_a", (8, 2)), ("hada_w1_b", (2, 8)), ("hada_w2_a", (8, 2)),
                                   ("hada_w2_b", (2, 8)))}  # fmt: skip
    save_file(tensors, tmp_path / "loha.safetensors")
    with pytest.raises(UnsupportedAdapter) as caught:
        combine([tmp_path / "loha.safetensors"], tmp_path / "out")
    (problem,) = caught.value.problems
    assert "and 2 more: kind loha: its change is no product of two factors" in problem
    file = tmp_path / "loha.safetensors"
    assert f"which needs no base model: loratools convert {file} -o loha-lora --to-lora --rank 16. Or" in (
        caught.value.hint or ""
    )


def test_what_kohyas_concat_makes_is_what_the_topic_says(tmp_path: Path) -> None:
    """sd-scripts' merge_lora.py: sqrt(alpha / the first alpha) times the ratio on both factors, then stacked."""
    pairs = [
        (random(6, 8, seed=n).double(), random(8, 5, seed=9 + n).double(), alpha) for n, alpha in enumerate((4.0, 2.0))
    ]
    ratios, first = (0.7, -0.3), pairs[0][2]
    ups = [up * abs((alpha / first) ** 0.5 * ratio) for (up, _, alpha), ratio in zip(pairs, ratios, strict=True)]
    downs = [down * (alpha / first) ** 0.5 * ratio for (_, down, alpha), ratio in zip(pairs, ratios, strict=True)]
    theirs = torch.cat(ups, 1) @ torch.cat(downs, 0) * first / 16
    inputs = []
    for up, down, alpha in pairs:
        parts = {"lora_A.weight": LazyTensor.of(down.float()), "lora_B.weight": LazyTensor.of(up.float())}
        inputs.append(Adapter({"m.q": kinds.get("lora").build(parts, alpha / 8, alpha)}))
    combine(inputs, tmp_path / "sum", weights=[0.245, -0.045])
    (ours,) = dense(tmp_path / "sum").values()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
