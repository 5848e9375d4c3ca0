"""Every tensor of a fine-tune beside its counterpart in the base, and what is to become of its change. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from loratools.adapter.naming.selection import Selection
from loratools.adapter.naming.wrappers import RENAMED, Names
from loratools.adapter.placement.owners import Kinds
from loratools.adapter.placement.shared import Ties, flag_of, ties_of
from loratools.errors import IncompatibleAdapter, counted
from loratools.storage import dtypes
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import TensorSpec

HEAD_OF_TASK = "head of its task"
"""Why a classifier is saved whole: PEFT does so for these tasks, and asks for it when it loads."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor of the fine-tune.

    `name` is what it is called there, `base` the tensor it came from (None: it is new), `path` the module in the base
    where `plan` is `factor`, else the parameter's path. `plan` says what happens if the two differ: `factor`, `whole`
    or `drop`, and `why` gives the reason; or `ignore`, for a tied head's copy that models do not look at. `kind` is one
    of `selection.KINDS` or `other`; `transposed` weights are stored [in, out], `reshaped` ones are new or had another
    shape, and `sparse` ones may be saved row by row if few rows changed.
    """

    name: str
    base: str | None
    path: str
    plan: str
    kind: str
    why: str = ""
    transposed: bool = False
    reshaped: bool = False
    sparse: bool = False


@dataclass(frozen=True, slots=True)
class Pairing:
    """All pairs, by the fine-tune's names; `missing` are tensors of the base that it lacks.

    `shared` are the other names of the embedding where one weight serves as it and as the output head in both models,
    or as the embeddings of encoder and decoder, each with the fine-tune's tensor: PEFT then wants its change under
    each, and the head's bias.
    """

    pairs: tuple[Pair, ...]
    missing: tuple[str, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def pair(base: Checkpoint, tuned: Checkpoint, selection: Selection) -> Pairing:
    """Put every tensor of the fine-tune beside its counterpart and decide its class, should it have changed.

    Names may differ by wrappers (`model.`, `language_model.`). Where one model ties its head to the embedding and the
    other stores it, the head is compared with the embedding that serves as one. Raises `IncompatibleAdapter` when the
    models have nothing in common or names are ambiguous, `LoraToolsError` for patterns that match nothing.
    """
    heads = _Heads.of(base, tuned)
    counterparts = _counterparts(base, tuned)
    if heads.copy:
        counterparts.pop(heads.copy, None)
    if heads.untied:
        counterparts[heads.untied] = heads.base_embedding
    used = set(counterparts.values())
    if not used - {None}:
        raise IncompatibleAdapter(
            f"{base.path} and {tuned.path} have no tensor in common, so one is no fine-tune of the other"
        )
    matched = [
        (name, source, _current(name if name == heads.untied else source or name))
        for name, source in sorted(counterparts.items())
    ]
    if heads.retied and heads.tuned_embedding:
        used.add(heads.retied)
        matched.append((heads.tuned_embedding, heads.retied, heads.retied))
    selection.check([path for _, _, path in matched])
    old, new = Kinds(base.specs, base.config), Kinds(tuned.specs, tuned.config)
    pairs = [_decide(*match, base, tuned, old if match[1] else new, selection) for match in matched]
    by_peft = str(heads.base_embedding).endswith("embed_tokens.weight") and len(heads.shared) == 1
    if heads.shared and not by_peft:
        pairs = [_as_tied(match, selection) if match.base == heads.base_embedding else match for match in pairs]
    if heads.copy:
        pairs.append(Pair(heads.copy, None, heads.copy, "ignore", "other", "tied: the embedding counts"))
    missing = tuple(sorted(base.specs.keys() - used - {heads.base_copy}))
    return Pairing(tuple(pairs), missing, heads.shared, tuple(_notes(heads)))


@dataclass(frozen=True, slots=True)
class _Heads:
    """What heads and embeddings are, where one model ties them and the other does not."""

    base_embedding: str | None
    tuned_embedding: str | None
    shared: Mapping[str, str] = field(default_factory=dict)  # other names of it: tensors of the fine-tune
    copy: str | None = None  # in the fine-tune, stored although tied
    base_copy: str | None = None  # the same in the base
    untied: str | None = None  # the fine-tune's head, compared with the base's embedding
    retied: str | None = None  # the base's head, compared with the fine-tune's embedding

    @classmethod
    def of(cls, base: Checkpoint, tuned: Checkpoint) -> _Heads:
        before, after = ties_of(base.specs, base.config), ties_of(tuned.specs, tuned.config)
        embeddings = before.embedding, after.embedding
        if before.embedding is None or after.embedding is None:
            return cls(*embeddings)
        was_tied = before.head is None or bool(flag_of(base.config))
        is_now = after.head is None or bool(flag_of(tuned.config))
        if was_tied and is_now:
            return cls(*embeddings, _other_names(before, after), after.head, before.head)
        if was_tied:
            return cls(*embeddings, untied=after.head, base_copy=before.head)
        return cls(*embeddings, retied=before.head, copy=after.head) if is_now else cls(*embeddings)


def _other_names(before: Ties, after: Ties) -> dict[str, str]:
    """Return the other names of the base's embedding, and of the bias of a head that is one of them."""
    tie, stored = before.of_embedding or after.of_embedding, before.head or after.head
    if tie is None:
        return {stored: str(after.embedding)} if stored else {}
    named = (each.tensor or each.name or "lm_head.weight" for each in tie.names)
    others = {name: str(after.embedding) for name in named if name != before.embedding}
    for bias in (each for each in after.ties if each.is_bias and each.stored):
        names = (str(each.name) for each in bias.names if each.tensor is None)
        others |= {name: bias.stored[0] for name in names if f"{name.removesuffix('.bias')}.weight" in others}
    return others


def _current(path: str) -> str:
    """Return a path as transformers names it today, where it renamed a module that checkpoints keep the old name of."""
    module, dot, parameter = path.rpartition(".")
    return f"{dict(RENAMED).get(module, module)}{dot}{parameter}"


def _as_tied(match: Pair, selection: Selection) -> Pair:
    """Keep an embedding whole: PEFT keeps only embed_tokens and a head tied, and would leave others as they were."""
    if match.plan == "drop":
        return match
    path = match.path if match.path.endswith(".weight") else f"{match.path}.weight"
    plan = "drop" if selection.drop_whole else "whole"
    return replace(match, path=path, plan=plan, why="tied to the head", sparse=False)


def _counterparts(base: Checkpoint, tuned: Checkpoint) -> dict[str, str | None]:
    """Return each tensor of the fine-tune with its tensor in the base: the same name, else the same past wrappers."""
    sources: dict[str, str | None] = {name: name for name in tuned.specs if name in base.specs}
    others = Names(base.specs.keys() - sources.keys(), base.config)
    problems = []
    for name in sorted(tuned.specs.keys() - sources.keys()):
        module, _, parameter = name.rpartition(".")
        candidates = others.find(module, parameter) if module else []
        if len(candidates) > 1:
            problems.append(f"{name}: could be any of {', '.join(candidates)}")
        sources[name] = candidates[0] if len(candidates) == 1 else None
    claimed: dict[str, str] = {}
    for name, source in sources.items():
        if source and claimed.setdefault(source, name) != name:
            problems.append(f"{name} and {claimed[source]} both are {source} of the base")
    if problems:
        raise IncompatibleAdapter(
            f"{tuned.path}: {counted(len(problems), 'name is', 'names are')} ambiguous in {base.path}", problems
        )
    return sources


def _decide(
    name: str, source: str | None, path: str, base: Checkpoint, tuned: Checkpoint, kinds: Kinds, selection: Selection
) -> Pair:
    before, after = base.specs[source] if source else None, tuned.specs[name]
    kind, transposed = kinds.of(source if source and _current(source) == path else path, after.shape)
    if why := selection.dropped(path):
        return Pair(name, source, path, "drop", kind, why, transposed)
    reshaped = before is None or before.shape != after.shape
    whole = _why_whole(path, kind, after, before, selection, kinds.heads)
    if whole is None:
        return Pair(name, source, path.removesuffix(".weight"), "factor", kind, "", transposed)
    sparse = kind == "embedding" and whole.startswith("--kind")
    plan = "drop" if selection.drop_whole else "whole"
    return Pair(name, source, path, plan, kind, whole, transposed, reshaped, sparse)


def _why_whole(
    path: str, kind: str, spec: TensorSpec, source: TensorSpec | None, selection: Selection, heads: frozenset[str]
) -> str | None:
    """Return why a change cannot or should not be factored, or None."""
    if source is None:
        return "new: the base has no such tensor"
    if source.shape != spec.shape:
        return f"its shape was {list(source.shape)} and is {list(spec.shape)}"
    if pattern := selection.saved(path):
        return pattern
    if set(path.split(".")) & heads:
        return HEAD_OF_TASK
    if {source.dtype, spec.dtype} - set(dtypes.FLOATS):
        return f"stored as {spec.dtype}"
    if kind == "other":
        return "norm" if "norm" in path or "ln_" in path else "bias" if path.endswith(".bias") else "no matrix"
    return None if kind in selection.kinds else f"--kind {kind} was not asked for"


def _notes(heads: _Heads) -> Iterator[str]:
    if heads.copy and heads.shared:
        yield f"{heads.copy} is stored, but the fine-tune ties its head to the embedding, so it does not count"
    if heads.untied:
        yield f"the fine-tune has a head of its own, {heads.untied}, where the base ties it: merge with --tied untie"
    if heads.retied:
        yield f"the fine-tune ties its head to the embedding: {heads.retied} is compared with {heads.tuned_embedding}"
