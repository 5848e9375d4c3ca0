"""Every tensor of a fine-tune is in one class, and what was taken comes back: by `merge`, and in PEFT itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loratools.adapter.naming.selection import Selection
from loratools.dialects import open_adapter
from loratools.errors import IncompatibleAdapter, InvalidFormat
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Energy, Fixed
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.convert import convert
from loratools.surgery.extract import Extraction, extract, plan
from tests.surgery.finetunes import H, V, llama, moved, optimum, pair, restored
from tests.surgery.models import load, random, save_base

RANK = Ranks(Fixed(3))
LINEAR = ("q_proj.weight", "up_proj.weight", "down_proj.weight")


def classes(found: Extraction) -> dict[str, str]:
    """Return fine-tune's name -> class, and check that each is there once."""
    names = [one.pair.name for one in found.outcomes]
    assert len(names) == len(set(names))
    return {one.pair.name: one.outcome for one in found.outcomes}


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Assert equality of names and, within the rounding of float32 factors, of numbers."""
    assert found.keys() == wanted.keys()
    for name, W in wanted.items():
        assert found[name].shape == W.shape, name
        torch.testing.assert_close(found[name], W, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def round_trip(
    folder: Path, base: dict[str, Tensor], tuned: dict[str, Tensor], *, selection: Selection | None = None,
    tied: str = "error", ranks: Ranks = RANK, **config: object,
) -> tuple[Extraction, dict[str, Tensor]]:  # fmt: skip
    """Extract, merge, and return what was extracted and the merged tensors."""
    before, after = pair(folder, base, tuned, **config)  # type: ignore[arg-type]
    found = extract(before, after, folder / "out", ranks, selection=selection)
    return found, restored(before, folder / "out", folder / "merged", tied=tied)


def test_norms_and_biases_come_back(tmp_path: Path) -> None:
    base = llama(bias=True)
    tuned = moved(base, *LINEAR, "norm.weight", "q_proj.bias", "layernorm.weight", "lm_head.weight")
    found, merged = round_trip(tmp_path, base, tuned)
    assert_same(merged, tuned)
    assert classes(found) == {
        name: "unchanged" if "embed" in name else "whole" if "norm" in name or "bias" in name else "factored"
        for name in tuned
    }
    for name in tuned:
        if "norm" in name or "bias" in name:
            assert torch.equal(merged[name], tuned[name])


def test_a_bias_whose_weight_did_not_change_comes_alone(tmp_path: Path) -> None:
    base = llama(bias=True)
    found, merged = round_trip(tmp_path, base, moved(base, "q_proj.bias", "up_proj.weight"))
    assert_same(merged, moved(base, "q_proj.bias", "up_proj.weight"))
    assert [name for name, kind in classes(found).items() if kind == "whole"] == [
        "model.layers.0.self_attn.q_proj.bias"
    ]
    assert found.nbytes < 4 * (3 * (24 + 36) + 24) + 1


def test_a_module_saved_whole_brings_its_other_parameters(tmp_path: Path) -> None:
    base = {"ln.weight": torch.ones(8), "ln.bias": torch.zeros(8), "fc.weight": random(8, 8)}
    found, merged = round_trip(tmp_path, base, moved(base, "ln.bias", "fc.weight"))
    assert classes(found) == {"ln.weight": "whole", "ln.bias": "whole", "fc.weight": "factored"}
    assert [one.why for one in found.outcomes if one.pair.name == "ln.weight"] == ["comes with its module"]
    assert_same(merged, moved(base, "ln.bias", "fc.weight"))


def test_nothing_to_factor_is_no_adapter(tmp_path: Path) -> None:
    base = llama()
    with pytest.raises(IncompatibleAdapter, match=r"differs .* in 1 tensor.* none of them can be factored"):
        extract(*pair(tmp_path, base, moved(base, "model.norm.weight")), tmp_path / "out", RANK)


def test_tied_embedding_stays_tied(tmp_path: Path) -> None:
    base = llama(tied=True)
    tuned = moved(base, "embed_tokens.weight", *LINEAR)
    found, merged = round_trip(tmp_path, base, tuned, tie_word_embeddings=True)
    assert_same(merged, tuned)
    assert torch.equal(merged["model.embed_tokens.weight"], tuned["model.embed_tokens.weight"])
    saved = load(tmp_path / "out")
    head = saved["base_model.model.lm_head.weight"]  # PEFT wants it under both names
    assert torch.equal(head, saved["base_model.model.model.embed_tokens.weight"])
    assert classes(found)["model.embed_tokens.weight"] == "whole"


def test_a_stored_copy_of_a_tied_head_does_not_count(tmp_path: Path) -> None:
    base = llama(tied=True)
    tuned = moved(base, "up_proj.weight") | {"lm_head.weight": base["model.embed_tokens.weight"].clone()}
    found, merged = round_trip(tmp_path, base, tuned, tie_word_embeddings=True)
    assert classes(found)["lm_head.weight"] == "unchanged"
    assert_same(merged, moved(base, "up_proj.weight"))
    assert any("lm_head.weight is stored" in note for note in found.notes)


def test_a_head_that_the_fine_tune_untied_is_factored_against_the_embedding(tmp_path: Path) -> None:
    base = llama(tied=True)
    embedding = base["model.embed_tokens.weight"]
    tuned = moved(base, "up_proj.weight")
    tuned["lm_head.weight"] = embedding + random(V, 2, seed=1) @ random(2, H, seed=2)
    before = save_base(tmp_path / "base", base, model_type="llama", tie_word_embeddings=True)
    after = save_base(tmp_path / "tuned", tuned, model_type="llama", tie_word_embeddings=False)
    found = extract(before, after, tmp_path / "out", RANK)
    assert classes(found)["lm_head.weight"] == "factored"
    assert_same(restored(before, tmp_path / "out", tmp_path / "merged", tied="untie"), tuned)


def test_a_head_that_the_fine_tune_tied_is_compared_with_its_embedding(tmp_path: Path) -> None:
    base, tuned = llama(), moved(llama(tied=True), "up_proj.weight")
    tuned["model.embed_tokens.weight"] = base["lm_head.weight"] + random(V, 2, seed=1) @ random(2, H, seed=2)
    before = save_base(tmp_path / "base", base, model_type="llama", tie_word_embeddings=False)
    after = save_base(tmp_path / "tuned", tuned, model_type="llama", tie_word_embeddings=True)
    found = extract(before, after, tmp_path / "out", RANK)
    merged = restored(before, tmp_path / "out", tmp_path / "merged")
    assert_same(merged, tuned | {"lm_head.weight": tuned["model.embed_tokens.weight"]})
    assert {one.pair.path: one.outcome for one in found.outcomes}["lm_head"] == "factored"


@pytest.mark.parametrize("rows", [V + 6, V - 6], ids=["grown", "shrunk"])
def test_another_vocabulary_is_saved_whole(tmp_path: Path, rows: int) -> None:
    base = llama()
    tuned = moved(base, *LINEAR)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tuned[name] = torch.cat([base[name], random(6, H, seed=8)])[:rows].clone()
    before, after = pair(tmp_path, base, tuned, vocab_size=rows)
    found = extract(before, after, tmp_path / "out", RANK)
    assert {name for name, kind in classes(found).items() if kind == "whole"} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    assert all("its shape was [40, 24]" in one.why for one in found.of("whole"))
    merged = restored(before, tmp_path / "out", tmp_path / "merged")
    assert_same(merged, tuned)
    assert Checkpoint.open(tmp_path / "merged").config["vocab_size"] == rows


def test_a_missing_tensor_is_named_and_stays_the_base_s(tmp_path: Path) -> None:
    base = llama()
    tuned = moved(base, *LINEAR)
    del tuned["model.norm.weight"], tuned["model.layers.0.mlp.down_proj.weight"]
    found, merged = round_trip(tmp_path, base, tuned)
    assert found.missing == ("model.layers.0.mlp.down_proj.weight", "model.norm.weight")
    assert_same(merged, base | tuned)


def test_a_new_head_is_added(tmp_path: Path) -> None:
    base = llama(tied=True)
    tuned = moved(base, *LINEAR) | {"score.weight": random(3, H, seed=4)}
    before = save_base(tmp_path / "base", base, model_type="llama", architectures=["LlamaModel"])
    named = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3}
    after = save_base(tmp_path / "tuned", tuned, model_type="llama", **named)
    found = extract(before, after, tmp_path / "out", RANK)
    assert classes(found)["score.weight"] == "whole"
    assert_same(restored(before, tmp_path / "out", tmp_path / "merged"), tuned)
    assert Checkpoint.open(tmp_path / "merged").config["architectures"] == named["architectures"]


@pytest.mark.parametrize(("old", "new"), [("model.", ""), ("", "model."), ("model.", "model.language_model.")])
def test_a_renamed_prefix_is_seen_through(tmp_path: Path, old: str, new: str) -> None:
    plain = {name.removeprefix("model."): W for name, W in llama(tied=True).items()}
    base = {old + name: W for name, W in plain.items()}
    tuned = moved(base, *LINEAR, "norm.weight")
    before, after = pair(tmp_path, base, {new + name.removeprefix(old): W for name, W in tuned.items()})
    found = extract(before, after, tmp_path / "out", RANK)
    assert found.missing == ()
    assert_same(restored(before, tmp_path / "out", tmp_path / "merged"), tuned)


def test_conv1d_is_turned(tmp_path: Path) -> None:
    base = {"h.0.attn.c_attn.weight": random(8, 24, seed=1), "h.0.attn.c_attn.bias": random(24, seed=2)}
    base |= {"h.0.attn.c_proj.weight": random(8, 8, seed=3)}  # square: only the config tells that it is [in, out]
    tuned = moved(base, "weight", "bias")
    found, merged = round_trip(tmp_path, base, tuned, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    assert_same(merged, tuned)
    assert load(tmp_path / "out")["base_model.model.h.0.attn.c_attn.lora_A.weight"].shape == (3, 8)
    assert {one.shape: one.layer.shape for one in found.of("factored") if one.layer}[8, 24] == (24, 8)


@pytest.mark.parametrize("sides", [(3,), (3, 3), (1, 1), (2, 3, 2)])
def test_convolutions_of_one_to_three_sides(tmp_path: Path, sides: tuple[int, ...]) -> None:
    base = {"conv_in.weight": random(16, 8, *sides, seed=1), "conv_in.bias": random(16, seed=2)}
    tuned = moved(base, "weight", "bias")
    found, merged = round_trip(tmp_path, base, tuned, model_type="unet")
    assert_same(merged, tuned)
    assert classes(found) == {"conv_in.weight": "factored", "conv_in.bias": "whole"}


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_factored_on_request(tmp_path: Path, tied: bool) -> None:
    base = llama(tied=tied)
    tuned = moved(base, "embed_tokens.weight", *LINEAR)
    selection = Selection(kinds=frozenset({"linear", "embedding"}))
    found, merged = round_trip(
        tmp_path, base, tuned, selection=selection, tied="both" if tied else "error", tie_word_embeddings=tied
    )
    assert classes(found)["model.embed_tokens.weight"] == "factored"
    assert_same(merged, tuned)


def test_what_was_left_out_is_counted(tmp_path: Path) -> None:
    base = llama()
    tuned = moved(base, *LINEAR, "norm.weight", "lm_head.weight")
    energy = {name: float((tuned[name].double() - base[name].double()).square().sum()) for name in base}
    found, merged = round_trip(
        tmp_path, base, tuned, selection=Selection(exclude=("mlp.*",), save=("lm_head",), drop_whole=False)
    )
    lost = sum(energy[name] for name in base if "mlp" in name)
    assert found.dropped == pytest.approx((lost / sum(energy.values())) ** 0.5, rel=1e-6)
    missed = sum(float((tuned[name].double() - merged[name].double()).square().sum()) for name in base)
    assert found.error == pytest.approx((missed / sum(energy.values())) ** 0.5, rel=1e-6)
    stated = open_adapter(Path(found.output)).provenance[-1].parameters
    assert (stated["error"], stated["dropped"]) == pytest.approx((found.error, found.dropped), rel=1e-5)
    assert classes(found)["lm_head.weight"] == "whole"
    assert_same(merged, {name: base[name] if "mlp" in name else W for name, W in tuned.items()})


def test_only_factors_where_servers_take_nothing_else(tmp_path: Path) -> None:
    base = llama(bias=True)
    tuned = moved(base, *LINEAR, "norm.weight", "embed_tokens.weight", "bias")
    selection = Selection(include=("layers.*",), drop_whole=True)
    found, merged = round_trip(tmp_path, base, tuned, selection=selection)
    assert sorted(classes(found).values()) == ["dropped"] * 4 + ["factored"] * 3 + ["unchanged"]
    assert_same(merged, {name: W if name.endswith(LINEAR) else base[name] for name, W in tuned.items()})


def test_plan_is_made_from_headers_alone(tmp_path: Path) -> None:
    before, after = pair(tmp_path, llama(), moved(llama(), *LINEAR))
    for folder in (before, after):
        file = folder / "model.safetensors"
        raw = file.read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        file.write_bytes(raw[:begin] + b"\xff" * (len(raw) - begin))  # every number is NaN
    pairing = plan(before, after, Selection(exclude=("q_proj",)))
    assert {one.path: one.plan for one in pairing.pairs} == {
        "model.layers.0.self_attn.q_proj.weight": "drop",
        "model.layers.0.mlp.up_proj": "factor",
        "model.layers.0.mlp.down_proj": "factor",
        "lm_head": "factor",
        "model.embed_tokens.weight": "whole",
        "model.layers.0.input_layernorm.weight": "whole",
        "model.norm.weight": "whole",
    }


def test_the_fine_tune_s_tokenizer_comes_along_where_it_differs(tmp_path: Path) -> None:
    before, after = pair(tmp_path, llama(), moved(llama(), *LINEAR))
    for name, old, new in (("tokenizer.json", "{}", '{"added": 1}'), ("vocab.json", "{}", "{}")):
        (before / name).write_text(old)
        (after / name).write_text(new)
    extract(before, after, tmp_path / "out", RANK)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"added": 1}'
    assert not (tmp_path / "out" / "vocab.json").exists()
    assert not (tmp_path / "out" / "config.json").exists()


def test_float64_keeps_what_float32_would_lose(tmp_path: Path) -> None:
    base = {"a.weight": random(16, 12, dtype=torch.float64)}
    delta = 1e-12 * random(16, 2, seed=3, dtype=torch.float64) @ random(2, 12, seed=4, dtype=torch.float64)
    found = extract(*pair(tmp_path, base, {"a.weight": base["a.weight"] + delta}), tmp_path / "out", Ranks(Fixed(2)))
    assert found.total.error < 1e-3  # W + ΔW itself keeps four digits of ΔW
    assert found.total.delta_norm == pytest.approx(float(delta.norm()), rel=1e-3)


@pytest.mark.parametrize(("model_type", "turned"), [("mixtral", False), ("gpt_oss", True)])
def test_stacked_experts(tmp_path: Path, model_type: str, turned: bool) -> None:
    shapes = {"gate_up_proj": (3, 20, 8), "down_proj": (3, 8, 10)}
    stored = {name: (e, inner, out) if turned else (e, out, inner) for name, (e, out, inner) in shapes.items()}
    base = {f"model.layers.0.mlp.experts.{name}": random(*shape, seed=1) for name, shape in stored.items()}
    tuned = {name: W.clone() for name, W in base.items()}
    for W in tuned.values():
        for e, rank in ((0, 2), (2, 1)):  # the second expert did not change
            W[e] += random(W.shape[1], rank, seed=e + 5) @ random(rank, W.shape[2], seed=e + 9)
    found, merged = round_trip(tmp_path, base, tuned, model_type=model_type)
    assert_same(merged, tuned)
    assert {one.pair.path.rpartition(".")[2]: one.layer.shape for one in found.of("factored") if one.layer} == shapes
    assert found.total.parameters == 3 * 2 * (20 + 8) + 3 * 2 * (8 + 10)  # rank 2 is all there is
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert len(config["target_parameters"]) == 2


@pytest.mark.parametrize("ranks", [Ranks(Fixed(2)), Ranks(Energy(0.8)), Ranks(budget=3 * 2 * 60)])
def test_certificate_of_a_stack_is_that_of_its_experts_together(tmp_path: Path, ranks: Ranks) -> None:
    base = {"mlp.experts.down_proj": random(3, 40, 20, seed=1)}
    D = torch.stack([random(40, 20, seed=e) * torch.arange(1, 21) ** -(0.5 + e) for e in range(3)]).double()
    tuned = {name: (W.double() + D).float() for name, W in base.items()}
    D = tuned["mlp.experts.down_proj"].double() - base["mlp.experts.down_proj"].double()
    found, merged = round_trip(tmp_path, base, tuned, ranks=ranks, model_type="mixtral")
    (one,) = found.of("factored")
    assert one.layer is not None
    error = float((tuned["mlp.experts.down_proj"].double() - merged["mlp.experts.down_proj"].double()).norm())
    assert one.layer.error == pytest.approx(error / float(D.norm()), rel=1e-4)
    assert error <= 1.0005 * sum(optimum(D[e], one.rank) ** 2 for e in range(3)) ** 0.5
    if ranks.rule == Energy(0.8):
        share = [torch.linalg.svdvals(D[e]).square().cumsum(0) / D[e].square().sum() for e in range(3)]
        assert one.rank == max(int((part < 0.8).sum()) + 1 for part in share)
    if ranks.budget:
        assert one.rank == 2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_few_changed_tokens_are_saved_as_rows(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    base = llama(dtype, tied=tied)
    tuned = moved(base, "up_proj.weight")
    rows = [3, 17, 39]
    tuned["model.embed_tokens.weight"] = base["model.embed_tokens.weight"].clone()
    tuned["model.embed_tokens.weight"][rows] = random(3, H, seed=9, scale=0.5, dtype=dtype)
    found, merged = round_trip(
        tmp_path, base, tuned, ranks=Ranks(Fixed(2)), tied="both" if tied else "error", tie_word_embeddings=tied
    )
    (one,) = found.of("rows")
    assert (one.pair.name, one.rows, one.rank) == ("model.embed_tokens.weight", 3, 3)
    torch.testing.assert_close(
        merged["model.embed_tokens.weight"], tuned["model.embed_tokens.weight"], rtol=0, atol=2.4e-7
    )
    assert found.total.layers == 1


def test_many_changed_tokens_are_saved_whole(tmp_path: Path) -> None:
    base = llama()
    tuned = moved(base, "up_proj.weight")
    tuned["model.embed_tokens.weight"] = base["model.embed_tokens.weight"].clone()
    tuned["model.embed_tokens.weight"][:20] += 1
    found, _ = round_trip(tmp_path, base, tuned)
    assert [(one.outcome, one.rows) for one in found.outcomes if "embed" in one.pair.name] == [("whole", 20)]


@pytest.mark.parametrize("names", [("c_attn", "c_proj", "c_fc", "c_fc2"), ("qkv", "out", "up", "down")])
def test_a_model_of_remote_code_built_of_conv1d(names: tuple[str, ...], tmp_path: Path) -> None:
    """Biases tell that JAIS and its like store [in, out]: the factors are those of the module's own ΔW (out, in)."""
    shapes = dict(zip(names, ((H, 3 * H), (H, H), (H, 4 * H), (4 * H, H)), strict=True))
    base = {f"h.0.{name}.weight": random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    base |= {f"h.0.{name}.bias": random(shape[1], seed=9) for name, shape in shapes.items()}
    base |= {"wte.weight": random(20, H, seed=20), "lm_head.weight": random(20, H, seed=21)}
    deltas = {name: random(shape[0], 2, seed=30) @ random(2, shape[1], seed=31) for name, shape in shapes.items()}
    tuned = {name: W.clone() for name, W in base.items()}
    for name, D in deltas.items():
        tuned[f"h.0.{name}.weight"] += D
    models = pair(tmp_path, base, tuned, model_type="unheard_of")
    extract(*models, tmp_path / "adapter", Ranks(Fixed(2)))
    for name, update in open_adapter(tmp_path / "adapter").updates.items():
        D = tuned[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        found = update.delta_weight().double()
        assert found.shape == D.T.shape
        assert float((found - D.T).norm()) < 1e-5 * float(D.norm())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    merged = restored(models[0], tmp_path / "adapter", tmp_path / "merged")
    assert all(torch.allclose(merged[name], tuned[name], atol=1e-5) for name in tuned)
    convert(tmp_path / "adapter", tmp_path / "peft", to="peft", allow_loss=True)
    again = restored(models[0], tmp_path / "peft", tmp_path / "by-peft")
    assert all(torch.allclose(again[name], tuned[name], atol=1e-5) for name in tuned)


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_refusal_of_the_format_names_the_output_and_no_scratch_folder(name: str, tmp_path: Path) -> None:
    far = f"model.layers.0.{'q' * 600}.weight"
    base, tuned = (save_base(tmp_path / side, {far: random(8, 8, seed=i)}) for i, side in enumerate(("base", "tuned")))
    with pytest.raises(InvalidFormat, match="the limit is 512") as caught:
        extract(base, tuned, tmp_path / name, 2)
    assert str(caught.value).startswith(f"{tmp_path / name}: not a valid adapter")
    assert "partial" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_a_parameter_of_no_module_can_be_left_out_as_is_said(tmp_path: Path) -> None:
    base, tuned = (
        save_base(tmp_path / side, {"h.0.q.weight": random(8, 8, seed=i), "logit_scale": torch.tensor(float(i))})
        for i, side in enumerate(("base", "tuned"))
    )
    with pytest.raises(InvalidFormat) as caught:
        extract(base, tuned, tmp_path / "out", 2)
    assert caught.value.hint == "PEFT saves modules, and logit_scale is a parameter of none: leave it out (--exclude)."
    found = extract(base, tuned, tmp_path / "out", 2, selection=Selection(exclude=("logit_scale",)))
    assert classes(found) == {"h.0.q.weight": "factored", "logit_scale": "dropped"}
