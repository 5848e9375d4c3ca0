"""The matcher against Python's own, and where Python's own would not end."""

from __future__ import annotations

import random
import re

import pytest

from loratools.dialects.peft import regex
from loratools.errors import UnsupportedAdapter

ATOMS = [
    "a", "b", "A", "ab", ".", r"\.", r"\d", r"\w", r"\W", r"\s", "[ab]", "[^a]", "^", "$", r"\b", r"\B", r"\A", r"\Z",
    "(a|b)", "(?:ab|)", "(?=a)", "(?!b)", "(?<=a)", "(?<!ab)", "a*", "b+?", "a{2,3}", "a{3}", "(ab)*", r"[a-c\d]?",
    ".*?", ".*", ".{0,2}", "(?P<x>a)", "((a)|b)+", "(?:a*)*", "(?:)*", "|",
]  # fmt: skip


def test_it_tells_what_python_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regex, "_SHORT", -1)  # never the short way
    chance, compared, true = random.Random(0), 0, 0
    for _ in range(6000):
        pattern = "".join(chance.choice(ATOMS) for _ in range(chance.randint(1, 7)))
        if chance.random() < 0.1:
            pattern = "(?i)" + pattern
        text = "".join(chance.choice("aabbAB.1 \n_") for _ in range(chance.randint(0, 9)))
        try:
            python = re.compile(pattern)
        except re.error:
            with pytest.raises(ValueError, match="is not a regular expression"):
                regex.check(pattern)
            continue
        expected = python.match(text) is not None, python.fullmatch(text) is not None
        assert (regex.matches(pattern, text, whole=False), regex.matches(pattern, text, whole=True)) == expected, (
            pattern
        )
        compared, true = compared + 1, true + sum(expected)
    assert compared > 4000
    assert true > 1500


@pytest.mark.parametrize(
    "pattern",
    [".*" * 40 + "!", "(a?){30}a{30}!", "(a+)+!", "((a|a)*)*!", "(?=" + ".*" * 20 + "!)a", "(a|a)" * 40 + "!",
     "a?" * 60 + "a" * 60, ".{0,9}" * 30 + "!"],
)  # fmt: skip
def test_what_python_would_not_end(pattern: str) -> None:
    assert not regex.matches(pattern, "a" * 50, whole=True)


def test_steps_and_features_are_limited() -> None:
    with pytest.raises(UnsupportedAdapter, match="takes too long to match"):
        regex.matches("(a?b?)*" * 100, "ab" * 1000, whole=True)
    for pattern in (r"(a)\1", "(?P<x>a)(?P=x)", "(?>a)", "a*+", "(?i:a)", "(?m)^a", "(?=(?=a))", "(a)?(?(1)b)"):
        with pytest.raises(ValueError, match=r"not read|flags|not a regular"):
            regex.check(pattern)
