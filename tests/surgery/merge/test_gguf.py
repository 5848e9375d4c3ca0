"""A GGUF base is merged into a GGUF file: names, rows of q and k, types, fields; judged by gguf's reader in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import loratools
from tests.make import gguf_models, tiny

gguf = pytest.importorskip("gguf")


def inputs(folder: Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Write base.gguf and an adapter for all linear layers; return weights and ΔW under transformers' names."""
    weights = tiny.llama_weights()
    gguf_models.save_llama(folder / "base.gguf", weights, kind)
    factors = tiny.lora_factors(tiny.SHAPES)
    tiny.save_peft(folder / "adapter", factors)
    deltas = {f"{module}.weight": 2 * (B.double() @ A.double()) for module, (A, B) in factors.items()}
    return weights, deltas


@pytest.mark.parametrize("kind", ["F16", "F32", "Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("policy", ["dequantize", "partial", "requantize"])
def test_merged_tensors_are_base_plus_adapter(tmp_path: Path, kind: str, policy: str) -> None:
    weights, deltas = inputs(tmp_path, kind)
    out = tmp_path / "out.gguf"
    report = loratools.merge(tmp_path / "base.gguf", tmp_path / "adapter", out, quantized=policy, force=True)
    before, after = gguf_models.read(tmp_path / "base.gguf"), gguf_models.read(out)
    assert list(before) == list(after)
    assert report.changed == len(deltas) == 14
    for name in weights:
        stored = gguf_models.name_of(name)
        (old_type, W), (new_type, merged) = before[stored], after[stored]
        coded = old_type not in ("F16", "F32")
        if name in deltas:
            exact = W.double() + gguf_models.in_file_order(name, deltas[name])
            expected = exact.float()
            if coded and policy == "requantize":
                ggml = gguf.GGMLQuantizationType[old_type]
                expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(expected.numpy(), ggml), ggml))
                assert new_type == old_type
                assert (merged != expected).double().mean() < 0.05  # a scale to its other neighbour moves a block
                continue
            assert new_type == ("F16" if coded else old_type)
            rounded = exact.half().float() if new_type == "F16" else expected
            assert (merged != rounded).double().mean() <= (1e-3 if new_type == "F16" else 1)
            torch.testing.assert_close(merged.double(), exact, rtol=2**-10, atol=1e-7)
        elif policy == "dequantize" and coded:
            assert new_type == "F16"
            assert torch.equal(merged, W.half().float())
        else:
            assert new_type == old_type
            assert torch.equal(merged, W)


@pytest.mark.parametrize("kind", ["F16", "F32", "BF16"])
def test_codes_are_made_anew_from_an_original_in_gguf(tmp_path: Path, kind: str) -> None:
    weights, deltas = inputs(tmp_path, "Q4_0")
    original, out = gguf_models.save_llama(tmp_path / "original.gguf", weights, kind), tmp_path / "out.gguf"
    loratools.merge(tmp_path / "base.gguf", tmp_path / "adapter", out, quantized="requantize", original=original)
    Q4, before, after = gguf.GGMLQuantizationType.Q4_0, gguf_models.read(original), gguf_models.read(out)
    for name, delta in deltas.items():
        exact = before[gguf_models.name_of(name)][1].double() + gguf_models.in_file_order(name, delta)
        expected = gguf.quants.dequantize(gguf.quants.quantize(exact.float().numpy(), Q4), Q4)
        kept, merged = after[gguf_models.name_of(name)]
        assert kept == "Q4_0"
        assert (merged != torch.from_numpy(expected)).double().mean() < 0.05


def test_an_original_of_a_gguf_file_in_other_names_is_refused(tmp_path: Path) -> None:
    weights, _ = inputs(tmp_path, "Q4_0")
    tiny.save_llama(tmp_path / "original", weights)
    with pytest.raises(loratools.errors.WrongBase, match="the original of a GGUF base has to be one"):
        loratools.merge(
            tmp_path / "base.gguf", tmp_path / "adapter", tmp_path / "out.gguf", quantized="requantize",
            original=tmp_path / "original",
        )  # fmt: skip


def test_fields_stay_and_the_type_of_the_file_follows(tmp_path: Path) -> None:
    inputs(tmp_path, "Q8_0")
    loratools.merge(tmp_path / "base.gguf", tmp_path / "adapter", tmp_path / "out.gguf")
    before, after = (gguf.GGUFReader(tmp_path / name).fields for name in ("base.gguf", "out.gguf"))
    changed = {key for key in before if before[key].contents() != after[key].contents()} - {"GGUF.kv_count"}
    assert changed == {"general.file_type"}
    assert after["general.file_type"].contents() == 1
    assert set(after) - set(before) == {"loratools.record"}
    with pytest.raises(loratools.errors.OutputRefused, match="already is a merge of this adapter"):
        loratools.merge(tmp_path / "out.gguf", tmp_path / "adapter", tmp_path / "twice.gguf")


@pytest.mark.parametrize("policy", ["dequantize", "partial", "requantize"])
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_verify_judges_the_file(tmp_path: Path, kind: str, policy: str) -> None:
    inputs(tmp_path, kind)
    out = tmp_path / "out.gguf"
    loratools.merge(tmp_path / "base.gguf", tmp_path / "adapter", out, quantized=policy)
    assert loratools.verify(out, tmp_path / "base.gguf", tmp_path / "adapter").ok
    data = bytearray(out.read_bytes())
    spec = loratools.Checkpoint.open(out).specs["blk.0.attn_q.weight"]
    data[spec.start : spec.stop] = data[spec.start : spec.stop][::-1]
    out.write_bytes(bytes(data))
    assert not loratools.verify(out, tmp_path / "base.gguf", tmp_path / "adapter").ok


def test_a_gguf_model_is_inspected_hashed_and_written_in_16_bit(tmp_path: Path) -> None:
    inputs(tmp_path, "Q4_0")
    summary = loratools.inspect(tmp_path / "base.gguf")
    assert summary.dtypes["Q4_0"].tensors == 16
    loratools.dequantize(tmp_path / "base.gguf", tmp_path / "plain.gguf", verify=True)
    before, after = gguf_models.read(tmp_path / "base.gguf"), gguf_models.read(tmp_path / "plain.gguf")
    assert all(torch.equal(after[name][1], W.half().float()) for name, (kind, W) in before.items() if kind == "Q4_0")
    assert loratools.hash(tmp_path / "plain.gguf", "root").root != loratools.hash(tmp_path / "base.gguf", "root").root


def test_the_table_of_types_is_that_of_the_library() -> None:
    from loratools.storage.gguf.types import TYPES

    theirs = {kind.name: (int(kind), *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    ours = {name: (kind.number, kind.block, kind.nbytes) for name, kind in TYPES.items()}
    assert ours == {name: theirs[name] for name in ours}
    assert theirs.keys() - ours.keys() == {"Q8_1", "Q8_K"}  # of activations
