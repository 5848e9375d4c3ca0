"""loratools hash"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from loratools.cli import _options as options
from loratools.cli._group import command as make
from loratools.cli._show import Report
from loratools.cli._sources import Source
from loratools.cli._talk import Talk, pass_talk
from loratools.storage.sources import Need

if TYPE_CHECKING:
    from loratools.adapter.model import BaseIdentity
    from loratools.storage.digest import Algorithm
    from loratools.surgery.hash import Tier


def _need(params: Mapping[str, Any]) -> Need:
    return "header" if params["tier"] == "schema" and not params["include"] else "checkpoint"


@make(section="Look")
@click.argument("checkpoint", type=Source(_need))
@click.option(
    "--tier",
    type=options.Words("loratools.surgery.hash", "TIERS", "all"),
    default="all",
    show_default=True,
    metavar="TIER",
    help="schema: names, dtypes and shapes, read from headers alone; tensors: a digest of each tensor; "
    "root: one digest of all tensors; all of them.",
)
@click.option(
    "--include",
    multiple=True,
    metavar="GLOB",
    help="Digests of the tensors with such names only, once or more; implies --tier tensors.",
)
@options.algorithm_option
@options.threads_option
@pass_talk
def command(
    talk: Talk,
    checkpoint: Path,
    tier: Tier | Literal["all"],
    include: tuple[str, ...],
    algorithm: Algorithm,
    threads: int | None,
) -> Report:
    """Print the base hash of a model: which model exactly is this?

    CHECKPOINT is a safetensors file, or a folder of them with or without an index. The hash does not depend on how
    the tensors are spread over files, or on their order: the same model in other shards has the same hash. An adapter
    that is sealed with it refuses every other base.

    \b
    Examples:
      loratools hash base
      loratools hash base --tier schema
      loratools hash hf://lab/base --tier schema
      loratools hash base --include '*.self_attn.q_proj.weight' --algorithm sha256
    """
    from loratools.storage.checkpoint import Checkpoint
    from loratools.surgery.hash import TIERS, hash_checkpoint

    if include and tier not in ("all", "tensors"):
        raise click.UsageError(f"--include chooses tensors; it does not go with --tier {tier}")
    opened = Checkpoint.open(checkpoint)
    tiers: tuple[Tier, ...] = ("tensors",) if include else TIERS if tier == "all" else (tier,)
    with talk.progress("hashing", 0 if tiers == ("schema",) else opened.nbytes) as advance:
        found = hash_checkpoint(opened, tiers, algorithm, include=include or None, threads=threads, progress=advance)
    asked = {tier: getattr(found, tier) for tier in tiers}
    return Report({"path": checkpoint, "algorithm": algorithm, "hash": asked}, _lines(found))


def _lines(found: BaseIdentity) -> Iterator[str]:
    for name, digest in found.tensors.items():
        yield f"{digest}  {name}"
    if found.schema:
        yield f"{found.schema}  (schema)"
    if found.root:
        yield f"{found.root}  (root)"
