"""A file or a folder appears under its final name whole, or not at all: what the folder says, step by step."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from loratools.decisions import warned
from loratools.errors import BadFile, InvalidOption, LoraToolsError, NoSpace, OutputRefused
from loratools.storage.atomic import afar, leftovers, machine, names, system
from loratools.storage.atomic.afar import reference as spelled
from loratools.storage.atomic.fleeting import temporary
from loratools.storage.atomic.hidden import FULL, Busy, beside, make
from loratools.storage.atomic.inputs import check_unchanged
from loratools.storage.atomic.kept import kept_folder, part_folder, part_folders, part_room
from loratools.storage.atomic.leftovers import remove
from loratools.storage.atomic.place import put
from loratools.storage.atomic.sync import sync, sync_names
from loratools.storage.atomic.together import put_together
from loratools.storage.atomic.undisturbed import undisturbed

__all__ = [
    "check_output", "check_space", "free_space", "kept_folder", "new_file", "new_files", "new_folder", "new_output",
    "part_folder", "part_folders", "part_room", "refuse_inputs", "remove", "spelled", "sweep", "temporary",
]  # fmt: skip


@contextmanager
def new_folder(target: Path, *, force: bool = False, key: str | None = None, durable: bool = True) -> Iterator[Path]:
    """Yield an empty scratch folder beside `target` that becomes `target` when the block succeeds.

    Any exception, an interrupt included, removes the scratch folder and leaves `target` as it was. A killed process
    leaves only its scratch folder, which the next run for the same target removes. A folder that is replaced is there
    until the new one has its place, where the file system can exchange two names. With `durable` everything is on the
    disk itself before it has its name, so that a power cut leaves the old or the new; without, as long as the system
    has not written it by itself (half a minute), a power cut may leave a name with nothing behind it.

    With a `key` (at least eight hex digits) the scratch folder outlives an interruption and a full disk: the next run
    with the same key finds it as it was, a run without removes it. A `LoraToolsError` removes it at once, for the next
    run would meet the same error.

    Raises `OutputRefused` if `target` exists and `force` is not set, or is a file, or another process is writing into
    the folder of that key; `NoSpace` when the disk is full.
    """
    if afar.is_afar(target):
        with afar.new_afar(target, force=force, key=key) as scratch:
            yield scratch
        return
    with _scratch(target, force, f"resume-{key[:8]}" if key else None) as scratch:
        _check_kind(target, folder=True)
        yield scratch
        check_unchanged(scratch)
        _install(scratch, target, scratch, force=force, durable=durable)


@contextmanager
def new_file(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield the path of a scratch file that becomes `target` when the block succeeds; see `new_folder`."""
    if afar.is_afar(target):
        with afar.new_afar(target, force=force, beside=()) as scratch:
            yield scratch / target.name
        return
    with _scratch(target, force) as scratch:
        _check_kind(target, folder=False)
        path = scratch / target.name
        yield path
        check_unchanged(scratch)
        _install(path, target, scratch, force=force, durable=True)


@contextmanager
def new_files(target: Path, beside: Sequence[str], *, force: bool = False, durable: bool = True) -> Iterator[Path]:
    """Yield a scratch folder whose file of `target`'s name becomes `target` when the block succeeds; see `new_folder`.

    Files of the names `beside` it come along, and take the places of those that are there; one that is there and not in
    the scratch folder goes.
    """
    if afar.is_afar(target):
        with afar.new_afar(target, force=force, beside=tuple(beside)) as scratch:
            yield scratch
        return
    others = [target.with_name(name) for name in beside]
    with _scratch(target, force) as scratch:
        for path in (target, *others):
            check_output(path, force=force)
            _check_kind(path, folder=False)
        yield scratch
        check_unchanged(scratch)
        for path in (target, *others):
            check_output(path, force=force)  # again: hours may have passed
            if durable and (scratch / path.name).exists():
                sync(scratch / path.name)
        try:
            put_together(scratch, target.absolute(), beside, force=force)
        except FileExistsError:
            check_output(target, force=force)
            raise
        with undisturbed():
            if durable:
                sync_names(target.absolute().parent)
            remove(scratch)


@contextmanager
def new_output(target: Path, name: str, *, force: bool = False) -> Iterator[Path]:
    """Yield where to write a file: `target` itself, if it has the suffix of `name`, or `name` in a folder `target`."""
    single = target.suffix == Path(name).suffix
    with (new_file if single else new_folder)(target, force=force) as scratch:
        yield scratch if single else scratch / name


def free_space(target: Path) -> int:
    """Return the bytes that are free on the disk of an output; for one in a store, where it is made."""
    if afar.is_afar(target):
        from tempfile import gettempdir

        return system.free(Path(gettempdir()))
    return system.free(target.absolute().parent)


def check_space(target: Path, size: int) -> None:
    """Raise `NoSpace` where an output of `size` bytes does not fit on its disk."""
    if size > (free := free_space(target)):
        raise NoSpace(
            f"{afar.reference(target)}: the result takes {size} bytes, the disk has {free} free; nothing was written"
        )


def check_output(target: Path, *, force: bool = False) -> None:
    """Refuse an output that exists (`OutputRefused`), or whose parent folder is missing (`BadFile`).

    With `force` an existing output is accepted, unless it is a symbolic link, or a folder that holds the current folder
    or the home folder: a slip like `-o . --force` must not delete those.
    """
    if (landing := afar.landing(target)) is not None:
        landing.check(force=force)
        return
    if target.is_symlink() or target.exists():
        if not force:
            raise OutputRefused(f"{target} exists already", hint="Choose another output, or replace it with --force.")
        if target.is_symlink():
            raise OutputRefused(f"{target} is a symbolic link; loratools does not write through links")
        resolved = target.resolve()
        for name, find in (("current", Path.cwd), ("home", Path.home)):
            with suppress(OSError, RuntimeError):  # there may be no such folder
                if (place := find().resolve()) == resolved or resolved in place.parents:
                    raise OutputRefused(f"{target} is or holds the {name} folder; it will not be replaced")
    if not target.absolute().parent.is_dir():
        raise BadFile(f"{target.absolute().parent}: no such folder to write {target.name} into")


def sweep(output: str | os.PathLike[str]) -> None:
    """Remove what killed runs for the same output left, and put back an old output that one had moved aside.

    Every verb does this first, before anything can fail. What a run left on purpose, to go on from, stays. Raises
    `InvalidOption` where `output` is no path, or a reference to the Hub.
    """
    if not isinstance(output, str | os.PathLike) or not os.fspath(output):
        raise InvalidOption(f"expected a path to write to, found {output!r}")
    _refuse_reference(Path(output))
    if afar.is_afar(Path(output)):
        return
    if (target := Path(output).absolute()).name:
        leftovers.sweep(target, leftovers.GARBAGE)


def _refuse_reference(target: Path) -> None:
    """Raise `InvalidOption` for `hf://org/name`, which as a path has lost a stroke."""
    if target.parts[:1] == ("hf:",) and not Path("hf:").exists():
        name = "/".join(target.parts[1:])
        raise InvalidOption(
            f"hf://{name} is a place on the Hub, and an output is a file or a folder here",
            hint=f"Write it to a folder, and send that: loratools push FOLDER {name}",
        )


@contextmanager
def _scratch(target: Path, force: bool, kept: str | None = None) -> Iterator[Path]:
    absolute = target.absolute()
    scratch = beside(absolute, kept or f"partial-{machine.token()}")
    leftovers.sweep(absolute, (*leftovers.GARBAGE, *leftovers.KEPT), scratch)
    check_output(target, force=force)
    lock = None
    try:
        lock = make(scratch, target, kept=kept is not None)
        yield scratch
    except BaseException as error:
        if not isinstance(error, Busy) and (kept is None or isinstance(error, LoraToolsError)):
            with undisturbed():
                remove(scratch)
        if isinstance(error, OSError) and error.errno in FULL:
            reason = os.strerror(error.errno or 0).lower()
            hint = "Free some space and run it again."
            raise NoSpace(f"{target}: {reason}; nothing was written", hint=hint) from None
        raise
    finally:
        if lock:
            lock.release()


def _check_kind(target: Path, *, folder: bool) -> None:
    if target.exists() and target.is_dir() != folder:
        existing, wanted = ("a folder", "a file") if target.is_dir() else ("a file", "a folder")
        raise OutputRefused(f"{target} is {existing}; the output would be {wanted}", hint="Choose another output.")


def _install(finished: Path, target: Path, scratch: Path, *, force: bool, durable: bool) -> None:
    """Give what is `finished`, the scratch folder or a file in it, the name of the output; remove what was there."""
    check_output(target, force=force)  # again: hours may have passed
    _tell_names(finished, target)
    if durable:
        sync(finished)
    absolute = target.absolute()
    token = scratch.name.rpartition("-")[2]
    kept = None
    with undisturbed():
        if scratch == beside(absolute, f"resume-{token}") and absolute.exists():
            # What is there will lie in the scratch folder next, and a killed run must not leave it to be resumed.
            kept, finished = scratch, scratch.rename(beside(absolute, f"partial-{token}"))
            scratch = finished
        try:
            replaced = put(finished, absolute, beside(absolute, f"replaced-{token}"), force=force)
        except OSError as error:
            if kept:
                scratch.rename(kept)
            if isinstance(error, FileExistsError):
                check_output(target, force=force)
            raise
        if durable:
            sync_names(absolute.parent)
        if old := scratch if finished != scratch else replaced:
            remove(old)
            if os.path.lexists(old):
                warned("%s: what was replaced lies there, and cannot be removed", old)


def _tell_names(finished: Path, target: Path) -> None:
    """Warn about names in an output, taken over from a base or a repository, that not every system can write."""
    inside = (path.relative_to(finished).as_posix() for path in finished.rglob("*")) if finished.is_dir() else ()
    if lines := names.faults(inside):
        shown = "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")
        warned("%s: not every system can hold it: on Windows %s", target, shown)


def refuse_inputs(output: Path, inputs: Sequence[str | Path | None]) -> None:
    """Refuse an output that is an input, lies in one, or holds one."""
    if afar.is_afar(output):
        afar.refuse_inputs(output, [Path(path) for path in inputs if path is not None])
        return
    target = output.resolve()
    for path in inputs:
        source = Path(path).resolve() if path is not None else None
        if source and (target == source or source in target.parents or target in source.parents):
            raise OutputRefused(f"{output} is, holds or lies in the input {path}", hint="Choose another output.")
