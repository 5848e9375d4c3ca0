"""One adapter a row, stacks for compiled models, and merged weights: the same numbers, and the base's bits back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loratools import live
from loratools.errors import IncompatibleAdapter, InvalidOption, LoraToolsError
from tests.live import Net, ids, net, trained

LINEAR = ["up", "down", "head"]


def three(model: Net, targets: list[str], dtype: torch.dtype = torch.float64) -> live.Lora:
    """Attach plain LoRA of two ranks, and DoRA."""
    for name, rank, dora in (("a", 2, False), ("b", 4, False), ("c", 3, True)):
        lora = live.attach(model, rank=rank, alpha=rank + 1, targets=targets, name=name, dora=dora, dtype=dtype)
    return trained(lora)


@pytest.mark.parametrize("targets", [LINEAR, ["embed", "conv", "up"]])
def test_every_row_has_its_adapter_and_its_gradient(targets: list[str]) -> None:
    model, x, names = net(), ids(5), ["a", None, "c", "b", "a"]
    lora = three(model, targets)
    alone = []
    for i, name in enumerate(names):
        lora.use(name)
        alone.append(model(x[i : i + 1]))
    torch.cat(alone).square().sum().backward()
    gradients = [p.grad.clone() for p in lora.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    with lora.route(names):
        y = model(x)
        assert (y - torch.cat(alone)).abs().max() < 1e-12
        y.square().sum().backward()
        for own, expected in zip(lora.parameters(), gradients, strict=True):
            assert own.grad is not None
            assert (own.grad - expected).abs().max() < 1e-11 * (1 + expected.abs().max())
        with torch.no_grad():
            for _ in range(2):  # gathered, and from what was gathered
                assert (model(x) - y).abs().max() < 1e-12


def test_rows_that_do_not_fit_are_refused() -> None:
    model = net()
    lora = three(model, LINEAR)
    with lora.route(["a", "b"]), pytest.raises(IncompatibleAdapter, match="the batch has 2 rows"):
        model(ids(3))
    with pytest.raises(InvalidOption, match="no adapter 'd'"), lora.route(["a", "d"]):
        pass

    for names in (["a"], [None], ["a", "a"], ["a"] * 6):
        with lora.route(names), pytest.raises(IncompatibleAdapter, match=f"the batch has {len(names)} rows"):
            model(ids(3))
        with lora.route(names), pytest.raises(IncompatibleAdapter, match=rf"up: .*the batch has {len(names)} rows"):
            model.blocks[0]["up"](torch.randn(3, 8, dtype=torch.float64))
    for nothing in ([], "aaa", ()):
        with pytest.raises(InvalidOption, match="one adapter, or None, for each row"), lora.route(nothing):
            pass

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.experts[0](x[:, 0])

    flat = Flat()
    lora = live.attach(flat, targets=["0"], name="a")
    with lora.route(["a", None]), pytest.raises(IncompatibleAdapter, match="chosen by a router"):
        flat(torch.randn(2, 3, 4))
    x = torch.randn(2, 3, 4)
    lora.use("a")
    expected = flat(x)
    with lora.route(["a", "a"]):  # whatever the router does, all are a's
        assert torch.equal(flat(x), expected)


def test_tokens_before_rows_are_refused_also_where_there_are_as_many() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False).eval()
    live.attach(model, targets=["linear1"], name="a", rank=2)
    lora = live.attach(model, targets=["linear1"], name="b", rank=2)
    with lora.route(["a", "b", None]), pytest.raises(IncompatibleAdapter, match="tokens first and its rows second"):
        model(torch.randn(3, 3, 8))


def test_stacked_adapters_switch_by_a_number() -> None:
    model, x = net(), ids()
    lora = three(model, LINEAR)
    expected = {}
    with torch.no_grad():
        for name in ("a", "b", "c", None):
            lora.use(name)
            expected[name] = model(x)
        lora.use({"a": 0.5, "b": 2.0})
        mixed = model(x)
        lora.use("b")
        lora.compiled(max_rank=6, max_adapters=4)
        assert (model(x) - expected["b"]).abs().max() < 1e-12
        for name, y in expected.items():
            lora.use(name)
            assert (model(x) - y).abs().max() < 1e-12
        lora.use({"a": 0.5, "b": 2.0})
        assert (model(x) - mixed).abs().max() < 1e-12
        with lora.off():
            assert torch.equal(model(x), expected[None])
        assert (model(x) - mixed).abs().max() < 1e-12
        with pytest.raises(InvalidOption, match="no sum"):
            lora.use({"a": 1, "c": 1})
        lora.compiled(None)
        assert (model(x) - mixed).abs().max() < 1e-12
    with pytest.raises(InvalidOption, match=r"rank 4 .*, and max_rank is 3") as error:
        lora.compiled(max_rank=3, max_adapters=2)
    assert "3 adapters, and max_adapters is 2" in str(error.value)
    assert not any(name.startswith("stacked") for name in lora.sites["head"].lora._buffers)


def test_stacks_of_a_model_that_moved_say_so() -> None:
    model = net(torch.float32)
    lora = live.attach(model, rank=2, targets=["up"])
    lora.compiled(4, 2)
    model.to("meta")
    with pytest.raises(LoraToolsError, match="stacked for cpu, and the model runs on meta"), torch.no_grad():
        model(ids().to("meta"))
    lora.compiled(None)
    lora.compiled(4, 2)
    with torch.no_grad():
        assert model(ids().to("meta")).is_meta


def test_an_adapter_added_to_stacks_takes_a_slot() -> None:
    model, x = net(), ids()
    lora = three(model, LINEAR)
    lora.use("a")
    adapter = lora.adapter("b")
    lora.remove("b")
    lora.compiled(max_rank=4, max_adapters=3)
    lora.add("d", adapter)
    with torch.no_grad():
        lora.use("d")
        y = model(x)
        other = net()
        live.load(other, adapter)
        assert (other(x) - y).abs().max() < 1e-12
        with pytest.raises(InvalidOption, match="max_adapters is 3"):
            lora.add("e", adapter)
        assert lora.names == ("a", "c", "d")
        lora.remove("a")
        lora.add("e", adapter)
        lora.use("e")
        assert (model(x) - y).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("dtype", "rounds"),
    [
        (torch.float32, 6),
        (torch.bfloat16, 6),
        (torch.float16, 6),
        (torch.float64, 6),
        (torch.bfloat16, 60),
    ],
)
def test_merges_one_after_the_other_change_no_bit(dtype: torch.dtype, rounds: int) -> None:
    """Bits are compared after every round: where all are back, the next round starts where the first one did."""
    model, x = net(dtype), ids()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora = three(model, [*LINEAR, "embed", "conv"], torch.float32)
    with torch.no_grad():
        for turn in range(rounds):
            name = "abc"[turn % 3]
            lora.use(name)
            y = model(x) if turn < 3 else None
            with lora.merged():
                if y is not None:
                    assert (model(x) - y).abs().max() < {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype, 0.05)
                    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
                    assert len(changed) == 7
            for key, tensor in model.state_dict().items():
                assert torch.equal(tensor.view(torch.uint8), before[key].view(torch.uint8)), (turn, key)


@pytest.mark.parametrize("which", [{"a": 0.5, "b": 2.0}, {"b": -0.3}, {"a": 0.5, "c": 0.25}, "c"])
def test_what_is_merged_computes_as_what_is_in_use(which: str | dict[str, float]) -> None:
    model, x = net(), ids()
    lora = three(model, [*LINEAR, "embed", "conv"])
    lora.use(which)
    y = model(x)
    with lora.merged():
        assert (model(x) - y).abs().max() < 1e-12
    with lora.off():
        base = model(x)
    with lora.merged(which):
        assert (model(x) - y).abs().max() < 1e-12 < (model(x) - base).abs().max()


def test_while_merged_nothing_else_is_done() -> None:
    model, x = net(torch.float32), ids()
    lora = three(model, LINEAR, torch.float32)
    lora.merge("a")
    model.train()
    for forbidden in (
        lambda: lora.use("b"),
        lambda: lora.add("d", lora.adapter("a")),
        lora.parameters,
        lambda: lora.merge("b"),
        lambda: live.attach(model, name="e"),
        lambda: model(x),
    ):
        with pytest.raises(LoraToolsError, match="unmerge it before"):
            forbidden()
    lora.unmerge()
    with pytest.raises(LoraToolsError, match="nothing is merged"):
        lora.unmerge()


def test_a_tied_weight_is_merged_in_its_own_module_alone() -> None:
    model, x = net(torch.float32), ids()
    model.head = nn.Linear(8, 11, bias=False)
    model.head.weight = model.embed.weight
    lora = trained(live.attach(model, targets=["embed"], rank=2))
    y, tied = model(x), model.head.weight
    with lora.merged():
        assert model.head.weight is tied
        assert model.embed.weight is not tied
        assert (model(x) - y).abs().max() < 1e-5
    assert model.embed.weight is tied


def pair(targets: list[str] | None = None) -> tuple[Net, live.Lora]:
    """Return a model with the trained adapters a and b, of which a acts, in evaluation."""
    model = net().eval()
    for name in "ab":
        lora = live.attach(model, rank=2, targets=targets or LINEAR, name=name, dtype=torch.float64)
    trained(lora).use("a")
    return model, lora


@pytest.mark.parametrize("block", ["off", "route"])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_merge_in_a_block_acts_once_after_it(block: str, stacked: bool) -> None:
    model, lora = pair()
    x = ids(2)
    with torch.no_grad():
        expected = model(x)
        if stacked:
            lora.compiled(max_rank=4)
        with lora.off() if block == "off" else lora.route(["a", "b"]):
            lora.merge("a")
        assert (model(x) - expected).abs().max() < 1e-12
        lora.unmerge()
        assert (model(x) - expected).abs().max() < 1e-12
        lora.merge()  # what acts, stacked or not
        assert (model(x) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("stacked", [False, True])
def test_an_adapter_removed_in_a_block_does_not_come_back(stacked: bool) -> None:
    model, lora = pair()
    x = ids(2)
    with torch.no_grad():
        if stacked:
            lora.compiled(max_rank=4)
        lora.use({"a": 1.0, "b": 1.0})
        with lora.off():
            expected_off = model(x)
            lora.remove("a")
        mixed = model(x)
        lora.use("b")
        assert torch.equal(model(x), mixed)
        lora.remove("b")
        assert torch.equal(model(x), expected_off)


def test_a_stacked_adapter_that_is_removed_leaves_its_mix() -> None:
    model, lora = pair()
    x = ids(2)
    with torch.no_grad():
        lora.use("b")
        expected = model(x)
        lora.compiled(max_rank=4)
        lora.use({"a": 1.0, "b": 1.0})
        lora.remove("a")
        assert (model(x) - expected).abs().max() < 1e-12


def test_an_adapter_of_a_row_is_not_removed_while_it_serves() -> None:
    model, lora = pair()
    with lora.route(["a", "b"]):
        with pytest.raises(InvalidOption, match="remove it after the block"):
            lora.remove("b")
        model(ids(2))
    lora.remove("b")
    assert lora.names == ("a",)


def test_rows_follow_a_training_step_without_gradients_between() -> None:
    model, lora = pair()
    x = ids(2)
    with lora.route(["a", "b"]):
        with torch.no_grad():
            before = model(x)
            for own in lora.parameters():
                own.add_(0.1)
            after = model(x)
        assert (before - after).abs().max() > 1e-3
        assert (model(x) - after).abs().max() < 1e-12


def test_what_ran_in_inference_mode_runs_with_gradients_after() -> None:
    model, lora = pair()
    values = {name: lora.adapter(name) for name in "ab"}
    lora.detach()
    with torch.inference_mode():
        for name, value in values.items():
            lora.add(name, value)
    with lora.route(["a", "b"]):
        with torch.inference_mode():
            plain = model(ids(2))
        y = model(ids(2))
        y.sum().backward()
    assert (y - plain).abs().max() < 1e-12


def test_what_is_attached_in_inference_mode_is_trained() -> None:
    model = net()
    with torch.inference_mode():
        lora = live.attach(model, rank=2, targets=LINEAR)
    model(ids(2)).sum().backward()
    assert any(own.grad is not None for own in lora.parameters())


def test_something_else_than_names_is_refused() -> None:
    _, lora = pair()
    with pytest.raises(InvalidOption, match="no mapping of names to weights"):
        lora.use(["a", "b"])  # type: ignore[arg-type]
