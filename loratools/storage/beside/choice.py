"""Which files of a folder are its model's weights: those that transformers and diffusers would load, by names alone.

transformers looks for `model.safetensors`, then for its index, then for `pytorch_model.bin`, then for its index;
diffusers for an index before a single file. Files of a variant (`model.fp16.safetensors`) are loaded where somebody
asks for the variant, and files of other names by other programs: they are read here where nothing else is there.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from loratools.errors import BadFile
from loratools.storage.beside import along

STATED = "transformers_weights"
"""The field of config.json in which a model names its file, or its index."""

INDEX = ".index.json"
ENDINGS = (".safetensors", ".bin")
_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
_BY_INDEX_FIRST = "diffusion_pytorch_model"
# Files of tensors that are no part of a model's own weights.
_NOT_WEIGHTS = ("adapter_model", "adapters", "pytorch_lora_weights", "optimizer", "training_args", "scheduler")
_NUMBERED = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})\.(?:safetensors|bin)")


@dataclass(frozen=True, slots=True)
class Choice:
    """What is read of a folder: one index, or the `files` that make up the model.

    `rivals` are files or indexes that another loader would take for the same model; a reader compares them.
    """

    index: str | None = None
    files: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()


def choose(names: Collection[str], *, diffusers: bool = False, stated: object = None) -> Choice | None:
    """Return what is read of a folder with files of these names; None where none of them is weights.

    `diffusers` says that a component of a pipeline is loaded by diffusers; `stated` is what config.json says in
    `transformers_weights`, which wins over every other name.

    Raises `BadFile` where nothing decides between several indexes, and for numbered files of which some are missing.
    """
    for ending in ENDINGS:
        usual = _usual(names, ending, diffusers)
        if ending == ENDINGS[0] and isinstance(stated, str) and stated in names:
            usual = [stated, *(name for name in usual if name != stated)]
        if usual:
            return _of(usual[0], tuple(usual[1:]))
    for ending in ENDINGS:
        indexes = sorted(name for name in names if along.is_index(name) and f"{ending}.index." in name)
        if len(indexes) > 1:
            raise BadFile(f"several indexes: {', '.join(indexes)}", hint="Give the path of one of them.")
        if indexes:
            return _of(indexes[0])
        loose = sorted(name for name in names if name.endswith(ending) and not name.startswith(_NOT_WEIGHTS))
        if loose:
            _check_numbers(loose)
            return Choice(files=tuple(loose))
    return None


def _usual(names: Collection[str], ending: str, diffusers: bool) -> list[str]:
    """Return the names that loaders look for and that are there, in the order in which they look."""
    stems = sorted(_STEMS, key=lambda stem: stem != _BY_INDEX_FIRST) if diffusers else _STEMS
    wanted = []
    for stem in stems:
        pair = [f"{stem}{ending}", f"{stem}{ending}{INDEX}"]
        wanted += pair[::-1] if stem == _BY_INDEX_FIRST else pair
    return [name for name in wanted if name in names]


def _of(name: str, rivals: tuple[str, ...] = ()) -> Choice:
    return Choice(name, (), rivals) if along.is_index(name) else Choice(None, (name,), rivals)


def _check_numbers(loose: list[str]) -> None:
    """Raise `BadFile` where numbered files, which no index lists, are not all of one saving."""
    sets: dict[tuple[str, str], set[int]] = {}
    for match in filter(None, map(_NUMBERED.fullmatch, loose)):
        sets.setdefault((match[1], match[3]), set()).add(int(match[2]))
    problems = []
    for (stem, count), numbers in sorted(sets.items()):
        if missing := sorted(set(range(1, min(int(count), 100_000) + 1)) - numbers)[:20]:
            problems.append(
                f"{stem}: {len(numbers)} of {int(count)} are there; missing: {', '.join(map(str, missing))}"
            )
    stems = [stem for stem, _ in sets]
    problems += [f"{stem}: files of several savings" for stem in sorted(set(stems)) if stems.count(stem) > 1]
    if problems:
        raise BadFile("numbered files without an index do not make up a model", problems)
