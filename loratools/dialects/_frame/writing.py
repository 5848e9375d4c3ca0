"""An adapter into a dialect's files: what cannot be said is an error, or left out where the user allows it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loratools.adapter.model import Adapter, Loss
from loratools.dialects._frame.dialect import Dialect
from loratools.dialects._frame.listing import WEIGHTS
from loratools.dialects._frame.losses import no_kind
from loratools.errors import LossyConversion, OutputRefused, counted


def written(
    writer: Dialect, adapter: Adapter, path: Path, dialect: str, allow_loss: bool, force: bool
) -> tuple[Adapter, list[Loss]]:
    """Write an adapter by a dialect's module; return it as it was written, and what was lost.

    Raises `LossyConversion` and `OutputRefused` as `save_adapter` says.
    """
    losses = writer.losses(adapter)
    if losses and not allow_loss:
        raise LossyConversion(
            f"{path}: the dialect {dialect} cannot say {counted(len(losses), 'thing')} of this adapter",
            [str(loss) for loss in losses],
            hint=_way_out(adapter, losses, dialect),
        )
    if path.suffix in WEIGHTS and path.suffix not in writer.FILES:
        written = " or ".join((*writer.FILES, "a folder"))
        raise OutputRefused(f"{path}: the dialect {dialect} does not write {path.suffix} files; it writes {written}")
    output, files = path.resolve(), {lazy.file for lazy in adapter.tensors().values() if lazy.file}
    if any(file == output or output in file.parents for file in map(Path.resolve, files)):
        raise OutputRefused(f"{path} is also an input", hint="Choose another output.")
    return writer.write(adapter, path, force=force), losses


def _way_out(adapter: Adapter, losses: Sequence[Loss], dialect: str) -> str:
    """Return the hint for losses: where they are of a kind that the dialect lacks, such as LoHa, a LoRA can be made."""
    reasons = {loss.what for loss in losses}  # by which alone they are known: losses have the dialect's names
    lacking = [update for update in adapter.updates.values() if no_kind(dialect, update.kind) in reasons]
    if not lacking:
        return "Write it without them with --allow-loss, or choose a dialect that keeps them."
    base = " --base BASE" if any(update.unsettled or not update.additive for update in lacking) else ""
    return f"Make a LoRA of it with --to-lora --rank R{base}, or choose a dialect that keeps them."
