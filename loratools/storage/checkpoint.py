"""A base or tuned model on disk, opened from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from loratools.errors import BadFile
from loratools.storage import digest, files
from loratools.storage.header import TensorSpec, read_header
from loratools.storage.pickles.archive import SUFFIXES, read_pickled
from loratools.storage.sources import Location, local
from loratools.storage.strict_json import read_json

if TYPE_CHECKING:
    import torch

_INDEX = ".index.json"
_SHOWN = 200  # problems listed of one index; a hostile one could have millions
_FIRST_CHOICES = ("model", "diffusion_pytorch_model", "pytorch_model")
# Files of tensors that are no part of a model's own weights.
_NOT_WEIGHTS = ("adapter_model", "adapters", "pytorch_lora_weights", "optimizer", "training_args", "scheduler")


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A model's tensors by name, over one file, shards with an index, a folder, or a diffusers pipeline.

    `path`        what was opened: a file, an index or a folder
    `root`        the folder that holds everything (the parent, for a single file)
    `shards`      its files of tensors, in order; every tensor is in exactly one
    `specs`       tensor name -> `TensorSpec`; in a pipeline the component is a prefix: `unet.conv_in.weight`
    `indexes`     index file -> its parsed JSON, for each index that was used
    `config`      the parsed config.json; {} where there is none, and for a pipeline
    `components`  the folders of a pipeline that hold weights; () for any other model
    `stored`      the model on disk, where this is a view of it with layers repeated; None for any other model
    `origins`     tensor name -> its name on disk, in such a view
    """

    path: Path
    root: Path
    shards: tuple[Shard, ...]
    specs: Mapping[str, TensorSpec]
    indexes: Mapping[Path, Mapping[str, Any]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    components: tuple[str, ...] = ()
    stored: Checkpoint | None = None
    origins: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Location) -> Checkpoint:
        """Open a model from its headers; no tensor is read.

        `path` is a safetensors or torch file, an index, a folder of them, a diffusers pipeline, or `hf://org/name`,
        which is downloaded to the cache of huggingface_hub.

        Raises `BadFile` for a missing or truncated shard, an index and shards that disagree, a Git-LFS pointer, a
        name that is in two files, and a folder that holds no weights. All problems are listed at once.
        """
        path = local(path, "checkpoint")
        try:
            if path.is_dir():
                pipeline = path / "model_index.json"
                return _open_pipeline(path, read_json(pipeline)) if pipeline.is_file() else _open_folder(path)
            if not path.exists():
                raise BadFile(f"{path}: no such file or folder")
        except OSError as error:
            raise BadFile(f"{error.filename or path}: cannot be read: {error.strerror}") from None
        if path.name.endswith(_INDEX):
            return _open_index(path)
        if "-of-" in path.name and list(path.parent.glob(f"*{_INDEX}")):
            raise BadFile(f"{path}: this is one shard of several", hint=f"Give the folder instead: {path.parent}")
        return _build(path, [_open_shard(path)], {})

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in its stored dtype; raise `BadFile` if there is none of that name."""
        if name not in self.specs:
            raise BadFile(f"{self.path}: no tensor {name!r}")
        return files.read_tensor(self.specs[name])

    def schema(self, algorithm: str = digest.DEFAULT) -> str:
        """Return the `schema` tier of the base hash: names, dtypes and shapes, no bytes read."""
        specs = (self.stored or self).specs
        return digest.schema({name: (spec.dtype, spec.shape) for name, spec in specs.items()}, algorithm)

    def origin(self, name: str) -> str:
        """Return the name that a tensor has on disk."""
        return self.origins.get(name, name)

    @property
    def model_type(self) -> str | None:
        """What config.json says that the model is; None where it says nothing."""
        name = self.config.get("model_type")
        return name if isinstance(name, str) and name else None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: spec.shape for name, spec in self.specs.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs.values())


def is_weights(path: Path) -> bool:
    """Tell by its name whether a file holds tensors, of whatever kind, or lists files that do."""
    return path.suffix in (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", *SUFFIXES) or path.name.endswith(_INDEX)


def _open_folder(folder: Path) -> Checkpoint:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    for ending in (".safetensors", ".bin"):
        indexes = [name for name in names if name.endswith(ending + _INDEX)]
        preferred = [f"{stem}{ending}{_INDEX}" for stem in _FIRST_CHOICES if f"{stem}{ending}{_INDEX}" in indexes]
        if preferred or len(indexes) == 1:
            return _open_index(folder / (preferred or indexes)[0])
        if indexes:
            raise BadFile(f"{folder}: several indexes: {', '.join(indexes)}", hint="Give the path of one of them.")
        single = [f"{stem}{ending}" for stem in _FIRST_CHOICES if f"{stem}{ending}" in names]
        loose = [name for name in names if name.endswith(ending) and not name.startswith(_NOT_WEIGHTS)]
        if chosen := single[:1] or loose:
            return _build(folder, [_open_shard(folder / name) for name in chosen], {})
    seen = ", ".join(names[:8]) or "nothing"
    hint = "This folder holds an adapter; a base model was expected." if "adapter_config.json" in names else None
    raise BadFile(f"{folder}: no model weights (.safetensors or .bin) in this folder; found {seen}", hint=hint)


def _open_index(path: Path) -> Checkpoint:
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadFile(f"{path}: expected weight_map, tensor names to file names")
    files_of: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        files_of.setdefault(file, set()).add(tensor)
    problems, shards = [], []
    for name, listed in sorted(files_of.items()):
        if not _is_plain(name):
            problems.append(f"{name!r}: a shard must be a plain file name in the index's own folder")
            continue
        try:
            shard = _open_shard(path.parent / name)
        except BadFile as error:
            problems.append(str(error))
            continue
        shards.append(shard)
        present = shard.tensors.keys()
        problems += [f"{tensor}: listed in the index, not in {name}" for tensor in sorted(listed - present)]
        problems += [f"{tensor}: in {name}, not listed in the index" for tensor in sorted(present - listed)]
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise BadFile(f"{path}: index and shards do not agree: {len(problems)} problem(s)", [*problems[:_SHOWN], *more])
    return _build(path.parent, shards, {path: index})


def _open_pipeline(folder: Path, model_index: Mapping[str, Any]) -> Checkpoint:
    shards: list[Shard] = []
    indexes: dict[Path, Mapping[str, Any]] = {}
    components = []
    for name, entry in model_index.items():
        part = folder / name
        if not isinstance(entry, list) or entry[:1] == [None] or not _is_plain(name) or not part.is_dir():
            continue
        if not any(is_weights(file) for file in part.iterdir()):
            continue  # a tokenizer, a scheduler
        inner = _open_folder(part)
        components.append(name)
        indexes |= inner.indexes
        for shard in inner.shards:
            renamed = {f"{name}.{tensor}": spec for tensor, spec in shard.tensors.items()}
            shards.append(Shard(shard.path, renamed, shard.metadata, f"{name}."))
    if not shards:
        raise BadFile(f"{folder}: a diffusers pipeline without any component that has weights")
    return _build(folder, shards, indexes, tuple(components))


def _is_plain(name: str) -> bool:
    """Tell whether a name from a file stays in its folder: no separators, no `..`, no NUL."""
    return name not in ("", ".", "..") and PurePosixPath(name).name == name and "\\" not in name and "\0" not in name


def _open_shard(path: Path) -> Shard:
    if path.suffix in SUFFIXES:
        return Shard(path, read_pickled(path))
    header = read_header(path)
    return Shard(path, header.tensors, header.metadata)


def _build(
    path: Path, shards: list[Shard], indexes: Mapping[Path, Mapping[str, Any]], components: tuple[str, ...] = ()
) -> Checkpoint:
    specs: dict[str, TensorSpec] = {}
    problems = []
    for shard in shards:
        for name, spec in shard.tensors.items():
            if name in specs:
                problems.append(f"{name}: in {specs[name].file.name} and in {shard.path.name}")
            specs[name] = spec
    if problems:
        raise BadFile(f"{path}: the same tensor is in two files", problems)
    if not specs:
        raise BadFile(f"{path}: no tensors in it")
    root = path if path.is_dir() else path.parent
    config_file = root / "config.json"
    config = read_json(config_file) if config_file.is_file() and not components else {}
    return Checkpoint(path, root, tuple(shards), specs, indexes, config, components)
