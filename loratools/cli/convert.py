"""loratools convert"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._batch import named_for
from loratools.cli._group import command as make
from loratools.cli._talk import Talk, pass_talk
from loratools.cli._words import UNSEALED
from loratools.errors import counted

if TYPE_CHECKING:
    from loratools.dialects.peft.profiles import Name
    from loratools.options import TrainedOn
    from loratools.surgery.convert import Conversion


def _renamed(name: str, file: bool, values: Mapping[str, Any]) -> str:
    """Return an output's name: a file stays one where the dialect writes files, of its ending."""
    return named_for(name, values["to"]) if file else name


@make(section="Change", each="adapter", renamed=_renamed)
@click.argument("adapter", type=options.INPUT)
@options.output_option
@options.option("--to", type=str, shell_complete=options.dialects_begun, default="loratools", show_default=True)
@options.option("--base", type=options.INPUT, more="Seal the adapter with its hash.")
@options.option("--onto", type=options.INPUT)
@options.option("--original", type=options.INPUT, more="With --onto; the scales are read from its norms.")
@options.trained_on_option
@options.option("--profile", type=options.Words("loratools.dialects.peft.profiles", "PROFILES"))
@options.option("--to-lora", is_flag=True)
@options.option("--rank", type=click.IntRange(min=1), more="With --to-lora.")
@options.adapter_options
@options.model_type_option
@options.option("--enable-lora", type=str)
@options.base_id_option
@options.option("--allow-loss", is_flag=True)
@options.dry_run_option
@options.force_option
@pass_talk
def command(
    talk: Talk, adapter: str, output: Path, to: str, base: str | None, onto: str | None,
    original: str | None, trained_on: TrainedOn | None, profile: Name | None, to_lora: bool, rank: int | None,
    alpha: float | None, enable_lora: str | None, base_id: str | None, allow_loss: bool, dialect: str | None,
    model_type: str | None, dry_run: bool, force: bool,
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
      loratools convert adapter other -o both --base base
      loratools convert adapter --onto quantized --original base -o carried
    """
    from loratools.surgery.convert import convert
    from loratools.surgery.inputs import plan, typed_model

    if profile and to != "peft":
        raise click.UsageError("--profile is for --to peft")
    if to_lora != (rank is not None):
        raise click.UsageError("--to-lora and --rank belong together")
    if base and onto:
        raise click.UsageError("--base and --onto: give one of them; --onto seals the adapter too")
    path = onto or base
    if model_type and not path:
        raise click.UsageError("--model-type says what a base is; give --base or --onto")
    checkpoint = typed_model(path, model_type) if path else None
    given: dict[str, Any] = {
        "to": to, "base": checkpoint if base else None, "onto": checkpoint if onto else None, "dialect": dialect,
        "alpha": alpha, "enabled": _switches(enable_lora) if enable_lora else None, "original": original,
        "trained_on": trained_on, "base_id": base_id, "profile": profile, "to_lora": rank, "allow_loss": allow_loss,
        "force": force,
    }  # fmt: skip
    if dry_run:
        return options.would(plan(convert, adapter, output, **given))
    with talk.progress("hashing the base", checkpoint.nbytes if checkpoint else 0) as advance:
        conversion = convert(adapter, output, **given, progress=advance)
    return show.Report(show.plain(conversion), _lines(conversion), line=_in_a_line(conversion))


def _in_a_line(conversion: Conversion) -> str:
    base = conversion.base
    sealed = f", sealed with {base.id or 'its base'}" if base and base.root else ""
    sealed = ", no base hash" if _lacks_hash(conversion) else sealed
    lora = f", relative error {conversion.lora.relative_error:.3g}" if conversion.lora else ""
    lost = f", {counted(len(conversion.losses), 'loss', 'losses')}" if conversion.losses else ""
    modules = counted(conversion.modules, "module")
    return f"wrote {conversion.output} ({conversion.dialect}, {modules}{sealed}{lora}{lost})"


def _switches(text: str) -> tuple[bool, ...]:
    parts = [part.strip().lower() for part in text.split(",")]
    if not set(parts) <= {"t", "f", "true", "false"}:
        raise click.UsageError(f"--enable-lora: expected T and F with commas, found {text!r}")
    return tuple(part.startswith("t") for part in parts)


def _lines(conversion: Conversion) -> Iterator[str]:
    base = conversion.base
    yield from show.fields(
        ("wrote", f"{conversion.output} ({conversion.dialect}, {counted(conversion.modules, 'module')})"),
        ("digest", conversion.output_digest),
        ("read", conversion.digest if conversion.digest != conversion.output_digest else None),
        ("base", (base.id if base else None) or "not named"),
        ("base hash", _hash(conversion)),
        ("lora", f"rank {lora.rank}, relative error {lora.relative_error:.3g}" if (lora := conversion.lora) else None),
        *(("lost", str(loss)) for loss in conversion.losses),
    )


def _hash(conversion: Conversion) -> str | None:
    """Return what is said of the base hash; None of a dialect that has no place for one."""
    base = conversion.base
    if base and base.root:
        return f"{base.root}, and {counted(len(base.tensors), 'tensor')}"
    return f"none, {UNSEALED}" if _lacks_hash(conversion) else None


def _lacks_hash(conversion: Conversion) -> bool:
    return conversion.dialect == "loratools" and not (conversion.base and conversion.base.sealed)
