"""`push` and `pull`, each as one call: what the front door of the package shows of the Hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loratools.errors import InvalidOption
from loratools.hub import pull as pulling
from loratools.hub import push as pushing
from loratools.hub.card import Side
from loratools.hub.client import Hub
from loratools.hub.pull import Pull, Pulled
from loratools.hub.push import Push
from loratools.hub.refs import Ref, parse
from loratools.hub.upload import Committed
from loratools.options import Options
from loratools.parallel import Progress
from loratools.storage.atomic import check_output
from loratools.storage.sources import Location


def push(
    path: Location,
    repo: str,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    private: bool = False,
    message: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    card: Side | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Committed:
    """Send an adapter or a model to the Hub, in one commit or none.

    It is validated first; a file that the repository has already is not sent again. The model card keeps what a person
    wrote in it. Training state and paths of this machine are not sent.

    Args:
        path: The adapter or the model: a folder, or an adapter's single file.
        repo: `org/name`, perhaps with `@branch`; it is made where it does not exist.
        revision: The branch to commit to; it is made where it does not exist. Default: `main`.
        create_pr: Open a pull request instead of changing the branch.
        private: Make a new repository private.
        message: The title of the commit. Default: what was pushed.
        base_model: The base model's name on the Hub, `org/name`. Default: as the files say.
        license: The licence for the card, such as `apache-2.0`. Default: README.md's, or the base model's.
        card: Where the folder's and the Hub's README.md have both been changed: whose stays, `"local"` or `"hub"`.
            Default: that is an error.
        token: Default: that of `hf auth login`, or HF_TOKEN.
        progress: Called with the bytes that were sent since its last call.

    Returns:
        The commit and its address. `notes` say what the card lacks, and what stayed here.

    Raises:
        InvalidOption: `repo` is no `org/name`, or names another branch than `revision`.
        BadFile, InvalidFormat, UnknownKind, UnsupportedAdapter: It is not sound.
        HubError: The Hub said no, could not be reached, or the branch moved meanwhile.

    Example:
        >>> push("sealed", "lab/adapter", license="mit").url  # doctest: +SKIP
        'https://huggingface.co/lab/adapter/commit/…'
    """
    hub, prepared = prepare_push(
        path, repo, revision=revision, create_pr=create_pr, base_model=base_model, license=license, card=card,
        token=token,
    )  # fmt: skip
    committed = pushing.push(hub, prepared, message=message, private=private, progress=progress)
    return replace(committed, notes=prepared.notes)


def prepare_push(
    path: Location,
    repo: str,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    card: Side | None = None,
    token: str | None = None,
) -> tuple[Hub, Push]:
    """Decide a push and send nothing; return the Hub, and what `hub.push.push` sends to it. See `push`."""
    ref = _repository(repo, revision)
    checked = Options()
    if ref.path:
        checked.problems.append(f"expected org/name, found {repo!r}")
    if card is not None:
        checked.word("card", card, Side)
    checked.done()
    subject = pushing.read(Path(path), base_model=base_model)
    hub = Hub(token=token)
    return hub, pushing.prepare(
        hub, subject, ref, create_pr=create_pr, license=license, keep_card=card, base_model_given=base_model is not None
    )


def pull(
    repo: str,
    output: Location,
    *,
    revision: str | None = None,
    check_base: bool = True,
    force: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Fetch an adapter or a model from the Hub into a new folder, whole or not at all.

    Only the files that it is made of are fetched. Every file is compared with the Hub's digest, a sealed adapter with
    its own too. After an interruption the same call goes on where it was.

    Args:
        repo: `org/name`, perhaps with `@revision` and `/file`; `hf://` may stand before it.
        output: The folder to write; it must not exist, unless `force`.
        revision: A branch, a tag or a commit. Default: `main`.
        check_base: Compare the base model on the Hub with the one that the adapter was sealed with, from headers.
        force: Replace an output that exists.
        token: Default: that of `hf auth login`, or HF_TOKEN.
        progress: Called with the bytes that arrived since its last call.

    Returns:
        What was fetched, from which commit, and what is known of the adapter's base.

    Raises:
        InvalidOption: `repo` names another revision than `revision`.
        BadFile: `repo` is no place on the Hub, or what was fetched is not sound.
        HubError: The Hub said no, or could not be reached.
        OutputRefused: The output exists.

    Example:
        >>> pull("lab/adapter", "adapter").commit  # doctest: +SKIP
        '5f3c…'
    """
    hub, prepared = prepare_pull(repo, output, revision=revision, force=force, token=token)
    return pulling.pull(hub, prepared, Path(output), force=force, check_base=check_base, progress=progress)


def prepare_pull(
    repo: str, output: Location, *, revision: str | None = None, force: bool = False, token: str | None = None
) -> tuple[Hub, Pull]:
    """Decide a pull and fetch no file; return the Hub, and what `hub.pull.pull` fetches from it. See `pull`."""
    ref = _repository(repo, revision)
    check_output(Path(output), force=force)
    hub = Hub(token=token)
    return hub, pulling.prepare(hub, ref)


def _repository(repo: str, revision: str | None) -> Ref:
    ref = parse(repo)
    if revision and ref.revision:
        raise InvalidOption(f"revision {revision}, but {repo!r} names the revision {ref.revision} too")
    return replace(ref, revision=revision or ref.revision)
