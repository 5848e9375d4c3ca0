"""A Llama quantized by the real libraries on the CPU, and its numbers as those libraries read them: no code of ours.

`SCHEMES` names the schemes. Each makes a model of a 16-bit folder, and reads the weights of a model of its own, merged
or not, under transformers' names; weights in 16 bit are read as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.make import fp8, gguf_models
from tests.storage.codecs import bnb_models
from tests.storage.codecs.test_compressed_tensors import compress, decompressed

Parts = dict[str, Tensor]
MODULE = re.compile(r"(.*?(?:_proj|embed_tokens|norm|lm_head))\.(.*)")
LINEAR = re.compile(r".*_proj\.weight")
NVFP4 = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
MXFP4 = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a library stores a model: `make(base, model)` writes one, `read(model, wanted)` gives its numbers.

    `wanted` are names of weights, None for all.
    """

    make: Callable[[Path, Path], None]
    read: Callable[[Path, Collection[str] | None], dict[str, Tensor]]


def stored(model: Path) -> dict[str, Tensor]:
    """Return every tensor of a folder, as it is stored."""
    tensors = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    return tensors


def by_module(tensors: Mapping[str, Any], wanted: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return the parts of each module, by the module's path."""
    modules: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if (match := MODULE.fullmatch(name)) is None:
            raise ValueError(f"{name}: of no module of a Llama")
        path, part = match.groups()
        if wanted is None or f"{path}.weight" in wanted:
            modules.setdefault(path, {})[part] = tensor
    return modules


def reader(decode: Callable[[Parts, Path], Tensor]) -> Callable[[Path, Collection[str] | None], dict[str, Tensor]]:
    """Give the function that reads a folder, in which `decode` is for modules of codes."""

    def read(model: Path, wanted: Collection[str] | None) -> dict[str, Tensor]:
        return {
            f"{path}.weight": (parts["weight"] if list(parts) == ["weight"] else decode(parts, model)).float()
            for path, parts in by_module(stored(model), wanted).items()
        }

    return read


def save(model: Path, base: Path, tensors: Parts, statement: Mapping[str, Any]) -> None:
    model.mkdir(parents=True)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": statement}
    (model / "config.json").write_text(json.dumps(config, indent=2))


def make_nf4(base: Path, model: Path) -> None:
    """Load in 4 bit as for QLoRA, and save: transformers and bitsandbytes."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings: Any = BitsAndBytesConfig
    quantization = settings(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, device_map="cpu", quantization_config=quantization
    )
    loaded.save_pretrained(model)


def read_nf4(parts: Parts, model: Path) -> Tensor:
    return bnb_models.exact(parts, "weight")


def maker(form: str, **arguments: Any) -> Callable[[Path, Path], None]:
    """Give the function that makes a model by compressed-tensors' compressor of a format."""

    def make(base: Path, model: Path) -> None:
        tensors: Parts = {}
        group: dict[str, Any] = {}
        for name, W in stored(base).items():
            if LINEAR.fullmatch(name):
                parts, _, group = compress(W, form, num_bits=4, **arguments)
                tensors |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}
            else:
                tensors[name] = W
        save(model, base, tensors, {
            "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
            "ignore": ["lm_head"], "config_groups": {"group_0": group},
        })  # fmt: skip

    return make


def read_compressed(parts: Parts, model: Path) -> Tensor:
    statement = json.loads((model / "config.json").read_text())["quantization_config"]
    if parts["weight_scale"].dtype == torch.bfloat16:  # the library computes in the dtype of the scales
        parts["weight_scale"] = parts["weight_scale"].float()
    return decompressed(parts, statement["config_groups"]["group_0"], statement["format"])


def make_fp8(base: Path, model: Path) -> None:
    """Quantize in blocks of 128 × 128 by transformers' formula: its own quantization needs a GPU."""
    save(model, base, fp8.quantized(stored(base)), fp8.STATED)


def read_fp8(parts: Parts, model: Path) -> Tensor:
    return fp8.decoded({f"x.{part}": tensor for part, tensor in parts.items()}, "x")


def make_mlx(base: Path, model: Path) -> None:
    """Quantize as `mlx_lm.convert -q` does, affine, 4 bits, groups of 64; without the tokenizer."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    loaded, config = load_model(base)
    quantized, stated = quantize_model(loaded, config, 64, 4)
    save_model(model, quantized)
    save_config(stated, model / "config.json")


def numbers_of_mlx(parts: Mapping[str, Any]) -> Tensor:
    """Return the numbers of a module of arrays of MLX, by `mx.dequantize` in float32."""
    import mlx.core as mx

    weight = parts["weight"]
    if len(parts) > 1:
        scales, biases = (parts[part].astype(mx.float32) for part in ("scales", "biases"))
        weight = mx.dequantize(weight, scales, biases, 64, 4)
    return torch.from_numpy(np.array(weight.astype(mx.float32)))


def read_mlx(model: Path, wanted: Collection[str] | None) -> dict[str, Tensor]:
    import mlx.core as mx

    tensors: dict[str, Any] = {}
    for file in sorted(model.glob("*.safetensors")):
        loaded: Any = mx.load(str(file))
        tensors |= loaded
    return {f"{path}.weight": numbers_of_mlx(parts) for path, parts in by_module(tensors, wanted).items()}


def of_gguf(kind: str) -> Scheme:
    """Return how gguf stores a model: linear layers in the type `kind`, embeddings in Q8_0, norms in F32."""

    def make(base: Path, model: Path) -> None:
        import gguf

        config = json.loads((base / "config.json").read_text())
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(config))  # for the heads, which read needs
        writer = gguf.GGUFWriter(model / "model.gguf", "llama")
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_tokenizer_model("llama")
        writer.add_token_list([f"<{i}>" for i in range(config["vocab_size"])])
        writer.add_token_scores([0.0] * config["vocab_size"])
        for name, W in stored(base).items():
            if heads := heads_of(name, config):
                W = gguf_models.permuted(W, heads)
            array: Any = W.float().numpy()
            if array.ndim < 2:
                writer.add_tensor(gguf_models.name_of(name), array)
                continue
            ggml = gguf.GGMLQuantizationType[kind if LINEAR.fullmatch(name) else "Q8_0"]
            writer.add_tensor(gguf_models.name_of(name), gguf.quants.quantize(array, ggml), raw_dtype=ggml)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def read(model: Path, wanted: Collection[str] | None) -> dict[str, Tensor]:
        import gguf

        base = model if model.is_dir() else model.parent
        config = json.loads((base / "config.json").read_text())
        names = {gguf_models.name_of(name): name for name in wanted or names_of(config)}
        tensors = {}
        for tensor in gguf.GGUFReader(model / "model.gguf" if model.is_dir() else model).tensors:
            if (name := names.get(tensor.name)) is None:
                continue
            values = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
            W = torch.from_numpy(values.reshape([int(side) for side in reversed(tensor.shape)]))
            if heads := heads_of(name, config):
                W = W.reshape(heads, len(W) // heads // 2, 2, -1).swapaxes(1, 2).reshape(W.shape)
            tensors[name] = W
        return tensors

    return Scheme(make, read)


def heads_of(name: str, config: Mapping[str, Any]) -> int | None:
    """Return the number of heads of a weight whose rows llama.cpp has in pairs; None for any other."""
    key = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    return None if key is None else config[key]


def names_of(config: Mapping[str, Any]) -> list[str]:
    """Return the names of all weights of a Llama with a tied head."""
    inner = [
        f"model.layers.{layer}.{name}.weight"
        for layer in range(config["num_hidden_layers"])
        for name in gguf_models.NAMES
    ]
    return ["model.embed_tokens.weight", *inner, "model.norm.weight"]


COMPRESSED = reader(read_compressed)
SCHEMES = {
    "NF4, double quantization": Scheme(make_nf4, reader(read_nf4)),
    "INT4, groups of 64": Scheme(maker("pack-quantized", strategy="group", group_size=64), COMPRESSED),
    "MLX affine, 4 bits": Scheme(make_mlx, read_mlx),
    "MXFP4": Scheme(maker("mxfp4-pack-quantized", type="float", **MXFP4), COMPRESSED),
    "NVFP4": Scheme(maker("nvfp4-pack-quantized", type="float", **NVFP4), COMPRESSED),
    "Q4_0": of_gguf("Q4_0"),
    "FP8, blocks of 128 × 128": Scheme(make_fp8, reader(read_fp8)),
    "Q8_0": of_gguf("Q8_0"),
}
