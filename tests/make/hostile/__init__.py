"""A hundred files of strangers who mean harm: each is made in a folder, with the command that meets it.

A case is a function that makes its files in an empty folder. Its decorator says what `loratools` is asked, and how the
sentence with which it must answer begins or goes; `None` stands for files that are sound and only large. Nothing here
uses loratools. `python -m tests.make.hostile FOLDER` makes all of them, one folder each.

    headers     safetensors headers: lengths, shapes, names, millions of entries
    models      indexes, configs, model cards and tokenizers of a base
    configs     `adapter_config.json`: names, patterns, numbers
    archives    pickles, zip and tar archives, YAML
    ggufs       GGUF files
    others      our own format, kohya's names and metadata, residuals
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

MODULES = ("headers", "models", "configs", "archives", "ggufs", "others")


@dataclass(frozen=True)
class Case:
    """Files of a stranger: `make` writes them, `command` reads them, `sentence` is what must be said.

    `command` is a line for a shell in the folder; `sentence` a regular expression that is searched for in what the
    command prints, None where the command must succeed.
    """

    name: str
    make: Callable[[Path], object]
    command: str
    sentence: str | None


CASES: dict[str, Case] = {}


def hostile(command: str, sentence: str | None) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    """Make a case of a function."""

    def register(make: Callable[[Path], object]) -> Callable[[Path], object]:
        CASES[make.__name__] = Case(make.__name__, make, command, sentence)
        return make

    return register


def cases() -> dict[str, Case]:
    """Return every case by its name."""
    for name in MODULES:
        import_module(f"{__name__}.{name}")
    return CASES
