"""loratools convert"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._group import command as make
from loratools.cli._talk import Talk, pass_talk

if TYPE_CHECKING:
    from loratools.dialects.peft.profiles import Name
    from loratools.options import TrainedOn
    from loratools.surgery.convert import Conversion


@make(section="Change")
@click.argument("adapter", type=options.INPUT)
@options.output_option
@click.option("--to", metavar="DIALECT", default="loratools", show_default=True, help="See `loratools dialects`.")
@click.option("--base", type=options.INPUT, metavar="PATH", help="Seal the adapter with the hash of this base model.")
@click.option(
    "--onto", type=options.INPUT, metavar="PATH",
    help="A folded base (AWQ, SmoothQuant): carry an adapter of its original into its basis, and seal it with that.",
)  # fmt: skip
@click.option(
    "--original", type=options.INPUT, metavar="PATH",
    help="With --onto: the model that the base was made from; the scales are read from its norms.",
)  # fmt: skip
@options.trained_on_option
@click.option(
    "--profile", type=options.Words("loratools.dialects.peft.profiles", "PROFILES"),
    help="With --to peft: as this consumer reads it, or refused; serving is what all of them read.",
)  # fmt: skip
@click.option("--to-lora", is_flag=True, help="Make a LoRA of --rank of it, whatever its kind; the error is told.")
@click.option("--rank", type=click.IntRange(min=1), metavar="R", help="With --to-lora: the rank.")
@click.option(
    "--alpha",
    type=float,
    metavar="NUMBER",
    help="The alpha it was trained with, for files that do not record it; wins over one that they record.",
)
@click.option(
    "--enable-lora", metavar="T,F,T",
    help="Which projections of a fused weight have factors, for loralib's MergedLinear.",
)  # fmt: skip
@click.option("--base-id", metavar="NAME", help="Name of the base model to record, such as org/model.")
@click.option("--allow-loss", is_flag=True, help="Write it even where the dialect cannot say everything.")
@options.dialect_option
@options.force_option
@pass_talk
def command(
    talk: Talk, adapter: str, output: Path, to: str, base: str | None, onto: str | None,
    original: str | None, trained_on: TrainedOn | None, profile: Name | None, to_lora: bool, rank: int | None,
    alpha: float | None, enable_lora: str | None, base_id: str | None, allow_loss: bool, dialect: str | None,
    force: bool,
) -> show.Report:  # fmt: skip
    """Rewrite an adapter in another dialect, or seal it with its base's hash.

    The result of `--to loratools` is still a PEFT adapter: it loads in PEFT unchanged. With --base it also carries the
    hash of every base tensor that it changes, so that merging it into any other model is refused.

    Dialects that neither record a hash nor the names of modules take them from --base: kohya's flattened names are
    looked up in it, GGUF's architecture and heads are read from its config.json.

    \b
    Examples:
      loratools convert adapter -o sealed --base base
      loratools convert adapter -o served --to peft --profile serving --base base
      loratools convert sealed -o plain --to peft --allow-loss
      loratools convert adapter -o lora --to-lora --rank 4 --base base
      loratools convert adapter --onto quantized --original base -o carried
    """
    from loratools import dialects
    from loratools.storage.checkpoint import Checkpoint
    from loratools.surgery.convert import convert

    if profile and to != "peft":
        raise click.UsageError("--profile is for --to peft")
    if to_lora != (rank is not None):
        raise click.UsageError("--to-lora and --rank belong together")
    if base and onto:
        raise click.UsageError("--base and --onto: give one of them; --onto seals the adapter too")
    path = onto or base
    checkpoint = Checkpoint.open(path) if path else None
    source = dialects.open_adapter(
        adapter, dialect=dialect, alpha=alpha, base=checkpoint, enabled=_switches(enable_lora) if enable_lora else None
    )
    with talk.progress("hashing the base", checkpoint.nbytes if checkpoint else 0) as advance:
        conversion = convert(
            source, output, to=to, base=checkpoint if base else None, onto=checkpoint if onto else None,
            original=original, trained_on=trained_on, base_id=base_id, profile=profile, to_lora=rank,
            allow_loss=allow_loss, force=force, progress=advance,
        )  # fmt: skip
    return show.Report(show.plain(conversion), _lines(conversion))


def _switches(text: str) -> tuple[bool, ...]:
    parts = [part.strip().lower() for part in text.split(",")]
    if not set(parts) <= {"t", "f", "true", "false"}:
        raise click.UsageError(f"--enable-lora: expected T and F with commas, found {text!r}")
    return tuple(part.startswith("t") for part in parts)


def _lines(conversion: Conversion) -> Iterator[str]:
    base = conversion.base
    yield from show.fields(
        ("wrote", f"{conversion.output} ({conversion.dialect}, {conversion.modules} modules)"),
        ("digest", conversion.digest),
        ("base", (base.id if base else None) or "not named"),
        ("base hash", f"{base.root}, and {len(base.tensors)} tensors" if base and base.root else None),
        ("lora", f"rank {lora.rank}, relative error {lora.relative_error:.3g}" if (lora := conversion.lora) else None),
        *(("lost", str(loss)) for loss in conversion.losses),
    )
