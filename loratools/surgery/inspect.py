"""Describe an adapter or a checkpoint from its headers alone: no tensor is read, torch is not imported."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapter.model import Adapter, BaseIdentity, Step
from loratools.adapter.naming.compact import compact, natural
from loratools.adapter.parts import factors_of
from loratools.decisions import decided
from loratools.dialects import InMemory, Listing, candidates_for, check_alpha, detect, get, located, open_adapter
from loratools.dialects._frame.facts import Facts, facts_of
from loratools.dialects._frame.metadata import metadata_of
from loratools.errors import BadFile
from loratools.format.manifest import METADATA_KEY, ORIGIN
from loratools.storage.beside.cards import read_card
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import TensorSpec
from loratools.storage.lazy import LazyTensor
from loratools.storage.sources import Location, session
from loratools.surgery.inputs import Patterns, kept, kept_names, patterns_of

if TYPE_CHECKING:
    from loratools.surgery.quantization import Quantization

_CARD = "README.md"
_Tensor = LazyTensor | TensorSpec


@dataclass(frozen=True, slots=True)
class Amount:
    """How much of something: tensors, parameters (elements), bytes."""

    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ModuleSummary:
    """One update of an adapter; `shape` is that of the weight it changes, (out, in, …)."""

    module: str
    kind: str
    rank: int
    alpha: float
    scaling: float
    shape: tuple[int, ...]
    parameters: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """One tensor of a checkpoint, or one that an adapter replaces whole."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Group:
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


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """What a model's files are; `schema` is the first tier of its base hash, `shards` maps file to what is in it.

    `architecture`, `model_type` and `quantization` are what its config.json says, or the fields and types of a GGUF
    file, None where it is silent; `tied` is too, or what its class does by default; `parent` is the model that a GGUF
    file says it was made from. `record` is what loratools.json says of the merge that it came out of. `codes` says how
    a quantized model is, module by module; None for any other.
    """

    path: str
    architecture: str | None
    model_type: str | None
    tied: bool | None
    quantization: str | None
    components: tuple[str, ...]
    total: Amount
    dtypes: Mapping[str, Amount]
    shards: Mapping[str, Amount]
    schema: str
    record: Mapping[str, Any] | None
    tensors: tuple[TensorSummary, ...] = field(repr=False)
    codes: Quantization | None = None
    type: str = "checkpoint"
    parent: str | None = None


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
    patterns = patterns_of(include, exclude)
    if not isinstance(path, str | PathLike | Checkpoint):
        path = open_adapter(path, dialect=dialect, alpha=alpha)
        # An adapter that was made in memory lies nowhere.
        place = next((lazy.spec.file.parent for lazy in path.tensors().values() if lazy.spec), Path())
        return describe_adapter(kept(path, *patterns), place, path.dialect, "opened by the caller")
    if isinstance(path, Checkpoint):
        return _listed(describe_checkpoint(path, path.path), patterns)
    listing = Listing.of(path, need="header", alpha=alpha)
    if dialect is not None:
        return _described(listing, path, dialect, "named by the user", patterns)
    candidates = candidates_for(listing)
    if not candidates:
        try:
            model = Checkpoint.open(listing.path)
        except BadFile:
            listing.check()  # which may say more of a file that is no model's
            if (below := located(listing)) is listing and not listing.factors:
                raise
            listing, candidates = below, []
        else:
            if not factors_of(model.specs):
                decided("%s: no dialect of adapters knows it, so it is a model", listing.path)
                return _listed(describe_checkpoint(model, path), patterns)
    dialect, evidence = detect(listing, candidates)
    decided("%s: dialect %s: %s", listing.path, dialect, evidence.reason)
    return _described(listing, path, dialect, evidence.reason, patterns)


def _described(
    listing: Listing, path: Location, dialect: str, evidence: str, patterns: tuple[tuple[str, ...], tuple[str, ...]]
) -> AdapterSummary:
    adapter = get(dialect).read(listing)
    listing.tell_unread(adapter)
    read, entries = {lazy.file for lazy in adapter.tensors().values() if lazy.file}, metadata_of(adapter)
    for name in listing.weights:
        if listing.folder / name in read and (header := listing.header(name)):
            entries |= {key: value for key, value in header.metadata.items() if key != METADATA_KEY}
    card = read_card(listing.folder / _CARD) if _CARD in listing.files else None
    return describe_adapter(kept(adapter, *patterns), path, dialect, evidence, entries=entries, card=card)


def _listed(summary: CheckpointSummary, patterns: tuple[tuple[str, ...], tuple[str, ...]]) -> CheckpointSummary:
    names = kept_names([tensor.name for tensor in summary.tensors], patterns)
    return replace(summary, tensors=tuple(tensor for tensor in summary.tensors if tensor.name in names))


def describe_adapter(
    adapter: Adapter, path: Location, dialect: str, evidence: str = "", *, entries: Mapping[str, str] | None = None,
    card: str | None = None,
) -> AdapterSummary:  # fmt: skip
    """Summarize an open adapter; `path` is where it is said to lie.

    `entries` are those of its header (default: those that it carries), `card` the text of its README.md.
    """
    entries = metadata_of(adapter) if entries is None else entries
    modules = tuple([
        ModuleSummary(
            module, update.kind, update.rank, update.alpha, update.scaling, update.shape,
            sum([part.parameters for part in parts]), sum([part.nbytes for part in parts]),
        )
        for module, update in sorted(adapter.updates.items(), key=lambda item: natural(item[0]))
        for parts in [update.parts.values()]
    ])  # fmt: skip
    tensors = adapter.tensors()
    return AdapterSummary(
        path=str(path), dialect=dialect, evidence=evidence, groups=_groups(modules), modules=modules,
        replacements=tuple(_tensor(name, adapter.replacements[name]) for name in sorted(adapter.replacements)),
        total=_amount(tensors.values()), dtypes=_by_dtype(tensors.values()),
        base=adapter.base, digest=adapter.settings.get(ORIGIN, {}).get("digest"), provenance=adapter.provenance,
        peft_type=adapter.settings.get("peft_type"), entries=entries,
        facts=facts_of(entries, adapter.base.id if adapter.base else None, card),
    )  # fmt: skip


def describe_checkpoint(checkpoint: Checkpoint, path: Location) -> CheckpointSummary:
    """Summarize an open checkpoint; `path` is where it is said to lie."""
    from loratools.format.record import read  # an adapter need not wait for these imports
    from loratools.surgery.quantization import gguf_codes, quantization, stated_codes

    checkpoint.tell_unread()
    config, specs = checkpoint.config, checkpoint.specs
    architectures, model_type = config.get("architectures"), config.get("model_type")
    record = read(checkpoint) or None
    tied, in_gguf = _tied(checkpoint), config.get("gguf") or {}
    return CheckpointSummary(
        path=str(path), components=checkpoint.components, schema=checkpoint.schema(), record=record,
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else in_gguf.get(
            "architecture"
        ),
        model_type=model_type if isinstance(model_type, str) else None,
        tied=tied, quantization=stated_codes(config) or gguf_codes(specs), parent=in_gguf.get("parent"),
        total=_amount(specs.values()), dtypes=_by_dtype(specs.values()),
        shards={s.path.relative_to(checkpoint.root).as_posix(): _amount(s.tensors.values()) for s in checkpoint.shards},
        tensors=tuple(_tensor(name, specs[name]) for name in sorted(specs, key=natural)),
        codes=quantization(checkpoint, record),
    )  # fmt: skip


def _tied(checkpoint: Checkpoint) -> bool | None:
    """Tell whether head and embedding are one weight: by config.json, or by the class where it is silent."""
    from loratools.adapter.placement.shared import flag_of, ties_of

    if (stated := flag_of(checkpoint.config)) is not None:
        return stated
    ties = ties_of(checkpoint.specs, checkpoint.config)
    of_head = [tie for tie in ties.ties if tie.has_head]
    if ties.model is None or any(tie.asked for tie in of_head):
        return None
    return True if of_head else False if ties.head else None


def _groups(modules: Iterable[ModuleSummary]) -> tuple[Group, ...]:
    shared: dict[tuple[str, int, float, float], list[str]] = defaultdict(list)
    for summary in modules:
        shared[summary.kind, summary.rank, summary.alpha, summary.scaling].append(summary.module)
    largest_first = sorted(shared.items(), key=lambda item: (-len(item[1]), item[0]))
    return tuple(Group(*key, len(members), tuple(compact(members))) for key, members in largest_first)


def _tensor(name: str, tensor: _Tensor) -> TensorSummary:
    return TensorSummary(name, tensor.dtype, tensor.shape, tensor.nbytes)


def _amount(tensors: Iterable[_Tensor]) -> Amount:
    listed = list(tensors)
    return Amount(len(listed), sum([tensor.parameters for tensor in listed]), sum([tensor.nbytes for tensor in listed]))


def _by_dtype(tensors: Iterable[_Tensor]) -> dict[str, Amount]:
    groups: dict[str, list[_Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.dtype].append(tensor)
    return {dtype: _amount(group) for dtype, group in sorted(groups.items())}
