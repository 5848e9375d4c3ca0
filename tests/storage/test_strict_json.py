"""JSON of strangers: what no reader agrees on is refused, and nothing is read that is too large."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loratools.errors import BadFile
from loratools.storage.strict_json import parse_json_object, read_json


def test_configs_may_hold_what_headers_may_not(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(BadFile, match="NaN is not a JSON number"):
        parse_json_object(b'{"a":NaN}', path)
    assert str(parse_json_object(b'{"a":NaN,"b":-Infinity}', path, constants=True)) == "{'a': nan, 'b': -inf}"
    with pytest.raises(BadFile, match="occurs twice"):
        parse_json_object(b'{"a":{"b":1,"b":1}}', path, constants=True)


def test_json_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": "x" * 1000}))
    assert read_json(path)["a"] == "x" * 1000
    monkeypatch.setattr("loratools.storage.strict_json.MAX_JSON", 1000)
    with pytest.raises(BadFile, match="larger than 1000 bytes"):
        read_json(path)


def test_negative_integers_are_integers_but_for_zero(tmp_path: Path) -> None:
    assert repr(parse_json_object(b'{"a":-2,"b":[-0,3]}', tmp_path)) == "{'a': -2, 'b': [-0.0, 3]}"
