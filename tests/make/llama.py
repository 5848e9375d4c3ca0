"""A real llama.cpp, where its libraries are at hand: logits of a GGUF file, and ggml's own quantization.

The libraries are those of the npm package `@node-llama-cpp/linux-x64` (3.22.1), found through the environment variable
LORATOOLS_LLAMA_CPP, the folder of libllama and libggml, or under a name of their own in the user's cache.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

CACHED = Path.home() / ".cache" / "loratools" / "llama_cpp"
"""Where the libraries are looked for, if the environment does not say."""


def folder() -> Path | None:
    """Return the folder of the libraries; None where there is none."""
    place = Path(os.environ.get("LORATOOLS_LLAMA_CPP") or CACHED)
    return place if list(place.glob("libllama*.so")) and (place / "libggml-base.so").is_file() else None


class _Params(ctypes.Structure):
    """Parameters of a model or context: larger than the real ones, of which only the first four numbers are set."""

    _fields_ = [("numbers", c_int32 * 4), ("rest", ctypes.c_char * 1008)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("count", c_int32), ("tokens", c_void_p), ("embeddings", c_void_p), ("positions", c_void_p),
        ("sequences_of", c_void_p), ("sequences", c_void_p), ("logits", c_void_p),
    ]  # fmt: skip


@cache
def _ggml() -> Any:
    place = folder()
    assert place is not None
    base = ctypes.CDLL(str(place / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    base.ggml_quantize_chunk.restype = c_size_t
    base.ggml_quantize_chunk.argtypes = [c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]
    return base


@cache
def _llama() -> Any:
    place = folder()
    assert place is not None
    _ggml()
    ggml = ctypes.CDLL(str(next(place.glob("libggml.*so*"))), mode=ctypes.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path.argtypes = [c_char_p]
    llama = ctypes.CDLL(str(next(place.glob("libllama.*so*"))), mode=ctypes.RTLD_GLOBAL)
    quiet = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
    llama.quiet = quiet(lambda level, text, data: None)
    llama.llama_log_set.argtypes = [c_void_p, c_void_p]
    if not os.environ.get("LORATOOLS_LLAMA_CPP_LOG"):
        llama.llama_log_set(llama.quiet, None)
    llama.llama_backend_init()
    ggml.ggml_backend_load_all_from_path(str(place).encode())
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(llama, name).restype = _Params
    for name, arguments in {
        "llama_model_load_from_file": [c_char_p, _Params], "llama_init_from_model": [c_void_p, _Params],
        "llama_adapter_lora_init": [c_void_p, c_char_p], "llama_get_logits_ith": [c_void_p, c_int32],
        "llama_model_get_vocab": [c_void_p],
    }.items():  # fmt: skip
        getattr(llama, name).restype, getattr(llama, name).argtypes = c_void_p, arguments
    llama.llama_vocab_n_tokens.argtypes = [c_void_p]
    llama.llama_decode.argtypes = [c_void_p, _Batch]
    llama.llama_set_adapters_lora.argtypes = [c_void_p, c_void_p, c_size_t, c_void_p]
    llama.llama_free.argtypes = llama.llama_model_free.argtypes = [c_void_p]
    return llama


def logits(path: Path, tokens: list[int], adapter: Path | None = None) -> np.ndarray[Any, Any]:
    """Return llama.cpp's logits (tokens, vocabulary) of a GGUF file, with its own application of a GGUF adapter."""
    llama = _llama()
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    assert model, f"llama.cpp does not load {path}"
    params = llama.llama_context_default_params()
    params.numbers[:] = [64, 64, 64, 1]
    context = llama.llama_init_from_model(model, params)
    assert context, "no context"
    if adapter is not None:
        lora = llama.llama_adapter_lora_init(model, str(adapter).encode())
        assert lora, f"llama.cpp does not load {adapter}"
        assert llama.llama_set_adapters_lora(context, (c_void_p * 1)(lora), 1, (c_float * 1)(1.0)) == 0
    count = len(tokens)
    ids, places, counts = (c_int32 * count)(*tokens), (c_int32 * count)(*range(count)), (c_int32 * count)(*[1] * count)
    first = (c_int32 * 1)(0)
    sequences = (c_void_p * count)(*[ctypes.addressof(first)] * count)
    wanted = (ctypes.c_int8 * count)(*[1] * count)
    arrays = [ctypes.addressof(array) for array in (places, counts, sequences, wanted)]
    assert llama.llama_decode(context, _Batch(count, ctypes.addressof(ids), None, *arrays)) == 0
    width = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    rows = [
        np.ctypeslib.as_array(ctypes.cast(llama.llama_get_logits_ith(context, i), ctypes.POINTER(c_float)), (width,))
        for i in range(count)
    ]
    out = np.stack(rows).copy()
    llama.llama_free(context)
    llama.llama_model_free(model)
    return out


def quantized(W: np.ndarray[Any, Any], kind: int) -> np.ndarray[Any, Any]:
    """Return the bytes (rows, bytes of a row) that ggml itself makes of float32 rows for a type, by number."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    W = np.ascontiguousarray(W, np.float32)
    rows, columns = W.shape
    out = np.zeros((rows, columns // block * size), np.uint8)
    written = _ggml().ggml_quantize_chunk(kind, W.ctypes.data, out.ctypes.data, 0, rows, columns, None)
    assert written == out.nbytes
    return out
