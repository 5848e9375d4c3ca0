"""Plan the files of an output before a byte is written: shards, headers, the offset of each tensor, the index. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from loratools.storage.header import TensorSpec, encode_header, nbytes

DEFAULT_SHARD = 5_000_000_000
"""Bytes of a shard where nothing else is asked, as transformers has it."""

Entry = tuple[str, str, tuple[int, ...]]
"""A tensor to be placed: name, dtype, shape."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one tensor in an output file: name, dtype, shape, and the offset from the file's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One output file: its name, its complete header, and the slots of its tensors in order.

    One of which others write the rest has some of the slots only, and the size of the `whole`; else that is None.
    """

    name: str
    header: bytes
    slots: tuple[Slot, ...]
    whole: int | None = None

    @property
    def size(self) -> int:
        """Bytes of the finished file."""
        return self.whole or max((slot.offset + slot.nbytes for slot in self.slots), default=len(self.header))

    @property
    def ranges(self) -> list[list[int]]:
        """Bytes [start, stop) of the slots, those that touch each other as one."""
        found: list[list[int]] = []
        for slot in self.slots:
            if found and found[-1][1] == slot.offset:
                found[-1][1] += slot.nbytes
            else:
                found.append([slot.offset, slot.offset + slot.nbytes])
        return found

    def only(self, names: Set[str]) -> FilePlan:
        """Return the plan of those who write the tensors of these names, of which others write the rest."""
        slots = tuple(slot for slot in self.slots if slot.name in names)
        return self if slots == self.slots else FilePlan(self.name, self.header, slots, self.size)

    def specs(self, folder: Path) -> dict[str, TensorSpec]:
        """Return the tensors as they lie in the finished file in `folder`, by name."""
        path = folder / self.name
        return {s.name: TensorSpec(s.dtype, s.shape, path, s.offset, s.offset + s.nbytes) for s in self.slots}


def plan_file(
    name: str, tensors: Sequence[Entry], metadata: Mapping[str, str] | None = None, *,
    header: bytes | None = None, prefix: str = "",
) -> FilePlan:  # fmt: skip
    """Return the plan of a file called `name` that holds `tensors` in this order.

    The header is encoded from the tensors, their names without `prefix`, and the string `metadata`; a `header` that is
    given stands in its place, byte for byte.
    """
    sized = [(tensor, dtype, shape, nbytes(dtype, shape)) for tensor, dtype, shape in tensors]
    if header is None:
        own = [(tensor.removeprefix(prefix), dtype, shape, size) for tensor, dtype, shape, size in sized]
        header = encode_header(own, metadata)
    slots, offset = [], len(header)
    for tensor, dtype, shape, size in sized:
        slots.append(Slot(tensor, dtype, shape, offset, size))
        offset += size
    return FilePlan(name, header, tuple(slots))


def plan_shards(
    tensors: Sequence[Entry], limit: int, metadata: Mapping[str, str] | None = None, stem: str = "model"
) -> list[FilePlan]:
    """Cut tensors in order into files of at most `limit` bytes of data.

    A tensor that is larger has a file of its own. The files have the names that transformers gives them:
    `model.safetensors`, or `model-00001-of-00003.safetensors`, `stem` in the place of `model`; all have `metadata`.
    """
    groups: list[list[Entry]] = [[]]
    used = 0
    for tensor in tensors:
        size = nbytes(tensor[1], tensor[2])
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += size
    if len(groups) == 1:
        return [plan_file(f"{stem}.safetensors", groups[0], metadata)]
    shard = f"{stem}-{{:05d}}-of-{len(groups):05d}.safetensors".format
    return [plan_file(shard(i), group, metadata) for i, group in enumerate(groups, 1)]


def index_json(
    plans: Sequence[FilePlan], metadata: Mapping[str, object] | None = None, folder: Path = Path(), prefix: str = ""
) -> dict[str, object]:
    """Return the index of the files in one folder of a model; `total_size` counts the bytes of all their tensors.

    Names of tensors stand in it without `prefix`, as in the files.
    """
    slots = [(slot, Path(plan.name)) for plan in plans for slot in plan.slots if Path(plan.name).parent == folder]
    weight_map = {slot.name.removeprefix(prefix): path.name for slot, path in slots}
    total = sum(slot.nbytes for slot, _ in slots)
    return {"metadata": {**(metadata or {}), "total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
