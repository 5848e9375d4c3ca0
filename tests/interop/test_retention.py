"""What `merge` prints of a quantized base is what the real libraries read of its output, for every scheme."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.make import tiny

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


@pytest.mark.slow
def test_the_retention_printed_is_the_retention_measured(tmp_path: Path) -> None:
    for package in ("bitsandbytes", "compressed_tensors", "mlx_lm", "gguf", "peft"):
        pytest.importorskip(package)
    transformers = pytest.importorskip("transformers")
    from tests.benchmarks import retention

    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, tie_word_embeddings=True, max_position_embeddings=128,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    model.save_pretrained(tmp_path / "base")
    factors = {
        f"model.layers.{layer}.self_attn.{name}": (
            torch.randn(4, 128, generator=generator) * 0.02, torch.randn(rows, 4, generator=generator) * 0.02,
        )
        for layer in range(2)
        for name, rows in (("q_proj", 128), ("v_proj", 64))
    }  # fmt: skip
    tiny.save_peft(tmp_path / "adapter", factors)
    case = retention.Case(tmp_path / "base", tmp_path / "adapter")
    figures = retention.measure(case, tmp_path / "out", lambda weights: 0.0)
    merges = {(scheme, merge): values for scheme, of in figures.items() for merge, values in of.items()}
    printed = {key: values["printed"] for key, values in merges.items() if "printed" in values}
    assert len(printed) == 4 * len(retention.SCHEMES) - len(retention.GGUF)
    assert printed == pytest.approx({key: merges[key]["kept"] for key in printed}, abs=0.01)
    for (scheme, merge), share in printed.items():
        if merge != "requantize" or scheme.startswith(("FP8", "Q8_0")):
            assert 0.9 < share < 1.1, (scheme, merge)
        else:
            assert share < 0.8, (scheme, merge)
    for scheme, others in retention.OTHERS.items():
        for merge in others:
            assert figures[scheme][merge]["kept"] < 0.8
