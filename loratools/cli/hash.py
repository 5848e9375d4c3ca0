"""loratools hash"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import click

from loratools.cli import _options as options
from loratools.cli._group import command as make
from loratools.cli._shares import crew
from loratools.cli._show import Report
from loratools.cli._talk import Talk, pass_talk

if TYPE_CHECKING:
    from loratools.adapter.identity import Tier
    from loratools.adapter.model import BaseIdentity
    from loratools.storage.digest import Algorithm


@make(section="Look", each="checkpoint")
@click.argument("checkpoint", type=options.INPUT)
@options.option(
    "--tier", type=options.Words("loratools.surgery.hash", "TIERS", "all"), default="root", show_default=True,
    more="root: one digest of all tensors; schema: names, dtypes and shapes, read from headers alone; tensors: a "
    "digest of each tensor; logical: the root of the 16-bit numbers that a quantized model stands for; all of them.",
)  # fmt: skip
@options.option("--modules", is_flag=True, more="Here: its digest, as --tier tensors.")
@options.option("--include", type=str, multiple=True, more="Implies --modules.")
@options.option("--exclude", type=str, multiple=True, more="Implies --modules.")
@options.adapter_options
@options.algorithm_option
@options.threads_option
@options.workers_option
@pass_talk
def command(
    talk: Talk, checkpoint: str, tier: Tier | Literal["all"], modules: bool, include: tuple[str, ...],
    exclude: tuple[str, ...], dialect: str | None, alpha: float | None, algorithm: Algorithm, threads: int | None,
    workers: str | None,
) -> Report:  # fmt: skip
    """Print the hash of a model or an adapter: which one exactly is this?

    CHECKPOINT is a safetensors file, or a folder of them with or without an index; or an adapter in any dialect. The
    root of an adapter is its digest: the one that it records of itself when it is sealed, the same in every dialect
    that keeps its tensors as they are. What the tensors mean (alpha, scaling) is not in it. The hash does not depend on
    how the tensors are spread over files, or on their order: the same model in other shards has the same hash. An
    adapter that is sealed with it refuses every other base. The logical hash of a quantized model is the root hash of
    the model that `loratools dequantize` makes of it: copies of one parent in several formats that agree in it hold the
    same numbers.

    \b
    Examples:
      loratools hash base
      loratools hash adapter
      loratools hash base --tier all
      loratools hash hf://lab/base --tier schema
      loratools hash quantized --tier logical
      loratools hash base --include '*.self_attn.q_proj.weight' --algorithm sha256
    """
    from loratools.adapter.model import Adapter
    from loratools.surgery.hash import TIERS, hash_checkpoint, open_hashed

    context = click.get_current_context()
    asked = None if context.get_parameter_source("tier") is click.core.ParameterSource.DEFAULT else tier
    if asked not in (None, "all", "tensors") and (modules or include or exclude):
        raise click.UsageError(f"--modules, --include and --exclude are for --tier tensors; it is {tier}")
    each = asked != "all" and (modules or include or exclude)
    tiers: tuple[Tier, ...] = ("tensors",) if each else TIERS if tier == "all" else (tier,)
    opened = open_hashed(checkpoint, headers=tiers == ("schema",), dialect=dialect, alpha=alpha)
    total = 0 if isinstance(opened, Adapter) or tiers == ("schema",) else opened.nbytes
    given: dict[str, Any] = {
        "tiers": tiers, "algorithm": algorithm, "include": include or None, "exclude": exclude or None,
        "threads": threads,
    }  # fmt: skip
    with (
        talk.progress("hashing", total) as advance,
        crew("hash", {"checkpoint": checkpoint, **given}, workers, advance),
    ):
        identity = hash_checkpoint(opened, **given, progress=advance)
    hashes = {tier: getattr(identity, tier) for tier in tiers}
    what = "adapter" if isinstance(opened, Adapter) else "checkpoint"
    document = {"path": checkpoint, "type": what, "algorithm": algorithm, "hash": hashes}
    return Report(document, _lines(identity, tiers), line=_in_a_line(identity, tiers))


def _in_a_line(identity: BaseIdentity, tiers: tuple[Tier, ...]) -> str | None:
    """Return the root hash, or the tier that was asked for; None where that is a line for each tensor."""
    if identity.tensors and "root" not in tiers:
        return None
    return next((digest for tier in ("root", "schema", "logical") if (digest := getattr(identity, tier))), None)


def _lines(identity: BaseIdentity, tiers: tuple[Tier, ...]) -> Iterator[str]:
    """Yield the digest alone where it is one, else with what each is of."""
    for name, digest in identity.tensors.items():
        yield f"{digest}  {name}"
    for tier in ("schema", "root", "logical"):
        digest = getattr(identity, tier)
        if digest and tiers == (tier,):
            yield digest
        elif digest and not (tier == "logical" and digest == identity.root):
            yield f"{digest}  ({tier})"
