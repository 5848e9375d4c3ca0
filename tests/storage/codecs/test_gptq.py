"""GPTQ: packed as AutoGPTQ and GPTQModel pack, read as the formula in float64 says; and merged by every policy."""

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

Tensors = dict[str, torch.Tensor]
COLUMNS, ROWS = 96, 64


def pack_rows(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes along their first side as AutoGPTQ does: 3 bits as 10, 1, 10, 1, 10 codes in three words."""
    packed = []
    codes = q.long().tolist()
    width = q.shape[1]
    if bits != 3:
        each = 32 // bits
        for start in range(0, len(codes), each):
            rows = codes[start : start + each]
            packed.append([sum(row[n] << (bits * j) for j, row in enumerate(rows)) for n in range(width)])
    else:
        for start in range(0, len(codes), 32):
            rows = [*codes[start : start + 32], *([[0] * width] * max(0, start + 32 - len(codes)))]
            for n in range(width):
                x = [row[n] for row in rows]
                first = sum(x[j] << 3 * j for j in range(10)) | x[10] << 30
                second = x[10] >> 2 | sum(x[11 + j] << 3 * j + 1 for j in range(10)) | x[21] << 31
                third = x[21] >> 1 | sum(x[22 + j] << 3 * j + 2 for j in range(10))
                if not n:
                    packed += [[], [], []]
                for row, value in zip(packed[-3:], (first, second, third), strict=True):
                    row.append(value)
    words = torch.tensor(packed, dtype=torch.int64) & 0xFFFFFFFF
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def gptq_module(
    bits: int, size: int, *, act_order: bool = False, sym: bool = False, v2: bool = False, seed: int = 0,
    shape: tuple[int, int] = (ROWS, COLUMNS),
) -> tuple[Tensors, torch.Tensor]:  # fmt: skip
    """Return the parts of a module, and its weight in float64."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    groups = -(-columns // size)
    q = torch.randint(0, 1 << bits, (columns, rows), generator=generator)
    z = torch.randint(1, 1 << bits, (groups, rows), generator=generator)
    z = torch.full_like(z, 1 << bits - 1) if sym else z
    scales = (torch.rand(groups, rows, generator=generator) * 1e-2).half()
    g_idx = torch.arange(columns) // size
    g_idx = g_idx[torch.randperm(columns, generator=generator)] if act_order else g_idx
    stored = pack_rows((z - (0 if v2 else 1)).T, bits).T
    W = scales.double()[g_idx] * (q - z[g_idx]).double()
    parts = {"qweight": pack_rows(q, bits), "qzeros": stored.contiguous(), "scales": scales, "g_idx": g_idx.int()}
    return parts, W.T.contiguous()


def gptq_base(folder: Path, modules: dict[str, Tensors], **stated: Any) -> Path:
    """Write a base of these modules and a plain head."""
    tensors = {f"{path}.{part}": tensor for path, parts in modules.items() for part, tensor in parts.items()}
    tensors["lm_head.weight"] = torch.ones(10, COLUMNS, dtype=torch.float16)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False, **stated}
    config = {"model_type": "llama", "torch_dtype": "float16", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [32, 64, COLUMNS])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("v2", [False, True])
def test_a_weight_reads_as_the_formula_says(tmp_path: Path, bits: int, size: int, act_order: bool, v2: bool) -> None:
    """Also a last group that is ragged (64 of 96 columns), and one group a row."""
    parts, W = gptq_module(bits, size, act_order=act_order, v2=v2)
    form = {"checkpoint_format": "gptq_v2"} if v2 else {}
    stated = -1 if size == COLUMNS else size
    base = gptq_base(tmp_path / "base", {Q: parts}, bits=bits, group_size=stated, desc_act=act_order, **form)
    assert torch.equal(read(base).double(), W)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_point_that_readers_take_for_three_numbers_is_refused(tmp_path: Path, bits: int) -> None:
    """Stored less one, the largest code is 2^bits to vLLM, 0 to AutoGPTQ, and a carry into the next to GPTQModel."""
    parts, _ = gptq_module(bits, 32, seed=3)
    top = (1 << bits) - 1
    stored = torch.full((ROWS, 3), top - 1)
    of_v2 = gptq_base(tmp_path / "v2", {Q: parts}, bits=bits, checkpoint_format="gptq_v2")
    for column, refused in ((None, False), (ROWS - 1, True)):
        if column is not None:
            stored[column, 1] = top
        qzeros = pack_rows(stored, bits).T.contiguous()
        base = gptq_base(tmp_path / f"base{column}", {Q: {**parts, "qzeros": qzeros}}, bits=bits)
        if not refused:
            assert read(base).isfinite().all()
            continue
        with pytest.raises(UnsupportedAdapter, match=f"{Q} is quantized with GPTQ: a zero point is stored as {top}"):
            read(base)
    assert read(of_v2).isfinite().all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_and_without_g_idx(tmp_path: Path, bits: int) -> None:
    parts, W = gptq_module(bits, 32, sym=True)
    del parts["g_idx"]
    base = gptq_base(tmp_path / "base", {Q: parts}, bits=bits, sym=True)
    assert torch.equal(read(base).double(), W)
    [encoding] = encodings(logical(Checkpoint.open(base))).values()
    assert (encoding.label, encoding.bits, encoding.group) == (f"GPTQ {bits} bit, groups of 32", bits, (1, 32))


def test_modules_may_differ_where_config_says_so(tmp_path: Path) -> None:
    (of_q, q), (of_k, k) = gptq_module(8, 96), gptq_module(4, 32, seed=1)
    modules = {Q: of_q, K: of_k}
    dynamic = {r"+:.*q_proj": {"bits": 8, "group_size": -1}, r"-:.*v_proj": {}}
    base = gptq_base(tmp_path / "base", modules, dynamic=dynamic)
    assert torch.equal(read(base).double(), q)
    assert torch.equal(read(base, K).double(), k)
    with pytest.raises(UnsupportedAdapter, match=f"{Q} is quantized with GPTQ: config.json says 4 bits, .* have 8"):
        logical(Checkpoint.open(gptq_base(tmp_path / "other", modules)))


def test_sides_that_are_no_multiples_of_a_word(tmp_path: Path) -> None:
    """Rows of zero points and columns of codes end within a word: 40 rows, 100 columns of 3 bits."""
    for bits in (2, 3, 4, 8):
        parts, W = gptq_module(bits, 50, shape=(40, 100))
        stored = -(-100 * bits // 32)
        parts["qweight"], parts["qzeros"] = parts["qweight"][:stored], parts["qzeros"][:, : -(-40 * bits // 32)]
        parts = {part: tensor.contiguous() for part, tensor in parts.items()}
        base = gptq_base(tmp_path / f"base{bits}", {Q: parts}, bits=bits, group_size=50)
        assert torch.equal(read(base).double(), W)


def test_what_does_not_agree_is_refused(tmp_path: Path) -> None:
    parts, _ = gptq_module(4, 32)
    cases: dict[str, tuple[Tensors, dict[str, Any]]] = {
        "its format is marlin": (parts, {"checkpoint_format": "marlin"}),
        "its format is gptq, gptq_v2": (parts, {"checkpoint_format": "gptq", "format": "gptq_v2"}),
        r"3 groups do not fit 96 columns and the group_size 64": (parts, {"group_size": 64}),
        "do not tell how many bits": (parts | {"qweight": parts["qweight"][:7].contiguous()}, {}),
        "do not fit each other": (parts | {"scales": parts["scales"][:2].contiguous()}, {}),
        "no words and floats": (parts | {"qweight": parts["qweight"].float()}, {}),
        "qzeros is missing": ({part: parts[part] for part in parts if part != "qzeros"}, {}),
        "config.json says 'fp8'": (parts, {"quant_method": "fp8"}),
        "desc_act true, and the g_idx .* is missing": (
            {part: parts[part] for part in parts if part != "g_idx"},
            {"desc_act": True},
        ),
        "sides of a matrix": (parts | {"scales": parts["scales"][0].contiguous()}, {}),
    }
    for i, (match, (changed, stated)) in enumerate(cases.items()):
        with pytest.raises(UnsupportedAdapter, match=match):
            logical(Checkpoint.open(gptq_base(tmp_path / f"{i}", {Q: changed}, **stated)))
    shuffled = torch.arange(COLUMNS).flip(0).int() // 32
    for i, (match, g_idx) in enumerate({"name each of the 3 groups": shuffled + 1, "desc_act false": shuffled}.items()):
        with pytest.raises(UnsupportedAdapter, match=match):
            read(gptq_base(tmp_path / f"g{i}", {Q: parts | {"g_idx": g_idx}}))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("v2", [False, True])
def test_no_change_gives_every_byte_again(tmp_path: Path, bits: int, size: int, act_order: bool, v2: bool) -> None:
    parts, W = gptq_module(bits, size, act_order=act_order, v2=v2)
    parts["scales"][0, :3] = 0  # codes that all stand for 0
    form = {"checkpoint_format": "gptq_v2"} if v2 else {}
    base = gptq_base(tmp_path / "base", {Q: parts}, bits=bits, group_size=size, desc_act=act_order, **form)
    [encoding] = encodings(logical(Checkpoint.open(base))).values()
    W = read(base)
    for draw in (None, np.random.default_rng(0).random):
        made, values = recoded(encoding, W.numpy(), "own", draw)
        assert set(made) == {"qweight"}
        assert np.array_equal(made["qweight"], parts["qweight"].numpy())
        assert np.array_equal(values, W.numpy())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("v2", [False, True])
def test_fresh_scales_round_to_the_nearest(tmp_path: Path, bits: int, sym: bool, act_order: bool, v2: bool) -> None:
    """GPTQModel's plain rounding, in float64: zero at a code, half a step off at most, and one file that reads back."""
    parts, _ = gptq_module(bits, 32, act_order=act_order, v2=v2)
    form = {"checkpoint_format": "gptq_v2"} if v2 else {}
    stated = {"bits": bits, "sym": sym, "desc_act": act_order, **form}
    base = gptq_base(tmp_path / "base", {Q: parts}, **stated)
    [encoding] = encodings(logical(Checkpoint.open(base))).values()
    W = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    W[:, :32] = W[:, :32].abs() if not sym else W[:, :32]
    made, values = recoded(encoding, W.numpy(), "fresh")
    again = {part: torch.from_numpy(made[part].copy()) for part in made} | {"g_idx": parts["g_idx"]}
    assert {part: (t.dtype, t.shape) for part, t in again.items()} == {p: (t.dtype, t.shape) for p, t in parts.items()}
    assert np.array_equal(read(gptq_base(tmp_path / "again", {Q: again}, **stated)).numpy(), values)
    top = (1 << bits) - 1
    for group in range(3):
        columns = parts["g_idx"] == group
        w = W[:, columns].double()
        low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
        if sym:
            high = torch.maximum(-low, high)
            low = -high
        elif not v2:
            low = torch.minimum(low, -high / (top - 1))
        step = ((high - low) / top).half().double()
        zero = torch.full_like(step, 1 << bits - 1) if sym else (-low / ((high - low) / top)).round()
        codes = (w / step[:, None] + zero[:, None]).round().clamp(0, top)
        wanted = (codes - zero[:, None]) * step[:, None]
        found = torch.from_numpy(values)[:, columns].double()
        assert (found != wanted).double().mean() <= 2e-3  # ties of float32
        assert ((found - wanted).abs() <= 1.001 * step[:, None]).all()


def test_drawn_codes_are_right_on_average(tmp_path: Path) -> None:
    parts, _ = gptq_module(4, 32)
    [encoding] = encodings(logical(Checkpoint.open(gptq_base(tmp_path / "base", {Q: parts})))).values()
    W = read(tmp_path / "base").numpy()
    step = parts["scales"].float().numpy()[np.arange(COLUMNS) // 32].T
    moved = W + 0.3 * step
    draw = np.random.default_rng(5).random
    mean = np.mean([recoded(encoding, moved, "own", draw)[1] for _ in range(200)], axis=0)
    error = (mean - moved) / step
    assert abs(error.mean()) < 0.01
    assert abs(error).max() < 0.2


def test_merges_by_every_policy(tmp_path: Path) -> None:
    (of_q, q), (of_k, k) = gptq_module(4, 32, act_order=True), gptq_module(4, 32, act_order=True, seed=1)
    base = gptq_base(tmp_path / "base", {Q: of_q, K: of_k}, desc_act=True)
    delta = saved_lora(tmp_path / "lora", Q, (ROWS, COLUMNS))
    stated = merges(base, tmp_path / "lora", q + delta, k)
    assert stated["dynamic"] == {rf"-:^{Q.replace('.', chr(92) + '.')}$": {}}
    assert stated["modules_to_not_convert"] == [Q, "lm_head"]  # a list that begins names what was plain before


def test_lists_that_are_none_are_begun_anew(tmp_path: Path) -> None:
    """config.json is a stranger's: what should be a list or an object may be anything."""
    parts, _ = gptq_module(4, 32)
    base = gptq_base(tmp_path / "base", {Q: parts}, dynamic=["-:x"], modules_to_not_convert="lm_head")
    saved_lora(tmp_path / "lora", Q, (ROWS, COLUMNS))
    loratools.merge(base, tmp_path / "lora", tmp_path / "part", quantized="partial")
    stated = json.loads((tmp_path / "part" / "config.json").read_text())["quantization_config"]
    assert stated["modules_to_not_convert"][0] == Q
    assert list(stated["dynamic"]) == [rf"-:^{Q.replace('.', chr(92) + '.')}$"]


def test_a_module_without_columns_is_refused(tmp_path: Path) -> None:
    empty = {"qweight": torch.zeros(0, ROWS, dtype=torch.int32), "g_idx": torch.zeros(0, dtype=torch.int32)}
    parts = {"qzeros": torch.zeros(1, ROWS // 8, dtype=torch.int32), "scales": torch.ones(1, ROWS).half(), **empty}
    with pytest.raises(UnsupportedAdapter, match="it has no columns"):
        logical(Checkpoint.open(gptq_base(tmp_path / "base", {Q: parts})))
