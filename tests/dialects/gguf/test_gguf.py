"""GGUF: names, permuted rows, one alpha, stacked experts; files are made and read with llama.cpp's own package."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loratools import dialects
from loratools.adapter import kinds
from loratools.adapter.model import Adapter, BaseIdentity
from loratools.adapter.naming.llama_cpp import Place, module_of, place
from loratools.adapter.naming.llama_cpp_table import TABLE
from loratools.errors import BadFile, LossyConversion, UnsupportedAdapter
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.lazy import LazyTensor
from tests.dialects.adapters import Q0, Q1, V0, factors, lora, opened, samples
from tests.dialects.contract import DialectContract

gguf: Any = pytest.importorskip("gguf")
HEADS = 2
LLAMA = {"base_config": {"model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": HEADS}}
QWEN = {"base_config": {"model_type": "qwen3_moe", "num_attention_heads": HEADS}}


def embedding() -> kinds.Update:
    parts = {"lora_embedding_A": torch.randn(4, 9), "lora_embedding_B": torch.randn(6, 4)}
    built: kinds.Update = kinds.get("embedding").build({n: LazyTensor.of(t) for n, t in parts.items()}, 2.0, 8.0)
    return built


def known(adapter: Adapter, settings: Mapping[str, Any] = LLAMA) -> Adapter:
    return replace(adapter, settings={**adapter.settings, **settings})


class TestContract(DialectContract):
    name = "gguf"
    refactors = True

    def adapters(self) -> Mapping[str, Adapter]:
        found = {label: known(adapter) for label, adapter in samples().items()}
        experts = {
            f"model.layers.0.mlp.experts.{i}.{n}_proj": lora(i, 2 + i % 2) for i in range(3) for n in ("up", "gate")
        }
        mixtral = {f"model.layers.0.block_sparse_moe.experts.{i}.w2": lora(i) for i in range(3)}
        found["experts"] = known(Adapter({**experts, Q0: lora(8)}), QWEN)
        found["mixtral"] = known(Adapter({**mixtral, Q0: lora(8)}))
        found["whole"] = known(Adapter({"model.embed_tokens": embedding(), "lm_head": lora(3), Q1: lora(4)}))
        return found

    def lossy(self) -> Mapping[str, tuple[Adapter, tuple[str, ...]]]:
        whole = {"lm_head.weight": LazyTensor.of(torch.ones(2, 2))}
        return {
            "whole": (known(Adapter({Q0: lora(1)}, whole)), ("lm_head.weight",)),
            "strange": (known(Adapter({Q0: lora(1), "vision_tower.x": lora(2)})), ("vision_tower.x",)),
            "experts": (
                known(Adapter({Q0: lora(1), "model.layers.0.mlp.experts.1.up_proj": lora(2)}), QWEN),
                ("model.layers.0.mlp.experts.1.up_proj",),
            ),
        }


class TestSingleFile(TestContract):
    suffix = ".gguf"


def interleaved(B: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Return rows as llama.cpp's converter permutes them (`LlamaModel.permute`)."""
    found: np.ndarray[Any, Any] = (
        B.reshape(heads, 2, B.shape[0] // heads // 2, *B.shape[1:]).swapaxes(1, 2).reshape(B.shape)
    )
    return found


def written(
    path: Path, tensors: Mapping[str, Any], architecture: str = "llama", alpha: Any = 8.0, **fields: Any
) -> Path:
    """Write a file as `convert_lora_to_gguf.py` does."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("general.type", fields.pop("general", "adapter"))
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    if alpha is not None:
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, value in fields.items():
        writer.add_uint32(name.replace("__", "."), value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(name: str, seed: int, heads: int | None = None) -> dict[str, Any]:
    A, B = (one.numpy() for one in factors(seed))
    return {f"{name}.weight.lora_a": A, f"{name}.weight.lora_b": interleaved(B, heads) if heads else B}


def check(update: kinds.Update, seed: int, scaling: float) -> None:
    A, B = factors(seed)
    assert update.scaling == scaling
    assert torch.equal(update.parts["lora_A.weight"].load(), A)
    assert torch.equal(update.parts["lora_B.weight"].load(), B)


def test_rows_of_q_and_k_come_back_from_llamas_order(tmp_path: Path) -> None:
    tensors = pair("blk.0.attn_q", 0, HEADS) | pair("blk.1.attn_k", 1, HEADS) | pair("blk.0.attn_v", 2)
    heads = {"llama__attention__head_count": HEADS, "llama__attention__head_count_kv": HEADS}
    adapter = dialects.open_adapter(written(tmp_path / "a.gguf", tensors, alpha=10.0, **heads))
    check(adapter.updates[Q0], 0, 2.5)
    check(adapter.updates["model.layers.1.self_attn.k_proj"], 1, 2.5)
    check(adapter.updates[V0], 2, 2.5)


def test_rows_of_qwen_stay(tmp_path: Path) -> None:
    adapter = dialects.open_adapter(written(tmp_path / "a.gguf", pair("blk.0.attn_q", 0), "qwen3"))
    check(adapter.updates[Q0], 0, 2.0)


def test_an_alpha_of_zero_means_a_scale_of_one(tmp_path: Path) -> None:
    for alpha, stated in ((0.0, "0.0"), (None, "missing")):
        adapter, warnings = opened(written(tmp_path / "a.gguf", pair("blk.0.attn_v", 0), alpha=alpha))
        check(adapter.updates[V0], 0, 1.0)
        assert [warning.partition(": ")[2] for warning in warnings] == [
            f"adapter.lora.alpha is {stated}; a scale of 1 is applied, as llama.cpp does"
        ]
        check(dialects.open_adapter(tmp_path / "a.gguf", alpha=6).updates[V0], 0, 1.5)
        check(dialects.open_adapter(tmp_path / "a.gguf", alpha=0).updates[V0], 0, 0.0)


def test_unknown_fields_of_an_adapter_are_said(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf", pair("blk.0.attn_v", 0), adapter__lora__gate=3, general__gate=3)
    _, warnings = opened(path)
    assert [warning.partition(": ")[2] for warning in warnings] == [
        "fields that are not known here, and have no effect: adapter.lora.gate"
    ]


def test_heads_are_asked_for_where_they_matter_and_only_there(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf", pair("blk.0.attn_q", 0, HEADS))
    with pytest.raises(UnsupportedAdapter) as refusal:
        dialects.open_adapter(path)
    assert refusal.value.problems[0] == "the rows of blk.0.attn_q are permuted by heads, and their number is not known"
    assert "--base" in str(refusal.value.hint)
    base = llama_base(tmp_path / "base")
    check(dialects.open_adapter(path, base=base).updates[Q0], 0, 2.0)


def llama_base(folder: Path, model_type: str = "llama", prefix: str = "model.") -> Checkpoint:
    import json

    from safetensors.torch import save_file

    folder.mkdir()
    names = ("self_attn.q_proj", "self_attn.v_proj")
    save_file({f"{prefix}layers.0.{name}.weight": torch.ones(12, 10) for name in names}, folder / "model.safetensors")
    config = {"model_type": model_type, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(folder)


def test_the_base_names_the_modules(tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base", "qwen3", "model.language_model.")
    path = written(tmp_path / "a.gguf", pair("blk.0.attn_q", 0), "qwen3")
    assert list(dialects.open_adapter(path, base=base).updates) == ["model.language_model.layers.0.self_attn.q_proj"]
    with pytest.raises(BadFile, match="its architecture is 'qwen2', that of the base 'qwen3'"):
        dialects.open_adapter(written(tmp_path / "b.gguf", pair("blk.0.attn_q", 0), "qwen2"), base=base)


def test_what_is_written_is_as_llama_cpp_expects(tmp_path: Path) -> None:
    """Read with llama.cpp's package: names, shapes, types, order of rows, and alpha over the last side of lora_b."""
    adapter = known(Adapter({Q0: lora(0, 4, 8), V0: lora(1, 2, 4), Q1: lora(2, 4, 8, 0.3)}, base=BaseIdentity("org/b")))
    dialects.save_adapter(adapter, tmp_path / "a.gguf", dialect="gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    said = {name: field.contents() for name, field in reader.fields.items() if "." in name and "GGUF" not in name}
    assert said == {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0,
        "llama.attention.head_count": 2, "llama.attention.head_count_kv": 2, "general.base_model.count": 1,
        "general.base_model.0.name": "org/b",
    }  # fmt: skip
    assert reader.fields["adapter.lora.alpha"].types == [gguf.GGUFValueType.FLOAT32]
    tensors = {one.name: one for one in reader.tensors}
    assert list(map(int, tensors["blk.0.attn_v.weight.lora_a"].shape)) == [10, 2]  # ne: [in, r]
    for tensor, module, heads in (("blk.0.attn_q", Q0, 2), ("blk.0.attn_v", V0, None), ("blk.1.attn_q", Q1, 2)):
        a, b = (np.array(tensors[f"{tensor}.weight.lora_{x}"].data) for x in "ab")
        delta = 8.0 / b.shape[1] * (b.astype(np.float64) @ a.astype(np.float64))
        wanted = adapter.updates[module].delta_weight().double().numpy()
        np.testing.assert_allclose(delta, interleaved(wanted, heads) if heads else wanted, rtol=1e-6, atol=1e-6)


def test_bf16_keeps_its_bytes(tmp_path: Path) -> None:
    adapter = known(Adapter({V0: lora(1, dtype=torch.bfloat16)}))
    dialects.save_adapter(adapter, tmp_path / "a.gguf", dialect="gguf")
    again = dialects.open_adapter(tmp_path / "a.gguf")
    for part, lazy in adapter.updates[V0].parts.items():
        assert again.updates[V0].parts[part].dtype == "BF16"
        assert torch.equal(again.updates[V0].parts[part].load(), lazy.load())


def test_without_the_architecture_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(LossyConversion, match="cannot say") as refusal:
        dialects.save_adapter(Adapter({Q0: lora(1)}), tmp_path / "a.gguf", dialect="gguf")
    assert refusal.value.problems[0].startswith("architecture: not known without the base model (--base)")
    with pytest.raises(UnsupportedAdapter, match="not known without the base"):
        dialects.save_adapter(Adapter({Q0: lora(1)}), tmp_path / "a.gguf", dialect="gguf", allow_loss=True)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"general": "model"}, BadFile, "general.type is 'model'"),
        ({"alpha": None, "adapter__lora__alpha": 8}, BadFile, "adapter.lora.alpha: expected a number, found 8"),
        ({"alpha": float("nan")}, BadFile, "adapter.lora.alpha: expected a number, found nan"),
        ({"architecture": "rwkv7"}, UnsupportedAdapter, "architecture 'rwkv7' is not known here"),
        ({"adapter__alora__invocation_tokens": 3}, UnsupportedAdapter, "activated LoRA"),
    ],
)
def test_files_that_are_no_plain_adapter(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        dialects.open_adapter(written(tmp_path / "a.gguf", pair("blk.0.attn_v", 0), **change))


def test_damaged_files_and_strange_names(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf", {**pair("blk.0.attn_v", 0), "what": np.ones((2, 2), np.float32)})
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(path)
    assert refusal.value.problems == ("what: expected a name that ends in .weight.lora_a or .weight.lora_b",)
    (tmp_path / "b.gguf").write_bytes(path.read_bytes()[:-400])
    with pytest.raises(BadFile, match=r"damaged|truncated"):
        dialects.open_adapter(tmp_path / "b.gguf")
    (tmp_path / "c.gguf").write_bytes(path.read_bytes()[:60])
    with pytest.raises(BadFile, match="damaged GGUF"):
        dialects.open_adapter(tmp_path / "c.gguf")


STRING, ARRAY, BYTE = 8, 9, 0
KEY = struct.pack("<Q", 1) + b"k"


@pytest.mark.parametrize(
    ("tensors", "fields", "body"),
    [
        (0, 1, KEY + struct.pack("<IIQ", ARRAY, ARRAY, 2**62) + bytes(64)),  # an array of empty arrays, without end
        (0, 1, KEY + struct.pack("<IIQ", ARRAY, STRING, 2**62) + bytes(64)),
        (0, 1, KEY + struct.pack("<IIQ", ARRAY, BYTE, 2**62) + bytes(64)),
        (0, 1, KEY + struct.pack("<IQ", STRING, 2**63) + bytes(64)),
        (0, 1, KEY + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 40 + bytes(64)),
        (0, 1, struct.pack("<Q", 2**63) + bytes(64)),
        (0, 2**62, bytes(200)),
        (2**62, 0, bytes(200)),
        (1, 0, KEY + struct.pack("<I", 2**31) + bytes(64)),
        (1, 0, KEY + struct.pack("<IQQIQ", 2, 2**62, 2**62, 0, 0) + bytes(64)),
    ],
)
def test_counts_that_a_file_cannot_hold_are_refused_at_once(
    tmp_path: Path, tensors: int, fields: int, body: bytes
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + body)
    with pytest.raises(BadFile, match="damaged GGUF"):
        dialects.open_adapter(path)


@pytest.mark.parametrize("architecture", TABLE)
def test_names_are_those_of_llama_cpp(architecture: str) -> None:
    by_name = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    theirs, known = gguf.get_tensor_name_map(by_name[architecture], 3), TABLE[architecture]
    wanted = dict(known.whole)
    for path, (prefix, modules) in known.kinds_of_layers().items():
        wanted |= {f"{path}.2.{name}": f"{prefix}.2.{tensor}" for name, tensor in modules.items()}
    for module, tensor in wanted.items():
        assert place(module, architecture) == Place(tensor), module
        assert place(str(module_of(tensor, architecture)), architecture) == Place(tensor)
        assert tensor in (theirs.get_name(module), theirs.get_name(module.removeprefix("transformer."))), module
    for stack in known.experts.values():
        assert Place(f"blk.1.{stack}", 4) == place(str(module_of(f"blk.1.{stack}", architecture, 4)), architecture)
        kinds = gguf.MODEL_TENSORS[by_name[architecture]]
        assert f"blk.{{bid}}.{stack}" in {gguf.TENSOR_NAMES[kind] for kind in kinds}
