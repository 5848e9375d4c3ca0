"""Give an adapter other ranks: to a rank, an energy, a ratio, or a budget, with the least error there is."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

from loratools import dialects
from loratools.adapter.weights import Weight
from loratools.errors import InvalidOption
from loratools.linalg.ranks.allocate import Ranks
from loratools.parallel import Progress
from loratools.storage import atomic
from loratools.storage.dtypes import FloatName
from loratools.storage.sources import Location, session
from loratools.surgery.combine import Combination, run
from loratools.surgery.combine.options import CombineOptions
from loratools.surgery.inputs import AdapterSource, read_as

if TYPE_CHECKING:
    import torch


@session()
def resize(
    adapter: AdapterSource,
    output: Location,
    ranks: Ranks | int,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    to: str | None = None,
    dtype: FloatName | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Combination:
    """Write an adapter with the nearest change to s·B·A at other ranks (Eckart-Young).

    The singular values of every change are found in factor space, in float64: ‖s·B·A − result‖² = Σ_{i>r} σᵢ². A rank
    above a module's true rank gives the true rank, and the same change. The scaling is 1 in the result.

    Args:
        adapter: A path, an `hf://` reference, or an open `Adapter`.
        output: The folder or file to write; it must not exist, unless `force`.
        ranks: How ranks are chosen: a number for every module, or `Ranks`: by a rule (`Energy(0.99)`, kohya's
            `SvRatio(20)`, …) for each, or a `budget` of parameters shared out among all.
        include: Patterns of the modules to keep: a name, its last segments (`"attn2.to_q"`), a glob
            (`"*.down_blocks.1.*"`), or `"re:…"`. Default: all.
        exclude: Patterns of modules to leave out, which win. Default: none.
        dialect: The dialect to read paths as, one of `list_dialects()`. Default: what is found in each file.
        alpha: The alpha that the adapters were trained with, for files that do not record it; it wins over one that
            they record. Default: the file's.
        to: The dialect (`loratools.list_dialects()`). Default: the adapter's own, and `"loratools"` for PEFT's, which
            reads it, and for one that is only read.
        dtype: The float dtype of the factors: `"f32"`, `"bf16"`, `"f16"`, `"f64"`, or torch's. Default: that of the
            adapter's factors, and `"F32"` where they have several, or a shorter one.
        device: Where changes are decomposed, as for `combine`. Default: `"cpu"`.
        threads: Threads to work with; no byte depends on it. Default: one per core, at most 8.
        force: Whether to replace an output that exists. Default: no.
        progress: Called with the bytes of factors that were worked on since the last call. Default: nobody is told.

    Returns:
        What was written, its error beside the least at these ranks, and what each module keeps.

    Raises:
        InvalidOption: A word or a number is wrong; all are listed.
        UnsupportedAdapter: A change is no product, such as DoRA's.
        IncompatibleAdapter: Numbers are not finite, or every change is zero.
        LoraToolsError: A budget is too small, or a pattern names no module.
        OutputRefused: The output exists, or is the input.
        NoDevice: The machine has no such device, it has no float64, or its memory is full.

    Example:
        >>> report = resize("adapter", "small", 2)
        >>> {share.rank for share in report.shares}
        {2}
    """
    atomic.sweep(output)
    options = CombineOptions(ranks=ranks, dtype=dtype, device=device, threads=threads, force=force)
    if to is not None:
        dialects.get(to)
    chosen = _chosen(include, exclude)
    (source,) = read_as(adapter, dialect, alpha)
    if not isinstance(source, str | PathLike):
        source = dialects.open_adapter(source)
    return run([source], output, options, [chosen], operation="resize", to=to, progress=progress)


def _chosen(include: Sequence[str] | None, exclude: Sequence[str] | None) -> Weight:
    """Return a weight that is 0 for the modules to leave out, which then are not in the result."""
    given = {"include": include, "exclude": exclude}
    wrong = [
        f"{name} is {value!r}; it can be a list of patterns, or None"
        for name, value in given.items()
        if value is not None
        and (not isinstance(value, list | tuple) or not all(isinstance(pattern, str) and pattern for pattern in value))
    ]
    if wrong:
        raise InvalidOption("patterns choose modules", wrong)
    patterns = (*((pattern, 0.0) for pattern in exclude or ()), *((pattern, 1.0) for pattern in include or ()))
    return Weight(0.0 if include else 1.0, patterns)
