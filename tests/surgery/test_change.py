"""Changes that depend on the base: with it W' − W by formulas of our own in float64, without it said; both commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools.errors import IncompatibleAdapter, UnsupportedAdapter
from loratools.surgery.combine import combine
from loratools.surgery.compare import compare
from loratools.surgery.convert import convert
from loratools.surgery.resize import resize
from loratools.surgery.spectrum import spectrum
from tests.surgery.models import random, save_base

OUT, IN, RANK, SCALING = 24, 16, 4, 2.0
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
W = random(OUT, IN, seed=1)


def factors(seed: int) -> dict[str, Tensor]:
    return {
        "lora_A.weight": random(RANK, IN, seed=seed, scale=0.1),
        "lora_B.weight": random(OUT, RANK, seed=seed + 50, scale=0.1),
    }


def saved(folder: Path, modules: Mapping[str, Mapping[str, Tensor]], **settings: Any) -> Path:
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": SCALING * RANK,
        "target_modules": sorted(modules),
        **settings,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {f"base_model.model.{module}.{part}": T for module, parts in modules.items() for part, T in parts.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def trained_whole(module: str) -> dict[str, list[str]]:
    return {"target_modules": [Q], "modules_to_save": [module]}


def dora(folder: Path, seed: int, by: float = 0.05) -> tuple[Path, Tensor, Tensor]:
    """Write an adapter of one DoRA module; return it, s·B·A and W' − W in float64."""
    parts = factors(seed)
    product = SCALING * parts["lora_B.weight"].double() @ parts["lora_A.weight"].double()
    changed = W.double() + product
    m = (changed.norm(dim=1) * (1 + by * random(OUT, seed=seed + 9).double())).float()
    adapter = saved(folder, {Q: {**parts, "lora_magnitude_vector": m}}, use_dora=True)
    return adapter, product, changed * (m.double() / changed.norm(dim=1))[:, None] - W.double()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    weights = {f"{Q}.weight": W, f"{K}.weight": random(OUT, IN, seed=2), "lm_head.weight": random(9, IN, seed=3)}
    return save_base(tmp_path / "base", weights, model_type="llama")


def cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / one.norm() / other.norm())


def test_dora_is_measured_with_its_magnitude_where_the_base_is_at_hand(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (first, product1, true1), (second, _, true2) = (dora(tmp_path / f"{i}", 5 + i) for i in (0, 1))
    assert abs(float(true1.norm()) - float(product1.norm())) > 0.02 * float(product1.norm())
    found = compare(first, second, base)
    assert found.norms == pytest.approx((float(true1.norm()), float(true2.norm())), rel=1e-12)
    assert found.cosine == pytest.approx(cosine(true1, true2), abs=1e-12)
    assert (found.in_part, found.left_out) == (({}, {}), ({}, {}))
    (one,) = found.modules
    assert (one.kinds, one.ranks, one.shape) == (("dora", "dora"), (RANK, RANK), (OUT, IN))
    (U1, S, V1), (U2, _, V2) = torch.linalg.svd(true1), torch.linalg.svd(true2)
    phi = float((V1[:2] @ V2[:3].T).square().sum()) / 2
    assert one.input_similarity[1][2] == pytest.approx(phi, abs=1e-9)
    assert one.output_similarity[1][2] == pytest.approx(float((U1[:, :2].T @ U2[:, :3]).square().sum()) / 2, abs=1e-9)
    strength = float((U1[:, :RANK].T @ W.double() @ V1[:RANK].T).norm())
    assert one.amplification[0] == pytest.approx(float(true1.norm()) / strength, rel=1e-9)
    (module,) = spectrum(first, base=base).modules
    assert module.norm == pytest.approx(float(true1.norm()), rel=1e-12)
    assert module.sigma == pytest.approx(tuple(S.tolist()), rel=1e-9)
    assert module.true_rank == IN  # W's rows in other lengths: no product of rank r
    assert caplog.messages == []


def test_without_a_base_it_is_said_that_the_magnitude_is_left_out(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (first, product1, _), (second, product2, _) = (dora(tmp_path / f"{i}", 5 + i) for i in (0, 1))
    found, measured = compare(first, second), spectrum(first)
    assert found.cosine == pytest.approx(cosine(product1, product2), abs=1e-12)
    assert measured.norm == pytest.approx(float(product1.norm()), rel=1e-12)
    reason = "without its magnitude, whose effect depends on the base model (--base)"
    assert found.in_part == ({Q: reason}, {Q: reason})
    assert measured.in_part == {Q: reason}
    assert [message.partition(": ")[2] for message in caplog.messages] == [f"1 module measured {reason}: {Q}"] * 3


@pytest.mark.parametrize("command", ["inspect a --spectrum", "compare a a"])
def test_the_commands_say_it_in_text_and_in_json(shell: Callable[..., Any], command: str, base: Path) -> None:
    _, product, true = dora(base.parent / "a", 5)
    assert "warning: a: 1 module measured without its magnitude" in shell(f"loratools {command}", base.parent).err
    lines = (f"loratools {command} --json", f"loratools {command} --base base --json")
    alone, on_base = (json.loads(shell(line, base.parent).out) for line in lines)
    assert any("without its magnitude" in warning for warning in alone["warnings"])
    assert "warnings" not in on_base or on_base["warnings"] == []
    norms = [(found.get("spectrum") or {"norm": found.get("norms", [0])[0]})["norm"] for found in (alone, on_base)]
    assert norms == pytest.approx([float(product.norm()), float(true.norm())], rel=1e-12)


def test_a_base_without_a_spectrum_is_a_misuse(shell: Callable[..., Any], base: Path) -> None:
    dora(base.parent / "a", 5)
    done = shell("loratools inspect a --base base", base.parent)
    assert done.code == 2
    assert "--base goes with --spectrum" in done.err


def test_what_is_trained_whole_is_left_out_without_a_base_and_measured_with_it(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heads = [random(9, IN, seed=70 + i) for i in (0, 1)]
    adapters = [
        saved(tmp_path / f"{i}", {Q: factors(5), "lm_head": {"weight": head}}, **trained_whole("lm_head"))
        for i, head in enumerate(heads)
    ]
    found = compare(*adapters)
    assert [list(side) for side in found.left_out] == [["lm_head.weight"]] * 2
    assert "1 module left out as a tensor trained whole: its change depends on the base" in caplog.messages[0]
    assert found.cosine == pytest.approx(1)
    caplog.clear()
    found = compare(*adapters, base)
    changes = [head.double() - random(9, IN, seed=3).double() for head in heads]
    by_name = {one.module: one for one in found.modules}
    assert by_name.keys() == {Q, "lm_head.weight"}
    assert by_name["lm_head.weight"].cosine == pytest.approx(cosine(*changes), abs=1e-12)
    assert by_name["lm_head.weight"].norms == pytest.approx([float(D.norm()) for D in changes], rel=1e-12)
    assert caplog.messages == []
    larger = saved(tmp_path / "new", {Q: factors(5), "score": {"weight": heads[0]}}, **trained_whole("score"))
    assert spectrum(larger, base=base).left_out == {
        "score.weight": f"as a tensor of shape [9, {IN}]: the base has none"
    }


def test_changes_of_which_nothing_is_known_without_a_base(tmp_path: Path) -> None:
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    stored = {f"{module}.weight": random(320), f"{module}.on_input": torch.tensor(False)}
    save_file(stored, tmp_path / "a.safetensors")
    with pytest.raises(IncompatibleAdapter, match="no module in common") as caught:
        compare(tmp_path / "a.safetensors", tmp_path / "a.safetensors")
    assert "left out as kind ia3: its change depends on the base model (--base)" in caught.value.problems[0]
    found = spectrum(tmp_path / "a.safetensors")
    assert (found.modules, len(found.skipped)) == ((), 1)


def test_names_that_only_the_base_tells(shell: Callable[..., Any], base: Path) -> None:
    """A flattened name is turned back with the base, by `inspect` and by `compare`."""
    v = random(OUT, seed=4, scale=0.1)
    stored = {
        f"lora_unet_{Q.replace('.', '_')}.weight": v,
        f"lora_unet_{Q.replace('.', '_')}.on_input": torch.tensor(0),
    }
    save_file(stored, base.parent / "a.safetensors")
    assert "Give the base model" in shell("loratools inspect a.safetensors --spectrum", base.parent).err
    wanted = float((W.double() * v.double()[:, None]).norm())
    spectrum_of = json.loads(shell("loratools inspect a.safetensors --spectrum --base base --json", base.parent).out)
    assert spectrum_of["spectrum"]["norm"] == pytest.approx(wanted, rel=1e-12)
    compared = json.loads(shell("loratools compare a.safetensors a.safetensors --base base --json", base.parent).out)
    assert compared["norms"] == pytest.approx([wanted, wanted], rel=1e-12)


def test_a_difference_of_a_bias_is_measured_too(tmp_path: Path) -> None:
    c = random(OUT, seed=8)
    with_bias = saved(tmp_path / "a", {Q: {**factors(5), "lora_B.bias": c}}, lora_bias=True)
    found = spectrum(with_bias)
    assert [one.module for one in found.modules] == [Q, f"{Q}.bias"]
    assert found.modules[1].norm == pytest.approx(SCALING * float(c.double().norm()), rel=1e-12)
    assert compare(with_bias, saved(tmp_path / "b", {Q: factors(5)})).only == ((f"{Q}.bias",), ())


def test_a_base_that_is_not_the_sealed_one_is_told(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter, _, true = dora(tmp_path / "a", 5)
    convert(adapter, tmp_path / "sealed", base=base)
    assert spectrum(tmp_path / "sealed", base=base).norm == pytest.approx(float(true.norm()), rel=1e-12)
    assert caplog.messages == []
    other = save_base(
        tmp_path / "other", {f"{Q}.weight": W + 1, f"{K}.weight": W - 1, "lm_head.weight": W}, model_type="llama"
    )
    spectrum(tmp_path / "sealed", base=other)
    assert "measured on another base than the one it was sealed with" in caplog.messages[0]


@pytest.mark.parametrize("verb", [partial(resize, ranks=2), combine, partial(combine, method="ties", density=0.5)])
def test_dora_is_not_combined_or_resized_as_if_it_were_its_product(verb: Callable[..., Any], tmp_path: Path) -> None:
    adapter, _, _ = dora(tmp_path / "a", 5)
    with pytest.raises(UnsupportedAdapter, match="cannot be combined or resized") as caught:
        verb(adapter, tmp_path / "out")
    assert caught.value.problems == (
        f"{adapter}: {Q}: kind dora: it rescales the base weight, so its change is no product that could be added up",
    )
    assert not (tmp_path / "out").exists()


def test_pissa_is_refused_by_name(tmp_path: Path) -> None:
    """Its B·A is no change of the base that others have: that is BA − B₀A₀ (`combine --initial`)."""
    pissa = saved(tmp_path / "a", {Q: factors(5)}, init_lora_weights="pissa")
    for measure in (lambda: spectrum(pissa), lambda: compare(pissa, pissa)):
        with pytest.raises(UnsupportedAdapter, match="pissa"):
            measure()


def test_numbers_that_are_none_are_refused_with_the_module(base: Path, tmp_path: Path) -> None:
    parts = factors(5)
    parts["lora_B.weight"][0, 0] = float("nan")
    adapter = saved(tmp_path / "a", {Q: parts})
    for measure in (spectrum, partial(compare, adapter)):
        with pytest.raises(IncompatibleAdapter, match=r"q_proj: .*NaN or infinite"):
            measure(adapter)
    sound, _, _ = dora(tmp_path / "b", 5)
    broken = save_base(tmp_path / "nan", {f"{Q}.weight": W * float("nan")}, model_type="llama")
    with pytest.raises(IncompatibleAdapter, match=r"q_proj: .*NaN or infinite"):
        spectrum(sound, base=broken)
