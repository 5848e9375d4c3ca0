"""The hub type: every dialect reads into, and writes from, one `Adapter`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.errors import printable
from loratools.storage.lazy import LazyTensor

_SHOWN = 20  # names and rows that a notebook shows

HEADER = "metadata"
"""The setting that holds the entries of the header that an adapter's file had: trigger words, tags, a thumbnail."""
MOST_LAYERS = 4096
"""Layers that an adapter may ask for; the largest models have some hundred."""


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """Which base model an adapter belongs to.

    `id` and `revision` are names (a Hub repository and its commit). `schema` and `root` are digests of the whole base,
    `tensors` the digests of the tensors that the adapter touches, by base tensor name (`storage/digest.py`).
    `model_type` is what the base's config.json says it is, which no digest covers. Of a quantized base `logical` is the
    root of the model that it stands for in 16 bit, and `weights` are the digests of the numbers of touched weights that
    it stores as codes, by the names that they have there (`storage/checkpoint/values.py`).
    """

    id: str | None = None
    revision: str | None = None
    schema: str | None = None
    tensors: Mapping[str, str] = field(default_factory=dict)
    root: str | None = None
    model_type: str | None = None
    logical: str | None = None
    weights: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_name(cls, name: object) -> BaseIdentity | None:
        """Return the identity of a base model known by name only; None where a file says no name, or an empty one."""
        return cls(name) if isinstance(name, str) and name else None

    @property
    def sealed(self) -> bool:
        """Whether any digest is recorded: only then can a wrong base be told from the right one."""
        return bool(self.schema or self.tensors or self.root or self.logical or self.weights)

    @property
    def of_codes(self) -> bool:
        """Whether it is that of a quantized base, whose numbers have digests of their own."""
        return bool(self.weights) or self.logical not in (None, self.root)


@dataclass(frozen=True, slots=True)
class Step:
    """One operation in the making of an adapter or a model.

    `inputs` are mappings with `digest` (of an adapter or a base) and, where it applies, `weight`; `seed` is set
    wherever chance was used. Host paths and times never appear here: equal work gives equal bytes.
    """

    operation: str
    tool: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[Mapping[str, Any], ...] = ()
    seed: int | None = None


class Loss(NamedTuple):
    """Something that a destination dialect cannot say: `where` (a module, a field) and `what`."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Adapter:
    """A set of changes to a base model. Two adapters are equal when their delta weights are, never when A and B are.

    `len(adapter)` counts its modules, `for module in adapter` goes through their paths, and `adapter[module]` is the
    `Update` of one. A notebook shows it as a table.

    `updates`       module path in the base, e.g. `model.layers.0.self_attn.q_proj` -> `Update`
    `replacements`  parameter path in the base, e.g. `lm_head.weight` -> the tensor that takes its place; it comes first
                    where an update changes the same weight
    `copies`        parameter path -> a copy of the base's own tensor in the adapter's file; it changes nothing, unless
                    it differs from the base's, as after a resize of the vocabulary
    `base`          the base model it belongs to, as far as the file says
    `provenance`    the operations that made it, oldest first
    `dialect`       the name of the dialect that read it
    `orientation`   module path -> whether the base stores its weight (in, out), where the adapter itself says it; of
                    other modules the base tells
    `settings`      what else its file says and a writer may want (PEFT: `task_type`, `fan_in_fan_out`, …), JSON values
    """

    updates: Mapping[str, Update]
    replacements: Mapping[str, LazyTensor] = field(default_factory=dict)
    base: BaseIdentity | None = None
    provenance: tuple[Step, ...] = ()
    dialect: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    copies: Mapping[str, LazyTensor] = field(default_factory=dict)
    orientation: Mapping[str, bool] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of modules that it changes by an update; replaced tensors are not among them."""
        return len(self.updates)

    def __bool__(self) -> bool:
        """Return True: an adapter that only replaces tensors, or changes nothing, is an adapter too."""
        return True

    def __iter__(self) -> Iterator[str]:
        """Yield the module paths, in the order of the file."""
        return iter(self.updates)

    def __contains__(self, module: object) -> bool:
        """Tell whether it changes a module."""
        return module in self.updates

    def __getitem__(self, module: str) -> Update:
        """Return the update of a module; raise `KeyError` where it has none."""
        return self.updates[module]

    def __repr__(self) -> str:
        """Return one line: dialect, number of modules, kinds and ranks, base."""
        kinds_and_ranks = Counter(f"{update.kind} of rank {update.rank}" for update in self.updates.values())
        shown = [name for name, _ in kinds_and_ranks.most_common(3)] + ["…"] * (len(kinds_and_ranks) > 3)
        words = [self.dialect, _count(len(self), "module"), *([", ".join(shown)] if shown else [])]
        words += [_count(len(self.replacements), "replaced tensor")] if self.replacements else []
        words += [f"for {self.base.id}"] if self.base and self.base.id else []
        return printable(f"<Adapter: {'; '.join(word for word in words if word)}>")

    def _repr_html_(self) -> str:
        """Return the table that a notebook shows: what its one line says, and a row for modules that are alike."""
        from loratools.adapter.shown import table  # for notebooks only

        sizes = [lazy.parameters for lazy in self.tensors().values()]
        fields = [
            ("dialect", self.dialect),
            ("base", self.base.id or "known by digest" if self.base else ""),
            ("parameters", f"{sum(sizes):,} in {_count(len(sizes), 'tensor')}"),
            ("replaced tensors", ", ".join([*self.replacements][:_SHOWN])),
        ]
        alike: dict[tuple[str, str, str, str], list[str]] = {}
        for module, update in self.updates.items():
            numbers = f"{update.rank}", f"{update.alpha:.6g}", f"{update.scaling:.6g}"
            alike.setdefault((update.kind, *numbers), []).append(module)
        rows = []
        for key, modules in alike.items():
            targets = list(dict.fromkeys(module.rpartition(".")[2] for module in modules))
            rows.append((*key, f"{len(modules)}", ", ".join(targets[:_SHOWN]) + ", …" * (len(targets) > _SHOWN)))
        heading = ("kind", "rank", "alpha", "scaling", "modules", "targets")
        return table("Adapter", [(name, text) for name, text in fields if text], heading, rows[:_SHOWN])

    def tensors(self) -> dict[str, LazyTensor]:
        """Return every tensor of the adapter under a canonical name, `module.part` or the replaced parameter's path.

        Copies of the base's tensors are not among them.
        """
        tensors = {
            f"{module}.{part}": lazy for module, update in self.updates.items() for part, lazy in update.parts.items()
        }
        return tensors | dict(self.replacements)

    def files(self) -> set[Path]:
        """Return the files that its tensors are read from, those of copies too."""
        parts = [lazy.file for update in self.updates.values() for lazy in update.parts.values()]
        whole = [lazy.file for each in (self.replacements, self.copies) for lazy in each.values()]
        return set({id(file): file for file in (*parts, *whole) if file}.values())  # most are one and the same

    def mapped(self, change: Callable[[LazyTensor], LazyTensor]) -> Adapter:
        """Return the same adapter with other tensors of the same shapes; one tensor in two places stays one."""
        made: dict[int, LazyTensor] = {}

        def once(lazy: LazyTensor) -> LazyTensor:
            if id(lazy) not in made:
                made[id(lazy)] = change(lazy)
            return made[id(lazy)]

        updates: dict[str, Update] = {}
        for module, update in self.updates.items():
            parts, layout = {part: once(lazy) for part, lazy in update.parts.items()}, dict(update.layout)
            build = kinds.get(update.kind).build
            updates[module] = build(parts, update.scaling, update.alpha, **({"layout": layout} if layout else {}))
        replacements, copies = (
            {path: once(lazy) for path, lazy in whole.items()} for whole in (self.replacements, self.copies)
        )
        return replace(self, updates=updates, replacements=replacements, copies=copies)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
