"""Rows of transformers' models: what `generate` repeats, positions that all rows share, embeddings that grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loratools import live
from loratools.errors import IncompatibleAdapter
from tests.interop.test_live_training import llama, rows
from tests.live import trained

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ["a", "b", None]


def t5() -> Any:
    torch.manual_seed(0)
    sides = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=61, decoder_start_token_id=0, **sides)
    )


def with_adapters(model: Any, targets: list[str]) -> live.Lora:
    for name in "ab":
        lora = live.attach(model.eval(), targets=targets, rank=2, name=name)
    return trained(lora)


@pytest.mark.parametrize(("make", "targets"), [(llama, ["q_proj", "down_proj"]), (t5, ["q", "v", "wo"])])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}],
)
def test_rows_that_generate_repeats_keep_their_adapter(make: Any, targets: list[str], options: dict[str, Any]) -> None:
    lora = with_adapters(make(), targets)
    model: Any = lora.model
    x = torch.stack([row["input_ids"] for row in rows(3)])
    more = {**options, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0, "output_logits": True}
    more |= {"return_dict_in_generate": True}
    with lora.route(NAMES):
        torch.manual_seed(0)
        together = model.generate(input_ids=x, **more)
        assert model(**inputs(x, make)).logits.shape[0] == 3  # and not repeated again after it
    copies = options.get("num_return_sequences", 1)
    for i, name in enumerate(NAMES):
        lora.use(name)
        if "do_sample" not in options:
            alone = model.generate(input_ids=x[i : i + 1], **more)
            assert torch.equal(together.sequences[i * copies : (i + 1) * copies], alone.sequences)
            continue
        logits = model(**inputs(x[i : i + 1], make)).logits[:, -1 if make is llama else 0]
        for own in together.logits[0][i * copies : (i + 1) * copies]:
            assert (own - logits[0]).abs().max() < 1e-4


def inputs(x: torch.Tensor, make: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": x} | ({"decoder_input_ids": torch.zeros(len(x), 1, dtype=torch.long)} if make is t5 else {})


def test_rows_that_another_repeats_say_how_to_name_them() -> None:
    lora = with_adapters(llama(), ["q_proj"])
    x = torch.stack([row["input_ids"] for row in rows(3)]).repeat_interleave(2, 0)
    with (
        lora.route(NAMES),
        pytest.raises(IncompatibleAdapter, match=r"the batch has 3 rows.*\n.*for _ in range\(2\)\]"),
    ):
        lora.model(input_ids=x)
    with lora.route([name for name in NAMES for _ in range(2)]):
        lora.model(input_ids=x)


def test_positions_that_all_rows_share_have_no_adapter_a_row() -> None:
    lora = with_adapters(t5(), ["q", "relative_attention_bias"])
    x = torch.stack([row["input_ids"][:3] for row in rows(3)])  # as many tokens as rows
    both = {"input_ids": x, "decoder_input_ids": x}
    with lora.route(NAMES), pytest.raises(IncompatibleAdapter, match="relative_attention_bias: its input is distances"):
        lora.model(**both)
    lora.use("b")
    expected = lora.model(**both).logits
    with lora.route(["b"] * 3):
        assert torch.equal(lora.model(**both).logits, expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_embeddings_that_grow_below_an_adapter_are_an_error(targets: list[str], tied: bool) -> None:
    model = llama()
    model.config.tie_word_embeddings = tied
    lora = trained(live.attach(model, targets=targets, rank=2))
    model.resize_token_embeddings(70)
    x = torch.stack([row["input_ids"] for row in rows(2)])
    with pytest.raises(IncompatibleAdapter, match=rf"{targets[-1]}: \(61, 32\) at that time, \(70, 32\) now"):
        model(input_ids=x)
    lora.detach()
    live.attach(model, targets=targets, rank=2)
    assert model(input_ids=x + 8).logits.shape[-1] == 70
