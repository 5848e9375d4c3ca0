"""compressed-tensors: what its own compressors wrote, against what they read back; merges by every policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.errors import UnsupportedAdapter
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import encodings, logical
from loratools.storage.files import chunks, read_tensor
from tests.storage.codecs.recode import saved_lora

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
ALONE = "model.layers.0.self_attn.o_proj"  # is not fused with others

Tensors = dict[str, torch.Tensor]


def compress(W: torch.Tensor, form: str, **weights: Any) -> tuple[Tensors, torch.Tensor, dict[str, Any]]:
    """Return the parts of a weight as the library's compressor makes them, what it reads back, and the group."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    n, columns = W.shape
    if args.strategy in ("group", "tensor_group"):
        grouped = W.unflatten(-1, (-1, args.group_size))
        low, high = grouped.amin(-1), grouped.amax(-1)
    elif args.strategy == "block":
        height, width = args.block_structure
        padded = torch.zeros(-(-n // height) * height, -(-columns // width) * width, dtype=W.dtype)
        padded[:n, :columns] = W
        blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    elif args.strategy == "channel":
        low, high = W.amin(1, keepdim=True), W.amax(1, keepdim=True)
    else:
        low, high = W.min(), W.max()
    state = {"weight": W}
    top = None
    if args.strategy == "tensor_group":
        top = state["weight_global_scale"] = generate_gparam(W.min(), W.max())
    state["weight_scale"], zero = calculate_qparams(low, high, args, top)
    if not args.symmetric:
        state["weight_zero_point"] = zero
    compressor = BaseCompressor.get_value_from_registry(form)
    parts = compressor.compress(state, scheme)
    parts = {name: part.contiguous() for name, part in parts.items()}
    back = compressor.decompress(parts, scheme)["weight"]
    return parts, back, scheme.model_dump(mode="json")


def decompressed(parts: Tensors, group: dict[str, Any], form: str) -> torch.Tensor:
    """Return what the library reads, in the dtype of its scales."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    back: torch.Tensor = BaseCompressor.get_value_from_registry(form).decompress(parts, QuantizationScheme(**group))[
        "weight"
    ]
    return back


def write(folder: Path, modules: dict[str, Tensors], group: dict[str, Any], form: str, **more: Any) -> Path:
    """Write a base of these modules and an embedding."""
    tensors = {f"{path}.{part}": tensor for path, parts in modules.items() for part, tensor in parts.items()}
    tensors["model.embed_tokens.weight"] = torch.randn(10, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    stated = {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    } | more  # fmt: skip
    config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": stated}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weight(shape: tuple[int, int], seed: int = 3, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)
    W[2] = 0
    return W.to(dtype)


MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
PACK, NAIVE = "pack-quantized", "int-quantized"
LAYOUTS: dict[str, tuple[str, tuple[int, int], dict[str, Any]]] = {
    "int4, groups of 32": (PACK, (48, 96), {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "int4, groups, zero points": (
        PACK, (44, 96), {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
    "int8, groups, zero points": (
        PACK, (43, 96), {"num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False}),
    "int8 by row": (PACK, (48, 90), {"num_bits": 8, "strategy": "channel"}),
    "int4 by row, zero points": (PACK, (41, 90), {"num_bits": 4, "strategy": "channel", "symmetric": False}),
    "int4 by tensor": (PACK, (48, 90), {"num_bits": 4, "strategy": "tensor"}),
    "int4 by block": (PACK, (60, 96), {"num_bits": 4, "strategy": "block", "block_structure": [16, 32]}),
    **{f"int{bits}, groups": (PACK, (44, 96), {"num_bits": bits, "strategy": "group", "group_size": 32})
       for bits in (2, 3, 5, 6, 7)},
    **{f"int{bits}, zero points": (
        PACK, (70, 93), {"num_bits": bits, "strategy": "channel", "symmetric": False}) for bits in (2, 3, 5, 6, 7)},
    "int8 as it is": (NAIVE, (48, 90), {"num_bits": 8, "strategy": "channel"}),
    "int8 as it is, zero points": (NAIVE, (48, 90), {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "FP8 by row": ("float-quantized", (48, 90), {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "FP8 by tensor": ("float-quantized", (48, 90), {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "FP8 by block": (
        "float-quantized", (60, 96),
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]}),
    "FP8 by group": (
        "naive-quantized", (60, 96), {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}),
    "MXFP8": ("mxfp8-quantized", (48, 96), MX | {"num_bits": 8}),
    "NVFP4": (
        "nvfp4-pack-quantized", (48, 96),
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
         "scale_dtype": "torch.float8_e4m3fn"}),
    "MXFP4": ("mxfp4-pack-quantized", (48, 96), MX | {"num_bits": 4}),
    "MXFP6": ("mxfp6-pack-quantized", (48, 96), MX | {"num_bits": 6}),
    "int4 in bytes": (NAIVE, (48, 96), {"num_bits": 4, "strategy": "group", "group_size": 32}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_reads_as_the_library_reads_it(layout: str, tmp_path: Path) -> None:
    form, shape, arguments = LAYOUTS[layout]
    parts, back, group = compress(weight(shape), form, **arguments)
    base = write(tmp_path / "base", {Q: parts}, group, form)
    spec = logical(Checkpoint.open(base)).specs[f"{Q}.weight"]
    assert spec.shape == shape
    read = read_tensor(spec)
    assert torch.equal(read.bfloat16(), back)
    assert b"".join(bytes(piece) for piece in chunks(spec, 1004)) == read.numpy().tobytes()


def encoded_again(
    base: Path, grid: Any, W: np.ndarray | None = None, step: int = 16, draw: Any = None, path: str = Q
) -> Any:
    """Encode q_proj tile by tile; return the parts that changed, what they stand for, and the weight before."""
    encoding = encodings(logical(Checkpoint.open(base)))[f"{path}.weight"]
    step = -(-step // encoding.together) * encoding.together
    with encoding.parts() as parts:
        before = np.empty((int(np.prod(encoding.shape[:-1])), encoding.columns), np.float32)
        encoding.decode(parts, 0, before)
        W = before if W is None else W
        encoder = encoding.encoder(parts, grid, draw)
        tiles = [(i, W[i : i + step]) for i in range(0, len(W), step)]
        for tile in tiles if encoder.needs_pass else ():
            encoder.observe(*tile)
        result = np.concatenate([encoder.encode(*tile) for tile in tiles])
        return encoder.finish(), result, before


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_own_grid_gives_every_byte_again(layout: str, tmp_path: Path) -> None:
    form, shape, arguments = LAYOUTS[layout]
    parts, _, group = compress(weight(shape), form, **arguments)
    base = write(tmp_path / "base", {Q: parts}, group, form)
    changed, result, before = encoded_again(base, "own")
    assert changed
    for part, array in changed.items():
        assert (array.tobytes(), array.shape) == (bytes_of(parts[part]), tuple(parts[part].shape)), part
    assert np.array_equal(result, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fresh_scales_are_the_library_s(layout: str, tmp_path: Path) -> None:
    """From float32, in which the library divides once as well: its scales and codes, byte for byte."""
    form, shape, arguments = LAYOUTS[layout]
    parts, _, group = compress(weight(shape, 3, torch.float32), form, **arguments)
    base = write(tmp_path / "base", {ALONE: parts}, group, form)
    W = weight(shape, 4, torch.float32)
    wanted, back, _ = compress(W, form, **arguments)
    changed, result, _ = encoded_again(base, "fresh", W.numpy(), path=ALONE)
    if layout.startswith("MX"):  # the library rounds the power of two of the largest number, whatever the others are
        errors = [np.square(each.astype(np.float64) - W.numpy()).sum() for each in (result, back.float().numpy())]
        assert 0.9 * errors[1] < errors[0] <= errors[1]
        return
    for part, array in changed.items():
        assert array.tobytes() == bytes_of(wanted[part]), part
    assert torch.equal(torch.from_numpy(result).to(back.dtype), back)


@pytest.mark.parametrize("layout", ["int4, groups of 32", "int3, zero points", "int8 as it is"])
def test_rounding_at_random_is_right_on_average(layout: str, tmp_path: Path) -> None:
    form, shape, arguments = LAYOUTS[layout]
    parts, _, group = compress(weight(shape), form, **arguments)
    base = write(tmp_path / "base", {Q: parts}, group, form)
    random = np.random.default_rng(7)
    _, result, before = encoded_again(base, "own", draw=lambda shape: random.random(shape, np.float32))
    assert np.array_equal(result, before)
    step = parts["weight_scale"].float().numpy().reshape(shape[0], -1)
    W = before * np.float32(0.9)  # between two grid points, and inside the grid
    W += np.repeat(step, -(-shape[1] // step.shape[1]), axis=1)[:, : shape[1]] * np.float32(0.03)
    W = np.clip(W, before.min(axis=1, keepdims=True) * 0.9, before.max(axis=1, keepdims=True) * 0.9)
    total = sum(
        encoded_again(base, "own", W, draw=lambda shape: random.random(shape, np.float32))[1].astype(np.float64)
        for _ in range(300)
    )
    error = (total / 300 - W) / np.repeat(step, -(-shape[1] // step.shape[1]), axis=1)[:, : shape[1]]
    assert np.abs(error).max() < 0.5 * 5 / 300**0.5
    assert abs(error.mean()) < 0.002


def test_the_groups_of_columns_are_those_of_weight_g_idx(tmp_path: Path) -> None:
    form, shape, arguments = LAYOUTS["int4, groups, zero points"]
    parts, back, group = compress(weight(shape), form, **arguments)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(2))
    from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32

    codes = unpack_from_int32(parts["weight_packed"], 4, torch.Size(shape))
    parts["weight_packed"] = pack_to_int32(codes[:, order].contiguous(), 4)
    parts["weight_g_idx"] = (order // 32).to(torch.int32)
    group["weights"]["actorder"] = "group"
    base = write(tmp_path / "base", {Q: parts}, group, form)
    assert torch.equal(read_tensor(logical(Checkpoint.open(base)).specs[f"{Q}.weight"]).bfloat16(), back[:, order])
    changed, result, before = encoded_again(base, "own")
    assert changed["weight_packed"].tobytes() == bytes_of(parts["weight_packed"])
    fresh, result, _ = encoded_again(base, "fresh", before)
    assert np.abs(result - before).max() <= parts["weight_scale"].float().max()
    wide = fresh["weight_scale"].astype(np.uint32) << 16
    assert np.allclose(wide.view(np.float32), parts["weight_scale"].float().numpy(), rtol=0.2)
    parts["weight_g_idx"][:] = -1  # old files without an order
    write(tmp_path / "old", {Q: parts | {"weight_packed": pack_to_int32(codes, 4)}}, group, form)
    old = logical(Checkpoint.open(tmp_path / "old")).specs[f"{Q}.weight"]
    assert torch.equal(read_tensor(old).bfloat16(), back)


def test_stacks_of_experts(tmp_path: Path) -> None:
    """Parts of three sides, each matrix packed on its own."""
    form, shape, arguments = LAYOUTS["int4, groups, zero points"]
    made = [compress(weight(shape, seed), form, **arguments) for seed in (3, 4, 5)]
    names = ("weight_packed", "weight_scale", "weight_zero_point")
    parts = {name: torch.stack([each[0][name] for each in made]) for name in names}
    parts["weight_shape"] = torch.tensor([3, *shape], dtype=torch.int32)
    base = write(tmp_path / "base", {Q: parts}, made[0][2], form)
    encoding = encodings(logical(Checkpoint.open(base))).popitem()[1]
    assert encoding.shape == (3, *shape)
    with encoding.parts() as opened:
        out = np.empty((3 * shape[0], shape[1]), np.float32)
        for i in range(0, len(out), 13):
            encoding.decode(opened, i, out[i : i + 13])
        assert torch.equal(torch.from_numpy(out).bfloat16().view(3, *shape), torch.stack([back for _, back, _ in made]))
        encoder = encoding.encoder(opened, "fresh")
        for i in range(0, len(out), 13):
            encoder.encode(i, out[i : i + 13])
        assert {part: tuple(a.shape) for part, a in encoder.finish().items()} == {
            name: tuple(parts[name].shape) for name in names
        }


@pytest.mark.parametrize("layout", ["int4, groups of 32", "int5, zero points", "int8 as it is"])
def test_merges(layout: str, tmp_path: Path) -> None:
    form, shape, arguments = LAYOUTS[layout]
    (q, _, group), (k, of_k, _) = (compress(weight(shape, seed), form, **arguments) for seed in (3, 4))
    base = write(tmp_path / "base", {ALONE: q, K: k}, group, form)
    delta = saved_lora(tmp_path / "lora", ALONE, shape)
    loratools.merge(base, tmp_path / "lora", tmp_path / "dense")
    loratools.merge(base, tmp_path / "lora", tmp_path / "part", quantized="partial")
    before, dense, part = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "dense", "part"))
    assert set(dense) == {f"{ALONE}.weight", f"{K}.weight", "model.embed_tokens.weight"}
    wide = {name: part.float() if part.is_floating_point() else part for name, part in q.items()}
    exact = (decompressed(wide, group, form).double() + delta).bfloat16()
    assert (dense[f"{ALONE}.weight"] != exact).double().mean() <= 1e-3
    assert torch.equal(dense[f"{K}.weight"], of_k)
    assert torch.equal(part.pop(f"{ALONE}.weight"), dense[f"{ALONE}.weight"])
    assert part.keys() == before.keys() - {f"{ALONE}.{name}" for name in q}
    assert all(bytes_of(part[name]) == bytes_of(before[name]) for name in part)
    stated = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("dense", "part")]
    assert "quantization_config" not in stated[0]
    assert stated[1]["quantization_config"]["ignore"] == ["lm_head", ALONE]


def test_simulated_quantization_goes_with_its_scales(tmp_path: Path) -> None:
    """What is not compressed yet: its numbers are shown as they are, and no scale is left that would not fit."""
    W = {path: weight((48, 96), seed) for path, seed in ((ALONE, 3), (K, 4))}
    scales = {path: W[path].abs().amax(1, keepdim=True) / 7.5 for path in W}
    modules = {path: {"weight": W[path], "weight_scale": scales[path]} for path in W}
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}}
    base = write(tmp_path / "base", modules, group, "dense", quantization_status="frozen")
    delta = saved_lora(tmp_path / "lora", ALONE, (48, 96))
    loratools.merge(base, tmp_path / "lora", tmp_path / "dense")
    report = loratools.merge(base, tmp_path / "lora", tmp_path / "part", quantized="partial")
    dense, part = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "part"))
    assert set(dense) == {f"{ALONE}.weight", f"{K}.weight", "model.embed_tokens.weight"}
    assert set(part) == {*dense, f"{K}.weight_scale"}
    assert torch.equal(dense[f"{K}.weight"], W[K])
    for merged in (dense, part):
        assert (merged[f"{ALONE}.weight"] != (W[ALONE].double() + delta).bfloat16()).double().mean() <= 1e-3
    assert any("only simulated" in note for note in report.notes)


def test_formats_by_group(tmp_path: Path) -> None:
    """A mixed model: int4 for the one, FP8 for the other, told by a name and a pattern."""
    (four, of_four, a), (eight, of_eight, b) = (
        compress(weight(LAYOUTS[name][1], 3), LAYOUTS[name][0], **LAYOUTS[name][2])
        for name in ("int4, groups of 32", "FP8 by row")
    )
    groups = {"a": a | {"targets": ["re:.*self_attn.*"]}, "b": b | {"targets": [K]}}
    base = write(tmp_path / "base", {Q: four, K: eight}, a, "mixed-precision", config_groups=groups)
    model = logical(Checkpoint.open(base))
    assert torch.equal(read_tensor(model.specs[f"{Q}.weight"]).bfloat16(), of_four)
    assert torch.equal(read_tensor(model.specs[f"{K}.weight"]).bfloat16(), of_eight)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], str]] = {
    "bits": ({"weights": {"num_bits": 8}}, {}, r"config.json says 8 bits"),
    "type": ({"weights": {"num_bits": 4, "type": "float"}}, {}, "type float, .*and its tensors are"),
    "groups": (
        {"weights": {"num_bits": 4, "strategy": "group", "group_size": 16}}, {},
        r"strategy group, group 16, and the scales \[48, 3\] do not fit"),
    "zero point": ({"weights": {"num_bits": 4, "symmetric": False}}, {}, "weight_zero_point is missing"),
    "format": ({"weights": {"num_bits": 4}, "format": "marlin-24"}, {}, "says format marlin-24"),
    "order": ({"weights": {"num_bits": 4, "actorder": "group"}}, {}, "weight_g_idx is missing"),
    "order's groups": ({"weights": {"num_bits": 4}}, {"weight_g_idx": torch.full((96,), 7, dtype=torch.int32)},
                       "names groups from 7 to 7, and it has 3"),
    "huge": ({"weights": {"num_bits": 4}}, {"weight_shape": torch.tensor([48, 2**60])}, "words hold 11529"),
    "rows": ({"weights": {"num_bits": 4}}, {"weight_shape": torch.tensor([96, 96])}, r"does not hold .*\[96, 96\]"),
    "sides": ({"weights": {"num_bits": 4}}, {"weight_shape": torch.tensor([48])}, "2 or 3 integers were expected"),
    "scales": ({"weights": {"num_bits": 4}}, {"weight_scale": torch.ones(7, 3)}, "do not fit"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_config_and_tensors_that_disagree(case: str, tmp_path: Path) -> None:
    changed, tensors, sentence = REFUSED[case]
    form, shape, arguments = LAYOUTS["int4, groups of 32"]
    parts, _, group = compress(weight(shape), form, **arguments)
    base = write(tmp_path / "base", {Q: parts | tensors}, {**group, **changed}, form)
    with pytest.raises(UnsupportedAdapter, match=rf"q_proj is quantized with compressed-tensors: .*{sentence}"):
        logical(Checkpoint.open(base))


def test_rotated_weights_are_refused(tmp_path: Path) -> None:
    form, shape, arguments = LAYOUTS["int4, groups of 32"]
    parts, _, group = compress(weight(shape), form, **arguments)
    rotation = {"config_groups": {"R1": {"type": "hadamard", "apply": []}}}
    base = write(tmp_path / "base", {Q: parts}, group, form, transform_config=rotation)
    saved_lora(tmp_path / "lora", Q, shape)
    with pytest.raises(UnsupportedAdapter, match=r"rotated \(transform_config\)"):
        loratools.merge(base, tmp_path / "lora", tmp_path / "out")


def test_without_config_the_tensors_tell(tmp_path: Path) -> None:
    form, shape, arguments = LAYOUTS["int4, groups of 32"]
    parts, back, group = compress(weight(shape), form, **arguments)
    base = write(tmp_path / "base", {Q: parts}, group, form)
    (base / "config.json").unlink()
    assert torch.equal(read_tensor(logical(Checkpoint.open(base)).specs[f"{Q}.weight"]).bfloat16(), back)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["int4, groups of 32", "int8 as it is", "FP8 by row", "NVFP4", "MXFP4"])
def test_transformers_loads_what_a_merge_leaves(layout: str, tmp_path: Path) -> None:
    """Partial and requantized, by compressed-tensors: the weights that we read; dequantized, without it: base + ΔW.

    Packed zero points are not among the cases: transformers 5.23 refuses what compressed-tensors 0.20.1 writes of them.
    """
    transformers = pytest.importorskip("transformers")
    form, _, arguments = LAYOUTS[layout]
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(4)
    state = transformers.LlamaForCausalLM(config).bfloat16().state_dict()
    tensors, group = {}, {}
    for name, W in state.items():
        path = name.removesuffix(".weight")
        if not name.endswith("_proj.weight"):
            tensors[name] = W.clone()
            continue
        parts, _, group = compress(W * 20, form, **arguments)
        tensors |= {f"{path}.{part}": tensor for part, tensor in parts.items()}
    base = write(tmp_path / "base", {}, group, form)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    stated = json.loads((base / "config.json").read_text())["quantization_config"]
    (base / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": stated}))
    path, shape = "model.layers.1.mlp.down_proj", (64, 96)
    delta = saved_lora(tmp_path / "lora", path, shape)
    read = logical(Checkpoint.open(base))
    wanted = {name: read_tensor(read.specs[name]).to(torch.float64) for name in state}
    wanted[f"{path}.weight"] += delta
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    ids = torch.arange(20).view(1, -1)

    def logits_of(weights: Tensors) -> torch.Tensor:
        plain.load_state_dict({name: W.float().bfloat16() for name, W in weights.items()})
        logits: torch.Tensor = plain(ids).logits.double()
        return logits

    exact, before = logits_of(wanted), logits_of(wanted | {f"{path}.weight": wanted[f"{path}.weight"] - delta})
    effect = torch.linalg.vector_norm(exact - before)
    for policy in ("partial", "dequantize", "requantize"):
        loratools.merge(base, tmp_path / "lora", tmp_path / policy, quantized=policy, force=True, retention="off")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / policy, dtype=torch.bfloat16)
        logits = loaded(ids).logits.double()  # compressed-tensors decompresses at the first
        stored = logical(Checkpoint.open(tmp_path / policy))
        merged = {name: read_tensor(stored.specs[name]) for name in state}
        assert all(torch.equal(loaded.state_dict()[name], W.bfloat16()) for name, W in merged.items()), policy
        assert torch.linalg.vector_norm(logits - logits_of(merged)) <= 1e-3 * effect
        if policy != "requantize":
            assert torch.linalg.vector_norm(logits - exact) <= 0.05 * effect
