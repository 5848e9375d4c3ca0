"""Codes in C: the bits of the formula in NumPy for every code, form, group, tail and width of vectors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratools.linalg.native import codes
from loratools.storage.codecs import Encoding, Module, bitsandbytes, compressed_tensors, fp8, get, gptq
from loratools.storage.codecs.bitsandbytes import MAPS
from loratools.storage.codecs.tables import E2M1, table
from loratools.storage.header import TensorSpec

pytestmark = pytest.mark.skipif(not codes.available(), reason="installed without a C compiler")
Array = np.ndarray[Any, np.dtype[Any]]

TABLES = {
    "low first": E2M1,
    "high first": MAPS["nf4"],
    "bytes": table("F8_E4M3FNUZ"),
    "I8": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32),
    "F8_E4M3": table("F8_E4M3"),
    "F8_E5M2": table("F8_E5M2"),
}


def formula(stored: Array, form: str, columns: int, scales: Array | None, zeros: Array | None, width: int) -> Array:
    """Return (table[code] - zero)·scale, each step in float32."""
    if codes.FORMS[form] < 2:
        low, high = stored & 15, stored >> 4
        pair = (low, high) if form == "low first" else (high, low)
        stored = np.stack(pair, axis=2).reshape(len(stored), -1)
    numbers = TABLES[form][stored[:, :columns]]
    of_column = np.arange(columns) // width
    with np.errstate(all="ignore"):
        if zeros is not None:
            numbers = numbers - zeros[:, of_column]
        if scales is not None:
            numbers = numbers * scales[:, of_column]
    return numbers


@pytest.mark.parametrize("form", codes.FORMS)
@pytest.mark.parametrize("columns", [512, 250, 33, 5, 1])
def test_every_code_is_numpys_to_the_bit_at_every_width(form: str, columns: int) -> None:
    random = np.random.default_rng(columns)
    stored = random.integers(0, 256, (24, 528), np.uint8)
    stored[0, :256] = stored[1, 256:512] = np.arange(256)
    for width in (columns, 128, 64, 16, 17):
        groups = -(-columns // width)
        scales = random.standard_normal((24, groups)).astype(np.float32)
        scales[2:8, 0] = [0, -0.0, np.inf, -np.inf, 1e-42, 3e38]
        zeros = random.integers(0, 16, (24, groups)).astype(np.float32)
        for by, less in ((None, None), (scales, None), (scales, zeros)):
            wanted = formula(stored, form, columns, by, less, width)
            for vector in codes.widths():
                out = np.full((24, columns), 7, np.float32)
                served = codes.decode(
                    stored, form, TABLES[form], out, scales=by, zeros=less, width=width, vector=vector
                )
                assert served or width > columns
                assert served == (width >= min(16, columns))
                np.testing.assert_array_equal(out.view(np.uint32), wanted.view(np.uint32))


def test_rows_apart_and_nothing_at_all() -> None:
    stored = np.arange(40 * 64, dtype=np.uint16).astype(np.uint8).reshape(40, 64)
    out = np.empty((20, 16), np.float32)
    assert codes.decode(stored[::2, 8:24], "F8_E4M3", TABLES["F8_E4M3"], out)
    assert out.tobytes() == TABLES["F8_E4M3"][stored[::2, 8:24]].tobytes()
    assert codes.decode(stored[:0], "I8", TABLES["I8"], np.empty((0, 64), np.float32))


def test_arrays_that_do_not_go_together_are_refused() -> None:
    stored, out, ones = np.zeros((4, 32), np.uint8), np.empty((4, 64), np.float32), np.ones((4, 2), np.float32)
    good: dict[str, Any] = {"scales": ones, "zeros": ones, "width": 32}
    assert codes.decode(stored, "low first", E2M1, out, **good)
    for change in ({"scales": ones[:, :1]}, {"zeros": ones[:3]}, {"scales": None}, {"width": 16}):
        with pytest.raises(ValueError):
            codes.decode(stored, "low first", E2M1, out, **good | change)
    with pytest.raises(ValueError):
        codes.decode(stored, "I8", TABLES["I8"], out)
    with pytest.raises(ValueError):
        codes.decode(stored, "low first", TABLES["I8"], out)
    with pytest.raises(ValueError):
        codes.turned(np.zeros((2, 8), np.int32), 5, 4)


def test_what_c_is_not_made_for_is_left_to_numpy() -> None:
    stored, out = np.zeros((4, 64), np.uint8), np.empty((4, 128), np.float32)
    assert not codes.decode(stored, "I8", TABLES["I8"], out[:, ::2])
    assert not codes.decode(stored, "I8", TABLES["I8"], np.empty((4, 64), np.float64))
    assert codes.turned(np.zeros((2, 8), np.int64), 0, 4) is None


def test_words_are_turned_and_blocks_taken_apart() -> None:
    words = np.random.default_rng(0).integers(0, 1 << 32, (37, 50), np.uint32)
    for first, count in ((0, 50), (3, 33), (49, 1), (7, 0)):
        turned = codes.turned(words, first, count)
        assert turned is not None
        assert (turned.view(np.uint32).reshape(count, 37) == words[:, first : first + count].T).all()
    blocks = np.random.default_rng(1).integers(0, 256, (3, 4 * 34), np.uint8)
    split = codes.split_blocks(blocks)
    assert split is not None
    apart = blocks.reshape(3, 4, 34)
    assert (split[0].reshape(3, 4, 32) == apart[..., 2:]).all()
    scales = apart[..., :2].copy().view(np.float16)[..., 0].astype(np.float32)
    np.testing.assert_array_equal(split[1], scales)


def saved(folder: Path, scheme: str, statement: dict[str, Any], arrays: dict[str, tuple[str, Array]]) -> Module:
    """Write parts to files, and return the module."""
    specs = {}
    for part, (dtype, array) in arrays.items():
        array.tofile(folder / part)
        specs[part] = TensorSpec(dtype, array.shape, folder / part, 0, array.nbytes)
    return Module("m", scheme, {part: f"m.{part}" for part in arrays}, specs, statement, "BF16")


def encodings(folder: Path) -> Iterator[Encoding]:
    """Make weights of 256 × 512 and of ragged shapes in each of the frequent schemes."""
    random = np.random.default_rng(5)

    def bits(*shape: int) -> Array:
        return random.integers(0, 256, shape, np.uint8)

    def positive(*shape: int) -> Array:
        return random.random(shape, np.float32) + np.float32(0.01)

    for rows, columns in ((256, 512), (200, 300)):
        for number, scale in enumerate(((-(-rows // 128), -(-columns // 128)), (rows, 1), (1,))):
            (place := folder / f"fp8-{rows}-{number}").mkdir()
            parts = {"weight": ("F8_E4M3", bits(rows, columns)), "weight_scale_inv": ("F32", positive(*scale))}
            yield fp8.opened(saved(place, "fp8", {"weight_block_size": [128, 128]}, parts))
    for rows, columns in ((256, 512), (31, 72)):
        (place := folder / f"nf4-{rows}").mkdir()
        absmax = positive(-(-rows * columns // 64))
        state = np.frombuffer(
            f'{{"quant_type":"nf4","blocksize":64,"dtype":"bfloat16","shape":[{rows},{columns}]}}'.encode(), np.uint8
        )
        parts = {
            "weight": ("U8", bits(rows * columns // 2, 1)), "absmax": ("F32", absmax),
            "quant_map": ("F32", MAPS["nf4"]), "nf4": ("U8", state),
        }  # fmt: skip
        yield bitsandbytes.opened(saved(place, "bitsandbytes", {}, parts))
    for bit, zero in ((4, False), (4, True), (8, False)):
        (place := folder / f"int-{bit}-{zero}").mkdir()
        parts = {
            "weight_packed": ("I32", bits(256, 64 * bit).view(np.int32)), "weight_scale": ("F32", positive(256, 4)),
            "weight_shape": ("I64", np.array([256, 512])),
        }  # fmt: skip
        if zero:
            parts["weight_zero_point"] = ("I32", bits(256 * bit // 32, 4 * 4).view(np.int32))
        weights = {"num_bits": bit, "type": "int", "strategy": "group", "group_size": 128, "symmetric": not zero}
        statement = {"config_groups": {"a": {"targets": ["Linear"], "weights": weights}}, "format": "pack-quantized"}
        yield compressed_tensors.opened(saved(place, "compressed-tensors", statement, parts))
        (place := folder / f"gptq-{bit}-{zero}").mkdir()
        parts = {
            "qweight": ("I32", bits(512 * bit // 32, 256 * 4).view(np.int32)),
            # Not the largest code: what readers take for three numbers is refused.
            "qzeros": ("I32", (bits(4, 32 * bit) & (0x77 if bit == 4 else 0x7F)).view(np.int32)),
            "scales": ("F16", positive(4, 256).astype("<f2")),
        }  # fmt: skip
        statement = {"bits": bit, "group_size": 128, "quant_method": "gptq"}
        yield gptq.opened(saved(place, "gptq", statement, parts))


def q8_0(folder: Path) -> Encoding:
    pytest.importorskip("gguf")
    blocks = np.random.default_rng(2).integers(0, 256, (64, 16 * 34), np.uint8)
    blocks.tofile(folder / "weight")
    stored = TensorSpec("Q8_0", (64, 512), folder / "weight", 0, blocks.nbytes)
    return get("gguf").opened(Module("m", "gguf", {"weight": "m.weight"}, {"weight": stored}, {}, "F16"))


def decoded(encoding: Encoding) -> list[bytes]:
    """Return all rows at once, and some that begin anywhere."""
    made = []
    with encoding.parts() as parts:
        for first, count in ((0, encoding.shape[0]), (3, 17), (8, 16), (encoding.shape[0] - 1, 1)):
            out = np.empty((count, encoding.columns), np.float32)
            encoding.decode(parts, first, out)
            made.append(out.tobytes())
    return made


def test_frequent_schemes_are_the_same_in_c_and_in_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = [*encodings(tmp_path), q8_0(tmp_path)]
    calls = []
    decode = codes.decode

    def counted(*args: Any, **kwargs: Any) -> bool:
        calls.append(decode(*args, **kwargs))
        return calls[-1]

    with monkeypatch.context() as patch:
        patch.setattr(codes, "decode", counted)
        in_c = [decoded(encoding) for encoding in every]
    assert calls.count(True) >= 4 * len(every) - 3  # a block that is not whole is left to NumPy
    monkeypatch.setattr(codes, "LIBRARY", tmp_path / "libcodes.so")
    codes._library.cache_clear()
    try:
        assert not codes.available()
        for encoding, made in zip(every, in_c, strict=True):
            assert made == decoded(encoding), encoding.label
    finally:
        monkeypatch.undo()
        codes._library.cache_clear()
