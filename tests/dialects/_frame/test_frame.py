"""Discovery, detection with evidence, opening and saving."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import loratools
from loratools import dialects
from loratools.errors import BadFile, LossyConversion, OutputRefused, UnknownKind, UnsupportedAdapter
from loratools.storage.lazy import LazyTensor
from tests.dialects.adapters import Q0, V0, expect, peft_folder, samples

TOY = """
from pathlib import Path
from loratools.adapter.model import Adapter, Loss
from loratools.dialects import Evidence

SUMMARY = "a toy"
EXTRA = None
FILES = ()
CANNOT = ("factors",)

def detect(listing):
    return Evidence({score}, "there is a file toy.txt") if "toy.txt" in listing.files else None

def read(listing):
    return Adapter({{}}, settings={{"text": (listing.folder / "toy.txt").read_text()}})

def losses(adapter):
    return [Loss(module, "a toy has no factors") for module in adapter.updates]

def write(adapter, target, *, force=False):
    target.mkdir()
    (target / "toy.txt").write_text("toy")
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put one more dialect beside the others: a file, nothing else."""
    folder = tmp_path / "plugin"
    folder.mkdir()
    (folder / "toy.py").write_text(TOY.format(score=90))
    monkeypatch.setattr(dialects, "__path__", [*dialects.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, "loratools.dialects.toy", raising=False)
    dialects.names.cache_clear()
    yield
    dialects.names.cache_clear()


@pytest.mark.usefixtures("toy")
def test_a_new_dialect_is_one_file(tmp_path: Path) -> None:
    assert "toy" in dialects.names()
    with pytest.raises(LossyConversion) as refusal:
        dialects.save_adapter(samples()["plain"], tmp_path / "x", dialect="toy")
    assert refusal.value.problems == (f"{Q0}: a toy has no factors", f"{V0}: a toy has no factors")
    assert not (tmp_path / "x").exists()
    lost = dialects.save_adapter(samples()["plain"], tmp_path / "x", dialect="toy", allow_loss=True)
    assert [loss.where for loss in lost] == [Q0, V0]
    adapter = dialects.open_adapter(tmp_path / "x")
    assert (adapter.dialect, adapter.settings["text"]) == ("toy", "toy")


@pytest.mark.usefixtures("toy")
def test_two_readings_as_good_are_an_error_that_shows_both(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a")
    (folder / "toy.txt").write_text("both")
    with pytest.raises(UnknownKind, match="can be read as peft or as toy") as refusal:
        dialects.open_adapter(folder)
    assert refusal.value.problems == (
        "peft: adapter_config.json has peft_type, and 6 of the tensors in adapter_model.safetensors have PEFT's names",
        "toy: there is a file toy.txt",
    )
    assert dialects.open_adapter(folder, dialect="toy").settings["text"] == "both"
    expect(dialects.open_adapter(folder, dialect="peft"), Q0, 0, 2.0)


def test_the_native_format_wins_over_peft(tmp_path: Path) -> None:
    dialects.save_adapter(samples()["plain"], tmp_path / "a")
    listing = dialects.Listing.of(tmp_path / "a")
    evidence = dialects.get("peft").detect(listing)
    assert evidence is not None
    assert evidence.score == 90
    assert dialects.detect(listing) == (
        "loratools",
        dialects.Evidence(100, "the header of adapter_model.safetensors holds a loratools manifest"),
    )


def test_an_unknown_folder_lists_what_was_seen_and_what_is_known(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnknownKind) as refusal:
        dialects.open_adapter(tmp_path)
    assert "it holds config.json, model.safetensors" in refusal.value.message
    assert list(refusal.value.problems) == []
    assert refusal.value.message.startswith(f"{tmp_path} looks like a base model; an adapter was expected; ")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UnknownKind, match=r"no dialect knows this folder; it holds model\.safetensors") as refusal:
        dialects.open_adapter(tmp_path)
    assert [line.split(":")[0] for line in refusal.value.problems] == list(dialects.names())


def test_unknown_files_and_names(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# a text\n")
    for path, reason in ((tmp_path / "README.md", "no file of weights"), (tmp_path, "it holds README.md")):
        with pytest.raises(UnknownKind, match=reason) as refusal:
            dialects.open_adapter(path)
        assert not refusal.value.problems  # a list of layouts helps nobody who named the wrong file
    save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UnknownKind, match=r"x\.safetensors: no dialect knows this file"):
        dialects.open_adapter(tmp_path / "x.safetensors")
    save_file({"m.q_proj.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UnknownKind, match=r"x\.safetensors looks like weights of a base model") as refusal:
        dialects.open_adapter(tmp_path / "x.safetensors")
    assert list(refusal.value.problems) == []
    with pytest.raises(UnknownKind, match=r"no dialect 'pfet'; loratools knows .*peft"):
        dialects.open_adapter(tmp_path, dialect="pfet")
    with pytest.raises(BadFile, match="nothing: no such file or folder"):
        dialects.open_adapter(tmp_path / "nothing")


def test_a_file_that_a_dialect_does_not_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputRefused, match=r"the dialect peft does not write \.safetensors files; it writes a folder"):
        dialects.save_adapter(samples()["plain"], tmp_path / "x.safetensors", dialect="peft")
    with pytest.raises(OutputRefused, match=r"does not write \.gguf files; it writes \.safetensors or a folder"):
        dialects.save_adapter(samples()["plain"], tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_a_tensor_fails_to_load(tmp_path: Path) -> None:
    def fail() -> torch.Tensor:
        raise BadFile("a file became shorter")

    from loratools.adapter import kinds
    from loratools.adapter.model import Adapter

    parts = {"lora_A.weight": LazyTensor("F32", (2, 10), fail), "lora_B.weight": LazyTensor("F32", (12, 2), fail)}
    adapter = Adapter({Q0: kinds.get("lora").build(parts, 1.0, 2.0)})
    for name in ("peft", "loratools"):
        with pytest.raises(BadFile, match="became shorter"):
            dialects.save_adapter(adapter, tmp_path / name, dialect=name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dialect", ["peft", "loratools"])
def test_reading_imports_neither_torch_nor_numpy(tmp_path: Path, dialect: str) -> None:
    dialects.save_adapter(samples()["plain"], tmp_path / "a", dialect=dialect)
    script = (
        "import sys; from loratools import dialects; adapter = dialects.open_adapter(sys.argv[1]);"
        "assert len(adapter.updates) == 2; print(sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "a"], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "ends",
    [
        ("lora_down", "lora_up"),
        ("lora.down.weight", "lora.up.weight"),
        ("hada_w1_a", "hada_w1_b"),
        ("lora_A", "lora_B"),
    ],
)
def test_a_file_of_factors_is_an_adapter_and_no_model_whatever_its_names(ends: tuple[str, str], tmp_path: Path) -> None:
    tensors = {f"strange!block{i}.{end}": torch.ones(2, 2) for i in range(3) for end in (*ends, "alpha")}
    save_file(tensors, tmp_path / "a.safetensors")
    for folder in (tmp_path, tmp_path / "a.safetensors"):
        for read in (loratools.inspect, dialects.open_adapter):
            with pytest.raises(UnknownKind, match=f"an adapter, with 6 factors such as strange!block0.{ends[0]}"):
                read(folder)
        with pytest.raises(UnsupportedAdapter, match=r"an adapter, with 6 factors .*; a model was expected"):
            loratools.merge(folder, tmp_path / "b", tmp_path / "new")


def test_a_model_with_some_factors_beside_its_weights_is_a_model(tmp_path: Path) -> None:
    weights = {f"layers.{i}.weight": torch.ones(2, 2) for i in range(3)}
    save_file(weights | {"layers.0.lora_A.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    assert loratools.inspect(tmp_path / "model.safetensors").type == "checkpoint"
