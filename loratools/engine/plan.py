"""What a merge will do to each tensor: pure, printable, and a value that serializes to JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loratools.adapter.input import AdapterInput
from loratools.adapter.model import Adapter
from loratools.adapter.placement.resolve import Placement
from loratools.engine.task import TILE
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import TensorSpec
from loratools.storage.layout import FilePlan

if TYPE_CHECKING:
    from loratools.storage.codecs import Encoding, Grid

# Resident bytes of a process that has imported torch (a CPU build), and of one that has not; measured.
_TORCH, _NUMPY = 260_000_000, 50_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Recoded:
    """How a changed weight becomes codes again: as `encoding` has it in the base, by its own scales or fresh ones.

    `original` is the weight before it was quantized, to which the change is added; None: what the codes stand for.
    Of what the quantization loses a product of rank `loss_rank` is kept, if that is not 0.
    """

    encoding: Encoding
    grid: Grid = "own"
    original: TensorSpec | None = None
    loss_rank: int = 0

    @property
    def parts(self) -> dict[str, TensorSpec]:
        """The stored parts as the base has them, by name."""
        module = self.encoding.module
        return {name: module.specs[part] for part, name in module.names.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What becomes of one output tensor: `source` bytes, of the base or of an adapter that replaces it, plus updates.

    `placements` pairs the number of an adapter with a placement of one of its updates. `expected` are the digests
    that adapters recorded for the base tensor, of codes by value (`storage/checkpoint/values.py`), each with the number
    of its adapter; `stored` those of the stored parts of codes, by name. A weight that becomes codes again
    is `recoded`; the stored parts of it are written with it, and each is a change that is `part_of` it.
    """

    source: TensorSpec
    placements: tuple[tuple[int, Placement], ...] = ()
    replaced: bool = False
    expected: tuple[tuple[int, str], ...] = ()
    stored: tuple[tuple[int, Mapping[str, str]], ...] = ()
    recoded: Recoded | None = None
    part_of: str | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the tensor as it is seen: the view that its sites share, or first side × rest.

        Raises `ValueError` for sites of different views.
        """
        views = {placement.site.matrix for _, placement in self.placements}
        if len(views) > 1:
            raise ValueError(f"{self.source.file}: sites of different views {sorted(views)}")
        if views:
            return views.pop()
        if self.source.encoding is not None and len(self.source.shape) > 1:  # rows as they are decoded: small tiles
            columns = self.source.shape[-1]
            return (self.source.parameters // columns if columns else 0, columns)
        rows = self.source.shape[0] if self.source.shape else 1
        return (rows, self.source.parameters // rows) if rows else (0, 0)


@dataclass(frozen=True, slots=True, eq=False)
class MergePlan:
    """All decisions of a merge. `files` lists the output's files of tensors, `changes` has every output tensor.

    `inputs` are the adapters as they are placed, in the order of the call; `config` holds changed fields of
    config.json, and `dropped` those that go; `laid_out` says whether files, headers and offsets are the base's own, so
    that untouched ranges are copied where they lie. `metadata` is what the header says besides the record of the merge
    where the output is one safetensors file, None where it is a folder or a GGUF file. `strict` makes a tensor that is
    not the recorded one an error, else it is reported.
    """

    base: Checkpoint
    inputs: tuple[AdapterInput, ...]
    files: tuple[FilePlan, ...]
    changes: Mapping[str, Change]
    config: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    laid_out: bool = True
    strict: bool = True
    metadata: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()

    @property
    def single(self) -> bool:
        """Whether the output is one safetensors file."""
        return self.metadata is not None

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The adapters, in the order of the call."""
        return tuple(each.adapter for each in self.inputs)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each adapter's change."""
        return tuple(each.weight for each in self.inputs)

    @property
    def tensors(self) -> int:
        """Number of tensors of the model: codes are one with what gives them their meaning."""
        return sum(change.part_of is None for change in self.changes.values())

    def touched(self) -> dict[str, Change]:
        """Return the tensors whose numbers change."""
        return {name: change for name, change in self.changes.items() if change.placements or change.replaced}

    def turned(self) -> list[list[str]]:
        """Return for each adapter the modules of which the base stores a weight (in, out), sorted."""
        modules: list[set[str]] = [set() for _ in self.inputs]
        for i, placement in (pair for change in self.changes.values() for pair in change.placements):
            if placement.site.transposed:
                modules[i].add(placement.module)
        return [sorted(names) for names in modules]

    def rewritten(self) -> dict[str, Change]:
        """Return the tensors that pass through arithmetic: updated, cast to another dtype, or decoded."""
        changes = ((slot, self.changes[slot.name]) for plan in self.files for slot in plan.slots)
        return {
            slot.name: change
            for slot, change in changes
            if change.placements or slot.dtype != change.source.dtype or change.source.encoding or change.part_of
        }

    def peak_memory(self, threads: int, *, torch: bool = True, tile_bytes: int = TILE) -> int:
        """Estimate the resident bytes: libraries, and for each thread its tiles and its largest factors."""
        largest = 0
        for change in self.changes.values():
            parts = {id(lazy): lazy for _, p in change.placements for lazy in p.update.parts.values()}
            largest = max(largest, sum(lazy.parameters * 8 + lazy.nbytes for lazy in parts.values()))
        return (_TORCH if torch else _NUMPY) + threads * (6 * tile_bytes + largest)

    def to_json(self, threads: int, *, torch: bool = True) -> dict[str, Any]:
        """Return the plan as plain data: sizes in bytes, names, no machine-dependent number but the estimate."""
        touched, rewritten = self.touched(), self.rewritten()
        cast = sum(name not in touched and not change.part_of for name, change in rewritten.items())
        total = sum(slot.nbytes for plan in self.files for slot in plan.slots)
        worked = sum(slot.nbytes for plan in self.files for slot in plan.slots if slot.name in rewritten)
        return {
            "base": str(self.base.path),
            "files": [{"name": plan.name, "bytes": plan.size, "tensors": len(plan.slots)} for plan in self.files],
            "tensors": {"total": self.tensors, "changed": len(touched), "cast": cast},
            "bytes": {"written": total, "changed": worked, "copied": total - worked},
            "peak_memory": self.peak_memory(threads, torch=torch),
            "verified_tensors": sum(bool(change.expected or change.stored) for change in self.changes.values()),
            "changed": {
                name: [
                    {"adapter": i, "module": p.module, "kind": p.update.kind, "rank": p.update.rank}
                    | {"scaling": p.update.scaling, "weight": self.weights[i]}
                    for i, p in change.placements
                ]
                for name, change in touched.items()
            },
            "config": dict(self.config),
            "dropped": list(self.dropped),
            "notes": list(self.notes),
        }
