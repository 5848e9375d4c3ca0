"""A trained DoRA in a trained language model, and a LoRA with trained biases in an encoder: our merge and PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.merge import merge
from loratools.surgery.verify import verify
from tests.interop.models import load, merge_by_peft

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

TEXT = "The capital of France is Paris, and the largest planet of the solar system is Jupiter. def main(): return 0"
ADAPTERS = {
    "smol-dora": ("smol-base", "AutoModelForCausalLM", 120, (360, 360, 0, 0)),
    "minilm-lora": ("minilm-base", "AutoModel", 24, (36, 24, 12, 0)),
}


def last(model: Any, tokens: Any) -> torch.Tensor:
    """Return a model's last output, in float32."""
    with torch.no_grad():
        out = model.float().eval()(**tokens)
    result: torch.Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return result


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_weights_and_outputs_are_those_of_peft(name: str, real_models: Any, tmp_path: Path) -> None:
    """Weights: the same but for ties, one unit off. Outputs: as near to the unmerged adapter as those of PEFT."""
    import transformers
    from peft import PeftModel

    base_name, auto, changed, account = ADAPTERS[name]
    base, adapter = real_models / base_name, real_models / name
    report = merge(base, [adapter], tmp_path / "ours")
    assert report.changed == changed
    (adapter_read,) = report.consumed
    assert (adapter_read.tensors, adapter_read.applied, adapter_read.replaced, adapter_read.passed_over) == account
    assert verify(tmp_path / "ours", base, [adapter], exact=True).ok

    model = getattr(transformers, auto)
    stored = next(iter(Checkpoint.open(base).specs.values())).dtype
    dtype = torch.bfloat16 if stored == "BF16" else torch.float32
    theirs = merge_by_peft(model.from_pretrained(base, dtype=dtype), adapter)
    state = theirs.state_dict()
    ours = {tensor: W for tensor, W in load(tmp_path / "ours").items() if tensor in state}  # position_ids are none
    assert len(ours) == len(Checkpoint.open(base).specs) - (base_name == "minilm-base")
    off = sum(int(torch.count_nonzero(state[tensor] != W)) for tensor, W in ours.items())
    assert off <= (0 if dtype == torch.float32 else 400)  # of 163 million; PEFT rounds a float32 sum, we a nearer one
    if dtype == torch.bfloat16:
        units = [
            ((W.view(torch.int16).int() - state[tensor].view(torch.int16).int()).abs() * (W.abs() > 1e-5)).max()
            for tensor, W in ours.items()
        ]
        assert max(units) <= 1  # nearer to zero PEFT's float32 sums have lost digits

    tokens = transformers.AutoTokenizer.from_pretrained(base)(TEXT, return_tensors="pt")
    unmerged = PeftModel.from_pretrained(model.from_pretrained(base, dtype=torch.float32), adapter)
    wanted = last(unmerged, tokens)
    own = last(model.from_pretrained(tmp_path / "ours", dtype=torch.float32), tokens)
    error, their_error = (float((logits - wanted).square().mean().sqrt()) for logits in (own, last(theirs, tokens)))
    assert error <= 1.05 * their_error + 1e-6
    assert error <= 2.0 ** (-7 if dtype == torch.bfloat16 else -20) * float(wanted.square().mean().sqrt())
