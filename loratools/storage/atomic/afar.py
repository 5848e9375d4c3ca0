"""Outputs in a store (`s3://bucket/key`): made in a temporary folder here, and sent; no rename there makes them whole.

As a path such a reference has lost a stroke, `s3:/bucket/key`, and is known by that. What sends is installed by name
(`resolvers.OUTPUTS`), for it lies above.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from loratools.errors import InvalidOption, LoraToolsError, NoSpace, OutputRefused, StoreError
from loratools.storage.atomic.fleeting import temporary
from loratools.storage.atomic.hidden import FULL
from loratools.storage.atomic.inputs import check_unchanged
from loratools.storage.resolvers import SHOWN, forget, reference_of


class Landing(Protocol):
    """A place in a store where an output is to be."""

    @property
    def kept(self) -> Mapping[str, Any]:
        """What an upload that was cut short had taken down of the files that are there, by their names."""
        ...

    def check(self, *, force: bool) -> None:
        """Raise `OutputRefused` where something is there that is no unfinished upload, and `force` is not set."""
        ...

    def begin(self, scratch: Path, key: str | None, *, force: bool) -> None:
        """Begin an output that is made in `scratch`; with the same `key` an upload that was cut short goes on."""
        ...

    def shard(self, path: Path, entry: Mapping[str, Any]) -> None:
        """Send a finished file of `scratch`, with what is taken down of it; its bytes are gone from the disk then."""
        ...

    def finish(self, scratch: Path) -> None:
        """Send the rest, what makes it an output last."""
        ...

    def abandon(self) -> None:
        """Remove what was sent."""
        ...

    def tell_left(self) -> None:
        """Warn of what stays for the next run."""
        ...

    def single(self, path: Path, beside: tuple[str, ...]) -> None:
        """Send an output that is one file, and before it what lies beside it."""
        ...


_OPEN: dict[str, Landing] = {}


def landing(target: Path) -> Landing | None:
    """Return where an output is to be in a store; None for one that is a path."""
    found = reference_of(target)
    if found is None:
        return None
    reference, module, function = found
    made: Landing = getattr(import_module(module), function)(reference)
    return made


def is_afar(target: Path) -> bool:
    """Tell whether an output is to be in a store."""
    return reference_of(target) is not None


def sender(scratch: Path) -> Landing | None:
    """Return what takes finished files of a scratch folder, where the output is to be in a store."""
    return _OPEN.get(str(scratch))


@contextmanager
def new_afar(
    target: Path, *, force: bool, key: str | None = None, beside: tuple[str, ...] | None = None
) -> Iterator[Path]:
    """Yield an empty temporary folder that is sent to a store when the block succeeds, and goes away in any case.

    With `beside` the output is one file of `target`'s name, and files of those names come along; see `atomic`.
    """
    place = landing(target)
    assert place is not None
    place.check(force=force)
    try:
        with temporary("merge") as folder:
            scratch = folder.resolve() / target.name
            scratch.mkdir()
            if beside is None:
                place.begin(scratch, key, force=force)
            _OPEN[str(scratch)] = place
            try:
                yield scratch
                check_unchanged(scratch)
                place.check(force=force)  # again: hours may have passed
                if beside is None:
                    place.finish(scratch)
                else:
                    place.single(scratch / target.name, beside)
            except BaseException as error:
                if isinstance(error, LoraToolsError) and not isinstance(error, StoreError):
                    place.abandon()  # the next run would meet the same error
                else:
                    place.tell_left()
                raise
            finally:
                del _OPEN[str(scratch)]
                forget(folder.resolve())
    except OSError as error:
        if error.errno not in FULL:
            raise
        reason = os.strerror(error.errno or 0).lower()
        hint = "What is sent lies in the temporary folder (TMPDIR) for a while: give one with more space."
        raise NoSpace(f"{reference(target)}: {reason}; nothing was finished", hint=hint) from None


def reference(target: str | os.PathLike[str]) -> str:
    """Return an output as it was written, with both strokes; any other path as it is."""
    found = reference_of(Path(target))
    return found[0] if found else str(target)


def refuse_afar(target: Path, what: str) -> None:
    """Raise `InvalidOption` for an output in a store, where `what` is done needs a folder of this machine."""
    if is_afar(target):
        raise InvalidOption(
            f"{reference(target)}: {what} needs a folder here",
            hint="Give the name of a folder, and copy it to the store with its own tools.",
        )


def refuse_inputs(target: Path, inputs: list[Path]) -> None:
    """Refuse an output in a store that is an input, lies in one, or holds one."""
    own = reference(target)
    for path in inputs:
        if reference(path) == own:
            raise OutputRefused(f"{own} is the input {own}", hint="Choose another output.")
        whole = path.absolute()
        for place in (whole, *whole.parents):
            shown = SHOWN.get(str(place))
            if shown is None:
                continue
            source = f"{shown}/{whole.relative_to(place).as_posix()}".removesuffix("/.")
            if own == source or own.startswith(f"{source}/") or source.startswith(f"{own}/"):
                raise OutputRefused(f"{own} is, holds or lies in the input {source}", hint="Choose another output.")
