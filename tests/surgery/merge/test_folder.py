"""What stands beside merged weights: shards and their index, config, tokenizer, card, record; and the plan of it."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import loratools
from loratools import dialects
from loratools.cli._run import run
from loratools.errors import IncompatibleAdapter, NoSpace
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.hash import hash_checkpoint
from loratools.surgery.merge import MergeOptions, execute, merge, prepare
from tests.surgery import models
from tests.surgery.models import load, lora, random, same_bytes, save_adapter, save_base

SHAPES = {"a": (64, 48), "b": (48, 64), "c": (64, 48)}
WEIGHTS = {
    f"{name}.weight": random(*shape, seed=i, scale=0.05, dtype=torch.bfloat16)
    for i, (name, shape) in enumerate(SHAPES.items())
}
WEIGHTS |= {"norm.weight": random(48, dtype=torch.bfloat16), "embed.weight": random(100, 48, dtype=torch.bfloat16)}
ADAPTER = lora(SHAPES)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """base/ in three shards, with all sorts of files beside them, and adapter/."""
    base = save_base(tmp_path / "base", WEIGHTS, shards=3, model_type="llama", torch_dtype="bfloat16", note="ü")
    for name, text in {
        "tokenizer.json": "base tokenizer",
        "generation_config.json": "{}\n",
        "modeling_own.py": "print()",
        "1_Pooling/config.json": '{"mode": 1}',
        "LICENSE": "free",
        ".gitattributes": "hidden",
        ".cache/x": "hidden",
        "model.gguf": "other weights",
        "loratools.json": "{}",
        "README.md": "---\nlicense: mit\n---\n# My model\n\nSaid by a person.\n",
    }.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    save_adapter(tmp_path / "adapter", ADAPTER)
    return tmp_path


def header(file: Path) -> bytes:
    raw = file.read_bytes()
    return raw[: 8 + struct.unpack("<Q", raw[:8])[0]]


def test_the_layout_stays(place: Path) -> None:
    """File names, headers byte for byte, untouched tensors, index; and no file that is not the base's or ours."""
    merge(place / "base", [place / "adapter"], place / "out")
    for file in (place / "base").glob("*.safetensors"):
        assert header(place / "out" / file.name) == header(file)
    before = json.loads((place / "base" / "model.safetensors.index.json").read_text())
    assert json.loads((place / "out" / "model.safetensors.index.json").read_text()) == before
    found = load(place / "out")
    assert {name for name in WEIGHTS if not same_bytes(found[name], WEIGHTS[name])} == {
        f"{name}.weight" for name in SHAPES
    }
    files = {str(file.relative_to(place / "out")) for file in (place / "out").rglob("*") if file.is_file()}
    assert files == {
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), "model.safetensors.index.json", "config.json",
        "tokenizer.json", "generation_config.json", "modeling_own.py", "1_Pooling/config.json", "LICENSE", "README.md",
        "loratools.json",
    }  # fmt: skip
    for name in files - {"README.md", "loratools.json", "model.safetensors.index.json"}:
        if not name.endswith(".safetensors"):
            assert (place / "out" / name).read_bytes() == (place / "base" / name).read_bytes()


@pytest.mark.parametrize("limit", [1, 7_000, 13_000, 10**9])
def test_shards_of_another_size(limit: int, place: Path) -> None:
    merge(place / "base", [place / "adapter"], place / "plain")
    merge(place / "base", [place / "adapter"], place / "out", max_shard_size=limit)
    files = sorted((place / "out").glob("*.safetensors"))
    tensors, total = {}, 0
    for number, file in enumerate(files, 1):
        assert file.name == (
            f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        )
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            inside = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        size = sum(W.nbytes for W in inside.values())
        assert size <= limit or len(inside) == 1
        total += size
        tensors |= dict.fromkeys(inside, file.name)
    index = place / "out" / "model.safetensors.index.json"
    if len(files) > 1:
        document = json.loads(index.read_text())
        assert document["weight_map"] == tensors
        assert document["metadata"]["total_size"] == total == sum(W.nbytes for W in WEIGHTS.values())
    else:
        assert not index.exists()
    plain, found = load(place / "plain"), load(place / "out")
    assert found.keys() == plain.keys()
    assert all(same_bytes(found[name], W) for name, W in plain.items())


def test_cast_is_told_to_config_and_index(place: Path) -> None:
    merge(place / "base", [place / "adapter"], place / "out", dtype="F32")
    config = json.loads((place / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "torch_dtype": "float32", "note": "ü"}
    index = json.loads((place / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(W.numel() * 4 for W in WEIGHTS.values())


def test_a_legacy_checkpoint_becomes_safetensors(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    torch.save(WEIGHTS, tmp_path / "base" / "pytorch_model.bin")
    save_base(tmp_path / "twin", WEIGHTS)
    save_adapter(tmp_path / "adapter", ADAPTER)
    for base in ("base", "twin"):
        merge(tmp_path / base, [tmp_path / "adapter"], tmp_path / f"{base}-out")
    assert [file.name for file in (tmp_path / "base-out").glob("*model*")] == ["model.safetensors"]
    found, wanted = load(tmp_path / "base-out"), load(tmp_path / "twin-out")
    assert found.keys() == wanted.keys()
    assert all(same_bytes(found[name], W) for name, W in wanted.items())


def test_the_adapters_tokenizer_wins_and_two_must_agree(place: Path) -> None:
    save_adapter(place / "other", lora(SHAPES, seed=9))
    for name in ("tokenizer.json", "chat_template.jinja"):
        (place / "adapter" / name).write_text("of the adapter")
    (place / "adapter" / "training_args.txt").write_text("stays")
    merge(place / "base", [place / "adapter", place / "other"], place / "out")
    assert (place / "out" / "tokenizer.json").read_text() == "of the adapter"
    assert (place / "out" / "chat_template.jinja").read_text() == "of the adapter"
    assert not (place / "out" / "training_args.txt").exists()
    (place / "other" / "tokenizer.json").write_text("of the adapter")
    merge(place / "base", [place / "adapter", place / "other"], place / "same")
    (place / "other" / "tokenizer.json").write_text("another")
    with pytest.raises(IncompatibleAdapter, match="different tokenizers") as refusal:
        merge(place / "base", [place / "adapter", place / "other"], place / "none")
    assert [problem.split(":")[0] for problem in refusal.value.problems] == ["tokenizer.json"]
    assert not (place / "none").exists()


def test_the_record_says_what_was_done(place: Path) -> None:
    report = merge(place / "base", [place / "adapter"], place / "out", weights=[0.5], retention="full")
    record = json.loads((place / "out" / "loratools.json").read_text())
    identity = hash_checkpoint(Checkpoint.open(place / "base"), include=["a.weight", "b.weight", "c.weight"])
    assert record["tool"] == f"loratools {loratools.__version__}"
    assert (record["operation"], record["base"]["schema"]) == ("merge", identity.schema)
    assert record["base"]["tensors"] == dict(identity.tensors)
    assert record["retention"] == report.retention
    (adapter,) = record["adapters"]
    expected = {"weight": 0.5, "dialect": "peft", "modules": 3, "kinds": "lora", "ranks": "4"}
    expected |= {"scaling": 2.0, "scalings": {}, "layouts": {}, "transposed": []}
    assert adapter == expected | {"digest": adapter["digest"]}
    own = hash_checkpoint(Checkpoint.open(place / "adapter" / "adapter_model.safetensors"), ("root",))
    assert adapter["digest"] == own.root
    assert str(place) not in json.dumps(record)


def test_the_card_gains_one_section(place: Path) -> None:
    merge(place / "base", [place / "adapter"], place / "out", weights=[0.5])
    card = (place / "out" / "README.md").read_text()
    original = (place / "base" / "README.md").read_text()
    assert card.startswith(original.rstrip())
    digest = json.loads((place / "out" / "loratools.json").read_text())["adapters"][0]["digest"]
    assert f"| 0.5 | `{digest}` |" in card
    save_adapter(place / "other", lora({"a": (64, 48)}, rank=7, seed=9))
    merge(place / "out", [place / "other"], place / "again")
    again = (place / "again" / "README.md").read_text()
    assert again.startswith(original.rstrip())
    assert again.count("## How this model was made") == 1
    (place / "base" / "README.md").unlink()
    merge(place / "base", [place / "adapter"], place / "new")
    assert (place / "new" / "README.md").read_text().startswith("---\nlibrary_name: transformers")


def test_the_card_tells_adapters_without_a_name_apart(place: Path) -> None:
    save_adapter(place / "other", lora({"a": (64, 48)}, rank=7, seed=9))
    merge(place / "base", [place / "adapter", place / "other"], place / "out")
    card = (place / "out" / "README.md").read_text()
    assert [row for row in ("| adapter 1 |", "| adapter 2 |") if row in card] == ["| adapter 1 |", "| adapter 2 |"]


def test_untied_head_in_shards(place: Path) -> None:
    """A new tensor: index, sizes and config follow it."""
    weights = {"model.embed_tokens.weight": random(64, 48, dtype=torch.bfloat16), "a.weight": WEIGHTS["a.weight"]}
    head = lora({"lm_head": (64, 48)})
    save_base(place / "tied", weights, shards=2, tie_word_embeddings=True)
    save_adapter(place / "head", head)
    merge(place / "tied", [place / "head"], place / "out", tied="untie")
    found = load(place / "out")
    wanted = models.merged({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}, [head])
    assert found.keys() == wanted.keys()
    assert all(same_bytes(found[name], W) for name, W in weights.items())
    assert int(models.units_off(found["lm_head.weight"], wanted["lm_head.weight"]).max()) <= 1
    index = json.loads((place / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(W.nbytes for W in found.values())
    assert index["weight_map"].keys() == found.keys()
    assert json.loads((place / "out" / "config.json").read_text()) == {"tie_word_embeddings": False}


@pytest.mark.parametrize("options", [{}, {"dtype": "F32"}, {"max_shard_size": 9_000}])
def test_the_plan_is_what_happens(options: dict[str, object], place: Path) -> None:
    save_adapter(place / "other", lora({"a": (64, 48)}, rank=7, seed=9))
    adapters = [place / "adapter", place / "other"]
    prepared = prepare(place / "base", adapters, place / "out", weights=[1, -0.5], options=MergeOptions(**options))  # type: ignore[arg-type]
    plan = json.loads(json.dumps(prepared.to_json()))
    assert not (place / "out").exists()
    done: list[int] = []
    report = execute(prepared, progress=done.append)
    files = {file.name: file.stat().st_size for file in (place / "out").glob("*.safetensors")}
    assert {file["name"]: file["bytes"] for file in plan["files"]} == files
    assert sum(files.values()) == report.bytes_written
    found = load(place / "out")
    size = {name: W.nbytes for name, W in found.items()}
    assert plan["bytes"]["written"] == sum(size.values()) == sum(done)
    assert plan["bytes"]["copied"] + plan["bytes"]["changed"] == plan["bytes"]["written"]
    moved = {name for name, W in found.items() if not same_bytes(W, WEIGHTS[name])}
    assert plan["bytes"]["changed"] == sum(size[name] for name in moved)
    assert plan["changed"].keys() == {f"{name}.weight" for name in SHAPES}
    cast = len(WEIGHTS) - 3 if options.get("dtype") else 0
    assert plan["tensors"] == {"total": len(WEIGHTS), "changed": report.changed, "cast": cast}
    first, second = plan["changed"]["a.weight"]
    assert first | {"module": "a"} == {
        "adapter": 0,
        "module": "a",
        "kind": "lora",
        "rank": 4,
        "scaling": 2.0,
        "weight": 1.0,
    }
    assert (second["rank"], second["scaling"], second["weight"]) == (7, 8 / 7, -0.5)
    others = [file for file in (place / "out").rglob("*") if file.is_file() and file.name not in files]
    written = {"loratools.json", "model.safetensors.index.json", "README.md"}
    assert plan["other_files"] == len([file for file in others if file.name not in written]) + 1


def test_more_than_the_disk_holds(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(place / "base", [place / "adapter"], place / "out")
    monkeypatch.setattr("loratools.storage.atomic.system.free", lambda _: 100)
    with pytest.raises(NoSpace, match="the disk has 100 free"):
        execute(prepared)
    assert not (place / "out").exists()


@pytest.mark.parametrize(("scale", "warned"), [(0.0002, True), (0.1, False)])
def test_a_change_that_rounding_eats_is_warned_about(
    scale: float, warned: bool, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(place / "faint", lora({"a": (64, 48), "b": (48, 64)}, scale=scale * 8))
    arguments = ["merge", *(str(place / name) for name in ("base", "faint")), "-o", str(place / "out"), "--json"]
    assert run([*arguments, "--retention", "full"]) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert warned == (document["retention"] < 0.9)
    assert any("of the change survives rounding" in line for line in document.get("warnings", ())) == warned


def test_what_an_adapter_says_is_in_the_record_and_its_words_in_the_card(place: Path) -> None:
    adapter = dialects.open_adapter(place / "adapter")
    said = {"modelspec.trigger_phrase": "mychar `woman`", "modelspec.title": "Me", "ss_network_dim": "4"}
    of_a_run = {
        "modelspec.author": "Jane Doe", "ss_training_comment": "by Jane Doe", "modelspec.thumbnail": "data:x",
        "modelspec.tags": "a, b", "ss_train_data_dir": "/home/jane.doe/x", "ss_output_name": "by Jane", "note": "Jane",
    }  # fmt: skip
    speaking = replace(adapter, settings={**adapter.settings, "metadata": said | of_a_run})
    report = merge(place / "base", [speaking, adapter], place / "says", weights=[1, 0.5])
    first, second = json.loads((place / "says" / "loratools.json").read_text())["adapters"]
    assert (first["header"], "header" in second) == (said, False)
    assert all("header" not in entry for entry in report.adapters)
    assert "Trigger words:\n\n- adapter 1: `mychar  woman `\n" in (place / "says" / "README.md").read_text()
