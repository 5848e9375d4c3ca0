"""One file of a model's tensors, opened from its header alone; and config.json beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from loratools.errors import UnsupportedAdapter
from loratools.storage.atomic import names
from loratools.storage.beside.along import is_index
from loratools.storage.beside.links import refuse_outside
from loratools.storage.codecs.state import BESIDE, with_beside
from loratools.storage.header import TensorSpec, read_header
from loratools.storage.pickles import SUFFIXES
from loratools.storage.strict_json import read_json

if TYPE_CHECKING:
    from loratools.storage.gguf.container import Container

GGUF = "A GGUF model is given by the path of its file."
"""What to do with a folder of GGUF files."""


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One file of tensors: its path, the tensors of its header by name, and its string metadata.

    `prefix` stands in `tensors` before the names that the file has: a pipeline's component, `unet.`
    """

    path: Path
    tensors: Mapping[str, TensorSpec]
    metadata: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""

    @property
    def layout(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of each tensor, in order."""
        return [(name, spec.dtype, spec.shape) for name, spec in self.tensors.items()]

    def header(self) -> bytes:
        """Read the bytes before the first tensor."""
        with self.path.open("rb") as file:
            return file.read(min((spec.start for spec in self.tensors.values()), default=0))


def is_weights(path: Path) -> bool:
    """Tell by its name whether a file holds tensors, of whatever kind, or lists files that do."""
    return path.suffix in (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", *SUFFIXES) or is_index(path.name)


def config_of(folder: Path) -> Mapping[str, Any]:
    """Return the parsed config.json of a folder, with what a file beside it says of a quantization; {} without both."""
    path, more = folder / "config.json", folder / BESIDE
    refuse_outside([path, more], folder)
    config = read_json(path) if os.path.lexists(path) else {}
    return with_beside(config, read_json(more)) if os.path.lexists(more) else config


def is_plain(name: str) -> bool:
    """Tell whether a name from a file stays in its folder: no separators, no `..`, no NUL; on Windows no device."""
    if names.WINDOWS and names.fault(name):
        return False
    return name not in ("", ".", "..") and PurePosixPath(name).name == name and "\\" not in name and "\0" not in name


def open_shard(path: Path) -> Shard:
    if path.suffix == ".gguf":
        from loratools.storage.gguf.container import read_container  # most models are of safetensors

        return Shard(path, read_container(path).tensors)
    if path.suffix in SUFFIXES:
        from loratools.storage.pickles.archive import read_pickled

        return Shard(path, read_pickled(path))
    header = read_header(path)
    return Shard(path, header.tensors, header.metadata)


def _parent(container: Container) -> object:
    """Return the name, or else the address, that a file states of the model that it was made from."""
    keys = [f"general.base_model.0.{part}" for part in ("repo_url", "name")]
    keys += ["general.source.repo_url", "general.source.huggingface.repository", "general.source.url"]
    return next((text for key in keys if (text := container.get(key))), None)


def gguf_config(path: Path) -> dict[str, Any]:
    """Return what a GGUF file says of its model, in the place of a config.json: architecture and heads.

    Raises `UnsupportedAdapter` for an adapter, and for a part of a model that is split over files.
    """
    from loratools.storage.gguf.container import read_container

    container = read_container(path)
    architecture, parts = container.get("general.architecture"), container.get("split.count")
    if container.get("general.type") == "adapter":
        raise UnsupportedAdapter(f"{path}: an adapter of llama.cpp; a base model was expected")
    if isinstance(parts, int) and parts > 1:
        hint = "Join them first: llama-gguf-split --merge."
        raise UnsupportedAdapter(
            f"{path}: one of {parts} files of a model, and they are read as one file only", hint=hint
        )
    heads, kv_heads = (container.get(f"{architecture}.attention.{key}") for key in ("head_count", "head_count_kv"))
    counts = {"heads": heads, "kv_heads": heads if kv_heads is None else kv_heads}
    stated: dict[str, Any] = {key: count for key, count in counts.items() if isinstance(count, int) and count > 0}
    texts = {"name": container.get("general.name"), "parent": _parent(container)}
    stated |= {key: text for key, text in texts.items() if isinstance(text, str) and text}
    stated |= {"sections": True} if f"{architecture}.rope.dimension_sections" in container.fields else {}
    return {"gguf": {"architecture": architecture, **stated}}
