"""LoRA on slices of a fused weight, q and v alone: judged by loralib's MergedLinear, by PEFT, and by float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loratools
from loratools import live
from loratools.errors import IncompatibleAdapter, InvalidOption
from loratools.live.restore import restore
from loratools.live.summary import readable

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61, "bos_token_id": 0}
MODELS: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61}, "c_attn"),
    "gpt_neox": ("GPTNeoXForCausalLM", SMALL | {"intermediate_size": 48}, "query_key_value"),
    "bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61}, "query_key_value"),
    "phi3": (
        "Phi3ForCausalLM",
        SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0},
        "qkv_proj",
    ),
    "mpt": ("MptForCausalLM", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 61}, "Wqkv"),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    cls, fields, _ = MODELS[name]
    torch.manual_seed(0)
    kind = getattr(transformers, cls)
    return kind(kind.config_class(**fields)).to(dtype).eval()


def tokens(rows: int = 3) -> Tensor:
    return torch.randint(2, 61, (rows, 7), generator=torch.Generator().manual_seed(4))


def attach(model: nn.Module, **options: Any) -> live.Lora:
    """Attach to q and v, and let every factor move, as training does."""
    settings = {"rank": 4, "alpha": 6, "targets": ["q_proj", "v_proj"], "dtype": torch.float64} | options
    lora = live.attach(model, **settings)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return lora


def doubled(lora: live.Lora) -> list[Tensor]:
    """Return the parameters as they are saved: of twice the rank where a start is taken off."""
    tensors: list[Tensor] = []
    for _, piece, _, _ in lora.children():
        A, B = piece.A, piece.B
        tensors += [A, B] if piece.A0 is None else [torch.cat([A, A]), torch.cat([B, B], 1)]
        tensors += [] if piece.magnitude is None else [piece.magnitude]
    return tensors


def merged_linear(model: Any, loralib: Any, dropout: float = 0.0) -> None:
    """Put loralib's layer in the place of every c_attn, with q and v enabled."""
    for block in model.transformer.h:
        old = block.attn.c_attn
        new = loralib.MergedLinear(
            32, 96, r=4, lora_alpha=6, lora_dropout=dropout, enable_lora=[True, False, True], fan_in_fan_out=True,
            dtype=torch.float64,
        )  # fmt: skip
        new.weight.data.copy_(old.weight.data)
        new.bias.data.copy_(old.bias.data)
        block.attn.c_attn = new
    loralib.mark_only_lora_as_trainable(model)


def test_training_q_and_v_of_gpt2_is_that_of_loralibs_merged_linear() -> None:
    loralib = pytest.importorskip("loralib")
    model, peer, x = build("gpt2"), build("gpt2"), tokens()
    lora = live.attach(model, targets=["q_proj", "v_proj"], rank=4, alpha=6, dtype=torch.float64)
    merged_linear(peer, loralib)
    peers: list[Tensor] = []
    for i, block in enumerate(peer.transformer.h):
        q, v = lora.sites[f"transformer.h.{i}.attn.c_attn"].lora.pieces["default"]
        assert [q.path, v.path] == [f"transformer.h.{i}.attn.{last}" for last in ("q_proj", "v_proj")]
        block.attn.c_attn.lora_A.data.copy_(torch.cat([q.A, v.A]))
        peers += [block.attn.c_attn.lora_A, block.attn.c_attn.lora_B]
    model.train(), peer.train()
    for each in (model, peer):
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    assert sum(p.numel() for p in lora.parameters()) == sum(p.numel() for p in peer.parameters() if p.requires_grad)
    optimizers = torch.optim.SGD(lora.parameters(), 0.5), torch.optim.SGD(peers, 0.5)
    for step in range(4):
        losses = [each(x, labels=x).loss for each in (model, peer)]
        assert abs(losses[0] - losses[1]) < 1e-12
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for i in range(2):
            q, v = lora.sites[f"transformer.h.{i}.attn.c_attn"].lora.pieces["default"]
            for role, theirs in (("A", peers[2 * i]), ("B", peers[2 * i + 1])):
                ours = torch.cat([getattr(q, role).grad, getattr(v, role).grad])
                assert (ours - theirs.grad).abs().max() <= 1e-10 * theirs.grad.abs().max()
                assert step == 0 or theirs.grad.abs().max() > 0
        for optimizer in optimizers:
            optimizer.step()
    model.eval(), peer.eval()  # loralib merges now
    y = model(x).logits
    assert (peer(x).logits - y).abs().max() < 1e-12
    base = build("gpt2")
    with lora.merged():
        for ours, theirs, old in zip(model.transformer.h, peer.transformer.h, base.transformer.h, strict=True):
            W, k = ours.attn.c_attn.weight, slice(32, 64)
            assert (W - theirs.attn.c_attn.weight).abs().max() < 1e-14
            assert torch.equal(W[:, k], old.attn.c_attn.weight[:, k])
            assert (W - old.attn.c_attn.weight).abs().max() > 1e-6
    lora.detach()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}, {"rslora": True, "rank": 3}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_way_of_using_slices_gives_the_same(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, x = build(name), tokens()
    base = model(x).logits
    lora = attach(model, **options)
    y = model(x).logits
    assert (y - base).abs().max() > 1e-3
    with lora.merged():
        assert (model(x).logits - y).abs().max() < 1e-12
    with lora.off():
        assert torch.equal(model(x).logits, base)
    with torch.no_grad(), lora.route(["default", None, "default"]):
        assert (model(x).logits - torch.cat([y[:1], base[1:2], y[2:]])).abs().max() < 1e-12
    if "dora" not in options:
        lora.use({"default": 0.5})
        half = model(x).logits
        with lora.merged({"default": 0.5}):
            assert (model(x).logits - half).abs().max() < 1e-12
        lora.use("default")
    if not options:
        lora.compiled(max_rank=8)
        with torch.no_grad():
            assert (model(x).logits - y).abs().max() < 1e-12
        lora.compiled(None)
        with pytest.raises(InvalidOption, match="rank 8 on"):
            lora.compiled(max_rank=7)

    lora.save(tmp_path / "ours")
    saved = loratools.open_adapter(tmp_path / "ours")
    size = sum(lazy.nbytes for lazy in saved.tensors().values())
    assert f", {readable(size)}B, trainable" in repr(lora)
    assert {module.rpartition(".")[2] for module in saved.updates} == {MODELS[name][2]}
    other = build(name)
    live.load(other, tmp_path / "ours")
    assert (other(x).logits - y).abs().max() < 1e-12
    loratools.save_adapter(lora.adapter(), tmp_path / "split")
    assert {module.rpartition(".")[2] for module in lora.adapter().updates} == {"q_proj", "v_proj"}
    other = build(name)
    live.load(other, tmp_path / "split")
    assert (other(x).logits - y).abs().max() < 1e-12

    before = [parameter.detach().clone() for parameter in lora.parameters()]
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.fill_(7)
    restore(lora, "default", tmp_path / "ours")
    assert all(torch.equal(own, old) for own, old in zip(lora.parameters(), before, strict=True))

    other = build(name)
    again = live.load(other, tmp_path / "ours", trainable=True)
    assert [tuple(p.shape) for p in again.parameters()] == [tuple(p.shape) for p in doubled(lora)]
    assert sorted(again.adapter().updates) == sorted(lora.adapter().updates)
    assert (other(x).logits - y).abs().max() < 1e-12

    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours", autocast_adapter_dtype=False)
    assert (theirs.eval()(x).logits - y).abs().max() < 1e-12
    lora.detach()
    assert torch.equal(model(x).logits, base)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_files_are_merged_as_the_running_model_computes(name: str, tmp_path: Path) -> None:
    model, x = build(name, torch.float32), tokens()
    model.save_pretrained(tmp_path / "base")
    lora = attach(model, dtype=torch.float32)
    y = model(x).logits
    lora.save(tmp_path / "adapter")
    assert loratools.validate(tmp_path / "adapter", base=tmp_path / "base").valid
    loratools.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    assert (merged(x).logits - y).abs().max() < 1e-5


def test_half_of_a_fused_feed_forward_weight() -> None:
    model, x = build("phi3"), tokens()
    base = model(x).logits
    lora = attach(model, targets=["gate_proj"])
    y, site = model(x).logits, lora.sites["model.layers.0.mlp.gate_up_proj"]
    up = site.weight[48:].detach().clone()
    assert (y - base).abs().max() > 1e-4
    with lora.merged():
        assert torch.equal(site.weight[48:], up)
        assert (model(x).logits - y).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        (["h.0.attn.q_proj", "value"], ["0.attn.q_proj", "0.attn.value", "1.attn.value"]),
        (r".*\.[qv]_proj", ["0.attn.q_proj", "0.attn.v_proj", "1.attn.q_proj", "1.attn.v_proj"]),
        (r".*\.0\.(attn\.k_proj|mlp\.c_fc)", ["0.attn.k_proj", "0.mlp.c_fc"]),
        (r".*\.0\.attn\..*", ["0.attn.c_attn", "0.attn.c_proj"]),
        (r".*0\..*_proj", ["0.attn.c_proj", "0.mlp.c_proj"]),
    ],
)
def test_names_of_slices(targets: str | list[str], paths: list[str]) -> None:
    lora = live.attach(build("gpt2"), targets=targets, rank=2)
    assert sorted(lora.adapter().updates) == [f"transformer.h.{path}" for path in paths]


def test_slices_that_cannot_be() -> None:
    model = build("gpt2")
    with pytest.raises(InvalidOption, match=r"q_proj: in transformer\.h\.0\.attn\.c_attn"):
        live.attach(model, targets=["c_attn", "q_proj"])
    with pytest.raises(InvalidOption, match="q_prj; nearest: q_proj"):
        live.attach(model, targets=["q_prj", "v_proj"])
    model.config.model_type = "mine"
    with pytest.raises(IncompatibleAdapter, match="does not tell where these lie"):
        live.attach(model, targets=["q_proj"])
    assert not hasattr(model, "_lora")


def test_cross_attention_has_no_q_in_its_fused_weight() -> None:
    config = transformers.GPT2Config(n_embd=24, n_layer=1, n_head=4, vocab_size=61, add_cross_attention=True)
    lora = live.attach(transformers.GPT2LMHeadModel(config), targets=["q_proj"], rank=2)
    assert list(lora.sites) == ["transformer.h.0.attn.c_attn"]


def test_dropout_is_of_the_input_of_all_slices_together() -> None:
    model = build("gpt2")
    site = attach(model, dropout=0.5).sites["transformer.h.0.attn.c_attn"].train()
    q, v = site.lora.pieces["default"]
    with torch.no_grad():
        v.A.copy_(q.A), v.B.copy_(q.B)
    z = torch.randn(2, 5, 32, dtype=torch.float64)
    added = site(z) - site.plain_forward(z)
    assert (added[..., :32] - added[..., 64:]).abs().max() < 1e-14
    assert not added[..., 32:64].any()
    assert (added - (site.eval()(z) - site.plain_forward(z))).abs().max() > 0.1


def test_beside_prefix_tuning_as_in_the_papers_appendix() -> None:
    peft = pytest.importorskip("peft")
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    torch.manual_seed(0)
    model = peft.get_peft_model(build("gpt2", torch.float32), prefix).eval()
    x = tokens()
    y = model(input_ids=x).logits.detach()
    assert (y - build("gpt2", torch.float32)(x).logits).abs().max() > 1e-4
    lora = attach(model, dtype=torch.float32)
    changed = model(input_ids=x).logits
    changed.square().mean().backward()
    assert all(parameter.grad is not None for parameter in lora.parameters())
    assert (changed - y).abs().max() > 1e-3
    with torch.no_grad(), lora.merged():
        assert (model(input_ids=x).logits - changed).abs().max() < 1e-5
    lora.detach()
    with torch.no_grad():
        assert (model(input_ids=x).logits - y).abs().max() < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_the_estimate_of_slices_is_what_is_trained(name: str, tmp_path: Path) -> None:
    model = build(name, torch.float32)
    model.save_pretrained(tmp_path / "base")
    lora = live.attach(model, targets=["q_proj", "v_proj"], rank=3)
    estimate = loratools.estimate(tmp_path / "base", 3, ["q_proj", "v_proj"])
    assert estimate.parameters == sum(parameter.numel() for parameter in lora.parameters())
    assert estimate.modules == len(lora.adapter().updates)


@pytest.mark.parametrize("name", MODELS)
def test_slices_are_the_projections_that_they_are_called(name: str) -> None:
    # Twice v doubles what the attention gives; twice q and half of k change nothing; half of k alone does.
    model, x = build(name), tokens()
    lora = live.attach(model, targets=["q_proj", "k_proj", "v_proj"], rank=1)
    path, site = next(iter(lora.sites.items()))
    spans = {piece.path.rpartition(".")[2]: piece.spans for piece in site.lora.pieces["default"]}
    attention = model.get_submodule(path.rpartition(".")[0])
    last = next(
        child for child in reversed(list(attention.children())) if hasattr(child, "weight") and child is not site
    )
    kept: list[Tensor] = []
    last.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach()))

    def scaled(**factors: float) -> Tensor:
        for sign in (1, -1):
            for projection, factor in factors.items():
                for _, outputs in spans[f"{projection}_proj"]:
                    site.matrix()[outputs] *= factor**sign
                    if site.bias is not None:
                        site.bias[outputs] *= factor**sign
            if sign == 1:
                model(x)
        return kept.pop()

    with torch.no_grad():
        y = scaled()
        assert (scaled(v=2) - 2 * y).abs().max() < 1e-12
        assert (scaled(q=2, k=0.5) - y).abs().max() < 1e-12
        assert (scaled(k=0.25) - y).abs().max() > 1e-6
        if name in ("gpt2", "bloom"):  # without rotary positions what all keys have in common changes nothing
            for projection, moved in (("k", False), ("q", True)):
                for _, outputs in spans[f"{projection}_proj"]:
                    site.bias[outputs] += 1
                model(x)
                assert bool((kept.pop() - y).abs().max() > 1e-6) is moved  # Bloom's softmax is in float32
