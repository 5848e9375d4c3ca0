"""What each fuzzer reads, and the sound inputs that it begins with.

A harness takes bytes and an empty folder for its files. Inputs of several files are joined: each after its length.
"""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save

from loratools import dialects
from loratools.dialects import Listing
from loratools.engine.residual import Residual
from loratools.engine.residual.restore import lost_bytes, lost_tensors
from loratools.format import validate
from loratools.hub import card
from loratools.storage.beside.plain_yaml import parse_yaml
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import parse_header
from loratools.storage.pickles.archive import read_pickled
from loratools.storage.pickles.unpickle import Damaged, Refused, unpickle
from loratools.surgery.inspect import inspect
from loratools.surgery.merge import merge
from tests.make import tiny

Inputs = Callable[[], Iterator[bytes]]


@dataclass(frozen=True)
class Harness:
    """`read` is given an input and an empty folder; `seeds` yields sound inputs."""

    read: Callable[[bytes, Path], object]
    seeds: Inputs


HARNESSES: dict[str, Harness] = {}


def harness(seeds: Inputs) -> Callable[[Callable[[bytes, Path], object]], Callable[[bytes, Path], object]]:
    def register(read: Callable[[bytes, Path], object]) -> Callable[[bytes, Path], object]:
        HARNESSES[read.__name__] = Harness(read, seeds)
        return read

    return register


def joined(*parts: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def parted(data: bytes, count: int) -> list[bytes]:
    """Return `count` parts of an input; where lengths are wrong, the last ones are short or empty."""
    parts, at = [], 0
    for _ in range(count):
        size = int.from_bytes(data[at : at + 4], "little")
        parts.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return parts


@cache
def samples() -> Path:
    """Return a folder with sound files of every sort; it goes with the process."""
    folder = Path(tempfile.mkdtemp(prefix="loratools-fuzz-"))
    tiny.save_llama(folder / "base", tiny.llama_weights(1))
    tiny.save_peft(folder / "adapter", tiny.lora_factors(("self_attn.q_proj",), 1))
    tiny.save_peft(folder / "all", tiny.lora_factors(tiny.SHAPES, 1, rank=1), rank_pattern={"q_proj": 1})
    adapter = dialects.open_adapter(folder / "adapter")
    dialects.save_adapter(adapter, folder / "sealed")
    stated = {**adapter.settings, "gguf": {"architecture": "llama", "heads": 4, "kv_heads": 2}}
    dialects.save_adapter(replace(adapter, settings=stated), folder / "x.gguf", dialect="gguf", allow_loss=True)
    dialects.save_adapter(adapter, folder / "kohya.safetensors", dialect="kohya", allow_loss=True)
    merge(folder / "base", [folder / "adapter"], folder / "merged", keep_residual=True)
    return folder


def header_of(raw: bytes) -> bytes:
    return raw[8 : 8 + int.from_bytes(raw[:8], "little")]


def _headers() -> Iterator[bytes]:
    for name in ("base/model-00001-of-00002.safetensors", "adapter/adapter_model.safetensors"):
        yield header_of((samples() / name).read_bytes())
    yield header_of((samples() / "sealed" / "adapter_model.safetensors").read_bytes())
    yield b'{"__metadata__":{"a":"b"},"w":{"dtype":"F32","shape":[0,4],"data_offsets":[0,0]}}'


@harness(_headers)
def header(data: bytes, folder: Path) -> object:
    """The JSON of a safetensors header, over data that are as long as its offsets say."""
    stops = [0]
    try:
        stops += [entry["data_offsets"][1] for entry in json.loads(data).values() if "data_offsets" in entry]
        length = min(max(stops), 2**64)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        length = 0
    return parse_header(data, 8 + len(data) + int(length), folder / "x.safetensors")


def _indexes() -> Iterator[bytes]:
    yield (samples() / "base" / "model.safetensors.index.json").read_bytes()


@harness(_indexes)
def index(data: bytes, folder: Path) -> object:
    """The index of a model in two shards."""
    for path in (samples() / "base").glob("*.safetensors"):
        (folder / path.name).hardlink_to(path)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors.index.json").write_bytes(data)
    return inspect(folder / "model.safetensors.index.json")


def _adapters() -> Iterator[bytes]:
    for name in ("adapter", "all"):
        yield joined(*((samples() / name / file).read_bytes() for file in FILES))


FILES = ("adapter_config.json", "adapter_model.safetensors")


@harness(_adapters)
def peft(data: bytes, folder: Path) -> object:
    """A config of PEFT and its file of tensors."""
    for name, part in zip(FILES, parted(data, 2), strict=True):
        (folder / name).write_bytes(part)
    adapter = dialects.open_adapter(folder)
    return [dialects.get(name).losses(adapter) for name in ("loratools", "kohya", "diffusers", "gguf")]


def _pickles() -> Iterator[bytes]:
    state = {f"layers.{i}.weight": torch.zeros(2, 3) for i in range(2)}
    state |= {"half": torch.ones(2, dtype=torch.bfloat16), "view": torch.zeros(4, 4)[1:2], "none": torch.zeros(0)}
    for saved in (state, {"state_dict": state, "epoch": 3}, {"p": torch.nn.Parameter(torch.zeros(2))}):
        memory = io.BytesIO()
        torch.save(saved, memory)
        yield b"\0" + memory.getvalue()
        start = memory.getvalue().index(b"\x80\x02")
        yield b"\1" + memory.getvalue()[start : memory.getvalue().index(b"PK\x03\x04", start)]


@harness(_pickles)
def pickle(data: bytes, folder: Path) -> object:
    """A file of torch.save (after a zero byte), or the pickle in it (after another)."""
    if data[:1] == b"\0":
        (folder / "x.bin").write_bytes(data[1:])
        return read_pickled(folder / "x.bin")
    try:
        return unpickle(data[1:])
    except (Refused, Damaged):
        return None


def _ggufs() -> Iterator[bytes]:
    yield (samples() / "x.gguf").read_bytes()


@harness(_ggufs)
def gguf(data: bytes, folder: Path) -> object:
    """A file of llama.cpp."""
    (folder / "x.gguf").write_bytes(data)
    return dialects.open_adapter(folder / "x.gguf")


def _nemos() -> Iterator[bytes]:
    name = "model.language_model.encoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_%s.weight"
    memory, archive = io.BytesIO(), io.BytesIO()
    torch.save({name % "in": torch.zeros(2, 8), name % "out": torch.zeros(24, 2)}, memory)
    config = b"peft:\n  lora_tuning:\n    adapter_dim: 2\n    alpha: 4\nhidden_size: 8\nnum_attention_heads: 2\n"
    with tarfile.open(fileobj=archive, mode="w") as file:
        for path, content in (("./model_config.yaml", config), ("./model_weights.ckpt", memory.getvalue())):
            info = tarfile.TarInfo(path)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    yield archive.getvalue()


@harness(_nemos)
def nemo(data: bytes, folder: Path) -> object:
    """An archive of NeMo."""
    (folder / "x.nemo").write_bytes(data)
    return dialects.open_adapter(folder / "x.nemo", alpha=2.0)


def _manifests() -> Iterator[bytes]:
    raw = (samples() / "sealed" / "adapter_model.safetensors").read_bytes()
    yield json.loads(header_of(raw))["__metadata__"]["loratools"].encode()


@harness(_manifests)
def manifest(data: bytes, folder: Path) -> object:
    """The manifest of our own format, in a file with the tensors that it is about."""
    for name in FILES:
        shutil.copyfile(samples() / "sealed" / name, folder / name)
    raw = (folder / FILES[1]).read_bytes()
    stated, tensors = json.loads(header_of(raw)), raw[8 + len(header_of(raw)) :]
    stated["__metadata__"]["loratools"] = data.decode("utf-8", "replace")
    text = json.dumps(stated).encode()
    (folder / FILES[1]).write_bytes(struct.pack("<Q", len(text)) + text + tensors)
    validate.report(folder)
    return dialects.open_adapter(folder)


def _kohyas() -> Iterator[bytes]:
    yield (samples() / "kohya.safetensors").read_bytes()
    tensors = {}
    for module in ("lora_unet_down_blocks_0_attentions_0_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1"):
        tensors |= {f"{module}.lora_down.weight": torch.zeros(2, 4), f"{module}.lora_up.weight": torch.zeros(4, 2)}
        tensors |= {f"{module}.alpha": torch.tensor(1.0), f"{module}.dora_scale": torch.zeros(4, 1)}
    yield save(tensors, {"ss_network_module": "networks.lora", "ss_network_dim": "2"})


@harness(_kohyas)
def kohya(data: bytes, folder: Path) -> object:
    """One file of kohya's."""
    (folder / "x.safetensors").write_bytes(data)
    return dialects.get("kohya").read(Listing.of(folder / "x.safetensors"))


def _residuals() -> Iterator[bytes]:
    yield (samples() / "merged" / "unmerge.residual").read_bytes()
    described = {"version": 1, "modes": {"w": "stored"}, "config": {}, "indexes": {"model.safetensors.index.json": {}},
                 "layout": [["model.safetensors", [["w", "F32", [4, 4]], ["v", "F32", [2]]], {}, ""]]}  # fmt: skip
    packed = torch.frombuffer(bytearray(zlib.compress(bytes(64))), dtype=torch.uint8)
    yield save({"w": packed}, {"residual": json.dumps(described)})


@harness(_residuals)
def residual(data: bytes, folder: Path) -> object:
    """The residual of a merge, beside the merged model."""
    (folder / "unmerge.residual").write_bytes(data)
    opened = Residual.open(folder / "unmerge.residual")
    model, inputs = _merged()
    lost = lost_tensors(model, opened, inputs, "error")
    return [sum(map(len, lost_bytes(each, opened))) for each in lost.values()]


@cache
def _merged() -> tuple[Checkpoint, list]:  # type: ignore[type-arg]
    from loratools.adapter.input import AdapterInput

    adapter = dialects.open_adapter(samples() / "adapter")
    return Checkpoint.open(samples() / "merged"), [AdapterInput(adapter, 1.0)]


def _cards() -> Iterator[bytes]:
    yield b"---\nlicense: mit\ntags: [a, b]\nmodel-index:\n- name: x\n  results: []\n---\n# A model\n"
    yield b"---\na: {b: [1, 2.5, null]}\n---\nx\n<!-- loratools card local=1 text=2 -->\nx\n<!-- /loratools card -->\n"


@harness(_cards)
def cards(data: bytes, folder: Path) -> object:
    """A model card: its front matter, and the section that we wrote."""
    text = data.decode("utf-8", "replace")
    parse_yaml("\n".join(card.parse(text).front), "x")
    return card.merged(text, text + "\n", {"tags": ["x"], "license": "mit"}, "section", force={}, keep="local")
