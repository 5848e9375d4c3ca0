"""A base or tuned model on disk, opened from headers alone.

shard      one file of tensors, and what lies beside it
logical    a view of a model with its quantized weights shown as weights
values     digests by value: codes as the 16-bit numbers that they stand for
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.decisions import warned
from loratools.errors import BadFile, counted
from loratools.storage import digest, files
from loratools.storage.beside.along import RESIDUAL, is_index, may_come
from loratools.storage.beside.choice import STATED, choose
from loratools.storage.beside.links import refuse_outside, walk
from loratools.storage.checkpoint.shard import GGUF, Shard, config_of, gguf_config, is_plain, is_weights, open_shard
from loratools.storage.codecs.state import HEADER
from loratools.storage.header import TensorSpec
from loratools.storage.sources import Location, absent, local
from loratools.storage.strict_json import MAX_INDEX, parse_json_object, read_json

if TYPE_CHECKING:
    import torch

MAX_FILES, _SHOWN = 10_000, 200
"""Files that one index may list, of which the largest models have some hundred; and its problems that are shown."""

PIPELINE = "model_index.json"
"""The file by which a folder is a diffusers pipeline; it says which."""


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A model's tensors by name, over one file, shards with an index, a folder, or a diffusers pipeline.

    `path`        what was opened: a file, an index or a folder
    `root`        the folder that holds everything (the parent, for a single file)
    `shards`      its files of tensors, in order; every tensor is in exactly one
    `specs`       tensor name -> `TensorSpec`; in a pipeline the component is a prefix: `unet.conv_in.weight`
    `indexes`     index file -> its parsed JSON, for each index that was used
    `config`      the parsed config.json; {} where there is none, and for a pipeline. What a ComfyUI file says of its
                  quantization in its header is in it, under `_quantization_metadata`
    `components`  the folders of a pipeline that hold weights; () for any other model
    `configs`     component -> its parsed config.json, in a pipeline
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
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Location) -> Checkpoint:
        """Open a model from its headers; no tensor is read.

        `path` is a safetensors or torch file, an index, a folder of them, a diffusers pipeline, or `hf://org/name`,
        which is downloaded to the cache of huggingface_hub.

        Raises `BadFile` for a missing or truncated shard, an index and shards that disagree, a Git-LFS pointer, a
        name that is in two files, and a folder that holds no weights. All problems are listed at once.
        """
        path = local(path, "checkpoint")
        pipeline = path / PIPELINE
        try:
            if path.is_dir():
                refuse_outside([pipeline], path)
                return _open_pipeline(path, read_json(pipeline)) if os.path.lexists(pipeline) else _open_folder(path)
            if not path.exists():
                raise absent(path)
        except OSError as error:
            raise BadFile(f"{error.filename or path}: cannot be read: {error.strerror}") from None
        if is_index(path.name):
            return _open_index(path)
        if "-of-" in path.name and any(is_index(other.name) for other in path.parent.glob("*.index*.json")):
            raise BadFile(f"{path}: this is one shard of several", hint=f"Give the folder instead: {path.parent}")
        return _build(path, [open_shard(path)], {})

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

    def unread(self) -> tuple[str, ...]:
        """Return the files of its folder that may be weights and were not looked at, by their relative paths."""
        if not self.path.is_dir() and not self.indexes:
            return ()
        read = {shard.path for shard in self.shards} | set(self.indexes)
        paths = (path for path in walk(self.root) if path not in read and path.name != RESIDUAL)
        names = (path.relative_to(self.root).as_posix() for path in paths)
        return tuple(name for name in names if not may_come(name))

    def tell_unread(self) -> None:
        """Warn of the files that `unread` returns."""
        if unread := self.unread():
            files, were = counted(len(unread), "file"), "was" if len(unread) == 1 else "were"
            warned("%s: %s that may be weights %s not looked at: %s", self.path, files, were, _few(unread))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: spec.shape for name, spec in self.specs.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs.values())


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _open_folder(folder: Path, root: Path | None = None, *, diffusers: bool = False) -> Checkpoint:
    """Open the model in a folder, which is a component of the pipeline in `root` where that is given."""
    root = root or folder
    refuse_outside([folder], root)
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    config = config_of(folder)
    try:
        chosen = choose(names, diffusers=diffusers or "_diffusers_version" in config, stated=config.get(STATED))
    except BadFile as error:
        raise BadFile(f"{folder}: {error.message}", error.problems, hint=error.hint) from None
    if chosen is None:
        seen = ", ".join(names[:8]) or "nothing"
        hint = "This folder holds an adapter; a base model was expected." if "adapter_config.json" in names else None
        hint = GGUF if hint is None and any(name.endswith(".gguf") for name in names) else hint
        raise BadFile(f"{folder}: no model weights (.safetensors or .bin) in this folder; found {seen}", hint=hint)
    if chosen.index:
        opened = _open_index(folder / chosen.index, root)
    else:
        refuse_outside([folder / name for name in chosen.files], root)
        opened = _build(folder, [open_shard(folder / name) for name in chosen.files], {})
        if len(chosen.files) > 1:
            warned("%s: no index; %d files are read as one model: %s", folder, len(chosen.files), _few(chosen.files))
    _compare(opened, [folder / name for name in chosen.rivals], root)
    return opened


def _compare(opened: Checkpoint, rivals: Sequence[Path], root: Path) -> None:
    """Hold what other loaders would read against what is read: the same tensors are said, others raise `BadFile`."""
    read = next(iter(opened.indexes), opened.shards[0].path)
    differing = []
    for path in rivals:
        try:
            rival = _open_index(path, root) if is_index(path.name) else _build(path, [open_shard(path)], {})
        except BadFile as error:
            warned("%s: not looked at, for it cannot be read: %s", path, error.message)
            continue
        pairs = [(rival.specs[name], spec) for name, spec in opened.specs.items() if name in rival.specs]
        if not pairs:
            continue
        if rival.specs.keys() != opened.specs.keys() or not all(files.same_bytes(*pair) for pair in pairs):
            differing.append(path)
        else:
            warned("%s: %s is read; %s holds the same tensors", opened.path, read.name, path.name)
    if differing:
        raise BadFile(
            f"{opened.path}: weights of different models beside each other, and loaders differ in which they take",
            [f"{path.name}: other tensors than {read.name}, which transformers would load here" for path in differing],
            hint="Remove those that are not the model's, or give the path of one file or index.",
        )


def _open_index(path: Path, root: Path | None = None) -> Checkpoint:
    refuse_outside([path] if root else [], root or path.parent)
    index = read_json(path, most=MAX_INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadFile(f"{path}: expected weight_map, tensor names to file names")
    files_of: dict[str, set[str]] = {}
    problems, shards = [], []
    for tensor, file in weight_map.items():
        files_of.setdefault(file, set()).add(tensor)
    if len(files_of) > MAX_FILES:
        raise BadFile(f"{path}: an index of {len(files_of)} files; at most {MAX_FILES} are read")
    refuse_outside([path.parent / name for name in files_of if is_plain(name)], root or path.parent)
    for name, listed in sorted(files_of.items()):
        if not is_plain(name):
            problems.append(f"{name!r}: a shard must be a plain file name in the index's own folder")
            continue
        try:
            shard = open_shard(path.parent / name)
        except BadFile as error:
            problems.append(error.line)
            continue
        shards.append(shard)
        present = shard.tensors.keys()
        problems += [f"{tensor}: listed in the index, not in {name}" for tensor in sorted(listed - present)]
        problems += [f"{tensor}: in {name}, not listed in the index" for tensor in sorted(present - listed)]
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise BadFile(
            f"{path}: index and shards do not agree: {counted(len(problems), 'problem')}", [*problems[:_SHOWN], *more]
        )
    return _build(path.parent, shards, {path: index})


def _open_pipeline(folder: Path, model_index: Mapping[str, Any]) -> Checkpoint:
    shards: list[Shard] = []
    indexes: dict[Path, Mapping[str, Any]] = {}
    components: dict[str, Mapping[str, Any]] = {}
    for name, entry in model_index.items():
        part = folder / name
        if not isinstance(entry, list) or entry[:1] == [None] or not is_plain(name) or not part.is_dir():
            continue
        if not any(is_weights(file) for file in part.iterdir()):
            continue  # a tokenizer, a scheduler
        inner = _open_folder(part, folder, diffusers=entry[:1] == ["diffusers"])
        components[name] = inner.config
        indexes |= inner.indexes
        for shard in inner.shards:
            renamed = {f"{name}.{tensor}": spec for tensor, spec in shard.tensors.items()}
            shards.append(Shard(shard.path, renamed, shard.metadata, f"{name}."))
    if not shards:
        raise BadFile(f"{folder}: a diffusers pipeline without any component that has weights")
    return _build(folder, shards, indexes, components)


def _build(
    path: Path, shards: list[Shard], indexes: Mapping[Path, Mapping[str, Any]],
    components: Mapping[str, Mapping[str, Any]] | None = None,
) -> Checkpoint:  # fmt: skip
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
    if path.suffix == ".gguf":
        config: Mapping[str, Any] = gguf_config(path)
    else:
        config = {} if components else {**config_of(root), **_of_headers(shards)}
    inner = components or {}
    return Checkpoint(path, root, tuple(shards), specs, indexes, config, tuple(inner), configs=inner)


def _of_headers(shards: Sequence[Shard]) -> dict[str, Any]:
    """Return what ComfyUI's files say of their quantization in their headers, under its name there; {} for others."""
    stated = [(shard, shard.metadata[HEADER]) for shard in shards if HEADER in shard.metadata]
    parsed = [parse_json_object(text.encode(), shard.path) for shard, text in stated]
    layers: dict[str, Any] = {}
    for each in parsed:
        layers |= each["layers"] if isinstance(each.get("layers"), dict) else {}
    return {HEADER: {**parsed[0], "layers": layers}} if parsed else {}
