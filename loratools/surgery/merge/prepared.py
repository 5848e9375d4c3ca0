"""Decide a merge: open its inputs, check that they fit and that nothing is overwritten, and plan every tensor."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loratools.adapter.placement.layers import replicated
from loratools.adapter.placement.settle import settle
from loratools.engine.plan import MergePlan
from loratools.engine.run import in_torch
from loratools.format.record import of_merge, refuse_second_merge
from loratools.parallel import cores
from loratools.storage import atomic
from loratools.storage.atomic import refuse_inputs
from loratools.storage.companions import companions, own_config
from loratools.surgery.inputs import AdapterSource, ModelSource, open_adapters, open_model, places, under_names_of
from loratools.surgery.merge.accounts import Account, accounts
from loratools.surgery.merge.options import MergeOptions
from loratools.surgery.merge.plan import plan_merge


@dataclass(frozen=True, slots=True, eq=False)
class Merge:
    """A merge that is decided but not run: the inputs, the plan, and what the output will record of itself."""

    plan: MergePlan
    output: Path
    sources: dict[str, Path]
    record: dict[str, Any]
    options: MergeOptions
    accounts: tuple[Account, ...]

    @property
    def threads(self) -> int:
        """Threads to work with, where the options leave it open one per core, at most 8."""
        return self.options.threads or min(8, cores())

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data, with the free space where the output goes."""
        free = shutil.disk_usage(self.output.absolute().parent).free
        return self.plan.to_json(self.threads, torch=bool(in_torch(self.plan))) | {
            "output": str(self.output),
            "other_files": len(self.sources),
            "free_disk": free,
            "threads": self.threads,
            "consumed": [asdict(account) for account in self.accounts],
        }


def prepare(
    base: ModelSource,
    adapters: AdapterSource | Sequence[AdapterSource],
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
    output = Path(output)
    atomic.check_output(output, force=options.force)
    base = open_model(base)
    if options.model_type:
        base = replace(base, config={**base.config, "model_type": options.model_type})
    inputs = open_adapters(adapters, base, weights)
    base = replicated(base, [each.adapter for each in inputs])
    # By the places of its files too: those of a base may be links.
    of_base = [base.path, *([base.root] if base.path.is_dir() else []), *(shard.path for shard in base.shards)]
    refuse_inputs(output, [*of_base, *places(inputs)])
    refuse_second_merge(base, [each.digest for each in inputs])
    settled, decided = settle(base, under_names_of(base, inputs), strict=options.check_base == "strict")
    plan = plan_merge(base, settled, options, configs=[own_config(each.path) for each in inputs])
    plan = replace(plan, notes=(*plan.notes, *decided))
    record = of_merge(base, inputs)
    record |= {"dtype": options.output_dtype, "tied": options.tied if options.tied != "error" else None}
    sources = companions(base, [each.path for each in inputs])
    return Merge(plan, output, sources, record, options, tuple(accounts(plan, inputs)))
