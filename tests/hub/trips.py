"""Pushing and pulling in one line each, as the command line does."""

from pathlib import Path

from loratools.hub import pull, push
from loratools.hub.card import Side
from loratools.hub.client import Hub
from loratools.hub.pull import Pulled
from loratools.hub.refs import Ref
from loratools.hub.upload import Committed
from tests.hub.server import LocalHub

REPO = "tester/sent"


def send(
    path: Path,
    repo: str = REPO,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    keep_card: Side | None = None,
    private: bool = False,
    message: str | None = None,
) -> Committed:
    """Push a file or folder."""
    hub = Hub()
    prepared = push.prepare(
        hub,
        push.read(path, base_model=base_model),
        Ref(repo, revision),
        create_pr=create_pr,
        license=license,
        keep_card=keep_card,
        base_model_given=base_model is not None,
    )
    return push.push(hub, prepared, message=message, private=private)


def fetch(output: Path, repo: str = REPO, revision: str | None = None, path: str | None = None) -> Pulled:
    """Pull a repository."""
    hub = Hub()
    return pull.pull(hub, pull.prepare(hub, Ref(repo, revision, path)), output)


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
