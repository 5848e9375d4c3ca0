"""Every option of a merge: the spellings that it takes, and a sentence with the list where it cannot be."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.cli._run import run
from loratools.errors import InvalidOption, LoraToolsError
from loratools.surgery.merge import MergeOptions, merge
from tests.surgery.models import load, lora, same_bytes, save, weights_of

WRONG: dict[str, tuple[Any, str]] = {
    "dtype": ("fp8", "dtype: 'fp8' is not a dtype that a model can be written in; it can be bf16, f16, f32 or f64"),
    "max_shard_size": ("5 apples", "max_shard_size: '5 apples' is not a size; write it like 5GB, 500MB or 2GiB"),
    "tied": ("Both", "tied is 'Both'; it can be error, untie or both; did you mean both?"),
    "model_type": (7, "model_type is 7; it can be a name such as 'gpt2', or None"),
    "check_base": ("Strict", "check_base is 'Strict'; it can be strict, warn or off; did you mean strict?"),
    "retention": ("some", "retention is 'some'; it can be sample, full or off"),
    "rounding": ("up", "rounding is 'up'; it can be nearest or stochastic"),
    "seed": (0.5, "seed is 0.5; it can be a whole number"),
    "quantized": ("no", "quantized is 'no'; it can be dequantize, partial, requantize or refuse"),
    "original": (7, "original is 7; it can be a path, a reference, or None"),
    "trained_on": ("x", "trained_on is 'x'; it can be original or folded"),
    "keep_loss": (0, "keep_loss is 0; it can be a whole number of at least 1 or None"),
    "keep_residual": ("no", "keep_residual is 'no'; it can be True or False"),
    "resume": (None, "resume is None; it can be True or False"),
    "device": ("gpu", "device is 'gpu'; it can be cpu, cuda, cuda:N or mps"),
    "threads": (0, "threads is 0; it can be a whole number of at least 1 or None"),
    "force": (1, "force is 1; it can be True or False"),
    "durable": ("yes", "durable is 'yes'; it can be True or False"),
}


def test_every_option_has_a_wrong_value_here() -> None:
    assert WRONG.keys() == set(MergeOptions.__dataclass_fields__)


@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_wrong_value_is_told_with_what_can_be(name: str, tmp_path: Path) -> None:
    value, sentence = WRONG[name]
    with pytest.raises(InvalidOption) as refusal:
        MergeOptions(**{name: value})
    assert str(refusal.value) == sentence
    with pytest.raises(ValueError, match=name):  # before anything is opened: neither path is there
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", **{name: value})


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(LoraToolsError) as refusal:
        MergeOptions(**{name: value for name, (value, _) in WRONG.items()})
    assert refusal.value.message == f"{len(WRONG)} options are wrong"
    assert list(refusal.value.problems) == [WRONG[name][1] for name in MergeOptions.__dataclass_fields__]


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("bf16", "BF16"), ("BF16", "BF16"), ("bfloat16", "BF16"), (torch.bfloat16, "BF16"), ("torch.bfloat16", "BF16"),
     ("fp16", "F16"), (torch.float16, "F16"), ("half", "F16"), ("f32", "F32"), ("float32", "F32"),
     (torch.float32, "F32"), ("F64", "F64"), (torch.float64, "F64"), ("double", "F64")],
)  # fmt: skip
def test_dtypes_in_every_spelling(spelling: Any, name: str) -> None:
    options = MergeOptions(dtype=spelling)
    assert (options.dtype, options.output_dtype) == (name, name)
    assert options == MergeOptions(dtype=name)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("cuda", "cuda"), ("cuda:1", "cuda:1"), (torch.device("cuda", 1), "cuda:1"), (torch.device("mps"), "mps")],
)
def test_devices_by_name_and_as_torch_has_them(spelling: Any, name: str) -> None:
    assert MergeOptions(device=spelling).computes_on == name


@pytest.mark.parametrize("spelling", [torch.int8, torch.float8_e4m3fn, "int", "", "float128", 16])
def test_what_is_no_float_dtype(spelling: Any) -> None:
    with pytest.raises(InvalidOption, match="it can be bf16, f16, f32 or f64"):
        MergeOptions(dtype=spelling)


@pytest.mark.parametrize("spelling", [5_000_000_000, "5GB", "5gb", "5000MB", "5000000000", "5e9"])
def test_sizes_in_every_spelling(spelling: Any) -> None:
    options = MergeOptions(max_shard_size=spelling)
    assert (options.max_shard_size, options.shard_bytes) == (5 * 10**9, 5 * 10**9)


@pytest.mark.parametrize("spelling", [0, -1, "0", 1.5, True, "5B5", b"5GB"])
def test_what_is_no_size(spelling: Any) -> None:
    with pytest.raises(InvalidOption, match=r"^max_shard_size: .* is not a size"):
        MergeOptions(max_shard_size=spelling)


def test_defaults_keep_what_the_base_has() -> None:
    options = MergeOptions()
    assert (options.output_dtype, options.shard_bytes, options.threads) == (None, None, None)
    with pytest.raises(FrozenInstanceError):
        options.seed = 1  # type: ignore[misc]


def test_one_path_and_one_weight_are_lists_of_one(tmp_path: Path) -> None:
    shapes = {"a": (24, 16)}
    base, paths = save(tmp_path, weights_of(shapes, torch.float32), [lora(shapes)])
    merge(base, paths, tmp_path / "listed", weights=[0.5])
    merge(str(base), str(paths[0]), str(tmp_path / "single"), weights=0.5)
    assert same_bytes(load(tmp_path / "listed")["a.weight"], load(tmp_path / "single")["a.weight"])


@pytest.mark.parametrize("name", ["dtype", "tied", "check_base", "retention", "rounding", "device", "max_shard_size"])
def test_the_command_line_has_the_same_lists(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value, sentence = WRONG[name]
    save(tmp_path, weights_of({"a": (24, 16)}, torch.float32), [lora({"a": (24, 16)})])
    paths = [str(tmp_path / part) for part in ("base", "adapter0")]
    assert run(["merge", *paths, "-o", str(tmp_path / "out"), f"--{name.replace('_', '-')}", value]) != 0
    message = capsys.readouterr().err
    *_, choices = sentence.rpartition("it can be " if "it can be" in sentence else "like ")
    words = choices.partition(";")[0].replace(",", "").replace(" or ", " ").split()
    assert all(word in message for word in words)
    assert not (tmp_path / "out").exists()
