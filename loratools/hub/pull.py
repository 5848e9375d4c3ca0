"""A repository becomes a folder, whole or not at all; or lands in the cache of huggingface_hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread

from loratools import dialects
from loratools.adapter.model import BaseIdentity
from loratools.decisions import warned
from loratools.errors import LoraToolsError, UnknownKind, UnsupportedAdapter, WrongBase
from loratools.format import validate
from loratools.format.manifest import ORIGIN
from loratools.hub import faults, files
from loratools.hub.client import Hub, RemoteFile, quiet
from loratools.hub.headers import choose, headers_of, schema_of
from loratools.hub.refs import Ref, is_plain, parse, repository
from loratools.options import CheckBase, Options
from loratools.parallel import Progress
from loratools.storage import atomic, digest
from loratools.storage.atomic import names as writable
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.sources import Location, Need, Watch

RECORD = Path(".loratools") / "pulled.json"
"""Where a pulled folder came from; hidden, so that it is not pushed again."""


@dataclass(frozen=True, slots=True)
class Pull:
    """What is fetched: name in the output -> file of the commit. `single` is the one file asked for, if any."""

    hub: Hub
    ref: Ref
    commit: str
    kind: files.Kind
    files: Mapping[str, RemoteFile]
    single: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())


@dataclass(frozen=True, slots=True)
class BaseCheck:
    """Whether the Hub has the model that an adapter was sealed with; `same` is None where nothing was compared."""

    id: str
    same: bool | None
    reason: str


@dataclass(frozen=True, slots=True)
class Pulled:
    """What `pull` did; `digest` is the adapter's own, checked; `notes` say what could not be checked."""

    output: Path
    repo: str
    commit: str
    kind: files.Kind
    files: int
    nbytes: int
    digest: str | None
    base: BaseCheck | None
    notes: tuple[str, ...] = ()


def pull(
    repo: str,
    output: Location,
    *,
    revision: str | None = None,
    check_base: CheckBase = "warn",
    force: bool = False,
    durable: bool = False,
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
        check_base: What happens where the base on the Hub, by its headers, is not the one that the adapter was sealed
            with: `strict` refuses, `warn` warns, `off` does not compare. Default: `warn`.
        force: Replace an output that exists.
        durable: Whether a model is on the disk itself before it has its name, so that a power cut leaves it whole or
            absent, as an adapter always is. Default: no, the system writes it when it likes.
        token: Default: that of `hf auth login`, or HF_TOKEN.
        progress: Called with the bytes that arrived since its last call.

    Returns:
        What was fetched, from which commit, and what is known of the adapter's base.

    Raises:
        InvalidOption: `repo` names another revision than `revision`.
        BadFile: `repo` is no place on the Hub, or what was fetched is not sound.
        WrongBase: The base on the Hub is another model, and `check_base` is `strict`.
        HubError: The Hub said no, or could not be reached.
        OutputRefused: The output exists.

    Example:
        >>> pull("lab/adapter", "adapter").commit  # doctest: +SKIP
        '5f3c…'
    """
    atomic.sweep(output)
    checked = Options().word("check_base", check_base, CheckBase).flag("force", force).flag("durable", durable)
    checked.text("revision", revision).text("token", token).done()
    prepared = prepare(repo, output, revision=revision, force=force, token=token)
    return fetch(prepared, output, force=force, durable=durable, check_base=check_base, progress=progress)


def prepare(
    repo: str, output: Location, *, revision: str | None = None, force: bool = False, token: str | None = None
) -> Pull:
    """Decide a pull and fetch nothing but lists; parameters and errors are those of `pull`."""
    ref = repository(repo, revision)
    atomic.check_output(Path(output), force=force)
    return plan(Hub(token=token), ref)


def plan(hub: Hub, ref: Ref, kind: files.Kind | None = None) -> Pull:
    """Resolve the revision to a commit, once, and decide what is needed of it."""
    commit = hub.commit(ref.repo, ref.revision)
    tree = hub.tree(ref.repo, commit)
    selection, names = choose(hub, ref, commit, tree, kind)
    single = Path(ref.path).name if ref.path and ref.path in tree else None
    wanted = {name: tree[names[name]] for name in sorted(selection.paths)}
    writable.check(wanted, f"hf://{ref.repo}")
    return Pull(hub, ref, commit, kind or files.kind_of(names), wanted, single)


def fetch(
    prepared: Pull, output: Location, *, force: bool = False, durable: bool = False, check_base: CheckBase = "warn",
    progress: Progress | None = None,
) -> Pulled:  # fmt: skip
    """Write the files of a prepared pull as a new folder; it appears whole, checked, or not at all.

    What was fetched before a failure stays in a hidden folder beside the output, which is said, and is not fetched
    again. Parameters and errors are those of `pull`.
    """
    output = Path(output)
    atomic.check_output(output, force=force)
    hub, ref = prepared.hub, prepared.ref
    with atomic.kept_folder(output, prepared.commit[:16]) as stage:
        try:
            writable.check_case(prepared.files, stage, output)
            with quiet(), _watched(stage, progress):
                for file in prepared.files.values():
                    hub.fetch(ref.repo, prepared.commit, file, stage)
        except BaseException:
            if kept := _fetched(stage):
                warned("%d bytes that were fetched stay in %s, and the same pull goes on from there", kept, stage)
            else:
                atomic.remove(stage)
            raise
        durable = durable or prepared.kind == "adapter"
        with atomic.new_folder(output, force=force, durable=durable) as scratch:
            for path, file in prepared.files.items():
                (scratch / path).parent.mkdir(parents=True, exist_ok=True)
                (stage / file.path).replace(scratch / path)
            atomic.remove(stage)
            doc = {"schema": 1, "repo": ref.repo, "commit": prepared.commit, "revision": ref.revision, "path": ref.path}
            (scratch / RECORD).parent.mkdir()
            (scratch / RECORD).write_text(json.dumps(doc, indent=2) + "\n", encoding="utf-8", newline="\n")
            own, base, notes = _check(prepared, scratch, check_base)
    count, nbytes = len(prepared.files), prepared.nbytes
    return Pulled(output, ref.repo, prepared.commit, prepared.kind, count, nbytes, own, base, notes)


def resolve(reference: str, need: Need, watch: Watch, folder: Callable[[], Path], *, token: str | None = None) -> Path:
    """Return a local path of what a reference to the Hub names; `loratools.storage.sources` calls this.

    `adapter` and `checkpoint` are downloaded to the cache of huggingface_hub, each file checked against the Hub's own
    digest; `watch` shows the progress of that. For `header`, headers and small JSON files are fetched by range
    requests into the folder that `folder` makes. `token` is by default that of huggingface_hub (HF_TOKEN, `hf auth
    login`).

    Raises `HubError`, and `BadFile` for a reference that is none.
    """
    ref, hub = parse(reference), Hub(token=token)
    return headers_of(hub, ref, folder()) if need == "header" else _cached(hub, ref, need, watch)


def _cached(hub: Hub, ref: Ref, need: Need, watch: Watch) -> Path:
    """Return the folder in huggingface_hub's cache that has what is needed of `ref`, or the file that it names.

    Offline (HF_HUB_OFFLINE) what the cache has is taken.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    folder = Path(constants.HF_HUB_CACHE) / f"models--{ref.repo.replace('/', '--')}"
    noted = folder / "refs" / (ref.revision or "main")  # as huggingface_hub notes what a branch was last
    if constants.HF_HUB_OFFLINE:
        commit = noted.read_text(encoding="utf-8").strip() if noted.is_file() else str(ref.revision)
        root = folder / "snapshots" / commit
        if not is_plain(commit) or not root.is_dir():
            raise faults.offline(str(ref))
        return root / ref.path if ref.path else root
    prepared = plan(hub, ref, "checkpoint" if need == "checkpoint" else "adapter")
    held = partial(try_to_load_from_cache, ref.repo, revision=prepared.commit)
    missing = sum(file.size for file in prepared.files.values() if not isinstance(held(file.path), str))
    with quiet(), watch(missing) as advance, _watched(folder / "blobs", advance):
        paths = {file.path: hub.fetch(ref.repo, prepared.commit, file) for file in prepared.files.values()}
    path, at = next(iter(paths.items()))
    root = at.parents[path.count("/")]
    if prepared.commit != ref.revision:
        noted.parent.mkdir(parents=True, exist_ok=True)
        noted.write_text(prepared.commit, encoding="utf-8", newline="\n")
    return root / ref.path if ref.path else root


def _check(prepared: Pull, folder: Path, check_base: CheckBase) -> tuple[str | None, BaseCheck | None, tuple[str, ...]]:
    """Open what was fetched; return the digest that an adapter states, checked, and what is known of its base."""
    if prepared.kind == "checkpoint":
        Checkpoint.open(folder)
        return None, None, ()
    path = folder / (prepared.single or "")
    try:
        adapter = dialects.open_adapter(path)
    except (UnknownKind, UnsupportedAdapter) as error:  # sound files, as far as the Hub knows
        return None, None, (f"not opened: {error.message}",)
    ours = adapter.dialect == "loratools"
    if ours and (problems := validate.validate(path)):
        raise validate.refusal(path, problems)
    own = adapter.settings[ORIGIN].get("digest") if ours else None
    base = _base(prepared.hub, adapter.base) if check_base != "off" and adapter.base else None
    if base and base.same is False:
        told = f"{base.id} on the Hub is not the model that this adapter was sealed with: {base.reason}"
        if check_base == "strict":
            raise WrongBase(told)
        warned("%s", told)
    return own, base, ()


def _base(hub: Hub, base: BaseIdentity) -> BaseCheck | None:
    if base.id is None:
        return None
    if not base.schema:
        return BaseCheck(base.id, None, "the adapter states no schema hash of its base")
    try:
        schema = schema_of(hub, Ref(base.id, base.revision), digest.algorithm_of(base.schema))
    except LoraToolsError as error:
        return BaseCheck(base.id, None, error.message)
    same = schema == base.schema
    return BaseCheck(base.id, same, f"names, dtypes and shapes are {'' if same else 'not '}those of the sealed base")


@contextmanager
def _watched(folder: Path, progress: Progress | None) -> Iterator[None]:
    """Tell `progress` how the folder grows: not every huggingface_hub can say how far a download is."""
    if progress is None:
        yield
        return
    done, stop = _size(folder), Event()

    def look() -> None:
        nonlocal done
        now = _size(folder)
        progress(max(0, now - done))
        done = max(done, now)

    def watch() -> None:
        while not stop.wait(0.2):
            look()

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()


def _fetched(stage: Path) -> int:
    """Return the bytes that need not be fetched again; what huggingface_hub notes beside them in .cache is none."""
    whole = (path for path in stage.rglob("*") if path.is_file() and ".cache" not in path.relative_to(stage).parts)
    return sum(path.stat().st_size for path in (*whole, *stage.glob(".cache/**/*.incomplete")))


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # it was renamed while it was looked at
            total += path.stat().st_size if path.is_file() else 0
    return total
