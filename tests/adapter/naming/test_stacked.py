"""The tables of stacked experts are those of the installed transformers; a class that is new there must be added."""

from __future__ import annotations

import pytest

from loratools.adapter.naming import stacked
from tests.make.stacked_models import tables


@pytest.mark.interop
@pytest.mark.slow
def test_the_tables_hold_what_transformers_has() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    listed = tables()
    assert set(listed["ORDERS"]) <= set(stacked.ORDERS)  # type: ignore[call-overload]
    for table in ("KNOWN", "IS_TRANSPOSED", "STORED_IN_OUT", "INTERLEAVED"):
        assert listed[table] <= getattr(stacked, table), table  # type: ignore[operator]
    for table in ("IS_TRANSPOSED", "STORED_IN_OUT", "INTERLEAVED"):
        known = getattr(stacked, table)
        assert known <= stacked.KNOWN
        assert known & listed["KNOWN"] <= listed[table], table  # type: ignore[operator]


def test_no_two_orders_contradict_each_other() -> None:
    before = {(a, b) for order in stacked.ORDERS for i, a in enumerate(order) for b in order[i + 1 :]}
    assert not before & {(b, a) for a, b in before}


@pytest.mark.parametrize(
    ("parameters", "order"),
    [
        (["down_proj", "gate_up_proj"], ["gate_up_proj", "down_proj"]),
        (["down_proj", "up_proj"], ["up_proj", "down_proj"]),
        (["w2", "v1", "w1"], ["w1", "v1", "w2"]),
        (
            ["down_proj", "down_proj_bias", "gate_up_proj", "gate_up_proj_bias"],
            ["gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"],
        ),
        (["w_in", "w_out"], None),
    ],
)
def test_order(parameters: list[str], order: list[str] | None) -> None:
    assert stacked.in_order(parameters) == order


def test_wrappers_are_named_in_that_order_and_what_peft_may_mix_up_is_said(caplog: pytest.LogCaptureFixture) -> None:
    names = stacked.nested("m", ["down_proj", "up_proj"])
    assert names == {"down_proj": "m", "up_proj": "m.base_layer"}
    assert stacked.nested("m", ["w_in"]) == {"w_in": "m"}
    assert not caplog.records
    assert stacked.nested("m.unheard_of", ["w_out", "w_in"]).keys() == {"w_in", "w_out"}
    assert "no class that is known registers w_in and w_out" in caplog.text


def test_the_type_of_a_model_inside_counts_where_the_outer_one_is_not_known() -> None:
    assert stacked.known_type({"model_type": "llava", "text_config": {"model_type": "gpt_oss"}}) == "gpt_oss"
    assert stacked.known_type({"model_type": "mixtral", "text_config": {"model_type": "gpt_oss"}}) == "mixtral"
    assert stacked.known_type({"model_type": 3}) is None
