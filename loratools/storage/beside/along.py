"""Which files beside a model's weights may come along with it, by their names: a list of what may, not of what may not.

Formats of weights are invented faster than a list of them grows, and unmerged weights in a merged folder are loaded by
whoever looks for that format. What is not known to be a text, a tokenizer, code or a picture stays behind.
"""

from __future__ import annotations

import re
from pathlib import PurePath

_TEXTS = frozenset({
    ".json", ".jsonl", ".txt", ".md", ".rst", ".jinja", ".jinja2", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".csv",
    ".tsv", ".tiktoken", ".vocab", ".bpe", ".codes", ".dict", ".dic", ".spm", ".proto", ".py", ".pyi", ".ipynb", ".sh",
    ".cpp", ".cu", ".cuh", ".h", ".html", ".bib", ".cff",
})  # fmt: skip
RESIDUAL = "unmerge.residual"
"""What rounding destroyed; not a name that a loader would take for weights."""


def residual_of(file: PurePath) -> str:
    """Return the name of the residual beside a model that is one file: `model.residual` of `model.safetensors`."""
    return file.with_suffix(".residual").name


PICTURES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg"])
"""Endings of pictures, as model cards show them."""

SHOWN = PICTURES | frozenset([".wav", ".mp3", ".flac", ".ogg", ".mp4", ".webm", ".pdf"])
"""And of all that people look at or listen to."""
_SENTENCEPIECE = r".*\.model(\.v\d+\w*)?"  # Mistral numbers its tokenizers: tokenizer.model.v3
_BARE = r"(licen[cs]e|notice|use_policy|copying|readme|vocab|merges|dict)[\w-]*"
_LEGAL = r"(licen[cs]e|notice|use_policy|copying)"
_INDEX = r".*\.index(\.[\w-]+)?\.json"  # of weights; a variant's is model.safetensors.index.fp16.json
# What training leaves beside a model: state of the run, and pickles that may hold a token or a path.
_OF_TRAINING = r"(optimizer|scheduler\.|rng_state|training_args|trainer_state|events\.out|.*_results\.)"
# Folders of other savings, of a run, and of a format that is a folder.
_FOLDERS = re.compile(r"(checkpoint-\d+|global_step\d+|runs|wandb|__pycache__|.*\.(mlpackage|mlmodelc|zarr))")


def may_come(path: PurePath | str) -> bool:
    """Tell whether a file may come along, by its path relative to the model's folder."""
    path = PurePath(path)
    name, suffix = path.name, path.suffix.lower()
    if any(part.startswith(".") or _FOLDERS.fullmatch(part) for part in path.parts[:-1]) or name.startswith("."):
        return False
    if is_of_training(name) or is_index(name):
        return False
    known = suffix in _TEXTS or suffix in SHOWN or re.fullmatch(_SENTENCEPIECE, name) is not None
    return known or (not suffix and re.fullmatch(_BARE, name, re.IGNORECASE) is not None) or is_legal(name)


def is_training(path: PurePath) -> bool:
    """Tell whether a file is state of a training run, by its name or by a folder that it is in."""
    return is_of_training(path.name) or any(_FOLDERS.fullmatch(part) for part in path.parts[:-1])


def is_legal(name: str) -> bool:
    """Tell whether a file is a licence or a notice."""
    return re.match(_LEGAL, name, re.IGNORECASE) is not None


def is_index(name: str) -> bool:
    """Tell whether a file lists the shards of weights."""
    return re.fullmatch(_INDEX, name) is not None


def is_of_training(name: str) -> bool:
    """Tell whether a file is state of a training run, and no part of a model."""
    return re.match(_OF_TRAINING, name, re.IGNORECASE) is not None
