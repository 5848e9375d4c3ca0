"""A model that holds adapters, with what its record and its residual know of the merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from loratools.adapter.input import AdapterInput
from loratools.adapter.model import BaseIdentity
from loratools.adapter.placement.gguf import is_gguf
from loratools.adapter.placement.layers import replicates
from loratools.decisions import warned
from loratools.engine.residual import Lost, Residual
from loratools.engine.residual.restore import lost_tensors
from loratools.errors import IncompatibleAdapter, UnsupportedAdapter, counted
from loratools.format import record as records
from loratools.options import Tied, words
from loratools.storage import atomic
from loratools.storage.beside.along import residual_of
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import logical
from loratools.storage.companions import RECORD, RESIDUAL, Companions
from loratools.surgery.inputs import (
    AdapterSource,
    ModelSource,
    Weights,
    open_adapters,
    open_model,
    under_names_of,
    weighed,
)


@dataclass(frozen=True, slots=True, eq=False)
class MergedModel:
    """A merged model, the record of its merge ({} without a complete one), and the adapters that are to be taken out.

    `inputs` are in the order of the record, under the model's names, with the weights of the merge, and `entries` what
    the record says of each; `others` are the digests of the adapters that the model holds besides.
    """

    model: Checkpoint
    record: Mapping[str, Any]
    inputs: tuple[AdapterInput, ...]
    others: tuple[str, ...]
    entries: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def open(
        cls, model: ModelSource, adapters: AdapterSource | Sequence[AdapterSource],
        weights: Weights,
    ) -> MergedModel:  # fmt: skip
        """Open a merged model and look up each adapter in its record by its digest.

        `weights` are for a model without a record; beside one they must be those recorded. Raises
        `IncompatibleAdapter` for an adapter that was not merged, `UnsupportedAdapter` for a GGUF file.
        """
        model = open_model(model)
        if is_gguf(model):
            raise UnsupportedAdapter(
                f"{model.path}: an adapter is not taken out of a GGUF file, which keeps no residual and no digests of "
                "its base",
                hint="Keep the base file, and merge into it anew.",
            )
        record = records.read(model)
        if isinstance(stated := record.get("model_type"), str):  # as the merge was told, where config.json does not say
            model = replace(model, config={**model.config, "model_type": stated})
        weighed = logical(model)  # an adapter may have changed what is codes again
        inputs = open_adapters(adapters, weighed, weights)
        if not records.is_complete(record):
            return cls(model, {}, under_names_of(weighed, inputs), ())
        entries: Sequence[Mapping[str, Any]] = record["adapters"]
        remaining = dict(enumerate(entries))
        recorded: dict[int, AdapterInput] = {}
        problems = []
        for i, each in enumerate(inputs):
            alike = [k for k, entry in remaining.items() if entry["digest"] == each.digest]
            if not alike:
                problems.append(f"adapter {i + 1}: its digest is {each.digest}")
                continue
            # The same tensors can be merged twice, with other scalings; those of the file tell which of the two it is.
            ways = {k: _as_merged(each, remaining[k], f"adapter {i + 1}") for k in alike}
            number = min(alike, key=lambda k: len(records.unlike(remaining[k], ways[k].adapter)))
            merged = ways[number]
            problems += [f"adapter {i + 1}: {line}" for line in records.unlike(remaining.pop(number), merged.adapter)]
            if weights is not None and (each.weight, each.words) != (merged.weight, merged.words):
                was, now = merged.words or f"{merged.weight:g}", each.words or f"{each.weight:g}"
                problems.append(f"adapter {i + 1}: merged with weight {was}, given {now}")
            recorded[number] = merged
        if problems:
            raise IncompatibleAdapter(
                f"{model.root / RECORD}: the record of this model's merge does not list what is to be taken out",
                [
                    *problems,
                    *(
                        f"recorded: {e['digest']}, weight {e.get(records.WORDS) or format(e['weight'], 'g')}"
                        for e in entries
                    ),
                ],
            )
        others = tuple(entry["digest"] for entry in remaining.values())
        order = sorted(recorded)
        ordered = under_names_of(model, [recorded[number] for number in order])
        return cls(model, record, ordered, others, tuple(entries[number] for number in order))

    def residual(self) -> Residual | None:
        """Open the residual, if the merge kept one."""
        shard = self.model.shards[0].path
        single = records.is_in_file(self.model)
        if single:
            atomic.sweep(shard)  # a run that was killed may have put another residual in the place of this model's
        path = shard.with_name(residual_of(shard)) if single else self.model.root / RESIDUAL
        return Residual.open(path) if self.record and path.is_file() else None

    def lost(self, residual: Residual) -> dict[str, Lost]:
        """Return the tensors of the base that the residual brings back; see `engine/residual/restore.py`."""
        return lost_tensors(self.model, residual, self.inputs, self.tied or "error")

    @property
    def below(self) -> BaseIdentity:
        """What the record says of the model below: digests of the tensors that the merge changed, schema and root."""
        of_base: Mapping[str, Any] = self.record.get("base") or {}
        return replace(records.base_of(self.record), schema=of_base.get("schema"))

    @property
    def tied(self) -> Tied | None:
        """What the merge did to a head that is the embedding; None where it met none, or no record says it."""
        stated = self.record.get("tied")
        return cast(Tied, stated) if stated in words(Tied) else None

    def entries_left(self) -> list[Mapping[str, Any]]:
        """Return what the record says of the adapters that are not taken out."""
        taken = set(map(id, self.entries))  # two entries may be equal
        return [entry for entry in records.held(self.record) if id(entry) not in taken]

    def tell_brought(self, new: Companions | None = None) -> list[str]:
        """Warn of files beside the weights that an adapter brought, for the base's are not in this model.

        Returns their names, without those in whose place a `new` adapter brings its own.
        """
        stated = self.record.get(records.BROUGHT)
        brought = [str(name) for name in stated] if isinstance(stated, list) else []
        stay = [name for name in brought if new is None or name not in new.brought]
        if stay:
            text = "%s: left in place: %s came with an adapter of the merge, and this model does not hold the base's"
            warned(text, self.model.path, ", ".join(stay))
        return stay

    def check_layers(self, new: Sequence[AdapterInput] = ()) -> None:
        """Raise `IncompatibleAdapter` where layers are repeated: one of the base is several of the model.

        By the merge, or by `new` adapters.
        """
        if replicates([each.adapter for each in new]):
            raise IncompatibleAdapter(
                f"{self.model.path}: an adapter that is put in repeats layers of the base (layer_replication)",
                hint="Unmerge the model, then merge the adapter into the base.",
            )
        if replicates([each.adapter for each in self.inputs]):
            raise IncompatibleAdapter(
                f"{self.model.path}: the merge repeated layers of the base (layer_replication)",
                hint="Only the base model leads back to it: unmerge with --base.",
            )

    def check_orientation(self, turned: Sequence[Sequence[str]]) -> None:
        """Raise `IncompatibleAdapter` where a weight lies otherwise than at the merge.

        `turned` has for each adapter the modules whose weights are taken to be stored (in, out).
        """
        problems = [
            f"adapter {i + 1}: {module}: {'(in, out)' if module in recorded else '(out, in)'} at the merge"
            for i, entry in enumerate(self.entries)
            if isinstance(recorded := entry.get(records.TURNED), list)
            for module in sorted(set(map(str, recorded)) ^ set(turned[i]))
        ]
        if problems:
            raise IncompatibleAdapter(
                f"{self.model.root / RECORD}: weights of this model are not stored as they were when it was merged",
                problems,
                hint="Was model_type of its config.json, or fan_in_fan_out of the adapter's, edited since?",
            )

    def check_complete(self) -> None:
        """Raise `IncompatibleAdapter` unless every merged adapter is among the inputs: all of them lead to the base."""
        if self.others:
            raise IncompatibleAdapter(
                f"{self.model.path}: holds "
                f"{counted(len(self.others), 'more adapter')}; all of them lead back to the base",
                [f"not given: {digest}" for digest in self.others],
                hint="Give every adapter of the merge; then merge those that are to stay into the result.",
            )


def _as_merged(each: AdapterInput, entry: Mapping[str, Any], name: str) -> AdapterInput:
    """Return an adapter with the weight that an entry of the record has, which may be one for each module."""
    words = str(entry.get(records.WORDS) or "")
    if words and not each.words:
        return weighed(each, words, name)
    return replace(each, weight=float(entry["weight"]), words=words)
