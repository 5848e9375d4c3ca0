"""What codes lose of a merge, kept beside the model as a small adapter: model + adapter is the merge again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from loratools import dialects
from loratools.adapter.kinds import Update
from loratools.adapter.kinds.embedding import EmbeddingUpdate
from loratools.adapter.kinds.lora import LoraUpdate
from loratools.adapter.model import Adapter, Step
from loratools.adapter.placement.shared import EMBEDDINGS, last_segment
from loratools.decisions import warned
from loratools.engine.plan import MergePlan
from loratools.engine.task import Loss, TensorResult
from loratools.errors import counted
from loratools.format.record import TOOL
from loratools.storage.lazy import LazyTensor

FOLDER = "loss"


def write(plan: MergePlan, results: Sequence[TensorResult], scratch: Path, rank: int) -> float | None:
    """Write the adapter into the folder `loss`, and return the share of ‖W' − W''‖² that it gives back.

    ΔW = B·A of each weight that became codes again, as PEFT has it: of an embedding (V, d), and of a weight that the
    base stores (in, out), the factors change places. None where nothing was lost. Stacks of experts are left out, which
    is said.
    """
    losses: Mapping[str, tuple[float, Loss]] = {each.name: (each.lost, each.loss) for each in results if each.loss}
    if stacks := sorted(
        name for name, change in plan.changes.items() if change.recoded and len(change.source.shape) > 2
    ):
        warned("what is lost of %s of experts, such as %s, is not kept", counted(len(stacks), "stack"), stacks[0])
    if not losses:
        return None
    turned = _turned(plan)
    updates: dict[str, Update] = {}
    for name, (_, loss) in sorted(losses.items()):
        module = name.removesuffix(".weight")
        is_embedding = last_segment(module) in EMBEDDINGS
        updates[module] = _update(loss, EmbeddingUpdate if is_embedding else LoraUpdate, is_embedding or name in turned)
    step = Step("merge", TOOL, {"keep_loss": rank}, tuple({"digest": each.digest} for each in plan.inputs))
    adapter = Adapter(
        updates, provenance=(step,), dialect="loratools", settings={"fan_in_fan_out": True} if turned else {},
        orientation={module: f"{module}.weight" in turned for module in updates},
    )  # fmt: skip
    dialects.save_adapter(adapter, scratch / FOLDER)
    lost = sum(each for each, _ in losses.values())
    return 1 - sum(loss.left2 for _, loss in losses.values()) / lost


def _turned(plan: MergePlan) -> set[str]:
    """Return the weights that the base stores (in, out)."""
    return {name for name, each in plan.changes.items() if any(place.site.transposed for _, place in each.placements)}


def _update(loss: Loss, kind: type[EmbeddingUpdate | LoraUpdate], swapped: bool) -> Update:
    import torch

    factors = (loss.B.T, loss.A.T) if swapped else (loss.A, loss.B)
    A, B = (LazyTensor.of(torch.from_numpy(factor.copy())) for factor in factors)
    return kind(A, B, 1.0, float(loss.A.shape[0]))
