"""Every model type of transformers: a merge on disk is PEFT's in memory, or is in the list of the rest with its reason.

`every.json` is what a whole run found (`python -m tests.interop.every`); a sample of it is run again here.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.interop import every

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

TABLE: dict[str, list[str]] = json.loads(every.TABLE.read_text(encoding="utf-8"))
BUILT = [name for name, (_, *outcomes) in TABLE.items() if not outcomes[0].startswith(("unbuilt", "peft"))]


def kinds(where: str) -> Counter[str]:
    return Counter(row[1 + every.WHERE.index(where)].partition(":")[0] for row in TABLE.values())


def test_no_model_type_is_merged_wrong_and_the_rest_has_its_reason() -> None:
    outcomes = [text for _, *texts in TABLE.values() for text in texts]
    assert {text.partition(":")[0] for text in outcomes} <= {"right", "none", "refused", "peft", "unbuilt"}
    assert all(len(text.partition(": ")[2]) > 10 for text in outcomes if text not in ("right", "none"))
    for where in ("attention", "linear"):
        assert kinds(where)["right"] > 500
        assert kinds(where)["refused"] < 10


@pytest.mark.slow
def test_every_model_type_of_the_installed_version_is_in_the_table() -> None:
    pytest.importorskip("transformers")
    from tests.make.small import model_class, names

    known = names()
    assert TABLE.keys() <= known.keys()
    assert [name for name in known.keys() - TABLE.keys() if model_class(known[name])] == []


@pytest.mark.slow
@pytest.mark.sweep(12)
@pytest.mark.parametrize("model_type", BUILT)
def test_a_merge_is_that_of_peft(model_type: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from tests.make.small import built, model_class

    outcomes = every.outcomes(built(model_class([TABLE[model_type][0]])), tmp_path)
    expected = dict(zip(every.WHERE, TABLE[model_type][1:], strict=True))
    assert {where: text.partition(":")[0] for where, text in outcomes.items()} == {
        where: text.partition(":")[0] for where, text in expected.items()
    }
