"""The stop of the tour at training: another adapter, trained in the running model, takes the first one's place."""

from __future__ import annotations

from pathlib import Path

from loratools.decisions import warnings_to
from loratools.demo import data_folder
from loratools.demo.recorded import recorded
from loratools.demo.stop import Stop
from loratools.parallel import one_torch_thread
from loratools.surgery.hash import hash_checkpoint
from loratools.surgery.merge import merge
from loratools.surgery.switch import switch

STEPS = 24


@one_torch_thread()
def trained(folder: Path) -> Stop:
    """Train an adapter in the running model, save it, and switch the merged model over to it."""
    import torch
    from torch.nn import functional as F

    from loratools import live
    from loratools.demo.llama import CONTEXT, Adam, Llama

    draw = torch.Generator().manual_seed(0)
    text = torch.frombuffer(bytearray((data_folder() / "plays.txt").read_bytes()), dtype=torch.uint8).long()
    seen, held_out = text[:6000], text[6000 : 6001 + 1900]
    model = Llama.open(folder / "base")

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    lora = live.attach(model, rank=4, alpha=8, targets=["q_proj", "v_proj", "up_proj", "down_proj"], seed=0)
    optimizer = Adam(lora.groups(lr=4e-3, ratio=4))
    windows = held_out[: len(held_out) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    with torch.no_grad():
        before = loss(windows).item()
    for _ in range(STEPS):
        starts = torch.randint(len(seen) - CONTEXT, (2,), generator=draw)
        batch = torch.stack([seen[start : start + CONTEXT] for start in starts])
        torch.autograd.backward([loss(batch)])
        optimizer.step()
    with torch.no_grad():
        after = loss(windows).item()
    if not after < before - 0.02:
        raise RuntimeError("training did not help")
    notes: list[str] = []
    with warnings_to(notes.append):
        lora.save(folder / "trained", base_id="demo")
    with recorded("switch", model=folder / "kept", take=[folder / "adapter"], put=[folder / "trained"]):
        switched = switch(folder / "kept", folder / "adapter", folder / "trained", folder / "switched")
    with recorded("merge", base=folder / "base", adapters=[folder / "trained"]):
        merge(folder / "base", [folder / "trained"], folder / "directly")
    same = hash_checkpoint(folder / "switched", "root").root == hash_checkpoint(folder / "directly", "root").root
    if not same:
        raise RuntimeError("a switch is not the merge that it stands for")
    return Stop(
        "Train another one on this machine, in the running model, and switch the merged model over to it.",
        'live.attach(model, rank=4, alpha=8, targets=["q_proj", "v_proj", "up_proj", "down_proj"], seed=0)',
        (
            repr(lora),
            f"{STEPS} steps on three scenes of Macbeth take the loss on the next ones from {before:.3f} to {after:.3f}",
            f"saved, {notes[0]}" if notes else "saved",
            "switched in, the merged model is bit for bit the merge of the new adapter",
        ),
        {"trained_loss": {"before": before, "after": after}, "switch_exact": switched.exact},
    )
