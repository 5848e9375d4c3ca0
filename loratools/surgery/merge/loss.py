"""What codes lose of a merge, kept beside the model as a small adapter: model + adapter is the merge again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from loratools import dialects
from loratools.adapter.kinds.lora import LoraUpdate
from loratools.adapter.model import Adapter, Step
from loratools.decisions import warned
from loratools.engine.plan import MergePlan
from loratools.engine.task import Loss, TensorResult
from loratools.format.record import TOOL
from loratools.storage.lazy import LazyTensor

FOLDER = "loss"


def write(plan: MergePlan, results: Sequence[TensorResult], scratch: Path, rank: int) -> float | None:
    """Write the adapter into the folder `loss`, and return the share of ‖W' − W''‖² that it gives back.

    ΔW = B·A of each weight that became codes again; None where nothing was lost. Stacks of experts are left out, which
    is said.
    """
    losses: Mapping[str, tuple[float, Loss]] = {each.name: (each.lost, each.loss) for each in results if each.loss}
    if stacks := sorted(
        name for name, change in plan.changes.items() if change.recoded and len(change.source.shape) > 2
    ):
        warned("what is lost of %d stack(s) of experts, such as %s, is not kept", len(stacks), stacks[0])
    if not losses:
        return None
    updates = {name.removesuffix(".weight"): _update(loss) for name, (_, loss) in sorted(losses.items())}
    step = Step("merge", TOOL, {"keep_loss": rank}, tuple({"digest": each.digest} for each in plan.inputs))
    dialects.save_adapter(Adapter(updates, provenance=(step,), dialect="loratools"), scratch / FOLDER)
    lost = sum(each for each, _ in losses.values())
    return 1 - sum(loss.left2 for _, loss in losses.values()) / lost


def _update(loss: Loss) -> LoraUpdate:
    import torch

    A, B = (LazyTensor.of(torch.from_numpy(factor)) for factor in (loss.A, loss.B))
    return LoraUpdate(A, B, 1.0, float(loss.A.shape[0]))
