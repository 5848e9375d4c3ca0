"""An extraction into one file: of an image model as programs for image models load it, of any other in our format.

What was saved whole becomes a difference there, W' − W in float32, which kohya's and ComfyUI's files have a name for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loratools import dialects
from loratools.adapter.kinds import Update
from loratools.adapter.kinds.full import FullUpdate
from loratools.adapter.model import HEADER, Adapter, BaseIdentity
from loratools.adapter.naming.image import one_file, rename
from loratools.adapter.naming.image.components import COMPONENTS
from loratools.adapter.naming.image.groups import ORIGINAL, groups
from loratools.decisions import warned
from loratools.dialects._frame.metadata import ALPHAS, RANKS
from loratools.errors import counted
from loratools.format.digest import checked_digest
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.lazy import LazyTensor
from loratools.surgery.extract.assemble import Outcome

if TYPE_CHECKING:
    import torch

_ARCHITECTURE = "modelspec.architecture"


def write(
    adapter: Adapter, outcomes: Iterable[Outcome], base: Checkpoint, tuned: Checkpoint, target: Path
) -> tuple[str, tuple[str, ...]]:
    """Write an extracted adapter into one file; return its digest, and what is to be said of its layout.

    `outcomes` are those that the adapter was made of. An image model's goes to kohya's layout, or to ComfyUI's where
    only that has names for all of it; where neither has, and for any other model, to ours, which is said.
    """
    lost: list[str] = []
    outcomes = tuple(outcomes)
    if (image := _of_image(adapter, outcomes, base, tuned)) is not None:
        image = replace(image, settings={**image.settings, HEADER: _header(base, target)})
        for dialect in ("comfy", "kohya") if _has_odd_names(image, outcomes) else ("kohya", "comfy"):
            if losses := [*_strangers(image), *map(str, dialects.get(dialect).losses(image))]:
                lost = lost or losses
                continue
            dialects.save_adapter(image, target, dialect=dialect)
            note = f"written in the layout of {dialect}, which ComfyUI loads"
            return _digest(target), (note, "this layout holds no base hash, so the file is not sealed with it")
        warned(
            "%s: written in the loratools format, which programs for image models do not load: their layouts have no "
            "place for %s, such as %s; --exclude and --drop-whole leave them out", target.name,
            counted(len(lost), "thing"), lost[0],
        )  # fmt: skip
    dialects.save_adapter(adapter, target)
    return _digest(target), ()


def _digest(path: Path) -> str:
    return checked_digest(dialects.open_adapter(path), path.name)


def _of_image(adapter: Adapter, outcomes: Iterable[Outcome], base: Checkpoint, tuned: Checkpoint) -> Adapter | None:
    """Return the adapter under the names that image models have in adapters; None where it is of another model."""
    base_id = adapter.base and BaseIdentity(adapter.base.id, adapter.base.revision)
    spelled = rename.spelled_out(replace(adapter, provenance=(), base=base_id))  # a foreign file has no more
    if not any(group.fits for group in groups(spelled)):
        return None
    # Files of a transformer alone have nothing before its names.
    bare = {new.removesuffix(old) for old, new in zip(adapter.updates, spelled.updates, strict=True) if old in new}
    root = bare.pop() if len(bare) == 1 else ""
    updates, left = dict(spelled.updates), dict(spelled.replacements)
    for tensor in outcomes:
        if tensor.outcome == "whole" and tensor.pair.base and not tensor.pair.reshaped and tensor.path in left:
            del left[tensor.path]
            updates |= {f"{root}{name}": update for name, update in _differences(tensor, base, tuned)}
    return replace(spelled, updates=updates, replacements=left)


def _has_odd_names(adapter: Adapter, outcomes: Iterable[Outcome]) -> bool:
    """Tell whether ComfyUI finds some differences under its own names alone: in text encoders, and of no weight."""
    names = (tensor.path for tensor in outcomes if tensor.outcome == "whole")
    odd = any(not name.endswith((".weight", ".bias")) for name in names)
    return odd or any(m.startswith("text_encoder") and u.kind == "full" for m, u in adapter.updates.items())


def _strangers(adapter: Adapter) -> list[str]:
    """Return the modules of no part of a pipeline that takes adapters, such as those of a VAE."""
    known = {ORIGINAL, *COMPONENTS}
    return [f"{module}: no program puts an adapter there" for module in adapter.updates if _first(module) not in known]


def _first(module: str) -> str:
    return module.partition(".")[0]


def _differences(tensor: Outcome, base: Checkpoint, tuned: Checkpoint) -> Iterator[tuple[str, Update]]:
    """Yield the update of one tensor that was saved whole, or those of q, k and v where it holds all three."""
    names = one_file.named(tensor.path.removesuffix(".weight"))
    rows = tensor.shape[0] // len(names) if tensor.shape else 0

    def load(at: int) -> torch.Tensor:
        old, new = base.read(str(tensor.pair.base)), tuned.read(tensor.pair.name)
        part = slice(at * rows, (at + 1) * rows) if len(names) > 1 else slice(None)
        return new[part].float() - old[part].float()

    shape = (rows, *tensor.shape[1:]) if len(names) > 1 else tensor.shape
    for at, name in enumerate(names):
        yield name, FullUpdate(LazyTensor("F32", shape, partial(load, at)))


def _header(base: Checkpoint, target: Path) -> dict[str, str]:
    """Return the header's entries: of sd-scripts, and those of ModelSpec that the base's header speaks for."""
    entries = {"ss_network_module": "networks.lora"}
    entries |= dict.fromkeys((RANKS[0], ALPHAS[0]), "0")  # which become those of the factors where they are written
    if stated := base.shards[0].metadata.get(_ARCHITECTURE):
        architecture = f"{stated.partition('/')[0]}/lora"
        entries |= {"modelspec.sai_model_spec": "1.0.0", _ARCHITECTURE: architecture, "modelspec.title": target.stem}
    return entries
