"""Is it this base? Verbs ask it of adapters among themselves, of a checkpoint, and of what `unmerge` writes.

All of them put the question to `adapter/identity.py`, which compares two identities; here is what each makes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from loratools.adapter.identity import as_numbers, compare, one_name
from loratools.adapter.model import BaseIdentity
from loratools.decisions import decided
from loratools.errors import LoraToolsError, WrongBase, counted
from loratools.format import record as records
from loratools.options import CheckBase, Options
from loratools.parallel import Progress
from loratools.storage import digest
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import encodings, logical
from loratools.surgery.hash import hash_checkpoint, hash_tensors


def agree(
    names: Sequence[str], bases: Sequence[BaseIdentity | None], check: CheckBase = "strict"
) -> tuple[BaseIdentity | None, list[str]]:
    """Compare the bases of adapters, pair by pair; return what all have in common, as far as they say, and warnings.

    Digests decide wherever two adapters state comparable ones: a root, a schema, or digests of the same tensors. Where
    one names a folder that is at hand, that model is looked at instead of its name. Else names do, and a warning says
    so. `check` is `strict`, `warn` (differences are warnings) or `off`. Raises `WrongBase` with every pair that
    differs.
    """
    Options().word("check_base", check, CheckBase).done()
    differing, uncertain, by_name = [], [], 0
    identities = [base or BaseIdentity() for base in bases]
    # What is sealed says more than a name, which may be that of another folder here.
    folders = [None if check == "off" or identity.sealed else _folder(identity.id) for identity in identities]
    sides = zip(names, identities, folders, strict=True)
    for (name, first, folder), (other_name, second, other_folder) in combinations(sides, 2):
        comparison, both = compare(first, second), f"{name} and {other_name}"
        if comparison.differing and (first.of_codes or second.of_codes):  # one base, as codes and as numbers
            comparison = compare(as_numbers(first), as_numbers(second))
        if comparison.by_type is False:
            differing.append(f"{both}: their bases are of the types {first.model_type} and {second.model_type}")
        elif comparison.differing:
            pair = comparison.differing[0]
            of_tensor, of_all = f"{pair.name} differs in their bases", f"the {pair.tier} hashes of their bases differ"
            what = of_tensor if pair.tier == "tensors" else of_all
            differing.append(f"{both}: {what}, {pair.first} and {pair.second}")
        elif comparison.agreeing:
            continue
        elif (looked := _at_hand((first, folder), (second, other_folder))) is not None:
            differing += [f"{both}: {sentence}" for sentence in looked[:1]]
        elif first.id is None or second.id is None:
            nameless = [n for n, base in ((name, first), (other_name, second)) if base.id is None]
            says = f"neither {' nor '.join(nameless)} says" if nameless[1:] else f"{nameless[0]} does not say"
            uncertain.append(f"{says} which base it belongs to, so it cannot be compared")
        elif comparison.by_name is None:
            uncertain.append(
                f"{both}: of the names of their bases only the last part can be compared, {first.id} and {second.id}"
            )
        elif comparison.by_name:
            revisions = {revision for revision in (first.revision, second.revision) if revision}
            stated = f", at the revisions {' and '.join(sorted(revisions))}" if len(revisions) > 1 else ""
            uncertain.append(f"{both}: the base models are compared by name only, {first.id}{stated}")
        else:
            differing.append(f"{name} names {first.id}, {other_name} names {second.id}")
            by_name += 1
    if differing and check == "strict":
        raise WrongBase(
            "these adapters belong to different base models, so their changes cannot be added up"
            if by_name < len(differing)
            else "these adapters name different base models, and no hash tells whether they are one",
            differing,
            hint="Use adapters of one base. Where both names are of one model, seal both with it, and its hash "
            "decides: loratools convert ADAPTER -o OUTPUT --base BASE. Or say --check-base off.",
        )
    return _common(bases), [] if check == "off" else list(dict.fromkeys([*differing, *uncertain]))


def _folder(name: str | None) -> Checkpoint | None:
    """Return the model in the folder or file that an adapter names as its base, where there is one on this machine."""
    if not name or not (Path(name).is_dir() or (name.endswith(".safetensors") and Path(name).is_file())):
        return None
    try:
        return Checkpoint.open(name)
    except (LoraToolsError, OSError) as error:
        decided("%s: what an adapter names as its base holds no model, so its name alone is compared: %s", name, error)
        return None


_Side = tuple[BaseIdentity, Checkpoint | None]


def _at_hand(first: _Side, second: _Side) -> list[str] | None:
    """Return in what two bases differ by a look at a model that is at hand; None where that tells nothing."""
    for (identity, _), (_, folder) in ((first, second), (second, first)):
        if identity.sealed and folder is not None:
            # The tensors that the adapter changes are enough: to read all of a model for its root takes long.
            needed = replace(identity, root=None) if identity.tensors else identity
            return [f"{folder.path} is not the sealed base; {which}" for which in differences(needed, folder)]
    (_, one), (_, other) = first, second
    if one is None or other is None:
        return None
    if one.path.samefile(other.path):
        return []
    same = one.schema() == other.schema() and hash_checkpoint(one, "root") == hash_checkpoint(other, "root")
    return [] if same else [f"{one.path} and {other.path} hold different models"]


def _common(bases: Sequence[BaseIdentity | None]) -> BaseIdentity | None:
    """Return what can be said of the one base: what some adapter states and none contradicts.

    Digests of tensors must cover all that the result touches, so they are kept only where every adapter has them.
    """
    known = [base for base in bases if base is not None]

    def single(values: Iterable[str | None]) -> str | None:
        stated = {value for value in values if value}
        return stated.pop() if len(stated) == 1 else None

    def union(each: Sequence[Mapping[str, str]]) -> dict[str, str]:
        stated = {pair for digests in each for pair in digests.items()}
        of_all = len(known) == len(bases) and all(each)
        return dict(sorted(stated)) if of_all and len(dict(stated)) == len(stated) else {}

    identity = BaseIdentity(
        one_name([base.id for base in known if base.id]), single(base.revision for base in known),
        single(base.schema for base in known), union([base.tensors for base in known]),
        single(base.root for base in known), single(base.model_type for base in known),
        single(base.logical for base in known), union([base.weights for base in known]),
    )  # fmt: skip
    return identity if identity != BaseIdentity() else None


def of_headers(base: Checkpoint, identity: BaseIdentity) -> BaseIdentity:
    """Return the schema of a checkpoint, made with the algorithm of another identity's; no tensor is read.

    Of a quantized one it is that of the model that it stands for, where the other identity is of such a model.
    """
    if identity.schema is None:
        return BaseIdentity()
    algorithm = digest.algorithm_of(identity.schema)
    view = _view(base.stored or base)
    plain = schema_of(view, algorithm)
    return BaseIdentity(schema=plain if plain == identity.schema else base.schema(algorithm))


def schema_of(model: Checkpoint, algorithm: str = digest.DEFAULT) -> str:
    """Return the schema tier of a model as its tensors are: in a logical view numbers in 16 bit."""
    return digest.schema({name: (spec.plain_dtype, spec.shape) for name, spec in model.specs.items()}, algorithm)


def other_type(identity: BaseIdentity, base: Checkpoint) -> str | None:
    """Return a sentence where a base is not of the model type that was sealed; None where it is, or neither says it."""
    if compare(identity, BaseIdentity(model_type=base.model_type)).by_type is not False:
        return None
    types = f"{identity.model_type}, and config.json says {base.model_type}"
    return f"model_type: the sealed base is of type {types}; the type decides how weights lie"


def differences(
    identity: BaseIdentity, base: Checkpoint, *, threads: int | None = None, progress: Progress | None = None
) -> list[str]:
    """Return in what a base differs from the one an adapter was sealed with, a sentence each; none if it is that base.

    Every tier that the identity states is compared, each with its own algorithm; tensors are read only where it states
    their digests, or the root of all. An identity without any digest is itself a difference: nothing can be proved.
    Where one of the two is quantized and stored otherwise than the other, numbers decide: those that its codes stand
    for in 16 bit, and those of the other.
    `threads` is by default one per core; `progress` takes the bytes read.
    """
    if not identity.sealed:
        return ["the adapter states no base hash, so nothing can be compared"]
    stored = _differences(identity, base.stored or base, threads, progress)
    if not stored:
        return []
    view = _view(base.stored or base)
    every = encodings(view)
    if not every and not identity.of_codes:
        return stored
    by_value = _differences(as_numbers(identity), view, threads, progress)
    if not by_value:
        return []
    labels = sorted({f"{encoding.module.scheme}, {encoding.label}" for encoding in every.values()})
    which = f"this base is a quantized copy ({labels[0]})" if labels else "the seal is that of a quantized base"
    return [f"{which}, and neither what is stored nor the numbers that codes stand for are those sealed", *by_value]


def _view(base: Checkpoint) -> Checkpoint:
    """Return a model as numbers; as it is stored where its codes are not read."""
    try:
        return logical(base)
    except LoraToolsError as error:
        decided("%s: compared as it is stored alone: %s", base.path, error.message)
        return base


def _differences(
    identity: BaseIdentity, base: Checkpoint, threads: int | None, progress: Progress | None
) -> list[str]:  # fmt: skip
    """Compare an identity with a model as its tensors are: those stored, or in a logical view numbers."""
    algorithms = {name: digest.algorithm_of(value) for name, value in identity.tensors.items() if name in base.specs}
    of_root = digest.algorithm_of(identity.root) if identity.root else None
    digests = {}
    for algorithm in {*algorithms.values(), of_root} - {None}:
        wanted = [name for name in base.specs if algorithm in (of_root, algorithms.get(name))]
        digests[algorithm] = hash_tensors({n: base.specs[n] for n in wanted}, str(algorithm), threads, progress)
    tensors = {name: digests[algorithm][name] for name, algorithm in algorithms.items()}
    root = digest.root(digests[of_root], of_root) if of_root else None
    schema = schema_of(base, digest.algorithm_of(identity.schema)) if identity.schema else None
    actual = BaseIdentity(schema=schema, tensors=tensors, root=root)
    sentences = {
        "schema": "schema: other names, dtypes or shapes than the sealed base has",
        "root": "root: some tensor is not that of the sealed base",
    }
    typed = other_type(identity, base)
    return ([typed] if typed else []) + [
        sentences.get(pair.tier)
        or f"{pair.name}: {'its bytes are not those of the sealed base' if pair.second else 'not in this base'}"
        for pair in compare(identity, actual, complete=True).differing
    ]


def prove(record: Mapping[str, Any], digests: Mapping[str, str], where: str | Path) -> str | None:
    """Compare digests of all tensors with what a merge recorded of its base; return the root if it was recorded.

    Raises `WrongBase` that lists the tensors that differ; and where the record says nothing that could prove anything.
    """
    recorded = records.base_of(record)
    if not recorded.sealed:
        raise WrongBase(f"{where}: the merge recorded no digest of its base, so nothing can be proved")
    root = digest.root(digests, digest.algorithm_of(recorded.root)) if recorded.root else None
    comparison = compare(recorded, BaseIdentity(tensors=digests, root=root), complete=True)
    # What cannot be compared, for it was recorded with another algorithm, is not proved either.
    unproved = [pair for pair in (*comparison.differing, *comparison.unknown) if pair.first is not None]
    if unproved:
        wrong = [pair for pair in unproved if pair.tier == "tensors"]
        raise WrongBase(
            f"{where}: this is not the base model that was merged; "
            f"{counted(len(wrong), 'changed tensor differs', 'changed tensors differ')}",
            [f"{pair.name}: digest {pair.second or 'of no tensor'}, recorded {pair.first}" for pair in wrong[:20]],
            hint="One of the files was changed since, or the residual belongs to another merge.",
        )
    return recorded.root
