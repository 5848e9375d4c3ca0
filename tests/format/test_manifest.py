from __future__ import annotations

import json
import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.format import manifest
from loratools.format.canonical import canonical_object, canonical_parts

# RFC 8785, appendix B, and values where ECMAScript and Python lay digits out differently.
NUMBERS = {
    -0.0: "0", 5e-324: "5e-324", -5e-324: "-5e-324", 1.7976931348623157e308: "1.7976931348623157e+308",
    9007199254740991: "9007199254740991", 295147905179352830000000.0: "2.9514790517935283e+23", 1e23: "1e+23",
    9.999999999999997e22: "9.999999999999997e+22", 1e21: "1e+21", 0.000001: "0.000001", 1e-7: "1e-7",
    4.5: "4.5", 0.002: "0.002", 1e-27: "1e-27", 333333333.33333325: "333333333.33333325", 2.0: "2", -1.5e-9: "-1.5e-9",
}  # fmt: skip


@pytest.mark.parametrize(("value", "text"), NUMBERS.items())
def test_numbers_as_in_the_rfc(value: float, text: str) -> None:
    assert manifest.canonical(value) == text


@given(st.binary(min_size=8, max_size=8))
def test_every_number_reads_back_as_itself(data: bytes) -> None:
    (value,) = struct.unpack("<d", data)
    if not math.isfinite(value) or (2**53 <= abs(value) < 1e21):
        with pytest.raises(ValueError):
            manifest.canonical(value)
        return
    assert json.loads(manifest.canonical(value)) == value


def test_names_are_sorted_by_utf16_and_text_is_not_escaped() -> None:
    # RFC 8785, 3.2.3: the emoji is a surrogate pair, and comes before U+FB33.
    value = {"€": 1, "\r": 2, "\ufb33": 3, "1": 4, "\U0001f600": 5, "\x80": 6, "ö": 7}
    assert list(json.loads(manifest.canonical(value))) == ["\r", "1", "\x80", "ö", "€", "\U0001f600", "\ufb33"]
    assert manifest.canonical('é"\\\n\x1f') == '"é\\"\\\\\\n\\u001f"'


_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**53) + 1, 2**53 - 1), st.floats(-9e15, 9e15), st.text(),
    st.sampled_from([key for key in NUMBERS if abs(key) < 2**53]), st.sampled_from(['1e5', 'a"b1.0', "\\", "2.0"]),
)  # fmt: skip


def _containers(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)


@given(st.dictionaries(st.text(max_size=8), st.recursive(_LEAVES, _containers, max_leaves=12), max_size=6))
def test_objects_have_one_text_however_it_is_made(value: dict[str, object]) -> None:
    assert canonical_object(value) == manifest.canonical(value)


@pytest.mark.parametrize("name", ["blake3", "sha256", "blake3:", "n"])
def test_numbers_are_found_beside_digests_that_look_like_some(name: str) -> None:
    value = {name: 2.0, "list": ["blake3:0e5f", 3.0, "sha256:1.5", -0.5e-7, "sha256:7e+1", 1, 4.0]}
    listed = '"list":["blake3:0e5f",3,"sha256:1.5",-5e-8,"sha256:7e+1",1,4]'
    fields = sorted([f'"{name}":2', listed])
    assert canonical_object(value) == "{" + ",".join(fields) + "}"
    only = {name: ["blake3:0e5f", "sha256:16.e5"]}
    assert canonical_object(only) == manifest.canonical(only)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**53, "\ud800", {1, 2}, b"x"])
def test_what_json_cannot_hold_is_refused_in_objects_too(value: object) -> None:
    with pytest.raises(ValueError):
        canonical_object({"a": [value]})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**53, -(2**53), "\ud800", {1: 2}, {1, 2}, b"x"])
def test_what_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        manifest.canonical(value)


@pytest.mark.parametrize(
    ("wanted", "settings", "found"),
    [
        (["q", "v"], {}, ["q", "v"]),
        (["v", "q", "q"], {}, ["q", "v"]),
        (["q"], {}, ["a.q", "a.v"]),  # v is not named
        (["q", "v", "k"], {}, ["a.q", "a.v"]),  # k names nothing
        (["q", "v"], {"exclude_modules": ["b"]}, ["a.q", "a.v"]),  # the list alone would say more
        (".*", {}, ["a.q", "a.v"]),
        (None, {}, ["a.q", "a.v"]),
    ],
)
def test_target_modules_are_kept_only_where_they_fit(
    wanted: object, settings: dict[str, object], found: list[str]
) -> None:
    modules = {"a.q": {"kind": "lora"}, "a.v": {"kind": "lora"}}
    assert manifest.target_modules(modules, settings | {"target_modules": wanted}, {}) == found


def test_the_text_of_parts_is_that_of_the_whole() -> None:
    parts = {"modules": {"b": {"alpha": 8.0, "s": 2 / 3}, "a": {}}, "digest": "x", "é": [1.0], "list": ["b", "a"]}
    assert canonical_parts(parts, ("modules", "list")) == manifest.canonical(parts)
    with pytest.raises(ValueError, match="only strings"):
        canonical_parts({1: 2}, ())  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="only strings"):  # what is not named may hold anything
        canonical_parts({"settings": {1: 2}}, ("modules",))
