"""AWQ's GEMM layout: packed in autoawq's order, read as the formula says; and merged by every policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import loratools
from loratools.errors import UnsupportedAdapter
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import encodings, logical
from tests.storage.codecs.recode import K, Q, merges, read, recoded, saved_lora
from tests.storage.codecs.test_gptq import COLUMNS, ROWS, Tensors

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # autoawq, WQLinear_GEMM.from_linear: the row that nibble i holds


def pack_columns(q: torch.Tensor) -> torch.Tensor:
    """Pack eight columns of codes in a word, as autoawq's GEMM does."""
    eights = q.long().view(len(q), -1, 8)
    words = sum(eights[:, :, row] << 4 * i for i, row in enumerate(ORDER))
    assert isinstance(words, torch.Tensor)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def awq_module(size: int = 32, seed: int = 0, shape: tuple[int, int] = (ROWS, COLUMNS)) -> tuple[Tensors, torch.Tensor]:
    """Return the parts of a module, and its weight in float64."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    q = torch.randint(0, 16, (columns, rows), generator=generator)
    z = torch.randint(0, 16, (columns // size, rows), generator=generator)
    scales = (torch.rand(columns // size, rows, generator=generator) * 1e-2).half()
    W = (q - z.repeat_interleave(size, 0)).double() * scales.double().repeat_interleave(size, 0)
    return {"qweight": pack_columns(q), "qzeros": pack_columns(z), "scales": scales}, W.T.contiguous()


def awq_base(folder: Path, modules: dict[str, Tensors], **stated: Any) -> Path:
    """Write a base of these modules and a plain head."""
    tensors = {f"{path}.{part}": tensor for path, parts in modules.items() for part, tensor in parts.items()}
    tensors["lm_head.weight"] = torch.ones(10, COLUMNS, dtype=torch.float16)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantization = {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None, **stated,
    }  # fmt: skip
    config = {"model_type": "llama", "torch_dtype": "float16", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("size", [32, 48, COLUMNS])
def test_a_weight_reads_as_the_formula_says(tmp_path: Path, size: int) -> None:
    parts, W = awq_module(size)
    base = awq_base(tmp_path / "base", {Q: parts}, group_size=-1 if size == COLUMNS else size)
    assert torch.equal(read(base).double(), W)
    [encoding] = encodings(logical(Checkpoint.open(base))).values()
    assert (encoding.bits, encoding.group) == (4, (1, size))


@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:auto_awq", None])
def test_auto_round_packs_as_either(tmp_path: Path, packing: str | None) -> None:
    from tests.storage.codecs.test_gptq import gptq_module

    parts, W = awq_module() if packing and packing.endswith("awq") else gptq_module(4, 32)
    parts.pop("g_idx", None)
    stated = {"quant_method": "auto-round", "version": None, **({"packing_format": packing} if packing else {})}
    base = awq_base(tmp_path / "base", {Q: parts}, **stated)
    assert torch.equal(read(base).double(), W)
    saved_lora(tmp_path / "lora", Q, (ROWS, COLUMNS))
    loratools.merge(base, tmp_path / "lora", tmp_path / "part", quantized="partial")
    config = json.loads((tmp_path / "part" / "config.json").read_text())["quantization_config"]
    assert config["extra_config"] == {Q: {"bits": 16, "data_type": "fp"}}


def test_other_layouts_are_refused_by_name(tmp_path: Path) -> None:
    parts, _ = awq_module()
    cases: dict[str, tuple[Tensors, dict[str, Any]]] = {
        "AWQ: its layout is gemv,": (parts, {"version": "gemv"}),
        "AWQ: its layout is gemv_fast,": (parts, {"version": "GEMV_FAST"}),
        "AWQ: its layout is llm-awq,": (parts, {"backend": "llm-awq"}),
        "AWQ: its layout is marlin,": (parts, {"version": None, "format": "marlin"}),
        "it has 8 bits": (parts, {"bits": 8}),
        "config.json says groups of 64, its tensors have 32": (parts, {"group_size": 64}),
        "do not fit each other": (parts | {"scales": parts["scales"][:2].contiguous()}, {}),
        "no words and floats": (parts | {"qweight": parts["qweight"].short()}, {}),
        "qzeros is missing": ({part: parts[part] for part in ("qweight", "scales")}, {}),
        "AutoRound: its packing_format is auto_round:fp8": (
            parts, {"quant_method": "auto-round", "packing_format": "auto_round:fp8"},
        ),
    }  # fmt: skip
    for i, (match, (changed, stated)) in enumerate(cases.items()):
        with pytest.raises(UnsupportedAdapter, match=match):
            logical(Checkpoint.open(awq_base(tmp_path / f"{i}", {Q: changed}, **stated)))


def test_no_change_gives_every_byte_again(tmp_path: Path) -> None:
    parts, _ = awq_module()
    base = awq_base(tmp_path / "base", {Q: parts})
    [encoding] = encodings(logical(Checkpoint.open(base))).values()
    W = read(base)
    made, values = recoded(encoding, W.numpy(), "own")
    assert set(made) == {"qweight"}
    assert np.array_equal(made["qweight"], parts["qweight"].numpy())
    assert np.array_equal(values, W.numpy())


def test_fresh_scales_are_autoawqs(tmp_path: Path) -> None:
    """autoawq's pseudo_quantize_tensor and WQLinear_GEMM.from_linear, in float64."""
    parts, _ = awq_module()
    [encoding] = encodings(logical(Checkpoint.open(awq_base(tmp_path / "base", {Q: parts})))).values()
    W = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    W[0, :32] = 0.25
    made, values = recoded(encoding, W.numpy(), "fresh")
    w = W.double().view(ROWS, -1, 32)
    scales = (w.amax(-1) - w.amin(-1)).clamp(min=1e-5) / 15
    zeros = (-(w.amin(-1) / scales).round()).clamp(0, 15)
    half = scales.half()
    codes = ((w + (zeros * half.double())[..., None]) / half.double()[..., None]).round().clamp(0, 15)
    assert np.array_equal(made["scales"], half.T.numpy())
    assert np.array_equal(made["qzeros"], pack_columns(zeros.T.contiguous()).numpy())
    found = read(awq_base(tmp_path / "again", {Q: {part: torch.from_numpy(made[part].copy()) for part in made}}))
    assert np.array_equal(found.numpy(), values)
    wanted = ((codes - zeros[..., None]) * half.double()[..., None]).view(ROWS, COLUMNS)
    assert (found.double() != wanted).double().mean() <= 1e-3


def test_merges_by_every_policy(tmp_path: Path) -> None:
    (of_q, q), (of_k, k) = awq_module(), awq_module(seed=1)
    base = awq_base(tmp_path / "base", {Q: of_q, K: of_k})
    delta = saved_lora(tmp_path / "lora", Q, (ROWS, COLUMNS))
    stated = merges(base, tmp_path / "lora", q + delta, k)
    assert set(stated["modules_to_not_convert"]) == {Q, "lm_head"}
