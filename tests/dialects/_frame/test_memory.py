"""State dicts in memory are the adapters of the files that they would be saved as, whatever holds their numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loratools
from loratools import dialects
from loratools.errors import BadFile, InvalidOption, LoraToolsError
from loratools.format.digest import adapter_digest
from loratools.surgery.inputs import as_list
from tests.dialects.adapters import Q0, lora, samples

UNET = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def written(folder: Path, dialect: str, module: str = Q0) -> tuple[Path, dict[str, torch.Tensor], dict[str, str]]:
    """Return a file of a dialect, its tensors, and the entries of its header."""
    place = folder / f"{dialect}.safetensors"
    dialects.save_adapter(loratools.Adapter({module: lora(3, 4, 10)}), place, dialect=dialect, allow_loss=True)
    with safe_open(place, "pt") as file:
        return place, load_file(place), file.metadata() or {}


def same(first: loratools.Adapter, second: loratools.Adapter) -> None:
    assert first.dialect == second.dialect
    assert adapter_digest(first) == adapter_digest(second)
    scalings = [{module: adapter[module].scaling for module in adapter} for adapter in (first, second)]
    assert scalings[0] == scalings[1]
    assert first.settings == second.settings


@pytest.mark.parametrize("dialect", ["kohya", "loratools", "diffusers"])
def test_a_state_dict_with_its_header_is_its_file(dialect: str, tmp_path: Path) -> None:
    place, state, header = written(tmp_path, dialect)
    from_file = dialects.open_adapter(place)
    same(dialects.open_adapter((state, header)), from_file)
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    same(dialects.open_adapter((arrays, header)), from_file)


def test_a_state_dict_alone_is_enough_where_it_says_its_scaling(tmp_path: Path, prepared: Path) -> None:
    place, state, _ = written(tmp_path, "kohya", UNET)
    save_file(state, place)  # without a header
    from_file, from_memory = dialects.open_adapter(place), dialects.open_adapter(state)
    same(from_memory, from_file)
    assert loratools.spectrum(state) == loratools.spectrum(place)
    assert loratools.compare(state, from_file).cosine == pytest.approx(1)
    assert loratools.hash(state, "root").root == loratools.hash(place, "root").root
    summary: Any = loratools.inspect(state)
    assert (summary.dialect, summary.groups[0].rank) == ("kohya", 4)
    loratools.save_adapter(state, tmp_path / "saved")
    loratools.convert(state, tmp_path / "converted", to="peft")
    loratools.combine([state, place], tmp_path / "combined")
    loratools.resize(state, tmp_path / "small", 2)
    merged = tmp_path / "of the file", tmp_path / "of memory"
    kohya = tmp_path / "k.safetensors"
    dialects.save_adapter(prepared / "adapter", kohya, dialect="kohya", allow_loss=True)
    loratools.merge(prepared / "base", kohya, merged[0])
    loratools.merge(prepared / "base", load_file(kohya), merged[1])
    for shard in sorted(merged[0].glob("*.safetensors")):
        first, second = load_file(shard), load_file(merged[1] / shard.name)
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert loratools.verify(merged[1], prepared / "base", load_file(kohya)).ok


def test_mlx_has_a_config_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "mlx"
    dialects.save_adapter(samples()["plain"], folder, dialect="mlx", allow_loss=True)
    state = {name: W.numpy() for name, W in load_file(folder / "adapters.safetensors").items()}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert adapter_digest(dialects.open_adapter((state, config))) == adapter_digest(dialects.open_adapter(folder))


def test_peft_names_alone_say_no_scaling(prepared: Path) -> None:
    state = load_file(prepared / "adapter" / "adapter_model.safetensors")
    with pytest.raises(InvalidOption, match="without its config, so the scaling is unknown"):
        dialects.open_adapter(state)
    assert {update.scaling for update in dialects.open_adapter(state, alpha=8).updates.values()} == {2.0}
    config = json.loads((prepared / "adapter" / "adapter_config.json").read_text())
    arrays = {name: W.numpy() for name, W in state.items()}
    assert loratools.hash((arrays, config), "root") == loratools.hash(prepared / "adapter", "root")


def test_what_is_given_stays_the_callers(tmp_path: Path) -> None:
    _, state, header = written(tmp_path, "kohya")
    adapter = dialects.open_adapter((state, header))
    before = adapter_digest(adapter)
    for tensor in state.values():
        tensor.zero_()
    assert adapter_digest(adapter) == before


def test_numbers_of_few_bits_keep_their_dtype(tmp_path: Path) -> None:
    _, state, header = written(tmp_path, "kohya")
    for dtype in ("float16", "float64"):
        arrays = {name: tensor.numpy().astype(dtype) for name, tensor in state.items()}
        adapter = dialects.open_adapter((arrays, header))
        assert {lazy.dtype for lazy in adapter.tensors().values()} == {{"float16": "F16", "float64": "F64"}[dtype]}
    swapped = {name: tensor.numpy().astype(">f4") for name, tensor in state.items()}
    assert adapter_digest(dialects.open_adapter((swapped, header))) == adapter_digest(
        dialects.open_adapter((state, header))
    )
    bf16 = {name: tensor.bfloat16() for name, tensor in state.items()}
    extended = pytest.importorskip("ml_dtypes")
    arrays = {name: tensor.numpy().astype(extended.bfloat16) for name, tensor in state.items()}
    assert adapter_digest(dialects.open_adapter((arrays, header))) == adapter_digest(
        dialects.open_adapter((bf16, header))
    )


def test_two_state_dicts_are_two_adapters_and_one_with_words_is_one(tmp_path: Path) -> None:
    _, state, header = written(tmp_path, "kohya")
    assert as_list((state, dict(state))) == [state, state]
    assert as_list((state, header)) == [(state, header)]
    assert as_list(state) == [state]


def test_what_is_no_tensor_is_listed_and_files_go_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    wrong: Any = {
        "a.lora_down.weight": [1.0],
        3: torch.ones(2),
        "b": np.array(["x"]),
        "c": torch.ones(1, device="meta"),
    }
    with pytest.raises(BadFile, match="4 of 4 entries") as refusal:
        dialects.open_adapter(wrong)
    assert len(refusal.value.problems) == 4
    with pytest.raises(LoraToolsError, match=r"^the state dict") as unknown:
        dialects.open_adapter({"what.weight": torch.ones(2, 2)})
    assert str(tmp_path) not in str(unknown.value)
    _, state, header = written(tmp_path, "kohya")
    dialects.open_adapter((state, header))
    assert list((tmp_path / "tmp").iterdir()) == []
