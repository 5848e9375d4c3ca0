"""Files from strangers: wrong, hostile, or of another model. A sentence, no output, and no other folder's files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loratools import dialects
from loratools.adapter.model import BaseIdentity
from loratools.errors import (
    BadFile,
    IncompatibleAdapter,
    LoraToolsError,
    OutputRefused,
    UnsupportedAdapter,
    WrongBase,
)
from loratools.storage import digest, files
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.execute import Settings, write_weights
from loratools.surgery.merge import merge, prepare
from tests.conftest import Result
from tests.faults import mutate
from tests.faults.killer import hashes
from tests.make import tiny

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with `base` (two shards), `adapter`, and nothing else."""
    tiny.save_llama(tmp_path / "base", tiny.llama_weights())
    tiny.save_peft(tmp_path / "adapter", tiny.lora_factors())
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(kind: type[LoraToolsError], match: str, folder: Path, *adapters: Any, **options: Any) -> LoraToolsError:
    """Merge; expect a refusal in one sentence, and no file anywhere that was not there before."""
    before = hashes(folder)
    with pytest.raises(kind, match=match) as caught:
        merge(folder / "base", adapters or [folder / "adapter"], folder / "out", **options)
    assert hashes(folder) == before
    assert not (folder / "out").exists()
    assert not list(folder.glob(".*"))
    assert "\n" not in caught.value.message
    return caught.value


def outcome(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or the sentence with which it refuses."""
    try:
        return call()
    except LoraToolsError as error:
        return error.message


# Names and places


@pytest.mark.parametrize("name", ["../outside.safetensors", "{folder}/outside.safetensors", "..", "sub/x.safetensors"])
def test_an_index_cannot_name_files_elsewhere(model: Path, name: str) -> None:
    save_file({"secret": torch.ones(4)}, model / "outside.safetensors")
    path = model / "base" / "model.safetensors.index.json"
    document = json.loads(path.read_text())
    document["weight_map"]["secret"] = name.format(folder=model)
    path.write_text(json.dumps(document))
    error = refused(BadFile, "index and shards do not agree", model)
    assert "must be a plain file name" in error.problems[0]


def test_links_are_not_written_through(model: Path) -> None:
    (model / "elsewhere").mkdir()
    (model / "elsewhere" / "precious").write_text("precious")
    (model / "out").symlink_to("elsewhere")
    for force in (False, True):
        with pytest.raises(OutputRefused, match=r"exists already|symbolic link"):
            merge(model / "base", [model / "adapter"], model / "out", force=force)
    assert hashes(model / "elsewhere").keys() == {"precious"}
    assert (model / "out").is_symlink()


def test_an_output_that_is_an_input_lies_in_one_or_holds_one(model: Path) -> None:
    (model / "holder").mkdir()
    (model / "base").rename(model / "holder" / "base")
    base, before = model / "holder" / "base", hashes(model)
    for output in (
        base,
        base / "out",
        model / "holder",
        model / "adapter",
        model / "adapter" / "x",
        base / ".." / "base",
    ):
        with pytest.raises(OutputRefused, match=r"is, holds or lies in the input|exists already"):
            merge(base, [model / "adapter"], output, force=True)
    for output in (model / "adapter" / "adapter_model.safetensors", base / "config.json"):
        with pytest.raises(LoraToolsError):
            merge(base, [model / "adapter"], output, force=True)
    assert hashes(model) == before


def test_an_opened_adapter_is_an_input_too(model: Path) -> None:
    before = hashes(model)
    opened = dialects.open_adapter(model / "adapter")
    with pytest.raises(OutputRefused, match="is, holds or lies in the input"):
        merge(Checkpoint.open(model / "base"), [opened], model / "adapter", force=True)
    assert hashes(model) == before


def test_a_base_of_links_is_not_overwritten_where_its_files_lie(model: Path) -> None:
    (model / "links").mkdir()
    for path in (model / "base").iterdir():
        (model / "links" / path.name).symlink_to(path)
    before = hashes(model / "base")
    with pytest.raises(OutputRefused, match="is, holds or lies in the input"):
        merge(model / "links", [model / "adapter"], model / "base", force=True)
    assert hashes(model / "base") == before


EVIL = "model.layers.0.\x1b[2J\x07\u202eevil\x7f.q_proj"


def test_names_with_control_characters_reach_no_terminal(model: Path, shell: Callable[..., Result]) -> None:
    A, B = tiny.lora_factors()[Q0]
    state = {f"base_model.model.{EVIL}.lora_A.weight": A, f"base_model.model.{EVIL}.lora_B.weight": B}
    save_file(state, model / "adapter" / "adapter_model.safetensors")
    save_file({EVIL: torch.ones(2, 2)}, model / "evil.safetensors")
    for line in (
        "merge base adapter -o out",
        "inspect adapter --modules",
        "inspect evil.safetensors",
        "hash evil.safetensors",
    ):
        for extra in ("", " --json"):
            found = shell(f"loratools {line}{extra}", model)
            assert found.code in (0, 1), found
            assert "Traceback" not in found.err
            assert not any(ord(character) < 32 and character not in "\n\t" for character in found.out + found.err)
            assert not any(character in found.out + found.err for character in "\x7f\u202e\x9b")


def test_odd_names_are_names_all_the_same(model: Path) -> None:
    weights = tiny.llama_weights()
    weights["ключ \n\"'\\ \U0001f600"] = torch.arange(7.0)
    weights[""] = torch.ones(1)
    for path in (model / "base").iterdir():
        path.unlink()
    save_file(weights, model / "base" / "model.safetensors")
    merge(model / "base", [model / "adapter"], model / "out")
    merged, expected = (
        load_file(model / "out" / "model.safetensors"),
        tiny.merged_weights(weights, tiny.lora_factors(), 2.0),
    )
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


# Contents


def test_a_claim_of_a_giant_header(model: Path) -> None:
    raw = (model / "adapter" / "adapter_model.safetensors").read_bytes()
    (model / "adapter" / "adapter_model.safetensors").write_bytes((10**8).to_bytes(8, "little") + raw[8:])
    refused(BadFile, "a header of 100000000 bytes in a file of", model)


def test_tensors_that_share_bytes(model: Path) -> None:
    """A file whose factors overlap is no safetensors file."""
    path = model / "adapter" / "adapter_model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    names = [name for name in header if name.endswith("q_proj.lora_A.weight")]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    refused(BadFile, "overlaps another tensor|a hole before it", model)


def test_tied_factors_in_a_pickle_are_two_tensors(model: Path) -> None:
    """Sharing is plain in torch's own files: each name is read for itself."""
    factors = tiny.lora_factors()
    A, B = factors[Q0]
    tied = {module: (A, B) if module.endswith("q_proj") else pair for module, pair in factors.items()}
    state = {}
    for module, (A, B) in tied.items():
        state |= {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B}
    (model / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(state, model / "adapter" / "adapter_model.bin")
    merge(model / "base", [model / "adapter"], model / "out")
    expected = tiny.merged_weights(tiny.llama_weights(), tied, 2.0)
    checkpoint = Checkpoint.open(model / "out")
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor), name


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_that_are_not_finite(model: Path, part: str, value: float, dtype: torch.dtype) -> None:
    path = model / "adapter" / "adapter_model.safetensors"
    state = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    state[f"base_model.model.{Q0}.{part}.weight"][1, 2] = value
    save_file(state, path)
    error = refused(IncompatibleAdapter, "NaN or infinite", model)
    assert Q0 in error.message


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0,)])
def test_empty_factors(model: Path, shape: tuple[int, ...]) -> None:
    path = model / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    state[f"base_model.model.{Q0}.lora_A.weight"] = torch.zeros(shape)
    save_file(state, path)
    refused(BadFile, "empty or flattened", model)


def test_values_that_overflow_the_base_s_dtype(model: Path) -> None:
    weights = {name: tensor.half() for name, tensor in tiny.llama_weights().items()}
    for path in (model / "base").iterdir():
        path.unlink()
    save_file(weights, model / "base" / "model.safetensors")
    error = refused(IncompatibleAdapter, "not finite in F16", model, weights=[1e7])
    assert "model.layers." in error.message


def test_numbers_that_no_one_trains(model: Path) -> None:
    """A rank or an alpha from the config is never an allocation, and never silently infinite."""
    config = model / "adapter" / "adapter_config.json"
    edit(config, r=2**31 - 1)
    refused(BadFile, r"problem\(s\) in this adapter", model)
    edit(config, r=4, rank_pattern={Q0: 10**9})
    refused(BadFile, r"problem\(s\) in this adapter", model)
    edit(config, rank_pattern={}, lora_alpha=1e299)
    refused(LoraToolsError, "not finite|infinite", model)
    edit(config, lora_alpha=1e308)
    refused(BadFile, "lora_alpha: expected a number", model)


# Every one of these takes a backtracking matcher longer than anyone waits, on names as short as a model's.
SLOW = [
    "(a+)+$", "(.*)*x", "((q|q_)*)*!", "(.|\\w)*!", ".*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*!", "(.*){20}!",
    "(\\w*\\.?)(\\w*\\.?)(\\w*\\.?)(\\w*\\.?)(\\w*\\.?)(\\w*\\.?)(\\w*\\.?)(\\w*\\.?)(\\w*\\.?)(\\w*\\.?)(\\w*\\.?)!",
    "(.?){60}.{60}!", "(?=(.*.*.*.*.*.*.*.*.*.*.*.*)!)x", ".*?.*?.*?.*?.*?.*?.*?.*?.*?.*?.*?.*?.*?.*?!",
]  # fmt: skip


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
@pytest.mark.parametrize("pattern", SLOW)
def test_regular_expressions_that_never_end(model: Path, field: str, pattern: str) -> None:
    edit(model / "adapter" / "adapter_config.json", layers_to_transform=[0, 1])
    value: Any = {pattern: 4} if field.endswith("_pattern") and field != "layers_pattern" else pattern
    if field == "target_modules":
        edit(model / "adapter" / "adapter_config.json", layers_to_transform=None)
    edit(model / "adapter" / "adapter_config.json", **{field: value})
    said = outcome(lambda: dialects.open_adapter(model / "adapter"))
    assert isinstance(said, str) or said.updates.keys() == tiny.lora_factors().keys()


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
@pytest.mark.parametrize("depth", [100, 500, 900, 990, 100_000])
def test_json_nested_deeply(model: Path, name: str, depth: int) -> None:
    """Read where Python can read it and write it again, refused where not."""
    path = model / ("base" if name == "config.json" else "adapter") / name
    text = path.read_text().rstrip()
    path.write_text(text[:-1] + f', "deep": {"[" * depth}{"]" * depth}}}')
    said = outcome(lambda: merge(model / "base", [model / "adapter"], model / "out", dtype="F32"))
    if isinstance(said, str):
        assert "nested too deeply" in said
        assert not (model / "out").exists()
    else:
        json.loads((model / "out" / "config.json").read_text())
    assert not list(model.glob(".*"))


def test_a_hostile_config_of_the_base(model: Path) -> None:
    """Whatever config.json says: the right tensors, or a sentence."""
    chance = random.Random(3)
    path = model / "base" / "config.json"
    document = json.loads(path.read_text()) | {"text_config": {"model_type": "llama", "tie_word_embeddings": False}}
    document |= {"n_head": 4, "torch_dtype": "bfloat16", "quantization_config": {"quant_method": "x"}}
    adapters = {
        "q": tiny.lora_factors(),
        "fused": {"model.layers.0.self_attn.qkv_proj": (torch.ones(2, 64), torch.ones(128, 2))},
        "head": {"lm_head": (torch.ones(2, 64), torch.ones(128, 2))},
    }
    for name, factors in adapters.items():
        tiny.save_peft(model / f"adapter-{name}", factors)
    done = 0
    for number in range(150):
        path.write_text(json.dumps(mutate.json_value(document, chance)))
        name, dtype = chance.choice(sorted(adapters)), chance.choice([None, "F32"])
        decide = partial(prepare, model / "base", [model / f"adapter-{name}"], model / "out", dtype=dtype)
        if not isinstance(found := outcome(decide), str):
            done += 1
            touched = set(found.plan.touched())
            assert name != "q" or touched == {f"{module}.weight" for module in adapters["q"]}, number
    assert done >= 50


# The wrong base, and the same thing twice


def sealed(model: Path, algorithm: str = "blake3") -> Any:
    checkpoint = Checkpoint.open(model / "base")
    adapter = dialects.open_adapter(model / "adapter")
    names = [f"{module}.weight" for module in adapter.updates]
    tensors = {
        name: digest.tensor(spec.dtype, spec.shape, files.chunks(spec), algorithm)
        for name, spec in checkpoint.specs.items()
        if name in names
    }
    return replace(adapter, base=BaseIdentity("tiny", None, checkpoint.schema(algorithm), tensors))


def flip(model: Path, name: str) -> None:
    """Flip the lowest bit of one element of a tensor of the base."""
    spec = Checkpoint.open(model / "base").specs[name]
    with spec.file.open("r+b") as file:
        file.seek(spec.start + spec.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("algorithm", digest.ALGORITHMS)
def test_one_flipped_bit_in_a_touched_tensor_is_the_wrong_base(model: Path, algorithm: str) -> None:
    adapter = sealed(model, algorithm)
    merge(model / "base", [adapter], model / "right")
    flip(model, "model.norm.weight")  # untouched by the adapter, so its digests say nothing of it
    merge(model / "base", [adapter], model / "also right")
    flip(model, f"{Q0}.weight")
    error = refused(WrongBase, f"{Q0}.weight", model, adapter)
    assert "digest" in error.message
    merge(model / "base", [adapter], model / "unchecked", check_base="off")
    merge(model / "base", [adapter], model / "warned", check_base="warn")
    assert load_all(model / "unchecked").keys() == load_all(model / "right").keys()


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.specs}


def test_another_shape_and_another_model(model: Path) -> None:
    adapter = sealed(model)
    weights = tiny.llama_weights()
    for path in (model / "base").iterdir():
        path.unlink()
    save_file({name: tensor.float() for name, tensor in weights.items()}, model / "base" / "model.safetensors")
    refused(WrongBase, "digest", model, adapter)
    save_file(
        {name: tensor for name, tensor in weights.items() if "layers.1" not in name},
        model / "base" / "model.safetensors",
    )
    error = refused(IncompatibleAdapter, "does not fit this base model", model, adapter)
    assert any("model.layers.1.self_attn.q_proj" in problem for problem in error.problems)


def test_a_second_merge_of_the_same_adapter(model: Path) -> None:
    merge(model / "base", [model / "adapter"], model / "once")
    with pytest.raises(OutputRefused, match="already is a merge of this adapter"):
        merge(model / "once", [model / "adapter"], model / "twice")
    with pytest.raises(OutputRefused, match="already is a merge of this adapter"):
        merge(model / "once", [model / "adapter"], model / "twice", weights=[0.5])
    assert not (model / "twice").exists()
    tiny.save_peft(model / "other", tiny.lora_factors(seed=5))
    merge(model / "once", [model / "other"], model / "both")


# Bytes do not depend on how it was run


def three(model: Path) -> tuple[list[Path], list[float]]:
    tiny.save_peft(model / "other", tiny.lora_factors(tiny.SHAPES, rank=3, seed=2), alpha=5)
    tiny.save_peft(model / "third", tiny.lora_factors(tiny.SHAPES, rank=8, seed=3), alpha=1)
    return [model / "adapter", model / "other", model / "third"], [1.0, -0.5, 0.25]


@pytest.mark.parametrize("dtype", [None, "F32", "F16"])
def test_threads_and_the_order_of_adapters_do_not_show(model: Path, dtype: str | None) -> None:
    adapters, weights = three(model)
    found = []
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        for threads in (1, 2, 5):
            output = model / f"{order}{threads}"
            merge(
                model / "base", [adapters[i] for i in order], output, weights=[weights[i] for i in order],
                dtype=dtype, threads=threads, retention="off",
            )  # fmt: skip
            found.append({name: value for name, value in hashes(output).items() if name.endswith(".safetensors")})
    assert found[0].keys() == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("dtype", [None, "F32", "F64"])
def test_the_size_of_tiles_does_not_show(model: Path, dtype: str | None) -> None:
    """In what is rounded to 16 bits: not in an element of 10,000. Else: not beyond the last bits of the arithmetic."""
    adapters, weights = three(model)
    prepared = prepare(model / "base", adapters, model / "out", weights=weights, dtype=dtype, threads=1)
    found = []
    for tile in (1, 1000, 1 << 20):
        folder = model / f"tiles of {tile}"
        folder.mkdir()
        settings = Settings(prepared.digests, 2, retention="off", tile_bytes=tile)
        write_weights(prepared.plan, folder, settings, lambda _: None)
        found.append({name: tensor for path in sorted(folder.iterdir()) for name, tensor in load_file(path).items()})
    for other in found[:2]:
        assert other.keys() == found[2].keys()
        right, seen = (torch.cat([state[name].flatten() for name in sorted(state)]) for state in (found[2], other))
        assert int((right != seen).sum()) <= (right.numel() // 10_000 if dtype is None else right.numel())
        step = {None: 2.0**-7, "F32": 2.0**-20, "F64": 2.0**-48}[dtype]
        torch.testing.assert_close(seen, right, rtol=step, atol=step / 8)


def test_two_runs_give_the_same_files(model: Path) -> None:
    for name in ("a", "b"):
        merge(model / "base", [model / "adapter"], model / name, threads=1 if name == "a" else 3)
    assert hashes(model / "a") == hashes(model / "b")


def test_untouched_tensors_of_every_dtype_come_through(model: Path) -> None:
    """Sub-byte and 8-bit dtypes, empty tensors, and what no array library knows."""
    weights = tiny.llama_weights()
    raw = {"F4": 3, "F6_E2M3": 3, "F6_E3M2": 3, "F8_E8M0": 5, "F8_E5M2FNUZ": 5, "BOOL": 2, "U64": 16, "C64": 8}
    bits = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
    path = model / "base" / "model.safetensors"
    for old in (model / "base").iterdir():
        old.unlink()
    save_file(weights, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    extra = {}
    for i, (dtype, size) in enumerate(raw.items()):
        size_bits = bits.get(dtype, 8 * {"U64": 8, "C64": 8}.get(dtype, 1))
        extra[dtype] = bytes([17 * i + k & 255 for k in range(size)])
        header[dtype] = {
            "dtype": dtype,
            "shape": [size * 8 // size_bits],
            "data_offsets": [len(body), len(body) + size],
        }
        body += extra[dtype]
    header["none"] = {"dtype": "F6_E2M3", "shape": [0, 5], "data_offsets": [len(body), len(body)]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    for name, options in {"same": {}, "cut": {"max_shard_size": 9000}, "cast": {"dtype": "F32"}}.items():
        merge(model / "base", [model / "adapter"], model / name, **options)
        checkpoint = Checkpoint.open(model / name)
        for dtype, content in extra.items():
            spec = checkpoint.specs[dtype]
            assert (spec.dtype, bytes(files.read_bytes(spec))) == (dtype, content), (name, dtype)
        assert checkpoint.specs["none"].shape == (0, 5)
    with safe_open(model / "same" / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("model.norm.weight"), weights["model.norm.weight"])


def test_a_quantized_target_is_refused(model: Path) -> None:
    weights = tiny.llama_weights()
    weights[f"{Q0}.weight"] = torch.zeros(64, 64, dtype=torch.int8)
    for old in (model / "base").iterdir():
        old.unlink()
    save_file(weights, model / "base" / "model.safetensors")
    error = refused(IncompatibleAdapter, "quantized", model)
    assert error.problems == (f"{Q0}.weight: stored as I8 with shape (64, 64)",)


def test_an_unsupported_adapter_is_named(model: Path) -> None:
    edit(model / "adapter" / "adapter_config.json", use_qalora=True)
    error = refused(UnsupportedAdapter, "does not read this adapter", model)
    assert any("QA-LoRA" in problem for problem in error.problems)
