"""A plan is what a verb then does: it writes nothing, takes what headers tell, and refuses what the verb refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loratools
from loratools.errors import LoraToolsError, OutputRefused
from loratools.surgery.inputs import is_planning, plan

VERBS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "combine": (loratools.combine, (["adapter", "other"], "out"), {"ranks": 2}),
    "resize": (loratools.resize, ("adapter", "out", 2), {}),
    "convert": (loratools.convert, ("adapter", "out"), {"base": "base"}),
    "dequantize": (loratools.dequantize, ("quantized", "out"), {}),
    "unmerge": (loratools.unmerge, ("merged", "adapter", "out"), {}),
    "switch": (loratools.switch, ("merged", "adapter", "other", "out"), {}),
}


@pytest.mark.parametrize("name", VERBS)
def test_a_plan_writes_nothing_and_the_verb_does_it(
    name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    verb, inputs, options = VERBS[name]
    before = sorted(workplace.rglob("*"))
    made = plan(verb, *inputs, **options)
    assert sorted(workplace.rglob("*")) == before
    assert (made.operation, made.output, made.dry_run) == (name, "out", True)
    assert made.free_disk > 0
    assert set(made.reads) >= {each for each in inputs if isinstance(each, str)} - {"out"}
    assert not is_planning()
    verb(*inputs, **options)
    written = sum(path.stat().st_size for path in Path("out").rglob("*.safetensors"))
    assert made.nbytes is None or made.nbytes <= written <= made.nbytes + 30_000
    with pytest.raises(OutputRefused):
        plan(verb, *inputs, **options)


def test_a_plan_says_what_is_decided(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    facts = plan(loratools.convert, "adapter", "out", to="kohya", base="base").facts
    assert (facts["from"], facts["dialect"], facts["modules"], facts["sealed"]) == ("peft", "kohya", 4, False)
    assert plan(loratools.dequantize, "quantized", "out").facts["modules"] == 14
    assert plan(loratools.unmerge, "merged", "adapter", "out", base="base").facts["from"] == "the base"
    assert plan(loratools.combine, ["adapter", "other"], "out", ranks=3).facts["ranks"] == "rank 3"
    assert plan(loratools.switch, "merged", "adapter", "other", "out").facts["exact"] is False


def test_a_verb_without_a_plan_is_told(workplace: Path) -> None:
    with pytest.raises(TypeError, match="inspect makes no plan"):
        plan(loratools.inspect, workplace / "adapter")
    with pytest.raises(LoraToolsError, match="no such file"):
        plan(loratools.unmerge, workplace / "merged", workplace / "nowhere", workplace / "out")
