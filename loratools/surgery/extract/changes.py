"""How far each tensor of a model is from its counterpart in a base: norms alone, in one pass over both."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loratools.adapter.naming.selection import Selection
from loratools.options import Options
from loratools.parallel import Progress, cores, no_progress, workers
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import logical
from loratools.surgery.extract.pairs import Pair, pair
from loratools.surgery.extract.read import read_delta
from loratools.surgery.inputs import ModelSource, open_model


@dataclass(frozen=True, slots=True)
class TensorChange:
    """One tensor of a model beside the base's: `norm` = ‖W' − W‖_F, `base_norm` = ‖W‖_F, 0 where nothing changed.

    `path` is its parameter's or module's path in the base. `kind` is `linear`, `embedding`, …, `other`.
    """

    name: str
    path: str
    kind: str
    norm: float
    base_norm: float

    @property
    def relative(self) -> float:
        """Return ‖W' − W‖/‖W‖: 0 for no change, infinite where the base is zero."""
        return self.norm / self.base_norm if self.base_norm else math.inf if self.norm else 0.0


@dataclass(frozen=True, slots=True)
class ModelChanges:
    """Every tensor of a model: compared, `new` or of another shape, and those of the base that it lacks (`missing`)."""

    tensors: tuple[TensorChange, ...]
    new: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def changed(self) -> tuple[TensorChange, ...]:
        """Return the tensors of which a number differs."""
        return tuple(tensor for tensor in self.tensors if tensor.norm)

    @property
    def norm(self) -> float:
        """Return √Σ‖W' − W‖²."""
        return math.hypot(*(tensor.norm for tensor in self.tensors))


def changes(
    model: ModelSource, base: ModelSource, *, threads: int | None = None, progress: Progress | None = None
) -> ModelChanges:
    """Measure how far each tensor of a model is from the base's, in float64.

    Args:
        model: The model: a folder, a safetensors file, an index, an `hf://` reference, or an open `Checkpoint`.
        base: The base model, likewise.
        threads: Threads to work with. Default: one per core, at most 8.
        progress: Called with the bytes read since the last call, from any thread. Default: nobody is told.

    Returns:
        The norms of every tensor's change, which tensors are new, and which are missing.

    Raises:
        InvalidOption: `threads` is wrong.
        IncompatibleAdapter: The models have no tensor in common.
        BadFile: A tensor has NaN or infinities, or cannot be read.

    Example:
        >>> found = changes("merged", "base")
        >>> len(found.changed), found.new
        (4, ())
    """
    Options().threads(threads).done()
    tuned, old = logical(open_model(model)), logical(open_model(base))
    pairing = pair(old, tuned, Selection())
    advance = progress or no_progress
    compared = [
        each for each in pairing.pairs if each.base and old.specs[each.base].shape == tuned.specs[each.name].shape
    ]
    with workers(threads or min(8, cores()), torch_threads=1) as pool:
        jobs = [pool.submit(_change, each, old, tuned, advance) for each in compared]
        measured = tuple(job.result() for job in jobs)
    names = {each.name for each in compared}
    new = tuple(sorted(each.name for each in pairing.pairs if each.name not in names))
    return ModelChanges(measured, new, tuple(sorted(pairing.missing)))


def _change(match: Pair, base: Checkpoint, tuned: Checkpoint, progress: Progress) -> TensorChange:
    spec = base.specs[str(match.base)]
    delta = read_delta(spec, tuned.specs[match.name], progress, keep=False, hashed=False)
    base_norm2 = delta.base_norm2 if delta.norm2 else 0.0
    return TensorChange(match.name, match.path, match.kind, math.sqrt(delta.norm2), math.sqrt(base_norm2))
