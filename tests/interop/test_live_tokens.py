"""Rows of an embedding trained for single tokens in a running model, judged by PEFT's `trainable_token_indices`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loratools
from loratools import live
from loratools.errors import IncompatibleAdapter, InvalidOption
from loratools.live.restore import restore

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

SIDES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 61}
MODELS: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", SIDES, "q_proj"),
    "llama, tied": ("LlamaForCausalLM", SIDES | {"tie_word_embeddings": True}, "q_proj"),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61}, "c_attn"),
    "gemma3": ("Gemma3ForCausalLM", SIDES | {"num_key_value_heads": 2, "head_dim": 8}, "q_proj"),
    "bert": ("BertForMaskedLM", SIDES, "query"),
    "t5": ("T5ForConditionalGeneration", T5, "q"),
}
ROWS = [1, 7, 5]


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    cls, fields, _ = MODELS[name]
    torch.manual_seed(0)
    kind = getattr(transformers, cls)
    return kind(kind.config_class(**fields)).to(dtype).eval().requires_grad_(False)


def logits(model: nn.Module) -> torch.Tensor:
    x = torch.arange(1, 22).reshape(3, 7)
    seq2seq = getattr(model, "config", None) is not None and model.config.is_encoder_decoder  # type: ignore[union-attr]
    out: torch.Tensor = (model(x, decoder_input_ids=x) if seq2seq else model(x)).logits
    return out


def by_peft(name: str) -> Any:
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[MODELS[name][2]], trainable_token_indices=ROWS)
    return peft.get_peft_model(build(name), config, autocast_adapter_dtype=False).double().eval()


def rows_of(model: nn.Module) -> torch.Tensor:
    """Return PEFT's parameter of the rows."""
    return next(p for name, p in model.named_parameters() if "trainable_tokens_delta" in name)


def move(parameters: Any, seed: int = 9) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("name", MODELS)
def test_training_rows_is_that_of_peft(name: str, tmp_path: Path) -> None:
    other, model = by_peft(name), build(name)
    base = logits(model)
    lora = live.attach(model, targets=[MODELS[name][2]], rank=2, alpha=3, tokens=ROWS, dtype=torch.float64)
    assert (logits(model) - base).abs().max() < 1e-13
    rows = next(parameter for parameter in lora.parameters() if parameter.shape == (3, 32))
    assert torch.equal(rows, rows_of(other))
    pieces = {piece.path: piece for _, piece, _, _ in lora.children() if isinstance(piece, live.site.Piece)}
    with torch.no_grad():
        for path, piece in pieces.items():
            module: Any = other.get_submodule(f"base_model.model.{path}")
            piece.A.copy_(module.lora_A["default"].weight)
    theirs = [parameter for parameter in other.parameters() if parameter.requires_grad]
    assert sum(p.numel() for p in theirs) == sum(p.numel() for p in lora.parameters())
    optimizers = torch.optim.SGD(lora.parameters(), 0.01), torch.optim.SGD(theirs, 0.01)
    for _ in range(3):
        for each, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            logits(each).square().mean().backward()
        expected = rows_of(other).grad
        assert expected is not None
        assert rows.grad is not None
        assert expected.abs().max() > 0
        assert (rows.grad - expected).abs().max() <= 1e-10 * expected.abs().max()
        for optimizer in optimizers:
            optimizer.step()
    y = logits(model)
    assert (y - logits(other)).abs().max() < 1e-12
    assert (y - base).abs().max() > 1e-6
    lora.save(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours", autocast_adapter_dtype=False).eval()
    assert (logits(back) - y).abs().max() < 1e-12
    other.save_pretrained(tmp_path / "peft")
    again = build(name)
    live.load(again, tmp_path / "peft", trainable=True)
    assert (logits(again) - y).abs().max() < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_every_way_of_using_rows_gives_the_same(name: str, tmp_path: Path) -> None:
    model = build(name)
    base = logits(model)
    lora = live.attach(model, targets=[MODELS[name][2]], rank=2, tokens={MODELS_EMBEDDING[name]: ROWS}, seed=1)
    move(lora.parameters())
    y = logits(model)
    assert (y - base).abs().max() > 1e-3
    with torch.no_grad():
        for _ in range(2):  # the second time the changed weight is there already
            assert (logits(model) - y).abs().max() < 1e-12
        with lora.merged():
            assert (logits(model) - y).abs().max() < 1e-5
        with lora.route(["default", None, "default"]):
            assert (logits(model) - torch.cat([y[:1], base[1:2], y[2:]])).abs().max() < 1e-12
        with lora.off():
            assert (logits(model) - base).abs().max() < 1e-13
    lora.save(tmp_path / "a")
    before = [parameter.detach().clone() for parameter in lora.parameters()]
    move(lora.parameters(), 3)
    with torch.no_grad():
        assert (logits(model) - y).abs().max() > 1e-3  # rows that were trained since are seen
    restore(lora, "default", tmp_path / "a")
    assert all(torch.equal(own, old) for own, old in zip(lora.parameters(), before, strict=True))
    with pytest.raises(InvalidOption, match=r"trained whole in default, which cannot have the weight 0\.5"):
        lora.use({"default": 0.5})
    lora.add("second", tmp_path / "a")
    with pytest.raises(InvalidOption, match="row 1 is that of default and of second"):
        lora.use({"default": 1, "second": 1})
    with pytest.raises(InvalidOption, match="cannot be stacked"):
        lora.compiled()
    lora.detach()
    assert (logits(model) - base).abs().max() < 1e-13
    assert all(not hasattr(module, "lora") for module in model.modules())


MODELS_EMBEDDING = {
    "llama": "embed_tokens", "llama, tied": "model.embed_tokens", "gpt2": "wte", "gemma3": "embed_tokens",
    "bert": "word_embeddings", "t5": "shared",
}  # fmt: skip


def test_files_of_rows_are_merged_as_the_running_model_computes(tmp_path: Path) -> None:
    model = build("llama, tied", torch.float32)
    model.save_pretrained(tmp_path / "base")
    lora = live.attach(model, targets=["q_proj"], rank=2, tokens=ROWS)
    move(lora.parameters())
    lora.save(tmp_path / "a")
    assert loratools.validate(tmp_path / "a", base=tmp_path / "base").valid
    loratools.merge(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - logits(model)).abs().max() < 1e-5


def test_rows_beside_factors_on_the_tied_head_are_not_merged_into_files_otherwise_than_peft(tmp_path: Path) -> None:
    build("llama, tied", torch.float32).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], trainable_token_indices=ROWS)
    peft.get_peft_model(build("llama, tied", torch.float32), config).save_pretrained(tmp_path / "a")
    with pytest.raises(IncompatibleAdapter, match="which PEFT gives the tied head as well"):
        loratools.merge(tmp_path / "base", tmp_path / "a", tmp_path / "merged", tied="untie")
    assert not (tmp_path / "merged").exists()


def test_rows_alone_and_rows_in_a_narrow_base(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = build("llama", torch.bfloat16)
    W = model.model.embed_tokens.weight
    lora = live.attach(model, targets=[], tokens=[3, 60])
    (rows,) = lora.parameters()
    assert rows.dtype == torch.float32
    assert torch.equal(rows, W[[3, 60]].float())
    logits(model).float().square().mean().backward()
    assert rows.grad is not None
    assert rows.grad[0].abs().max() > 0
    lora.save(tmp_path / "a")
    assert "PEFT loads no LoRA without factors" in caplog.text
    assert loratools.open_adapter(tmp_path / "a").updates["model.embed_tokens"].replaced_rows == (3, 60)


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"tokens": [61]}, IncompatibleAdapter, "token 61 is beyond its 61 rows"),
        ({"tokens": [1, 1]}, InvalidOption, "has an index twice"),
        ({"tokens": [-1]}, InvalidOption, "each 0 or more"),
        ({"tokens": []}, InvalidOption, "a list of token indices"),
        ({"tokens": "<s>"}, InvalidOption, "a list of token indices"),
        ({"tokens": {"wte": [1]}}, InvalidOption, "no module with a weight"),
        ({"tokens": [1], "targets": ["embed_tokens"]}, InvalidOption, "cannot have factors besides"),
    ],
)
def test_rows_that_cannot_be_leave_the_model_untouched(options: dict[str, Any], kind: Any, says: str) -> None:
    model = build("llama")
    with pytest.raises(kind, match=says):
        live.attach(model, **({"targets": ["q_proj"]} | options))
    assert live.handle.find_handle(model) is None
    assert type(model.model.embed_tokens) is nn.Embedding


def test_a_model_that_does_not_say_which_embedding_is_meant() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(9, 4), "places": nn.Embedding(9, 4)})
    with pytest.raises(InvalidOption, match="does not say which module"):
        live.attach(model, targets=[], tokens=[1])
    assert live.attach(model, targets=[], tokens={"words": [1, 8]}).parameters()[0].shape == (2, 4)
