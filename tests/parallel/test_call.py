"""A call travels: it pickles, and goes to JSON and back; what is held in memory only does not."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from loratools.errors import BadFile, InvalidOption
from loratools.parallel.call import Call


def test_a_call_pickles_and_goes_to_json_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = {"base": Path("b"), "adapters": ["hf://lab/a", Path("c")], "weights": [0.5, "x=1"], "force": False}
    call = Call.of("merge", arguments, ["base", "adapters", "output"])
    assert call.arguments == {
        "base": str(tmp_path / "b"), "adapters": ["hf://lab/a", str(tmp_path / "c")], "weights": [0.5, "x=1"],
        "force": False,
    }  # fmt: skip
    assert pickle.loads(pickle.dumps(call)) == call  # noqa: S301  (our own)
    assert Call.from_json(json.loads(json.dumps(call.to_json())), "here") == call


def test_what_is_held_in_memory_does_not_travel() -> None:
    with pytest.raises(InvalidOption) as caught:
        Call.of("merge", {"adapters": [{"A": object()}, "there"], "base": object()})
    assert caught.value.problems == ("adapters[0]['A'] is a object", "base is a object")


@pytest.mark.parametrize("document", [None, [], {}, {"verb": "merge"}, {"verb": 1, "arguments": {}, "version": "1"}])
def test_another_document_is_no_call(document: object) -> None:
    with pytest.raises(BadFile, match=r"part\.json: expected a call"):
        Call.from_json(document, "part.json")


def test_a_call_of_another_version_is_refused() -> None:
    Call.of("merge", {}).check_version()
    with pytest.raises(InvalidOption, match=r"the call is of loratools 0\.0\.0"):
        Call("merge", {}, "0.0.0").check_version()
