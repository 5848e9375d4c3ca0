"""One adapter out, another in: with the residual the result is the merge into the base, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.adapter.model import BaseIdentity
from loratools.decisions import warnings_to
from loratools.dialects import open_adapter
from loratools.errors import IncompatibleAdapter, InvalidOption, OutputRefused, WrongBase
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.companions import RECORD, RESIDUAL
from loratools.surgery.convert import convert
from loratools.surgery.merge import merge
from loratools.surgery.switch import switch
from loratools.surgery.unmerge import unmerge
from loratools.surgery.verify import verify
from tests.surgery.models import DTYPES, load, lora, random, same_bytes, save_adapter, save_base

SHAPES = {"a.up": (96, 128), "a.down": (128, 96), "b.up": (96, 128)}


def prepare(folder: Path, dtype: str = "BF16", shards: int = 2) -> tuple[Path, Path, Path]:
    weights = {
        f"{name}.weight": random(*shape, seed=i, scale=0.05, dtype=DTYPES[dtype])
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    base = save_base(folder / "base", weights | {"norm.weight": random(96)}, shards, model_type="llama")
    old = save_adapter(
        folder / "old", lora({name: SHAPES[name] for name in ("a.up", "a.down")}, rank=8, seed=1, scale=0.2)
    )
    new = save_adapter(folder / "new", lora({name: SHAPES[name] for name in ("a.down", "b.up")}, rank=4, seed=9))
    return base, old, new


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_with_a_residual_it_is_the_merge_into_the_base(dtype: str, tmp_path: Path) -> None:
    base, old, new = prepare(tmp_path, dtype)
    merge(base, [old], tmp_path / "merged", keep_residual=True)
    found = switch(tmp_path / "merged", [old], [new], tmp_path / "switched", weights=[0.6])
    merge(base, [new], tmp_path / "wanted", weights=[0.6])
    assert (found.exact, found.changed, found.error_bound) == (True, 3, 0.0)
    for file in sorted((tmp_path / "wanted").glob("*.safetensors")):
        assert (tmp_path / "switched" / file.name).read_bytes() == file.read_bytes()
    record, wanted = (json.loads((tmp_path / name / RECORD).read_text()) for name in ("switched", "wanted"))
    assert record["adapters"] == wanted["adapters"]
    assert record["base"]["tensors"] == wanted["base"]["tensors"]
    merge(base, [new], tmp_path / "kept", weights=[0.6], keep_residual=True)
    assert (tmp_path / "switched" / RESIDUAL).read_bytes() == (tmp_path / "kept" / RESIDUAL).read_bytes()
    back = unmerge(tmp_path / "switched", [new], tmp_path / "back", base=base)
    assert back.proved == "root hash"


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_without_a_residual_it_is_within_its_bound(dtype: str, tmp_path: Path) -> None:
    base, old, new = prepare(tmp_path, dtype)
    merge(base, [old], tmp_path / "merged")
    found = switch(tmp_path / "merged", [old], [new], tmp_path / "switched")
    merge(base, [new], tmp_path / "wanted", dtype="F64")
    wanted, got = load(tmp_path / "wanted"), load(tmp_path / "switched")
    worst = max(float((wanted[name] - got[name].double()).abs().max()) for name in wanted)
    assert not found.exact
    assert found.error_bound / (400 if dtype == "F32" else 40) < worst <= found.error_bound
    assert same_bytes(got["norm.weight"], load(base)["norm.weight"])


def test_what_is_not_the_recorded_merge_is_refused(tmp_path: Path) -> None:
    base, old, new = prepare(tmp_path, shards=1)
    merge(base, [old], tmp_path / "merged", keep_residual=True)
    with pytest.raises(IncompatibleAdapter, match="does not list"):
        switch(tmp_path / "merged", [new], [old], tmp_path / "out")
    spec = Checkpoint.open(tmp_path / "merged").specs["a.down.weight"]
    with spec.file.open("r+b") as file:
        file.seek(spec.start)
        byte = file.read(1)[0]
        file.seek(spec.start)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(WrongBase, match=r"a\.down\.weight was not restored"):
        switch(tmp_path / "merged", [old], [new], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_that_changed_the_layout_takes_two_steps(tmp_path: Path) -> None:
    weights = {"model.embed_tokens.weight": random(64, 32, dtype=torch.bfloat16), "model.q.weight": random(32, 32)}
    base = save_base(tmp_path / "base", weights, model_type="llama", tie_word_embeddings=True)
    head = save_adapter(tmp_path / "head", lora({"lm_head": (64, 32)}))
    new = save_adapter(tmp_path / "new", lora({"model.q": (32, 32)}))
    merge(base, [head], tmp_path / "merged", tied="untie", keep_residual=True)
    with pytest.raises(IncompatibleAdapter, match="one pass does not do"):
        switch(tmp_path / "merged", [head], [new], tmp_path / "out")


UNTIED: dict[str, Any] = {"model_type": "llama", "vocab_size": 9, "tie_word_embeddings": False}
WAYS = pytest.mark.parametrize("exact", [True, False], ids=["exact", "approximate"])


def heard(call: Callable[..., Any], *inputs: Any, **options: Any) -> tuple[Any, list[str]]:
    """Return what a call returns, and the warnings that it gives."""
    warnings: list[str] = []
    with warnings_to(warnings.append):
        return call(*inputs, **options), warnings


def add_tensors(adapter: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> Path:
    """Put more tensors into an adapter, under PEFT's prefix, and fields into its config."""
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    more = {f"base_model.model.{name}": W for name, W in tensors.items()}
    save_file(load_file(file) | more, file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return adapter


@WAYS
def test_another_base_is_found_out(exact: bool, tmp_path: Path) -> None:
    """Also in tensors that are not the base's any more: by what the merge recorded of them."""
    base, old, _ = prepare(tmp_path)
    weights = load(base)
    for name in ("a.down", "b.up"):  # the first is changed by `old`, the second is not
        other = save_base(tmp_path / f"without-{name}", weights | {f"{name}.weight": random(*SHAPES[name], seed=77)})
        adapter = save_adapter(tmp_path / f"into-{name}", lora({name: SHAPES[name]}, seed=5))
        convert(adapter, tmp_path / f"wrong-{name}", base=other)
        convert(adapter, tmp_path / f"right-{name}", base=base)
    merge(base, [old], tmp_path / "merged", keep_residual=exact)
    for name in ("a.down", "b.up"):
        wrong, right = tmp_path / f"wrong-{name}", tmp_path / f"right-{name}"
        with pytest.raises(WrongBase, match=r"recorded|sealed"):
            switch(tmp_path / "merged", old, wrong, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        report, warnings = heard(switch, tmp_path / "merged", old, wrong, tmp_path / f"w-{name}", check_base="warn")
        assert any(f"{name}.weight" in text for text in [*report.warnings, *report.notes])
        report, warnings = heard(switch, tmp_path / "merged", old, right, tmp_path / f"r-{name}")
        assert (report.exact, report.warnings) == (exact, ())
        assert warnings == []
        report = switch(tmp_path / "merged", old, right, tmp_path / f"o-{name}", check_base="off")
        assert "adapter 1: base model not checked (--check-base off)" in report.notes


@WAYS
def test_a_base_that_only_its_schema_tells(exact: bool, tmp_path: Path) -> None:
    base, old, new = prepare(tmp_path)
    other = save_base(tmp_path / "other", load(base) | {"more.weight": random(3)})
    right, wrong = (
        replace(open_adapter(new), base=BaseIdentity(schema=Checkpoint.open(model).schema())) for model in (base, other)
    )
    merge(base, [old], tmp_path / "merged", keep_residual=exact)
    assert switch(tmp_path / "merged", old, right, tmp_path / "out").exact == exact
    with pytest.raises(WrongBase, match="not the base model that was recorded"):
        switch(tmp_path / "merged", old, wrong, tmp_path / "no")
    if not exact:  # the schema below is not that of a merge which cast
        merge(base, [old], tmp_path / "cast", dtype="F32")
        switch(tmp_path / "cast", old, right, tmp_path / "cast-out")
        with pytest.raises(WrongBase, match="not the base model that was recorded"):
            switch(tmp_path / "cast", old, wrong, tmp_path / "no")


def test_without_a_record_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    base, old, new = prepare(tmp_path)
    convert(new, tmp_path / "sealed", base=base)
    merge(base, [old], tmp_path / "merged")
    (tmp_path / "merged" / RECORD).unlink()
    report = switch(tmp_path / "merged", old, tmp_path / "sealed", tmp_path / "out")
    said = "no longer the base's: 1 tensor that it changes, such as a.down.weight"
    assert any(said in note for note in report.notes)
    assert any("no record of its merge" in note for note in report.notes)
    assert switch(tmp_path / "out", tmp_path / "sealed", old, tmp_path / "again").error_bound > report.error_bound


@WAYS
def test_copies_of_the_base_are_settled(exact: bool, tmp_path: Path) -> None:
    """PEFT saves embeddings along; those that are the base's own change nothing, others are another base's."""
    weights = {"model.embed_tokens.weight": random(9, 16), "model.q.weight": random(16, 16, dtype=torch.bfloat16)}
    base = save_base(tmp_path / "base", weights | {"lm_head.weight": random(9, 16)}, **UNTIED)
    embeds = save_adapter(tmp_path / "embeds", lora({"model.embed_tokens": (9, 16), "model.q": (16, 16)}))
    new = save_adapter(tmp_path / "new", lora({"model.q": (16, 16)}, seed=3))
    add_tensors(new, {"model.embed_tokens.base_layer.weight": weights["model.embed_tokens.weight"]})
    wrong = save_adapter(tmp_path / "wrong", lora({"model.q": (16, 16)}, seed=3))
    add_tensors(wrong, {"model.embed_tokens.base_layer.weight": random(9, 16, seed=8)})
    merge(base, [embeds], tmp_path / "merged", keep_residual=exact)
    assert switch(tmp_path / "merged", embeds, new, tmp_path / "out").exact == exact
    wanted = merge(base, [new], tmp_path / "wanted")
    assert wanted.changed == 1
    difference = load(tmp_path / "out")["model.embed_tokens.weight"] - weights["model.embed_tokens.weight"]
    assert float(difference.abs().max()) <= (0 if exact else 1e-5)
    with pytest.raises(WrongBase, match="not the base model that was copied into the adapter"):
        switch(tmp_path / "merged", embeds, wrong, tmp_path / "no")


@pytest.mark.parametrize("rows", [9, 12])
def test_a_tensor_trained_whole_takes_the_place_of_a_restored_one(rows: int, tmp_path: Path) -> None:
    """It lies where the base's was restored, or, with more rows, moves all that follows."""
    weights = {"model.embed_tokens.weight": random(9, 16, dtype=torch.bfloat16)}
    weights |= {f"model.{name}.weight": random(16, 16, seed=i, dtype=torch.bfloat16) for i, name in enumerate("qkv")}
    base = save_base(tmp_path / "base", weights | {"lm_head.weight": random(9, 16)}, **UNTIED)
    old = save_adapter(
        tmp_path / "old", lora({"model.embed_tokens": (9, 16), **{f"model.{n}": (16, 16) for n in "qkv"}})
    )
    new = save_adapter(tmp_path / "new", lora({"model.q": (16, 16), "model.v": (16, 16)}, seed=3))
    trained = random(rows, 16, seed=4, dtype=torch.bfloat16)
    whole = {"model.embed_tokens.modules_to_save.weight": trained, "lm_head.modules_to_save.weight": random(rows, 16)}
    add_tensors(new, whole, modules_to_save=["embed_tokens", "lm_head"])
    merge(base, [old], tmp_path / "merged", keep_residual=True)
    report = switch(tmp_path / "merged", old, new, tmp_path / "out")
    merge(base, [new], tmp_path / "wanted", keep_residual=True)
    for path in (tmp_path / "wanted").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert same_bytes(load(tmp_path / "out")["model.embed_tokens.weight"], trained)
    assert report.consumed[0].replaced == 2
    back = unmerge(tmp_path / "out", new, tmp_path / "back")
    assert back.proved == "root hash"
    assert same_bytes(load(tmp_path / "back")["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])


def test_what_stands_beside_a_replaced_tensor_is_not_subtracted(tmp_path: Path) -> None:
    """A copy with other rows took the base's place at the merge, which only the record tells afterwards."""
    weights = {"model.embed_tokens.weight": random(9, 16), "model.q.weight": random(16, 16)}
    base = save_base(tmp_path / "base", weights | {"lm_head.weight": random(9, 16)}, **UNTIED)
    old = save_adapter(tmp_path / "old", lora({"model.q": (16, 16)}))
    names = ("lm_head", "model.embed_tokens")
    add_tensors(old, {f"{name}.base_layer.weight": random(12, 16, seed=8) for name in names})
    merge(base, [old], tmp_path / "merged")
    with pytest.raises(IncompatibleAdapter, match="does not unmerge this model") as refusal:
        unmerge(tmp_path / "merged", old, tmp_path / "out")
    assert refusal.value.problems == tuple(
        f"{name}.weight: was replaced by the adapter's own at the merge" for name in names
    )
    whole = save_adapter(tmp_path / "whole", lora({"model.q": (16, 16)}))
    add_tensors(whole, {"lm_head.modules_to_save.weight": random(9, 16, seed=8)}, modules_to_save=["lm_head"])
    merge(base, [whole], tmp_path / "trained")
    for record in (True, False):
        if not record:
            (tmp_path / "trained" / RECORD).unlink()
        with pytest.raises(IncompatibleAdapter, match="does not unmerge this model"):
            unmerge(tmp_path / "trained", whole, tmp_path / "out")
    plain = save_adapter(tmp_path / "plain", lora({"model.q": (16, 16)}))
    merge(base, [plain], tmp_path / "added")
    with pytest.raises(IncompatibleAdapter, match="takes tensors as they are"):
        switch(tmp_path / "added", plain, whole, tmp_path / "out")


def test_the_option_tied_is_that_of_the_merge(tmp_path: Path) -> None:
    weights = {"model.embed_tokens.weight": random(64, 32, dtype=torch.bfloat16), "model.q.weight": random(32, 32)}
    base = save_base(tmp_path / "base", weights, model_type="llama", tie_word_embeddings=True)
    shapes = {"model.embed_tokens": (64, 32)}
    first, second = (save_adapter(tmp_path / name, lora(shapes, seed=len(name))) for name in ("a", "bb"))
    plain = save_adapter(tmp_path / "plain", lora({"model.q": (32, 32)}))
    merge(base, [first], tmp_path / "merged", tied="both", keep_residual=True)
    assert switch(tmp_path / "merged", first, second, tmp_path / "out").exact
    merge(base, [second], tmp_path / "wanted", tied="both", keep_residual=True)
    for path in (tmp_path / "wanted").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    with pytest.raises(IncompatibleAdapter, match="tie"):
        switch(tmp_path / "merged", first, second, tmp_path / "no", tied="error")
    merge(base, [plain], tmp_path / "untouched", keep_residual=True)
    with pytest.raises(IncompatibleAdapter, match="tie"):
        switch(tmp_path / "untouched", plain, second, tmp_path / "no")
    for source, out in (("untouched", plain), ("merged", first)):
        switch(tmp_path / source, out, second, tmp_path / f"untied-{source}", tied="untie")
        merge(base, [second], tmp_path / f"wanted-{source}", tied="untie", keep_residual=True)
        for path in (tmp_path / f"wanted-{source}").iterdir():
            assert (tmp_path / f"untied-{source}" / path.name).read_bytes() == path.read_bytes(), path.name


@WAYS
def test_an_adapter_is_not_put_in_twice(exact: bool, tmp_path: Path) -> None:
    base, old, new = prepare(tmp_path)
    merge(base, [old, new], tmp_path / "merged", keep_residual=exact)
    third = save_adapter(tmp_path / "third", lora({"b.up": SHAPES["b.up"]}, seed=4))
    if exact:  # all are taken out, so any may come in again, with another weight
        switch(tmp_path / "merged", [old, new], new, tmp_path / "out", weights=2)
    else:
        with pytest.raises(OutputRefused, match="apply it twice"):
            switch(tmp_path / "merged", old, new, tmp_path / "out")
        switch(tmp_path / "merged", old, third, tmp_path / "out")
        assert len(json.loads((tmp_path / "out" / RECORD).read_text())["adapters"]) == 2
        with pytest.raises(OutputRefused, match="apply it twice"):
            merge(tmp_path / "out", third, tmp_path / "no")
        unmerge(tmp_path / "out", [third, new], tmp_path / "back")
        with pytest.raises(IncompatibleAdapter, match="does not list"):
            unmerge(tmp_path / "back", new, tmp_path / "no")


@WAYS
def test_a_change_that_rounding_swallows_is_warned_of(exact: bool, tmp_path: Path) -> None:
    base, _, _ = prepare(tmp_path)
    small = save_adapter(tmp_path / "small", lora({"b.up": SHAPES["b.up"]}, scale=0.003))
    faint = save_adapter(tmp_path / "faint", lora({"b.up": SHAPES["b.up"]}, scale=0.003, seed=6))
    merge(base, [small], tmp_path / "merged", keep_residual=exact)
    report, warnings = heard(switch, tmp_path / "merged", small, faint, tmp_path / "out")
    assert any("of the change survives rounding" in text for text in warnings)
    assert report.retention < 0.9


@WAYS
def test_files_of_an_adapter_that_stay_are_said(exact: bool, tmp_path: Path) -> None:
    base, old, new = prepare(tmp_path)
    (base / "tokenizer.json").write_text("{}")
    (base / "model.ot").write_text("weights")
    (old / "tokenizer.json").write_text('{"added": 1}')
    (old / "chat_template.jinja").write_text("{{ messages }}")
    merge(base, [old], tmp_path / "merged", keep_residual=exact)
    assert json.loads((tmp_path / "merged" / RECORD).read_text())["brought"] == ["tokenizer.json", "chat template"]
    (tmp_path / "merged" / "model.ot").write_text("weights")
    report, warnings = heard(switch, tmp_path / "merged", old, new, tmp_path / "out")
    assert any("tokenizer.json, chat template came with an adapter" in text for text in warnings)
    assert report.left_behind == ("model.ot",)
    _, warnings = heard(unmerge, tmp_path / "merged", old, tmp_path / "back")
    assert any("tokenizer.json, chat template came with an adapter" in text for text in warnings)
    _, warnings = heard(unmerge, tmp_path / "merged", old, tmp_path / "base-back", base=base)
    assert not any("came with an adapter" in text for text in warnings)
    (new / "tokenizer.json").write_text('{"added": 2}')
    _, warnings = heard(switch, tmp_path / "merged", old, new, tmp_path / "own")
    assert any(": chat template came with an adapter" in text for text in warnings)
    stated = json.loads((tmp_path / "own" / RECORD).read_text())["brought"]
    assert stated == ["chat template", "tokenizer.json"]


@WAYS
def test_what_the_merge_was_told_of_the_model_is_known(exact: bool, tmp_path: Path) -> None:
    """Square weights of GPT-2 lie (in, out), which only --model-type told."""
    name = "h.0.attn.c_proj"
    base = save_base(tmp_path / "base", {f"{name}.weight": random(8, 8)})
    old, new = (save_adapter(tmp_path / n, lora({name: (8, 8)}, seed=len(n))) for n in ("a", "bb"))
    merge(base, [old], tmp_path / "merged", model_type="gpt2", keep_residual=exact)
    switch(tmp_path / "merged", old, new, tmp_path / "out")
    merge(base, [new], tmp_path / "wanted", model_type="gpt2")
    torch.testing.assert_close(load(tmp_path / "out"), load(tmp_path / "wanted"), rtol=0, atol=0 if exact else 1e-5)
    unmerge(tmp_path / "out", new, tmp_path / "back")
    torch.testing.assert_close(load(tmp_path / "back"), load(base), rtol=0, atol=0 if exact else 1e-5)


def test_no_residual_can_be_kept_where_there_is_none(tmp_path: Path) -> None:
    base, old, new = prepare(tmp_path)
    merge(base, [old], tmp_path / "merged")
    with pytest.raises(InvalidOption, match=r"there is no unmerge\.residual"):
        switch(tmp_path / "merged", old, new, tmp_path / "out", keep_residual=True)


def test_layers_are_not_repeated_by_a_switch(tmp_path: Path) -> None:
    weights = {f"model.layers.{i}.q.weight": random(8, 8, seed=i) for i in range(2)}
    base = save_base(tmp_path / "base", weights, model_type="llama", num_hidden_layers=2)
    old = save_adapter(tmp_path / "old", lora({"model.layers.0.q": (8, 8)}))
    new = save_adapter(
        tmp_path / "new", lora({"model.layers.0.q": (8, 8)}, settings={"layer_replication": [[0, 2], [0, 2]]})
    )
    merge(base, [old], tmp_path / "merged")
    with pytest.raises(IncompatibleAdapter, match="repeats layers"):
        switch(tmp_path / "merged", old, new, tmp_path / "out")


def test_an_untouched_tensor_that_was_changed_is_found_out(tmp_path: Path) -> None:
    base, old, new = prepare(tmp_path, shards=1)
    merge(base, [old], tmp_path / "merged", keep_residual=True)
    spec = Checkpoint.open(tmp_path / "merged").specs["norm.weight"]
    with spec.file.open("r+b") as file:
        file.seek(spec.start)
        file.write(b"\x01")
    with pytest.raises(WrongBase, match="not the base model that was merged"):
        switch(tmp_path / "merged", old, new, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_own_tensor_in_the_place_of_the_base_s_is_said_by_every_verb(tmp_path: Path) -> None:
    """A copy with other rows takes the base's place: merge, convert and verify say so."""
    weights = {"model.embed_tokens.weight": random(9, 16), "model.q.weight": random(16, 16)}
    base = save_base(tmp_path / "base", weights | {"lm_head.weight": random(9, 16)}, **UNTIED)
    new = save_adapter(tmp_path / "new", lora({"model.q": (16, 16)}))
    names = ("lm_head", "model.embed_tokens")
    add_tensors(new, {f"{name}.base_layer.weight": random(12, 16, seed=8) for name in names})
    said = "adapter 1: its own lm_head.weight takes the place of the base's, as in PEFT"
    assert said in merge(base, new, tmp_path / "merged").notes
    for call, inputs in ((convert, (new, tmp_path / "sealed")), (verify, (tmp_path / "merged", base, new))):
        _, warnings = heard(call, *inputs, **({"base": base} if call is convert else {}))
        assert said in warnings
