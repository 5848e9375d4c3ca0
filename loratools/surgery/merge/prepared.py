"""Decide a merge: open its inputs, check that they fit and that nothing is overwritten, and plan every tensor."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.adapter.placement.image import named_for
from loratools.adapter.placement.layers import replicated
from loratools.adapter.placement.settle import settle
from loratools.engine import products
from loratools.engine.plan import MergePlan
from loratools.errors import InvalidOption
from loratools.format.digest import checked_digest
from loratools.parallel import cores
from loratools.storage import atomic
from loratools.storage.atomic import refuse_inputs
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.companions import RECORD, companions, own_config
from loratools.surgery.merge.accounts import Account, accounts
from loratools.surgery.merge.options import MergeOptions
from loratools.surgery.merge.plan import plan_merge
from loratools.surgery.record import merge_record, refuse_second_merge


@dataclass(frozen=True, slots=True, eq=False)
class Merge:
    """A merge that is decided but not run: the inputs, the plan, and what the output will record of itself."""

    plan: MergePlan
    output: Path
    sources: dict[str, Path]
    record: dict[str, Any]
    digests: tuple[str, ...]
    options: MergeOptions
    accounts: tuple[Account, ...]

    @property
    def threads(self) -> int:
        """Threads to work with, where the options leave it open one per core, at most 8."""
        return self.options.threads or min(8, cores())

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data, with the free space where the output goes."""
        free = shutil.disk_usage(self.output.absolute().parent).free
        return self.plan.to_json(self.threads, torch=not products.serves(self.plan)) | {
            "output": str(self.output),
            "other_files": len(self.sources),
            "free_disk": free,
            "threads": self.threads,
            "consumed": [asdict(account) for account in self.accounts],
        }


def prepare(
    base: str | Path | Checkpoint,
    adapters: str | Path | Adapter | Sequence[str | Path | Adapter],
    output: str | Path,
    *,
    weights: float | Sequence[float] | None = None,
    options: MergeOptions = MergeOptions(),  # noqa: B008  (frozen)
) -> Merge:
    """Decide everything about a merge from headers and the adapters' digests; write nothing.

    `base`, `adapters`, `output` and `weights` are those of `merge`; `options` holds its other arguments.

    Raises `IncompatibleAdapter`, `WrongBase`, `BadFile`, `UnsupportedAdapter`, `InvalidOption` for weights that are not
    one for each adapter, `OutputRefused` where the output exists, is an input, or the base already holds this adapter.
    """
    adapters = [adapters] if isinstance(adapters, str | Path | Adapter) else list(adapters)
    weights = [1.0] * len(adapters) if weights is None else [weights] if isinstance(weights, int | float) else weights
    weights = [float(weight) for weight in weights]
    if not adapters or len(weights) != len(adapters):
        raise InvalidOption(f"{len(adapters)} adapter(s) and {len(weights)} weight(s); each adapter takes one weight")
    output = Path(output)
    atomic.check_output(output, force=options.force)
    base = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    if options.model_type:
        base = replace(base, config={**base.config, "model_type": options.model_type})
    opened = [one if isinstance(one, Adapter) else dialects.open_adapter(one, base=base) for one in adapters]
    base = replicated(base, opened)
    paths = [None if isinstance(adapter, Adapter) else Path(adapter) for adapter in adapters]
    # By their own places too: an adapter may come opened, and the files of a base may be links.
    own = {lazy.spec.file for adapter in opened for lazy in adapter.tensors().values() if lazy.spec}
    own |= {shard.path for shard in base.shards}
    refuse_inputs(output, [base.path, base.root if base.path.is_dir() else None, *paths, *sorted(own)])
    digests = tuple(checked_digest(a, str(p or "adapter")) for a, p in zip(opened, paths, strict=True))
    refuse_second_merge(base, digests, RECORD)
    named = [named_for(one, base) for one in opened]
    settled, decided = settle(base, named, strict=options.check_base == "strict")
    plan = plan_merge(base, settled, weights, options, configs=[own_config(path) for path in paths])
    plan = replace(plan, notes=(*plan.notes, *decided))
    sources = companions(base, paths)
    record = merge_record(base, opened, weights, digests)
    record |= {"dtype": options.output_dtype, "tied": options.tied if options.tied != "error" else None}
    return Merge(plan, output, sources, record, digests, options, tuple(accounts(plan, opened)))
