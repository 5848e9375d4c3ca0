"""Whether an adapter is one of a base model, which is known by its name alone or is at hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from loratools.adapter.identity import same_name
from loratools.adapter.model import Adapter, BaseIdentity
from loratools.adapter.placement.image import named_for
from loratools.adapter.placement.resolve import resolve
from loratools.errors import LoraToolsError
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import logical
from loratools.storage.digest import algorithm_of
from loratools.storage.sources import Location, is_reference, local


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """The base model whose adapters are wanted: `name`, or where it is at hand `model` and its hash of all shapes.

    `roots` are the hashes that adapters of that name have of their base, `tensors` those of its tensors, by name.
    """

    name: str = ""
    model: Checkpoint | None = None
    schema: str = ""
    roots: frozenset[str] = frozenset()
    tensors: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, base: Location | Checkpoint) -> Wanted:
        """Return what a text says: a path or a reference where it is one, else a name. Raises what opening raises."""
        if isinstance(base, str) and not is_reference(base) and not Path(base).exists():
            return cls(base)
        model = base if isinstance(base, Checkpoint) else Checkpoint.open(local(base, "header"))
        return cls(model=model, schema=model.schema())

    def known_from(self, bases: Iterable[BaseIdentity]) -> Wanted:
        """Return it with the hashes that those of `bases` state which have its name."""
        roots, tensors = set[str](), dict[str, set[str]]()
        for base in bases:
            if self._may_name(base):
                roots |= {base.root} if base.root else set()
                for name, digest in base.tensors.items():
                    tensors.setdefault(name, set()).add(digest)
        return replace(self, roots=frozenset(roots), tensors={name: frozenset(all_) for name, all_ in tensors.items()})

    def has(self, adapter: Adapter) -> bool:
        """Tell whether an adapter is one of it.

        By name: one that may be the same, as a bare name may; whatever its name, one that was sealed with the same base
        as an adapter of that name, by the hash of all tensors, or of those that it changes. Of a model at hand: by the
        hash of an adapter that was sealed with one, else by whether every module has its place there, in its shape.
        """
        base = adapter.base
        if self.model is None:
            return base is not None and (self._may_name(base) or self._hashes(base))
        if base is not None and base.schema and algorithm_of(base.schema) == algorithm_of(self.schema):
            return base.schema == self.schema
        view = logical(self.model)
        shapes = {name: spec.shape for name, spec in view.specs.items()}
        try:
            resolve(named_for(adapter, view), shapes, view.config)
        except LoraToolsError:
            return False
        return True

    def _may_name(self, base: BaseIdentity) -> bool:
        return base.id is not None and same_name(base.id, self.name) is not False

    def _hashes(self, base: BaseIdentity) -> bool:
        if base.root and self.roots:
            return base.root in self.roots
        both = base.tensors.keys() & self.tensors.keys()
        return bool(both) and all(base.tensors[name] in self.tensors[name] for name in both)
