"""Pushing and pulling in one line each, as the command line does."""

from pathlib import Path
from typing import Any

from loratools.hub.pull import Pulled, pull
from loratools.hub.push import push
from loratools.hub.upload import Committed
from tests.hub.server import LocalHub

REPO = "tester/sent"


def send(path: Path, repo: str = REPO, **options: Any) -> Committed:
    """Push a file or folder."""
    return push(path, repo, **options)


def fetch(output: Path, repo: str = REPO, revision: str | None = None, path: str | None = None) -> Pulled:
    """Pull a repository, or a file of it."""
    return pull(f"{repo}/{path}" if path else repo, output, revision=revision)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by relative path, hidden ones left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def shelf(folder: Path) -> list[str]:
    """Return everything in a folder, hidden entries too."""
    return sorted(path.name for path in folder.iterdir())


def stored(hub: LocalHub, folder: Path, repo: str) -> None:
    """Put the files of a folder on the Hub, past loratools."""
    hub.seed(repo, contents(folder))
