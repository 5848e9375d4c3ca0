"""LoRA and DoRA of linear layers into plain dtypes, on the CPU: what most people merge, without torch.

Importing torch takes longer than merging a model of a billion parameters, so the common case does without: every update
is s·B·A with factors as stored, rescaled or not, every tensor is BF16, F16 or F32 and stays so. What is computed is
what `tensor.run` computes: a tile is widened to float32, all products are added at once, the sum is rounded once, and
sums near zero are computed again in float64; in C (`arithmetic/native.py`) or in NumPy (`arithmetic/numpy.py`).
Anything else goes through `tensor.run`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.adapter.kinds import Update
from loratools.adapter.kinds.dora import DoraUpdate
from loratools.adapter.kinds.lora import LoraUpdate
from loratools.adapter.placement.resolve import Placement
from loratools.adapter.site import Site
from loratools.engine.arithmetic import native
from loratools.engine.arithmetic.native import Fused
from loratools.engine.arithmetic.numpy import Stepwise
from loratools.engine.arithmetic.sums import RescaledSum, SumOfProducts
from loratools.engine.load import is_wide
from loratools.engine.tensor import TILE, TensorResult, sampled_tiles
from loratools.errors import IncompatibleAdapter
from loratools.parallel import Progress
from loratools.storage import digest, dtypes, files
from loratools.storage.codecs import floats
from loratools.storage.header import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from loratools.engine.plan import Change, MergePlan

    Array = np.ndarray[Any, np.dtype[Any]]

_MEASURED = 1 << 16  # elements of a sampled tile on which retention is measured


def serves(plan: MergePlan) -> bool:
    """Tell whether a plan holds nothing but plain LoRA, stored as such, on tensors of the dtypes served here."""
    slots = {slot.name: slot for file in plan.files for slot in file.slots}
    return all(
        slots[name].dtype == change.source.dtype in floats.SERVED
        and all(_plain(p) for _, p in change.placements)
        and not is_wide(change, slots[name].dtype)
        for name, change in plan.rewritten().items()
    )


def _plain(placement: Placement) -> bool:
    """Tell whether an update is LoRA on a linear layer, or DoRA where a feature is a row; with factors as stored."""
    update = placement.update
    if update.bias is not None or type(_inner(update)) is not LoraUpdate:
        return False
    if isinstance(update, DoraUpdate) and placement.site.transposed:
        return False
    return all(lazy.spec is not None and lazy.dtype in floats.SERVED for lazy in update.parts.values())


def _inner(update: Update) -> Update:
    """Return what updates the direction of a DoRA, or the update itself."""
    return update.inner if isinstance(update, DoraUpdate) else update


def load(plan: MergePlan, change: Change, digests: Sequence[str], name: str) -> list[SumOfProducts]:
    """Load the products of one tensor in float32, joined for each site in the order of the adapters' digests.

    Raises `IncompatibleAdapter` for factors that are not finite.
    """
    import numpy as np

    parts: dict[Site, list[tuple[Array, Array, float]]] = {}
    magnitudes: dict[Site, Array] = {}
    for i, placement in sorted(change.placements, key=lambda item: (digests[item[0]], plan.weights[item[0]])):
        update, site = _inner(placement.update), placement.site
        assert isinstance(update, LoraUpdate)
        A, B = _read(update.A.spec), _read(update.B.spec)[site.part_rows]
        if isinstance(placement.update, DoraUpdate):  # alone on its site, or `serves` would have said no
            magnitudes[site] = _read(placement.update.magnitude.spec).ravel()[site.part_rows].astype(np.float64)
        if not all(np.isfinite(one).all() for one in (A, B, magnitudes.get(site, A))):
            raise IncompatibleAdapter(
                f"adapter {i + 1}: {placement.module} has NaN or infinite factors (for {name})",
                hint="The training diverged, or the file is damaged; such an adapter would destroy the model.",
            )
        factor, right = (A.T, B.T) if site.transposed else (B, A)
        parts.setdefault(site, []).append((factor, right, plan.weights[i] * update.scaling))
    return [_joined(site, group, magnitudes.get(site)) for site, group in parts.items()]


def _joined(site: Site, group: list[tuple[Array, Array, float]], magnitude: Array | None) -> SumOfProducts:
    import numpy as np

    factor = np.concatenate([factor for factor, _, _ in group], axis=1)
    right = np.ascontiguousarray(np.concatenate([right for _, right, _ in group], axis=0))
    scale = np.concatenate([np.full(len(right), s) for _, right, s in group])
    with np.errstate(over="ignore"):  # what overflows shows in the sums, and is refused there
        left = (factor * scale).astype(np.float32)
    if magnitude is not None:
        return RescaledSum(site, left, right, factor, scale, magnitude, np.zeros_like(magnitude))
    return SumOfProducts(site, left, right, factor, scale)


def acts(plan: MergePlan, number: int, placement: Placement) -> bool:
    """Tell whether a placement changes anything: a rank whose column of B and row of A are not zero, or a magnitude."""
    update = placement.update
    if isinstance(update, DoraUpdate):
        return True
    assert isinstance(update, LoraUpdate)
    scale = plan.weights[number] * update.scaling
    return scale != 0 and bool((_read(update.B.spec).any(0) & _read(update.A.spec).any(1)).any())


def _read(spec: TensorSpec | None) -> Array:
    """Return a stored factor in float32."""
    import numpy as np

    assert spec is not None
    raw = np.frombuffer(files.read_bytes(spec), dtype=floats.numpy_dtype(spec.dtype)).reshape(spec.shape)
    return floats.exactly(raw, spec.dtype).astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True, eq=False)
class ProductTask:
    """One output tensor: `source` bytes, changed by `terms`, stored at `offset` of the file `target`."""

    name: str
    source: TensorSpec
    target: int
    offset: int
    terms: Sequence[SumOfProducts]
    hashes: Sequence[str]
    retention: str
    seed: int


def run(
    task: ProductTask,
    buffers: floats.Buffers,
    progress: Progress,
    stopped: Callable[[], bool],
    tile_bytes: int = TILE,
    in_c: bool = True,
) -> TensorResult:
    """Write one output tensor and return what was measured; see `tensor.run`.

    With `in_c` the arithmetic is done in C where that serves, else in NumPy, which differs in the last bit of float32
    sums at most. Raises `IncompatibleAdapter` when the result is not finite in the output's dtype.
    """
    spec = task.source
    rows, columns = task.terms[0].site.matrix
    width = columns * dtypes.bits(spec.dtype) // 8
    step = max(1, min(rows, tile_bytes // max(1, width)))
    starts = range(0, rows, step)
    sampled = sampled_tiles(task.name, task.seed, task.retention, len(starts))
    hashers = {name: digest.start_tensor(spec.dtype, spec.shape, name) for name in task.hashes}
    result = TensorResult(task.name)
    arithmetic = (Fused if in_c and native.serves(task) else Stepwise)(task, buffers, result)
    measured = 0
    with files.descriptor(spec.file) as source:
        for index, start in enumerate(starts):
            if stopped():
                raise InterruptedError
            count = min(step, rows - start)
            stored = buffers.of("stored", count * columns, floats.numpy_dtype(spec.dtype)).reshape(count, columns)
            raw = floats.bytes_of(stored)
            files.read_into(source, raw, spec.start + start * width)
            for hasher in hashers.values():
                hasher.update(raw)
            some = 0
            if index in sampled:
                some = count if task.retention == "full" else min(count, max(1, _MEASURED // columns))
                measured += some * columns
            out = arithmetic.change(stored, start, some)
            files.write_from(task.target, floats.bytes_of(out), task.offset + start * width)
            progress(out.nbytes)
    share = spec.parameters / measured if measured else 0.0
    result.retained, result.total, result.changed = (x * share for x in (result.retained, result.total, result.changed))
    result.digests = {name: digest.finish(hasher, name) for name, hasher in hashers.items()}
    return result
