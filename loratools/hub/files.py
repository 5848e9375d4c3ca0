"""Which files of a repository, or of a folder to be sent there, an adapter or a model is made of. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from loratools.adapter.naming.compact import natural
from loratools.decisions import warned
from loratools.errors import BadFile
from loratools.hub.refs import is_plain
from loratools.storage.beside import along, templates
from loratools.storage.beside.choice import STATED, Choice, choose
from loratools.storage.companions import RECORD

Kind = Literal["adapter", "checkpoint"]
Index = Callable[[str], Mapping[str, Any]]
"""Reads a JSON file of the repository: path -> the parsed object."""

PIPELINE = "model_index.json"
PICTURES = along.PICTURES

# Files of weights by their stems, first choice first, as PEFT, diffusers, MLX and transformers name them.
_STEMS: Mapping[Kind, tuple[str, ...]] = {
    "adapter": ("adapter_model", "pytorch_lora_weights", "adapters"),
    "checkpoint": ("model", "diffusion_pytorch_model", "pytorch_model"),
}
_ENDINGS = (".safetensors", ".bin", ".npz", ".pt", ".pth", ".ckpt", ".gguf")  # of an adapter
_CONFIGS = ("adapter_config.json", "params.json")  # that say an adapter's scaling: PEFT's and MLX's, mistral-finetune's
_INDEX = ".index.json"


@dataclass(frozen=True, slots=True)
class Selection:
    """The files that are needed: those that hold tensors or list such files, and all others, sorted."""

    weights: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """All of them; the weights first."""
        return (*self.weights, *self.others)


def kind_of(paths: Collection[str]) -> Kind:
    """Tell by the names at the top whether a repository holds an adapter or a whole model."""
    top = {path for path in paths if "/" not in path}
    if PIPELINE in top:
        return "checkpoint"
    if RECORD in top:  # of a merge, whatever its weights are called
        return "checkpoint"
    if any(name.startswith(_STEMS["adapter"]) or name == "adapter_config.json" for name in top):
        return "adapter"
    model = tuple(f"{stem}{middle}" for stem in _STEMS["checkpoint"] for middle in (".", "-0"))
    return "checkpoint" if any(name.startswith(model) for name in top) else "adapter"


def under(paths: Iterable[str], path: str | None) -> dict[str, str]:
    """Return name -> path in the repository of what lies in the folder `path`, or of the file itself and its JSON.

    Raises `BadFile` if there is neither.
    """
    paths = list(paths)
    if path is None:
        return {other: other for other in paths}
    if path in paths:
        parent = path.rpartition("/")[0]
        beside = {name: other for name, other in under(paths, parent or None).items() if "/" not in name}
        name = PurePosixPath(path).name
        return {other: at for other, at in beside.items() if other in (name, *_CONFIGS)}
    inside = {other.removeprefix(f"{path}/"): other for other in paths if other.startswith(f"{path}/")}
    if not inside:
        raise BadFile(f"no file or folder {path} in this repository")
    return inside


def select(paths: Collection[str], kind: Kind, index: Index) -> Selection:
    """Return what of `paths` an adapter or a model is made of, as loratools would read it.

    One set of weights only: safetensors before pickles, an index and its shards before a single file. Of a diffusers
    pipeline the folders that its model_index.json names. Nothing of the state of a training run, nothing hidden.
    Raises `BadFile` where there are no weights, an index names what is not there, or a path leaves its folder.
    """
    folders, by_diffusers = [""], set()
    if kind == "adapter":
        folders = [_home(paths, index)]
    if kind == "checkpoint" and PIPELINE in paths:
        entries = index(PIPELINE).items()
        parts = [name for name, entry in entries if isinstance(entry, list) and entry[:1] != [None]]
        folders += [f"{name}/" for name in parts if is_plain(name)]
        by_diffusers = {f"{name}/" for name, entry in entries if isinstance(entry, list) and entry[:1] == ["diffusers"]}
    weights: list[str] = []
    others: list[str] = []
    for folder in folders:
        inside = [path.removeprefix(folder) for path in paths if path.startswith(folder)]
        names = {name for name in inside if "/" not in name and not name.startswith(".")}
        beside: Index = lambda name, at=folder: index(at + name)  # type: ignore[misc]  # noqa: E731
        chosen = [] if folders[1:] and not folder else _weights(names, kind, beside, diffusers=folder in by_diffusers)
        weights += [folder + name for name in chosen]
        others += [folder + name for name in names if _is_companion(name) and name not in chosen]
        others += [folder + name for name in inside if "/" in name and templates.is_template(name)]
    if not weights:
        shown = ", ".join(sorted(paths)[:8]) or "nothing"
        raise BadFile(f"no weights of {'an adapter' if kind == 'adapter' else 'a model'} among its files: {shown}")
    problems = [f"{path!r}: not among the files" for path in weights if path not in paths]
    problems += [f"{path!r}: leads out of the folder, or cannot be written" for path in weights if not is_plain(path)]
    if problems:
        raise BadFile("the files do not belong together", problems)
    return Selection(tuple(sorted(weights)), tuple(sorted(path for path in others if is_plain(path))))


def _home(paths: Collection[str], index: Index) -> str:
    """Return the folder, "" or `name/`, of the adapter among `paths`: the top, or below it the only one, which is said.

    Raises `BadFile` where there is none at the top and several below.
    """
    inside: dict[str, set[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        inside.setdefault(folder, set()).add(name)
    if _of_adapter(inside.get("", set()), lambda _: {"weight_map": {}}):
        return ""
    stems = tuple(f"{stem}." for stem in (*_STEMS["adapter"], "lora"))
    homes = [
        folder
        for folder, names in sorted(inside.items())
        if folder and any(name.startswith(stems) and name.endswith(_ENDINGS) for name in names)
    ]
    if len(homes) > 1:
        hint = f"Give the path of one behind the repository's name, such as {max(homes, key=natural)}."
        raise BadFile("no adapter at the top of the repository, and several in its folders", homes[:20], hint=hint)
    if homes:
        warned("no adapter at the top of the repository; the only one below is taken, %s", homes[0])
    return f"{homes[0]}/" if homes else ""


def stale(existing: Iterable[str], weights: Iterable[str]) -> tuple[str, ...]:
    """Return the files of an earlier version that a reader would take for part of the new: other shards, an index."""
    weights = set(weights)
    stems = {match[1] for match in map(_SHARD.fullmatch, weights) if match}
    others = map(_SHARD.fullmatch, sorted(set(existing) - weights))
    return tuple(match[0] for match in others if match and match[1] in stems)


_SHARD = re.compile(r"((?:[^/]+/)*[^/]+?)(?:-\d{5,}-of-\d{5,})?\.(?:safetensors|bin)(?:\.index\.json)?")


def _weights(names: set[str], kind: Kind, index: Index, *, diffusers: bool) -> list[str]:
    return _of_model(names, index, diffusers=diffusers) if kind == "checkpoint" else _of_adapter(names, index)


def _of_model(names: set[str], index: Index, *, diffusers: bool) -> list[str]:
    """Return what transformers, or diffusers, would load; warn of what other loaders would take in its place."""
    chosen = choose(names, diffusers=diffusers)
    read = _listed(chosen, index)
    if "config.json" in names and any(name.endswith(".safetensors") and name not in read for name in names):
        chosen = choose(names, diffusers=diffusers, stated=index("config.json").get(STATED))
        read = _listed(chosen, index)
    if chosen and chosen.rivals:
        text = "of the weights in this repository %s is taken, and not compared with %s"
        warned(text, chosen.index or chosen.files[0], ", ".join(chosen.rivals))
    return read


def _listed(chosen: Choice | None, index: Index) -> list[str]:
    if chosen is None:
        return []
    return _shards(chosen.index, index) if chosen.index else list(chosen.files)


def _of_adapter(names: set[str], index: Index) -> list[str]:
    for ending in _ENDINGS:
        if listed := [name for name in names if name.endswith(ending + _INDEX)]:
            return _shards(min(listed), index)
        if single := [f"{stem}{ending}" for stem in _STEMS["adapter"] if f"{stem}{ending}" in names]:
            return single[:1]
    for ending in _ENDINGS:
        loose = sorted(name for name in names if name.endswith(ending) and not along.is_of_training(name))
        if loose:
            return loose
    return []


def _shards(name: str, index: Index) -> list[str]:
    weight_map = index(name).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise BadFile(f"{name}: expected weight_map, tensor names to file names")
    return [name, *sorted(set(weight_map.values()))]


def _is_companion(name: str) -> bool:
    return along.may_come(name) and PurePosixPath(name).suffix.lower() not in along.SHOWN
