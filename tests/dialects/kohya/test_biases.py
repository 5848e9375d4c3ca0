"""Differences of biases: `diff_b` beside factors, beside other kinds, and alone, through merges and conversions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools import dialects
from loratools.errors import BadFile
from loratools.surgery.merge import merge
from loratools.surgery.verify import verify

N, R = 6, 2
ATTENTION = "blocks.0.self_attn"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def made(folder: Path, alpha: float | None, dora: bool = False) -> dict[str, torch.Tensor]:
    """Write a base and a video model's adapter; return the base's tensors as they must be after the merge."""
    base, file, wanted = {}, {}, {}
    names = {
        "q": ATTENTION + ".q",
        "loha": "blocks.0.ffn.0",
        "alone": "blocks.0.cross_attn.k",
        "norm": "blocks.0.norm3",
    }
    for name in names.values():
        base |= {f"{name}.weight": random(N) if "norm" in name else random(N, N), f"{name}.bias": random(N) + 1}
    wanted = {name: tensor.double() for name, tensor in base.items()}
    down, up, bias = random(R, N), random(N, R), random(N) - 2
    s = 1.0 if alpha is None else alpha / R
    file |= {"q.lora_down.weight": down, "q.lora_up.weight": up, "q.diff_b": bias}
    file |= {} if alpha is None else {"q.alpha": torch.tensor(alpha)}
    changed = wanted[f"{names['q']}.weight"] + s * (up.double() @ down.double())
    if dora:
        file["q.dora_scale"] = random(N, 1).abs() + 1
        changed = changed * file["q.dora_scale"].double() / changed.norm(dim=1, keepdim=True)
    wanted[f"{names['q']}.weight"] = changed
    hada = {
        f"loha.hada_{name}": random(*((N, R) if name.endswith("a") else (R, N)))
        for name in ("w1_a", "w1_b", "w2_a", "w2_b")
    }
    a, b, c, d = (tensor.double() for tensor in hada.values())
    wanted[f"{names['loha']}.weight"] += (a @ b) * (c @ d)
    file |= {**hada, "loha.alpha": torch.tensor(float(R)), "loha.diff_b": bias}
    file |= {"alone.diff_b": bias, "norm.diff": bias, "norm.diff_b": bias}
    wanted[f"{names['norm']}.weight"] += bias
    for name in names.values():
        wanted[f"{name}.bias"] += bias
    tensors = {f"diffusion_model.{names[key.split('.', 1)[0]]}.{key.split('.', 1)[1]}": t for key, t in file.items()}
    folder.mkdir(exist_ok=True)
    save_file(base, folder / "base.safetensors")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "adapter.safetensors")
    return wanted


def check(folder: Path, adapter: Path, wanted: dict[str, torch.Tensor]) -> None:
    out = folder / f"of-{adapter.stem}"
    merge(folder / "base.safetensors", adapter, out)
    merged = load_file(out / "base.safetensors")
    assert merged.keys() == wanted.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=3e-7, atol=3e-7, msg=name)
    assert verify(out, base=folder / "base.safetensors", adapters=adapter).ok


@pytest.mark.parametrize(("alpha", "dora"), [(None, False), (2.0, False), (0.3, False), (0.0, False), (3.0, True)])
@pytest.mark.parametrize("through", ["comfy", "kohya", "loratools"])
def test_biases_are_added_as_they_are(tmp_path: Path, alpha: float | None, dora: bool, through: str) -> None:
    wanted = made(tmp_path, alpha, dora)
    source = tmp_path / "adapter.safetensors"
    if through == "comfy":
        check(tmp_path, source, wanted)
    adapter = dialects.open_adapter(source)
    assert adapter.dialect == "comfy"
    assert not dialects.save_adapter(adapter, tmp_path / "converted", dialect=through)
    again = dialects.open_adapter(tmp_path / "converted")
    assert again.dialect == through
    check(tmp_path, tmp_path / "converted", wanted)
    if through == "comfy":
        file, first = load_file(tmp_path / "converted" / "lora.safetensors"), load_file(source)
        for name in (name for name in first if name.endswith(".diff_b")):
            torch.testing.assert_close(file[name], first[name], rtol=2e-7, atol=0)


def test_peft_has_them_as_biases_of_b(tmp_path: Path) -> None:
    wanted = made(tmp_path, 0.3)
    tensors = {name: t for name, t in load_file(tmp_path / "adapter.safetensors").items() if ATTENTION in name}
    save_file(tensors, tmp_path / "adapter.safetensors")
    adapter = dialects.open_adapter(tmp_path / "adapter.safetensors")
    assert not dialects.save_adapter(adapter, tmp_path / "peft", dialect="peft")
    merge(tmp_path / "base.safetensors", tmp_path / "peft", tmp_path / "out")
    bias = load_file(tmp_path / "out" / "base.safetensors")[f"{ATTENTION}.q.bias"]
    torch.testing.assert_close(bias.double(), wanted[f"{ATTENTION}.q.bias"], rtol=3e-7, atol=3e-7)


def test_a_bias_of_b_beside_a_dora_scale_over_inputs_is_applied(tmp_path: Path) -> None:
    W, b, A, B, c, m = random(N, N), random(N), random(R, N), random(N, R), random(N) - 2, random(1, N).abs() + 1
    save_file({"blocks.0.q.weight": W, "blocks.0.q.bias": b}, tmp_path / "base.safetensors")
    name = "diffusion_model.blocks.0.q"
    parts = {"lora_A.weight": A, "lora_B.weight": B, "lora_B.bias": c, "dora_scale": m, "alpha": torch.tensor(1.0)}
    save_file({f"{name}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "adapter.safetensors")
    assert dialects.open_adapter(tmp_path / "adapter.safetensors").updates[name].kind == "wdora"
    changed = W.double() + 0.5 * (B.double() @ A.double())
    wanted = {"blocks.0.q.weight": changed * m.double() / changed.norm(dim=0, keepdim=True)}
    check(tmp_path, tmp_path / "adapter.safetensors", wanted | {"blocks.0.q.bias": b.double() + 0.5 * c.double()})


def test_two_biases_of_one_module_are_a_contradiction(tmp_path: Path) -> None:
    made(tmp_path, 2.0)
    tensors = load_file(tmp_path / "adapter.safetensors")
    tensors[f"diffusion_model.{ATTENTION}.q.lora_B.bias"] = torch.ones(N)
    save_file(tensors, tmp_path / "adapter.safetensors")
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(tmp_path / "adapter.safetensors")
    assert refusal.value.problems == (
        f"diffusion_model.{ATTENTION}.q: a bias of B (lora_B.bias) and one of its own (diff_b)",
    )
