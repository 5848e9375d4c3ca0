"""Verification finds every kind of fault, and passes what is right. Models are made here in float64, not by `merge`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loratools.cli._run import run
from loratools.surgery.merge import merge
from loratools.surgery.verify import Verification, verify
from tests.surgery import models
from tests.surgery.models import DTYPES, Lora, lora, random, save_adapter, save_base

SHAPES = {"a": (128, 96), "b": (96, 128), "square": (96, 96)}
WEIGHT = 0.8
Weights = dict[str, Tensor]


def base_weights(dtype: torch.dtype) -> Weights:
    found = {
        f"{name}.weight": random(*shape, seed=i, scale=0.05, dtype=dtype)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    return found | {"norm.weight": random(96, dtype=dtype), "embed.weight": random(64, 96, seed=9, dtype=dtype)}


def adapter_of(size: float) -> Lora:
    """Return an adapter whose changes are about `size` of the weights."""
    return lora(SHAPES, scale=(size * 0.05 / 4) ** 0.5, weight=WEIGHT)


def check(
    folder: Path,
    dtype: torch.dtype,
    given: Lora,
    change: Callable[[Weights, Weights, Lora], Weights] | None = None,
    **options: bool,
) -> Verification:
    """Save base, adapter, and their merge after `change(merged, base, adapter)`; verify it."""
    weights = base_weights(dtype)
    model = models.merged(weights, [given])
    model = change(dict(model), weights, given) if change else model
    base, adapter = save_base(folder / "base", weights), save_adapter(folder / "adapter", given)
    return verify(save_base(folder / "model", model, shards=2), base, [adapter], weights=[WEIGHT], **options)


def merged_with(changed: Callable[[str, Tensor, Tensor], Tensor]) -> Callable[[Weights, Weights, Lora], Weights]:
    """Return a fault: every ΔW is `changed(module, A, B)` instead."""

    def fault(model: Weights, weights: Weights, given: Lora) -> Weights:
        for module, (A, B) in given.factors.items():
            W = weights[f"{module}.weight"]
            model[f"{module}.weight"] = (W.double() + changed(module, A.double(), B.double())).to(W.dtype)
        return model

    return fault


def edited(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Weights, Weights, Lora], Weights]:
    """Return a fault in one tensor; None takes it out."""

    def fault(model: Weights, weights: Weights, given: Lora) -> Weights:
        new = change(model[name].clone())
        return {key: W for key, W in (model | {name: new}).items() if W is not None}

    return fault


def nudge(W: Tensor) -> Tensor:
    """Move one element by one unit in the last place."""
    W.view({2: torch.int16, 4: torch.int32}[W.itemsize])[3, 5] += 1
    return W


SCALE = WEIGHT * 8 / 4
TOUCHED = {
    "not scaled": merged_with(lambda _, A, B: WEIGHT * (B @ A)),
    "not weighted": merged_with(lambda _, A, B: 2 * (B @ A)),
    "weight on both factors": merged_with(lambda _, A, B: 2 * WEIGHT**2 * (B @ A)),
    "merged twice": merged_with(lambda _, A, B: 2 * SCALE * (B @ A)),
    "subtracted": merged_with(lambda _, A, B: -SCALE * (B @ A)),
    "not merged": merged_with(lambda _, A, B: 0 * (B @ A)),
    "one module not merged": merged_with(lambda name, A, B: SCALE * (B @ A) * (name != "b")),
    "A and B swapped where square": merged_with(lambda name, A, B: SCALE * ((B @ A).T if name == "square" else B @ A)),
    "one rank forgotten": merged_with(lambda _, A, B: SCALE * (B[:, :3] @ A[:3])),
}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("size", [0.3, 0.01, 0.001])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_what_is_rounded_once_is_within(dtype: str, size: float, exact: bool, tmp_path: Path) -> None:
    found = check(tmp_path, DTYPES[dtype], adapter_of(size), exact=exact)
    assert found.ok
    assert (found.identical, found.differing, found.missing, found.extra) == (2, (), (), ())
    assert [one.name for one in found.checked] == ["a.weight", "b.weight", "square.weight"]
    assert [one.mismatched for one in found.checked] == ([0, 0, 0] if exact else [None] * 3)
    assert 0 < found.error <= 2.0 ** -models.PRECISION[DTYPES[dtype]]


@pytest.mark.parametrize(("dtype", "size"), [("BF16", 0.3), ("BF16", 0.002), ("F16", 0.002), ("F32", 0.01)])
@pytest.mark.parametrize("fault", sorted(TOUCHED))
def test_faults_in_touched_tensors(fault: str, dtype: str, size: float, tmp_path: Path) -> None:
    """Even where the change is smaller than a unit of most elements."""
    wrong = {"one module not merged": ["b.weight"], "A and B swapped where square": ["square.weight"]}.get(fault)
    for exact in (False, True):
        found = check(tmp_path / str(exact), DTYPES[dtype], adapter_of(size), TOUCHED[fault], exact=exact)
        assert not found.ok
        failed = [one.name for one in found.checked if not one.within]
        assert failed == (wrong or ["a.weight", "b.weight", "square.weight"])


@pytest.mark.parametrize("factor", [1.0, 0.0, WEIGHT, 2.0, -1.0])
def test_a_change_below_one_unit_of_every_element(factor: float, tmp_path: Path) -> None:
    """No element is far off then, whatever was applied; but what survives of a change shows how large it was."""
    W = (random(128, 96).sign() * (0.5 + 0.5 * random(128, 96, seed=3).abs().clamp(max=0.99))).to(torch.bfloat16)
    given = lora({"a": (128, 96)}, scale=0.011)
    base = save_base(tmp_path / "base", {"a.weight": W})
    delta = given.delta("a")
    assert float(delta.abs().max()) < 2.0**-8
    model = save_base(tmp_path / "model", {"a.weight": (W.double() + factor * delta).to(W.dtype)})
    for exact in (False, True):
        assert verify(model, base, [save_adapter(tmp_path / f"{exact}", given)], exact=exact).ok is (factor == 1)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_how_much_was_applied(dtype: str, tmp_path: Path) -> None:
    """⟨ΔW', ΔW⟩/‖ΔW‖² and ‖E‖/‖ΔW'‖, estimated by probes, against the same in full."""
    found = check(tmp_path, DTYPES[dtype], adapter_of(0.3), TOUCHED["weight on both factors"])
    for one in found.checked:
        assert one.applied == pytest.approx(WEIGHT, rel=0.02)
        assert one.error == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize("exact", [False, True])
def test_one_bit_in_an_untouched_tensor(exact: bool, tmp_path: Path) -> None:
    found = check(tmp_path, torch.bfloat16, adapter_of(0.01), edited("embed.weight", nudge), exact=exact)
    assert (found.ok, found.differing, found.identical) == (False, ("embed.weight",), 1)
    assert all(one.within for one in found.checked)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_single_unit_of_a_single_element_of_a_touched_tensor(dtype: str, tmp_path: Path) -> None:
    """No tie is near it, and so none excuses it."""
    found = check(tmp_path, DTYPES[dtype], adapter_of(0.01), edited("a.weight", nudge), exact=True)
    assert (found.ok, found.checked[0].mismatched) == (False, 1)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_number_that_is_none(value: float, dtype: str, exact: bool, tmp_path: Path) -> None:
    def spoiled(W: Tensor) -> Tensor:
        W[3, 5] = value
        return W

    found = check(tmp_path, DTYPES[dtype], adapter_of(0.1), edited("a.weight", spoiled), exact=exact)
    assert [one.within for one in found.checked] == [False, True, True]


def test_names_are_accounted_for_on_both_sides(tmp_path: Path) -> None:
    def fault(model: Weights, weights: Weights, given: Lora) -> Weights:
        del model["norm.weight"], model["a.weight"]
        return model | {"rotary.inv_freq": torch.ones(3)}

    found = check(tmp_path, torch.bfloat16, adapter_of(0.01), fault)
    assert (found.ok, found.missing, found.extra) == (False, ("a.weight", "norm.weight"), ("rotary.inv_freq",))
    assert [one.within for one in found.checked] == [True, True]


@pytest.mark.parametrize("name", ["a.weight", "embed.weight"])
def test_another_shape(name: str, tmp_path: Path) -> None:
    found = check(tmp_path, torch.bfloat16, adapter_of(0.01), edited(name, lambda W: W[:-1].clone()))
    assert not found.ok
    assert name in (*found.differing, *(one.name for one in found.checked if not one.within))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("out", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_merges_of_several_adapters_cast(dtype: str, out: str, exact: bool, tmp_path: Path) -> None:
    """What `merge` makes passes, whatever the dtype; a cast of untouched tensors is no difference."""
    given = [adapter_of(0.3), lora({"a": (128, 96)}, rank=9, seed=4, weight=-1.3)]
    base = save_base(tmp_path / "base", base_weights(DTYPES[dtype]))
    adapters = [save_adapter(tmp_path / f"adapter{i}", one) for i, one in enumerate(given)]
    merge(base, adapters, tmp_path / "model", weights=[0.8, -1.3], dtype=out)
    assert verify(tmp_path / "model", base, adapters, weights=[0.8, -1.3], exact=exact).ok
    assert not verify(tmp_path / "model", base, adapters, weights=[0.8, 1.3], exact=exact).ok
    assert not verify(tmp_path / "model", base, adapters[:1], weights=[0.8], exact=exact).ok


def test_transposed_weights(tmp_path: Path) -> None:
    """Conv1D: [in, out] in the base."""
    weights = {"h.0.c_fc.weight": random(96, 128, scale=0.05, dtype=torch.bfloat16), "ln.weight": random(96)}
    given = lora({"h.0.c_fc": (128, 96)}, scale=0.02)
    W = weights["h.0.c_fc.weight"]
    right = (W.double() + given.delta("h.0.c_fc").T).to(W.dtype)
    base = save_base(tmp_path / "base", weights, model_type="gpt2")
    adapter = save_adapter(tmp_path / "adapter", given)
    for name, model in (("right", weights | {"h.0.c_fc.weight": right}), ("same", weights)):
        folder = save_base(tmp_path / name, model, model_type="gpt2")
        assert verify(folder, base, [adapter]).ok is (name == "right")
        assert verify(folder, base, [adapter], exact=True).ok is (name == "right")


@pytest.mark.parametrize("size", [0.3, 0.02, 0.002])
def test_models_that_were_rounded_twice(size: float, tmp_path: Path) -> None:
    """As PEFT does with safe_merge: within rounding, though not exactly the float64 result."""

    def fault(model: Weights, weights: Weights, given: Lora) -> Weights:
        for module in given.factors:
            W = weights[f"{module}.weight"]
            model[f"{module}.weight"] = W + given.delta(module).to(W.dtype)
        return model

    assert check(tmp_path / "sampled", torch.bfloat16, adapter_of(size), fault).ok
    assert not check(tmp_path / "exact", torch.bfloat16, adapter_of(size), fault, exact=True).ok


def test_tied_head_that_was_untied(tmp_path: Path) -> None:
    weights = {"model.embed_tokens.weight": random(64, 96, dtype=torch.bfloat16), "norm.weight": random(96)}
    base = save_base(tmp_path / "base", weights, tie_word_embeddings=True)
    adapter = save_adapter(tmp_path / "adapter", lora({"lm_head": (64, 96)}))
    for policy in ("untie", "both"):
        merge(base, [adapter], tmp_path / policy, tied=policy)
        found = verify(tmp_path / policy, base, [adapter], exact=True)
        assert found.ok
        assert [one.name for one in found.checked] == [
            "lm_head.weight" if policy == "untie" else "model.embed_tokens.weight"
        ]


def test_exit_codes_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, given = base_weights(torch.bfloat16), adapter_of(0.1)
    folders = {
        "base": save_base(tmp_path / "base", weights),
        "adapter": save_adapter(tmp_path / "adapter", given),
        "good": save_base(tmp_path / "good", models.merged(weights, [given])),
        "bad": save_base(
            tmp_path / "bad", edited("norm.weight", lambda W: -W)(models.merged(weights, [given]), {}, given)
        ),
    }
    rest = ["--base", str(folders["base"]), "--adapter", str(folders["adapter"])]
    for model, code in (("good", 0), ("bad", 1)):
        assert run(["verify", str(folders[model]), *rest, "-w", str(WEIGHT), "--json"]) == code
        document = json.loads(capsys.readouterr().out)
        assert document["ok"] is (code == 0)
        assert document["differing"] == (["norm.weight"] if code else [])
    assert run(["verify", str(folders["good"]), *rest]) == 1  # without the weight
    assert capsys.readouterr().out.count("BEYOND") == 3
    assert run(["verify", str(folders["good"]), *rest, "-w", "1", "-w", "2"]) == 2
    assert run(["verify", str(tmp_path / "none"), *rest]) == 1
    with pytest.raises(ValueError, match="each adapter takes one weight"):
        verify(folders["good"], folders["base"], [folders["adapter"]], weights=[1, 2])


def test_the_seed_is_what_decides(tmp_path: Path) -> None:
    check(tmp_path, torch.bfloat16, adapter_of(0.1))
    paths = (tmp_path / "model", tmp_path / "base", [tmp_path / "adapter"])
    first, same, other = (verify(*paths, weights=[WEIGHT], seed=seed) for seed in (1, 1, 2))
    assert first == same
    assert first.checked != other.checked
    # Seeds of more than 32 bits are seeds of their own.
    assert first.checked != verify(*paths, weights=[WEIGHT], seed=2**32 + 1).checked


def test_without_a_seed_each_run_draws_its_own_and_tells_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(tmp_path, torch.bfloat16, adapter_of(0.1))
    command = ["verify", str(tmp_path / "model"), "--base", str(tmp_path / "base")]
    command += ["--adapter", str(tmp_path / "adapter"), "-w", str(WEIGHT)]
    documents = []
    for rest in ([], [], ["--seed", "77"]):
        assert run([*command, *rest, "--json"]) == 0
        documents.append(json.loads(capsys.readouterr().out))
    first, second, given = documents
    assert given["seed"] == 77
    assert first["seed"] != second["seed"]
    assert first["checked"] != second["checked"]
    assert run([*command, "--seed", str(first["seed"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert run([*command, "--seed", "77"]) == 0
    printed = capsys.readouterr().out
    assert "77, which --seed repeats" in printed
    assert "errors below 4.0e-03 of a changed BF16 tensor" in printed
