"""The plan of a merge that several processes share, as a value that travels, and what each of them writes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Self

from loratools.adapter.placement.gguf import is_gguf
from loratools.engine.device import described
from loratools.engine.plan import MergePlan
from loratools.engine.run import in_torch
from loratools.errors import BadFile, InvalidOption
from loratools.options import either
from loratools.parallel import tasks
from loratools.parallel.call import Call, fields_of
from loratools.parallel.shares import balanced
from loratools.storage.layout import FilePlan, Slot
from loratools.surgery.merge.prepare import Merge
from loratools.surgery.merge.resume import fingerprint
from loratools.surgery.merge.run import settings_of

VERB, PLACES = "merge", ("base", "adapters", "output", "original")
"""The verb, and its arguments that are paths or references."""

VERBS: Mapping[str, str] = {VERB: "loratools.surgery.merge.parts", "dequantize": "loratools.surgery.dequantize"}
"""Verbs that decide a `Merge` and share its files: modules with `decided(arguments)` and `finished(arguments, report)`.

The first returns that `Merge`, the second what the verb returns.
"""

PIECE = 32 << 20
"""Bytes of a file that are shared out as one, at least, unless a file has fewer: reading in one go stays long."""


class Piece(NamedTuple):
    """Some tensors of one file, and their bytes there."""

    file: str
    tensors: frozenset[str]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan of a merge as a value that travels: its call, and what whoever plans it must come to as well.

    `key` is the merge's fingerprint, `arithmetic` what computes, where that decides the last bit, and `piece` the bytes
    that are shared out as one. A plan is made of headers alone: `again` makes it anew, and proves that it is the same.
    """

    call: Call
    key: str
    arithmetic: str
    piece: int

    @classmethod
    def of(cls, call: Call, prepared: Merge) -> Self:
        """Return what a call was planned to be."""
        return cls(call, fingerprint(prepared.plan, settings_of(prepared)), arithmetic_of(prepared), PIECE)

    def again(self) -> Merge:
        """Plan the merge anew; raise `BadFile` where it is another by now, `InvalidOption` where it is computed so."""
        prepared = decide_call(self.call)
        if fingerprint(prepared.plan, settings_of(prepared)) != self.key:
            raise BadFile(
                f"{tasks.place()} sees another merge than the caller: other inputs, or other files of them",
                hint="Every worker has to see the same folders under the same names.",
            )
        if (own := arithmetic_of(prepared)) != self.arithmetic:
            raise InvalidOption(
                f"{tasks.place()} computes by {own}, the caller by {self.arithmetic}: the bytes could differ",
                hint="Give all workers the same torch and the same kind of processor, or a C compiler.",
            )
        return prepared

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"call": self.call.to_json(), "key": self.key, "arithmetic": self.arithmetic, "piece": self.piece}

    @classmethod
    def from_json(cls, document: Any, source: Path | str) -> Self:
        """Return what `to_json` made; raise `BadFile`, which names its `source`, for what it did not make."""
        own = fields_of(document, {"key": str, "arithmetic": str, "piece": int}, "the plan of a merge", source)
        return cls(Call.from_json(document.get("call"), source), *own)

    def parts(self, prepared: Merge, of: int) -> list[tuple[FilePlan, ...]]:
        """Return what each of so many parts writes: of each file all, or the tensors that are its own."""
        pieces = self.pieces(prepared.plan)
        found = []
        for names in balanced({name: piece.nbytes for name, piece in pieces.items()}, of):
            own: dict[str, set[str]] = {}
            for piece in (pieces[name] for name in names):
                own.setdefault(piece.file, set()).update(piece.tensors)
            found.append(tuple(file.only(own[file.name]) for file in prepared.plan.files if file.name in own))
        return found

    def pieces(self, plan: MergePlan) -> dict[str, Piece]:
        """Return what is shared out, by names: tensors of a file, those together that become codes of one weight."""
        found = {}
        for file in plan.files:
            together: dict[str, list[Slot]] = {}
            for slot in file.slots:
                together.setdefault(plan.changes[slot.name].part_of or slot.name, []).append(slot)
            runs: list[list[Slot]] = [[]]
            for slots in together.values():
                if sum(slot.nbytes for slot in runs[-1]) >= self.piece:
                    runs.append([])
                runs[-1] += slots
            for number, run in enumerate(runs, 1):
                tensors = frozenset(slot.name for slot in run)
                found[f"{file.name} {number:06d}"] = Piece(file.name, tensors, sum(slot.nbytes for slot in run))
        return found


def decide_call(call: Call) -> Merge:
    """Decide the merge of a call, as its verb does."""
    call.check_version()
    if call.verb not in VERBS:
        raise InvalidOption(f"{call.verb!r} is no verb whose parts are written here; expected {either(list(VERBS))}")
    prepared: Merge = import_module(VERBS[call.verb]).decided(call.arguments)
    if is_gguf(prepared.plan.base):
        raise InvalidOption(
            f"{prepared.output}: a GGUF file is written by one process", hint="Leave out --workers and --part."
        )
    if prepared.options.keep_loss:
        raise InvalidOption("keep_loss: what the codes lose is measured in one process", hint="Leave it out.")
    return prepared


def arithmetic_of(prepared: Merge) -> str:
    """Return what computes the merge, as far as that decides the last bit: the C code has the same everywhere."""
    if not in_torch(prepared.plan, settings_of(prepared)):
        return "C"
    if on := described(prepared.options.computes_on):
        return ", ".join(on.values())
    import torch

    return f"torch {torch.__version__.partition('+')[0]}, {torch.backends.cpu.get_cpu_capability()}"
