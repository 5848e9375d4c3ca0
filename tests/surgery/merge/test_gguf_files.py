"""GGUF files as wholes: types and fields of the output, K-quants, tied heads, what is refused; llama.cpp judges.

`llama.cpp`'s own application of the adapter to the base is the oracle of a merged file, where its libraries are here.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import loratools
from loratools.errors import IncompatibleAdapter, UnsupportedAdapter
from tests.make import gguf_models, gguf_transformers, llama, tiny

gguf = pytest.importorskip("gguf")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

TOKENS = [1, 5, 9, 3, 77]
needs_llama_cpp = pytest.mark.skipif(llama.folder() is None, reason="llama.cpp's libraries are not here")


def inputs(folder: Path, kind: str, case: str = "llama", **config: Any) -> None:
    """Write base.gguf, whose rows are blocks of 256 numbers, and an adapter."""
    settings: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "tie_word_embeddings": True}
    made = gguf_transformers.model(gguf_transformers.KINDS[case], **settings)
    gguf_transformers.save(folder / "base.gguf", case, made, kind)
    with warnings.catch_warnings(action="ignore"):
        adapted = peft.get_peft_model(made, peft.LoraConfig(r=4, lora_alpha=8, **config))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("policy", ["dequantize", "partial", "requantize"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_llama_cpp_computes_what_it_computes_of_base_and_adapter(tmp_path: Path, kind: str, policy: Any) -> None:
    inputs(tmp_path, kind, target_modules="all-linear")
    base, adapter, out = tmp_path / "base.gguf", tmp_path / "adapter", tmp_path / "out.gguf"
    report = loratools.merge(base, adapter, out, quantized=policy, force=True)
    loratools.convert(adapter, tmp_path / "adapter.gguf", to="gguf", base=base)
    without, expected = llama.logits(base, TOKENS), llama.logits(base, TOKENS, tmp_path / "adapter.gguf")
    ours = llama.logits(out, TOKENS)
    error = np.linalg.norm(ours - expected) / np.linalg.norm(expected - without)
    # llama.cpp rounds the activations before codes, and Q4_0 keeps little of a small change.
    assert error < (1.0 if (kind, policy) == ("Q4_0", "requantize") else 0.15)
    types = {name: kind for name, (kind, _) in gguf_models.read(out).items()}
    touched = "F16" if policy != "requantize" else kind if kind in ("Q8_0", "Q4_0") else "Q8_0"
    assert types["blk.0.attn_q.weight"] == touched
    assert types["token_embd.weight"] == ("F16" if policy == "dequantize" else kind)
    assert types["blk.0.attn_norm.weight"] == "F32"
    told = any("ggml alone makes their types" in line for line in report.notes)
    assert told == (policy == "requantize" and kind in ("Q4_K", "Q6_K"))


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S"])
def test_types_that_ggml_makes_are_read(tmp_path: Path, kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    W = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)).numpy() * np.float32(0.05)
    codes = llama.quantized(W, number)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("blk.0.attn_v.weight", codes, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loratools.dequantize(tmp_path / "one.gguf", tmp_path / "plain.gguf")
    (_, read) = gguf_models.read(tmp_path / "plain.gguf")["blk.0.attn_v.weight"]
    wanted = gguf.quants.dequantize(codes, number).astype(np.float16).astype(np.float32)
    assert np.array_equal(read.numpy(), wanted)
    assert np.linalg.norm(read.numpy() - W) < 0.35 * np.linalg.norm(W)


@pytest.mark.parametrize("kind", ["F16", "F32"])
def test_dtype_casts_matrices_and_leaves_vectors(tmp_path: Path, kind: str) -> None:
    inputs(tmp_path, kind, target_modules=["q_proj"])
    out = tmp_path / "out.gguf"
    loratools.merge(tmp_path / "base.gguf", tmp_path / "adapter", out, dtype="bf16")
    tensors = gguf_models.read(out)
    assert {kind for kind, W in tensors.values() if W.ndim > 1} == {"BF16"}
    assert {kind for kind, W in tensors.values() if W.ndim == 1} == {"F32"}
    fields = gguf.GGUFReader(out).fields
    assert (fields["general.file_type"].contents(), fields["general.quantization_version"].contents()) == (32, 2)


def test_a_tied_head_is_untied_when_asked(tmp_path: Path) -> None:
    inputs(tmp_path, "F16", target_modules=["q_proj", "lm_head"])
    base, adapter = tmp_path / "base.gguf", tmp_path / "adapter"
    with pytest.raises(IncompatibleAdapter, match="tied"):
        loratools.merge(base, adapter, tmp_path / "out.gguf")
    loratools.merge(base, adapter, tmp_path / "out.gguf", tied="untie")
    before, after = gguf_models.read(base), gguf_models.read(tmp_path / "out.gguf")
    assert list(after) == [*before, "output.weight"]
    assert torch.equal(after["token_embd.weight"][1], before["token_embd.weight"][1])
    assert not torch.equal(after["output.weight"][1], before["token_embd.weight"][1])
    if llama.folder():
        assert np.isfinite(llama.logits(tmp_path / "out.gguf", TOKENS)).all()


def test_norms_trained_whole_take_their_place_and_permuted_rows_do_not(tmp_path: Path) -> None:
    inputs(tmp_path, "F16", target_modules=["v_proj"], modules_to_save=["input_layernorm"])
    loratools.merge(tmp_path / "base.gguf", tmp_path / "adapter", tmp_path / "out.gguf")
    after = gguf_models.read(tmp_path / "out.gguf")
    assert after["blk.0.attn_norm.weight"][0] == "F32"
    assert after["blk.0.attn_norm.weight"][1].abs().max() < 0.5  # the base's are near 1
    refused = tmp_path / "refused"
    refused.mkdir()
    inputs(refused, "F16", target_modules=["v_proj"], modules_to_save=["q_proj"])
    with pytest.raises(IncompatibleAdapter) as refusal:
        loratools.merge(refused / "base.gguf", refused / "adapter", refused / "out.gguf")
    assert "the converter puts its rows in another order" in refusal.value.problems[0]


def test_norms_to_which_one_is_added_are_refused(tmp_path: Path) -> None:
    inputs(tmp_path, "F16", "gemma", target_modules=["v_proj"], modules_to_save=["input_layernorm"])
    with pytest.raises(IncompatibleAdapter) as refusal:
        loratools.merge(tmp_path / "base.gguf", tmp_path / "adapter", tmp_path / "out.gguf")
    assert "the converter adds 1 to the weights of norms" in refusal.value.problems[0]


def test_architecture_and_heads_come_from_a_gguf_base(tmp_path: Path) -> None:
    inputs(tmp_path, "Q8_0", target_modules="all-linear")
    base, adapter = tmp_path / "base.gguf", tmp_path / "adapter"
    there = loratools.convert(adapter, tmp_path / "adapter.gguf", to="gguf", base=base)
    back = loratools.convert(tmp_path / "adapter.gguf", tmp_path / "back", to="peft", base=base)
    assert (there.modules, back.digest) == (14, there.digest)
    for each in (adapter, tmp_path / "adapter.gguf"):
        loratools.merge(base, each, tmp_path / f"{each.name}-merged.gguf")
    one, other = (gguf_models.read(tmp_path / f"{name}-merged.gguf") for name in ("adapter", "adapter.gguf"))
    assert all(torch.equal(W, other[name][1]) for name, (_, W) in one.items())


def test_an_adapter_of_the_files_own_names_has_its_rows(tmp_path: Path) -> None:
    inputs(tmp_path, "F32", target_modules=["q_proj"])
    base, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    loratools.merge(base, tmp_path / "adapter", out)
    loratools.extract_svd(base, out, tmp_path / "extracted")
    loratools.merge(base, tmp_path / "extracted", tmp_path / "again.gguf")
    wanted, ours = gguf_models.read(out), gguf_models.read(tmp_path / "again.gguf")
    torch.testing.assert_close(ours["blk.0.attn_q.weight"][1], wanted["blk.0.attn_q.weight"][1], rtol=1e-4, atol=1e-5)


def test_what_a_file_is_and_that_nothing_is_taken_out_of_it(tmp_path: Path) -> None:
    inputs(tmp_path, "Q8_0", target_modules=["q_proj"])
    base = tmp_path / "base.gguf"
    summary = loratools.inspect(base)
    assert (summary.architecture, summary.quantization) == ("llama", "GGUF, Q8_0")
    loratools.merge(base, tmp_path / "adapter", tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["base.gguf"]
    with pytest.raises(UnsupportedAdapter, match="not taken out of a GGUF file"):
        loratools.unmerge(tmp_path / "folder" / "base.gguf", tmp_path / "adapter", tmp_path / "back.gguf")


@pytest.mark.parametrize("policy", ["dequantize", "partial", "requantize"])
def test_an_adapter_that_changes_no_codes_leaves_them_all(tmp_path: Path, policy: Any) -> None:
    base = gguf_models.save_llama(tmp_path / "base.gguf", tiny.llama_weights())
    norm = torch.full((tiny.HIDDEN,), 1.5)
    (tmp_path / "lora").mkdir()
    save_file({"base_model.model.model.norm.weight": norm}, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": [], "modules_to_save": ["norm"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    loratools.merge(base, tmp_path / "lora", tmp_path / "out.gguf", quantized=policy)
    before, after = gguf_models.read(base), gguf_models.read(tmp_path / "out.gguf")
    assert torch.equal(after["output_norm.weight"][1], norm)
    assert {kind for kind, W in after.values() if W.ndim == 2} == {"F16" if policy == "dequantize" else "Q8_0"}
    if policy != "dequantize":
        assert all(torch.equal(after[name][1], W) for name, (_, W) in before.items() if name != "output_norm.weight")
