"""What a call says of its inputs reaches every verb: dialect and alpha, modules that count, the kind of model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import loratools
from loratools import dialects
from loratools.errors import InvalidOption, LoraToolsError, UnknownKind
from loratools.surgery.inputs import chosen, chosen_weights, kept, open_model, read_as, typed_model
from loratools.surgery.switch import switch
from tests.surgery.models import load, lora, same_bytes, save, weights_of

SHAPES = {"layers.0.a": (24, 16), "layers.1.a": (24, 16), "layers.0.b": (16, 24)}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Save a base, and two adapters `adapter0` and `adapter1` that fit it, in float32."""
    save(tmp_path, weights_of(SHAPES, torch.float32), [lora(SHAPES, seed=1), lora(SHAPES, seed=2)])
    return tmp_path


@pytest.fixture
def without_alpha(models: Path) -> Path:
    """The factors of `adapter0` as loralib leaves them: without the alpha of training."""
    tensors = dialects.open_adapter(models / "adapter0").tensors()
    named = {name.removesuffix(".weight"): lazy.load() for name, lazy in tensors.items()}
    torch.save(named, models / "bare.pt")
    return models / "bare.pt"


def change(models: Path, merged: str) -> dict[str, torch.Tensor]:
    base, after = load(models / "base"), load(models / merged)
    return {name: (after[name].double() - base[name].double()) for name in base}


@pytest.mark.parametrize(
    ("patterns", "counts"),
    [
        ({"include": "a"}, {"layers.0.a", "layers.1.a"}),
        ({"include": ["layers.0.*"]}, {"layers.0.a", "layers.0.b"}),
        ({"exclude": ["re:.*1.*"]}, {"layers.0.a", "layers.0.b"}),
        ({"include": ["a"], "exclude": ["layers.1.*"]}, {"layers.0.a"}),
    ],
)
def test_a_merge_of_some_modules_is_verified_and_undone(
    patterns: dict[str, Any], counts: set[str], models: Path
) -> None:
    adapters = [models / "adapter0", models / "adapter1"]
    loratools.merge(models / "base", adapters, models / "all", weights=[0.5, -2])
    loratools.merge(models / "base", adapters, models / "some", weights=[0.5, -2], keep_residual=True, **patterns)
    whole, some = change(models, "all"), change(models, "some")
    for name in whole:
        expected = whole[name] if name.removesuffix(".weight") in counts else torch.zeros_like(whole[name])
        assert torch.allclose(some[name], expected, atol=1e-6)
        assert bool(expected.any()) is (name.removesuffix(".weight") in counts)
    assert loratools.verify(models / "some", models / "base", adapters, weights=[0.5, -2], **patterns).ok
    assert not loratools.verify(models / "some", models / "base", adapters, weights=[0.5, -2]).ok
    assert loratools.unmerge(models / "some", adapters, models / "un").proved == "root hash"
    assert loratools.unmerge(models / "some", adapters, models / "un2", weights=[0.5, -2], **patterns).root
    assert all(same_bytes(tensor, load(models / "base")[name]) for name, tensor in load(models / "un").items())
    switch(models / "some", adapters, adapters[0], models / "switched", **patterns)
    loratools.merge(models / "base", adapters[0], models / "direct", **patterns)
    switched, direct = load(models / "switched"), load(models / "direct")
    assert all(same_bytes(switched[name], direct[name]) for name in direct)
    loratools.combine(adapters, models / "sum", weights=[0.5, -2], **patterns)
    assert set(dialects.open_adapter(models / "sum").updates) == counts
    assert {module.module for module in loratools.compare(*adapters, **patterns).modules} == counts
    assert {module.module for module in loratools.spectrum(adapters[0], **patterns).modules} == counts
    described = loratools.inspect(adapters[0], **patterns)
    assert {module.module for module in described.modules} == counts  # type: ignore[union-attr]
    held = loratools.certify(models / "all", models / "base", adapters[0], **patterns)
    assert {layer.module for layer in held.layers} == counts


def test_alpha_and_dialect_reach_every_verb(without_alpha: Path, models: Path) -> None:
    stated = {"dialect": "loralib", "alpha": 6.0}
    made = loratools.convert(without_alpha, models / "made", **stated)
    assert made.modules == len(SHAPES)
    scaling = {group.scaling for group in loratools.inspect(models / "made").groups}  # type: ignore[union-attr]
    assert len(scaling) == 1
    with pytest.raises(LoraToolsError, match="alpha"):
        loratools.merge(models / "base", without_alpha, models / "refused")
    loratools.merge(models / "base", without_alpha, models / "bare", **stated)
    loratools.merge(models / "base", models / "made", models / "told")
    bare, told = load(models / "bare"), load(models / "told")
    assert all(same_bytes(bare[name], told[name]) for name in told)
    assert loratools.verify(models / "bare", models / "base", without_alpha, **stated).ok
    loratools.unmerge(models / "bare", without_alpha, models / "unmerged", **stated)
    loratools.switch(models / "bare", without_alpha, without_alpha, models / "switched", **stated)
    assert loratools.compare(without_alpha, without_alpha, **stated).cosine == pytest.approx(1)
    (first, *_) = loratools.spectrum(without_alpha, **stated).modules
    assert first.norm == pytest.approx(loratools.spectrum(models / "made").modules[0].norm)
    for verb in (loratools.combine, lambda *args, **options: loratools.resize(*args, 2, **options)):
        verb(without_alpha, models / "written", force=True, **stated)
        norm = loratools.spectrum(models / "written").norm
        assert norm == pytest.approx(loratools.spectrum(models / "made").norm, rel=0.7)
    assert loratools.hash(without_alpha, "schema", **stated).schema
    assert loratools.certify(models / "told", models / "base", without_alpha, **stated).total.captured > 0.99


def test_the_kind_of_a_model_reaches_every_verb_with_a_base(models: Path) -> None:
    """A square weight of a GPT-2 lies (in, out): only its kind tells, and config.json is silent."""
    shapes = {"transformer.h.0.attn.c_proj": (16, 16)}
    folder = models / "gpt"
    save(folder, weights_of(shapes, torch.float32), [lora(shapes, seed=1)])
    (folder / "base" / "config.json").write_text("{}")
    base, adapter = folder / "base", folder / "adapter0"
    typed = {"model_type": "gpt2"}
    loratools.merge(base, adapter, folder / "merged", **typed)
    before, after = load(base), load(folder / "merged")
    update = dialects.open_adapter(adapter).updates["transformer.h.0.attn.c_proj"]
    A, B = (update.parts[f"lora_{side}.weight"].load().double() for side in "AB")
    delta = update.scaling * B @ A
    (name,) = before
    assert torch.allclose(after[name].double() - before[name].double(), delta.T, atol=1e-6)
    (folder / "merged" / "loratools.json").unlink()
    assert loratools.verify(folder / "merged", base, adapter, **typed).ok
    loratools.unmerge(folder / "merged", adapter, folder / "unmerged", **typed)
    assert torch.allclose(load(folder / "unmerged")[name], before[name], atol=1e-6)
    loratools.switch(folder / "merged", adapter, adapter, folder / "switched", **typed)
    assert torch.allclose(load(folder / "switched")[name], after[name], atol=1e-5)
    assert loratools.certify(folder / "merged", base, adapter, **typed).total.captured > 0.99
    assert loratools.spectrum(adapter, base=base, **typed).norm == pytest.approx(float(delta.norm()))
    assert loratools.compare(adapter, adapter, base, **typed).cosine == pytest.approx(1)
    loratools.convert(adapter, folder / "sealed", base=base, **typed)
    for call in (
        lambda: loratools.compare(adapter, adapter, **typed),
        lambda: loratools.spectrum(adapter, **typed),
        lambda: loratools.convert(adapter, folder / "x", **typed),
    ):
        with pytest.raises(InvalidOption, match="there is none"):
            call()


@pytest.mark.parametrize(
    ("weight", "include", "exclude", "words"),
    [
        (1.0, None, None, 1.0),
        (0.1, ["q"], None, "0,q=0.10000000000000001"),
        ("0.5", None, ["q", "*.0.*"], "0.5,q=0,*.0.*=0"),
        ("q=0.5,2", None, ["k"], "k=0,q=0.5,2"),
    ],
)
def test_a_choice_is_a_weight(weight: Any, include: Any, exclude: Any, words: Any) -> None:
    assert chosen(weight, include, exclude) == words


@pytest.mark.parametrize(
    ("weight", "include", "exclude", "told"),
    [
        ("q=0.5", ["k"], None, "says itself which modules count"),
        ("lbw:1,0", None, ["k"], "says itself which modules count"),
        (1.0, ["re:a{1,2}"], None, "has no comma"),
        (1.0, 3, None, "include is 3"),
        (1.0, None, [""], "exclude is"),
    ],
)
def test_a_choice_that_cannot_be(weight: Any, include: Any, exclude: Any, told: str) -> None:
    with pytest.raises(InvalidOption) as refusal:
        chosen(weight, include, exclude)
    assert told in " ".join([refusal.value.message, *refusal.value.problems])


def test_weights_without_patterns_stay_as_they_are() -> None:
    given: list[Any] = [None, 0.5, [1.0, 2.0], "q=1"]
    assert [chosen_weights(2, weights, None, None) for weights in given] == given
    assert chosen_weights(2, None, "q", None) == ["0,q=1", "0,q=1"]


def test_patterns_that_leave_nothing_or_name_nothing(models: Path) -> None:
    adapter = dialects.open_adapter(models / "adapter0")
    with pytest.raises(LoraToolsError, match="leave nothing"):
        kept(adapter, None, "*")
    with pytest.raises(LoraToolsError) as refusal:
        kept(adapter, ["c"], ["d"])
    assert len(refusal.value.problems) == 2
    assert kept(adapter, None, None) is adapter
    assert set(kept(adapter, "a", "layers.0.a").updates) == {"layers.1.a"}


def test_an_open_adapter_takes_no_dialect(models: Path) -> None:
    adapter = dialects.open_adapter(models / "adapter0")
    with pytest.raises(InvalidOption, match="dialect: for files only"):
        loratools.merge(models / "base", adapter, models / "x", dialect="peft")
    with pytest.raises(UnknownKind):
        read_as("nowhere", "morse", None)
    with pytest.raises(InvalidOption, match="finite number"):
        read_as("nowhere", None, float("nan"))
    (told,) = read_as(models / "adapter0", "peft", 3.0)
    assert str(told) == str(models / "adapter0")
    assert dialects.open_adapter(told).dialect == "peft"


def test_a_model_keeps_what_it_says_unless_it_is_told(models: Path) -> None:
    config = models / "base" / "config.json"
    config.write_text(json.dumps({"model_type": "llama"}))
    assert typed_model(models / "base", None).config["model_type"] == "llama"
    assert typed_model(open_model(models / "base"), "gpt2").config["model_type"] == "gpt2"
