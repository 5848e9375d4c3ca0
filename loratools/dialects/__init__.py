"""The layouts of adapters in the wild, one file each, found by file name; all through the one `Adapter`.

A dialect is a module here with

    SUMMARY            what it is and who writes it, in one line
    EXTRA              the pip extra that it needs, or None
    FILES              endings of single files that it can write, or (): it writes folders only
    CANNOT             what no file of it can say, one phrase each; `losses` names them for an adapter
    detect(listing)    `Evidence` that the listing is of this dialect, or None: from names, headers and small files only
    read(listing)      the `Adapter`; every tensor accounted for, or an exception that lists all problems
    losses(adapter)    every `Loss` that writing this adapter would mean
    write(adapter, target, force)   write the folder `target`, or a file of an ending in FILES, by `storage.atomic`
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Protocol, cast

from loratools.adapter.model import Adapter, Loss
from loratools.decisions import decided
from loratools.dialects._frame.listing import WEIGHTS, Evidence, Listing
from loratools.errors import LossyConversion, OutputRefused, UnknownKind
from loratools.storage.checkpoint import Checkpoint

__all__ = ["Dialect", "Evidence", "Listing", "detect", "get", "list_dialects", "names", "open_adapter", "save_adapter"]


class Dialect(Protocol):
    """A dialect's module; see the top of this file."""

    SUMMARY: str
    EXTRA: str | None
    FILES: tuple[str, ...]
    CANNOT: tuple[str, ...]

    def detect(self, listing: Listing) -> Evidence | None:
        """Say how sure it is that the listing is of this dialect."""
        ...

    def read(self, listing: Listing) -> Adapter:
        """Read the adapter."""
        ...

    def losses(self, adapter: Adapter) -> list[Loss]:
        """List what it cannot say of the adapter."""
        ...

    def write(self, adapter: Adapter, target: Path, *, force: bool) -> None:
        """Write what it can say of the adapter, whole or not at all."""
        ...


def names() -> tuple[str, ...]:
    """Return the names of all dialects, sorted."""
    return tuple(sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_")))


def get(name: str) -> Dialect:
    """Return a dialect's module; raise `UnknownKind` with the list of those that exist."""
    if name not in names():
        raise UnknownKind(f"no dialect {name!r}; loratools knows {', '.join(names())}")
    return cast(Dialect, import_module(f"{__name__}.{name}"))


@dataclass(frozen=True, slots=True)
class DialectSummary:
    """What `Dialect` says of itself: its name, what it is, the files it writes, what it cannot say, and its extra."""

    name: str
    summary: str
    extra: str | None
    files: tuple[str, ...]
    cannot: tuple[str, ...]


def list_dialects() -> tuple[DialectSummary, ...]:
    """List the layouts of adapter files that loratools reads and writes, sorted by name.

    Example:
        >>> "peft" in [dialect.name for dialect in list_dialects()]
        True
    """
    return tuple(
        DialectSummary(name, dialect.SUMMARY, dialect.EXTRA, dialect.FILES, dialect.CANNOT)
        for name, dialect in ((name, get(name)) for name in names())
    )


def detect(listing: Listing) -> tuple[str, Evidence]:
    """Return the dialect with the best evidence, and the evidence.

    Raises `UnknownKind` where no dialect knows the listing, or where the best two are equally sure; `BadFile` where the
    reason is a file that cannot be opened.
    """
    candidates = [(name, evidence) for name in names() if (evidence := get(name).detect(listing))]
    if not candidates:
        listing.check()
        raise _unknown(listing)
    best = max(evidence.score for _, evidence in candidates)
    first = [(name, evidence) for name, evidence in candidates if evidence.score == best]
    if len(first) > 1:
        raise UnknownKind(
            f"{listing.path}: can be read as {' or as '.join(name for name, _ in first)}",
            [f"{name}: {evidence.reason}" for name, evidence in first],
            hint="Say which one it is: name the dialect.",
        )
    return first[0]


def open_adapter(
    path: str | Path,
    *,
    dialect: str | None = None,
    alpha: float | None = None,
    base: Checkpoint | None = None,
    initial: bool = False,
    enabled: tuple[bool, ...] | None = None,
) -> Adapter:
    """Read an adapter from a folder or a single file, of any dialect, or of the one that is named.

    `alpha`, `base` and `enabled` tell what some dialects leave out: loralib records neither alpha nor which projections
    of a MergedLinear are enabled, kohya's names need the base's. `initial` lets in what only makes sense less the
    adapter that its training started from (PiSSA, OLoRA, CorDA), for a caller that takes that one away.

    No factor is read: dtypes and shapes are known, the numbers are loaded when they are asked for. torch is imported
    only for pickles. Raises `UnknownKind`, `BadFile`, `InvalidFormat` or `UnsupportedAdapter`.
    """
    listing = Listing.of(path, alpha=alpha, base=base, initial=initial, enabled=enabled)
    name, evidence = (dialect, None) if dialect else detect(listing)
    adapter = get(name).read(listing)
    decided("%s: dialect %s: %s", listing.path, name, evidence.reason if evidence else "as the call says")
    return adapter if adapter.dialect == name else replace(adapter, dialect=name)


def save_adapter(
    adapter: Adapter,
    path: str | Path,
    *,
    dialect: str = "loratools",
    allow_loss: bool = False,
    force: bool = False,
) -> list[Loss]:
    """Write an adapter in a dialect, whole or not at all; return what the dialect could not say.

    A path that ends as a file of tensors does (`.safetensors`, …) becomes a single file, any other a folder. Raises
    `LossyConversion` with every loss unless `allow_loss`, `OutputRefused` where the output exists and `force` is not
    set, the output is also an input, or the dialect writes no such file, `NoSpace`.
    """
    path, writer = Path(path), get(dialect)
    losses = writer.losses(adapter)
    if losses and not allow_loss:
        raise LossyConversion(
            f"{path}: the dialect {dialect} cannot say {len(losses)} thing(s) of this adapter",
            [str(loss) for loss in losses],
            hint="Write it without them with --allow-loss, or choose a dialect that keeps them.",
        )
    if path.suffix in WEIGHTS and path.suffix not in writer.FILES:
        written = " or ".join((*writer.FILES, "a folder"))
        raise OutputRefused(f"{path}: the dialect {dialect} does not write {path.suffix} files; it writes {written}")
    _check_not_input(adapter, path)
    writer.write(adapter, path, force=force)
    return losses


def _check_not_input(adapter: Adapter, path: Path) -> None:
    output = path.resolve()
    files = {lazy.file.resolve() for lazy in adapter.tensors().values() if lazy.file}
    if any(file == output or output in file.parents for file in files):
        raise OutputRefused(f"{path} is also an input", hint="Choose another output.")


def _unknown(listing: Listing) -> UnknownKind:
    known = [f"{name}: {get(name).SUMMARY}" for name in names()]
    if listing.single:
        return UnknownKind(f"{listing.path}: no dialect knows this file; loratools reads", known)
    shown = ", ".join(listing.files[:12]) + (f" and {len(listing.files) - 12} more" if len(listing.files) > 12 else "")
    inside = sorted(config.parent.name for config in listing.folder.glob("*/adapter_config.json"))
    hint = f"There are adapters in its folders: {', '.join(inside[:12])}" if inside else None
    if not inside and "config.json" in listing.files:
        hint = "This looks like a base model; an adapter was expected."
    return UnknownKind(
        f"{listing.path}: no dialect knows this folder; it holds {shown or 'no files'}; loratools reads",
        known,
        hint=hint,
    )
