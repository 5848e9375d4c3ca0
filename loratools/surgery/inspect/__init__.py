"""Describe an adapter or a checkpoint from its headers alone: no tensor is read, torch is not imported.

amounts   how much of something a file holds
model     what a model is
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loratools.adapter.model import Adapter, BaseIdentity, Step
from loratools.adapter.naming.compact import compact, natural
from loratools.adapter.parts import factors_of, is_textual_inversion
from loratools.decisions import decided
from loratools.dialects import Listing, candidates_for, check_alpha, detect, get, located, open_adapter
from loratools.dialects._frame import folders
from loratools.dialects._frame.facts import Facts, facts_of
from loratools.dialects._frame.metadata import metadata_of
from loratools.errors import BadFile
from loratools.format.manifest import METADATA_KEY, ORIGIN
from loratools.storage.beside.cards import read_card
from loratools.storage.sources import Location, session
from loratools.surgery.inspect.amounts import Amount, TensorSummary, by_dtype, sizes_of, summary_of, total_of

if TYPE_CHECKING:  # what the headers of one adapter do not need is not imported for it
    from loratools.dialects import InMemory
    from loratools.storage.checkpoint import Checkpoint
    from loratools.surgery.inputs import Patterns
    from loratools.surgery.inspect.model import CheckpointSummary, describe_checkpoint

    _Patterns = tuple[tuple[str, ...], tuple[str, ...]]

__all__ = [
    "AdapterSummary", "Amount", "CheckpointSummary", "Group", "ModuleSummary", "TensorSummary", "describe_adapter",
    "describe_checkpoint", "inspect",
]  # fmt: skip

_CARD = "README.md"


def __getattr__(name: str) -> Any:
    """Return what is said of models, imported when it is asked for: an adapter does not wait for it."""
    if name not in ("CheckpointSummary", "describe_checkpoint"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from loratools.surgery.inspect import model

    return getattr(model, name)


class ModuleSummary(NamedTuple):
    """One update of an adapter; `shape` is that of the weight it changes, (out, in, …)."""

    module: str
    kind: str
    rank: int
    alpha: float
    scaling: float
    shape: tuple[int, ...]
    parameters: int
    nbytes: int


class Group(NamedTuple):
    """The modules that share kind, rank, alpha and scaling; `targets` are their names in few lines (`compact`)."""

    kind: str
    rank: int
    alpha: float
    scaling: float
    modules: int
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """What an adapter is; `digest` is the one its file states, and `dtypes` counts its own tensors by dtype.

    `path` is as the call has it; of an open adapter it is the folder of its files. `peft_type` is PEFT's word for what
    it is where that is another one than LORA, else None. `facts` are what its metadata say, `entries` those of the
    headers of its files.
    """

    path: str
    dialect: str
    evidence: str
    groups: tuple[Group, ...]
    modules: tuple[ModuleSummary, ...]
    replacements: tuple[TensorSummary, ...]
    total: Amount
    dtypes: Mapping[str, Amount]
    base: BaseIdentity | None
    digest: str | None
    provenance: tuple[Step, ...]
    type: str = "adapter"
    peft_type: str | None = None
    facts: Facts = field(default_factory=Facts)
    entries: Mapping[str, str] = field(default_factory=dict, repr=False)


@session()
def inspect(
    path: Location | Adapter | InMemory | Checkpoint, dialect: str | None = None, *,
    alpha: float | None = None, include: Patterns = None, exclude: Patterns = None,
) -> AdapterSummary | CheckpointSummary:  # fmt: skip
    """Describe an adapter or a model from its headers alone: no tensor is read, torch is not imported.

    Args:
        path: A path, an `hf://` reference of which the headers are fetched, an open `Adapter`, one held in memory, or
            an open `Checkpoint`.
        dialect: The dialect to read an adapter as (`loratools.list_dialects()`). Default: the one that knows its
            contents best; what no dialect knows is a model.
        alpha: The alpha that an adapter was trained with, for a file that does not record it; it wins over one that it
            records. Default: the file's.
        include: Patterns of the modules that are described, of a model of the tensors that are listed: a name
            (`"q_proj"`), a glob (`"layers.*.mlp.*"`), or `"re:…"`. Default: all.
        exclude: Patterns of modules or tensors that are left out. Default: none.

    Returns:
        An `AdapterSummary` or a `CheckpointSummary`.

    Raises:
        BadFile, InvalidFormat, UnsupportedAdapter: What is there cannot be read.
        UnknownKind: There is no such dialect, or two know the contents equally well.

    Example:
        >>> inspect("adapter").groups[0].rank
        8
    """
    if dialect is not None:
        get(dialect)
    check_alpha(alpha)
    patterns: _Patterns = ((), ())
    if include is not None or exclude is not None:
        from loratools.surgery.inputs import patterns_of

        patterns = patterns_of(include, exclude)
    if not isinstance(path, str | PathLike):
        return _of_value(path, dialect, alpha, patterns)
    listing = Listing.of(path, need="header", alpha=alpha)
    if dialect is not None:
        return _described(listing, path, dialect, "named by the user", patterns)
    candidates = candidates_for(listing)
    if not candidates:
        from loratools.storage.checkpoint import Checkpoint

        try:
            model = Checkpoint.open(listing.path)
        except BadFile:
            listing.check()  # which may say more of a file that is no model's
            if (below := located(listing)) is listing and not listing.factors:
                raise
            listing, candidates = below, []
        else:
            if is_textual_inversion({name: spec.shape for name, spec in model.specs.items()}):
                raise folders.embedding(listing)
            if not factors_of(model.specs):
                from loratools.surgery.inspect.model import describe_checkpoint, listed

                decided("%s: no dialect of adapters knows it, so it is a model", listing.path)
                return listed(describe_checkpoint(model, path), patterns)
    dialect, evidence = detect(listing, candidates)
    decided("%s: dialect %s: %s", listing.path, dialect, evidence.reason)
    return _described(listing, path, dialect, evidence.reason, patterns)


def _of_value(
    value: Adapter | InMemory | Checkpoint, dialect: str | None, alpha: float | None, patterns: _Patterns
) -> AdapterSummary | CheckpointSummary:
    from loratools.storage.checkpoint import Checkpoint

    if isinstance(value, Checkpoint):
        from loratools.surgery.inspect.model import describe_checkpoint, listed

        return listed(describe_checkpoint(value, value.path), patterns)
    adapter = open_adapter(value, dialect=dialect, alpha=alpha)
    # An adapter that was made in memory lies nowhere.
    place = next((lazy.spec.file.parent for lazy in adapter.tensors().values() if lazy.spec), Path())
    return describe_adapter(_kept(adapter, patterns), place, adapter.dialect, "opened by the caller")


def _kept(adapter: Adapter, patterns: _Patterns) -> Adapter:
    """Return an adapter with the modules that patterns keep."""
    if not any(patterns):
        return adapter
    from loratools.surgery.inputs import kept

    return kept(adapter, *patterns)


def _described(listing: Listing, path: Location, dialect: str, evidence: str, patterns: _Patterns) -> AdapterSummary:
    adapter = get(dialect).read(listing)
    read, entries = listing.tell_unread(adapter), metadata_of(adapter)
    for name in listing.weights:
        if listing.folder / name in read and (header := listing.header(name)):
            entries |= {key: value for key, value in header.metadata.items() if key != METADATA_KEY}
    card = read_card(listing.folder / _CARD) if _CARD in listing.files else None
    return describe_adapter(_kept(adapter, patterns), path, dialect, evidence, entries=entries, card=card)


def describe_adapter(
    adapter: Adapter, path: Location, dialect: str, evidence: str = "", *, entries: Mapping[str, str] | None = None,
    card: str | None = None,
) -> AdapterSummary:  # fmt: skip
    """Summarize an open adapter; `path` is where it is said to lie.

    `entries` are those of its header (default: those that it carries), `card` the text of its README.md.
    """
    entries = metadata_of(adapter) if entries is None else entries
    sizes = sizes_of(adapter.replacements.values())
    listed: list[ModuleSummary] = []
    for module in sorted(adapter.updates, key=natural):
        update = adapter.updates[module]
        own = sizes_of(update.parts.values())
        sizes += own
        listed.append(ModuleSummary(
            module, update.kind, update.rank, update.alpha, update.scaling, update.shape,
            sum([size[1] for size in own]), sum([size[2] for size in own]),
        ))  # fmt: skip
    modules, dtypes = tuple(listed), by_dtype(sizes)
    return AdapterSummary(
        path=str(path), dialect=dialect, evidence=evidence, groups=_groups(modules), modules=modules,
        replacements=tuple(summary_of(name, adapter.replacements[name]) for name in sorted(adapter.replacements)),
        total=total_of(dtypes.values()), dtypes=dtypes, base=adapter.base,
        digest=adapter.settings.get(ORIGIN, {}).get("digest"), provenance=adapter.provenance,
        peft_type=adapter.settings.get("peft_type"), entries=entries,
        facts=facts_of(entries, adapter.base.id if adapter.base else None, card),
    )  # fmt: skip


def _groups(modules: Iterable[ModuleSummary]) -> tuple[Group, ...]:
    shared: dict[tuple[str, int, float, float], list[str]] = defaultdict(list)
    for summary in modules:
        shared[summary.kind, summary.rank, summary.alpha, summary.scaling].append(summary.module)
    largest_first = sorted(shared.items(), key=lambda item: (-len(item[1]), item[0]))
    return tuple(Group(*key, len(members), tuple(compact(members))) for key, members in largest_first)
