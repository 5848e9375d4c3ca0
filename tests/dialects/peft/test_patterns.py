"""Names and regular expressions of a config: matched as Python's `re` matches them, in bounded time."""

from __future__ import annotations

import gc
import random
import re
from pathlib import Path

import pytest

from loratools.dialects.peft import patterns
from loratools.dialects.peft.patterns import (
    ConfigFile,
    Expression,
    NameList,
    PatternKeys,
    SavedModules,
    compile_alike,
)
from loratools.errors import UnsupportedAdapter

CONFIG = Path("adapter_config.json")
ATOMS = [
    "a", "b", "A", "ab", ".", r"\.", r"\d", r"\w", r"\W", r"\s", "[ab]", "[^a]", "^", "$", r"\b", r"\B", r"\A", r"\Z",
    "(a|b)", "(?:ab|)", "(?=a)", "(?!b)", "(?<=a)", "(?<!ab)", "a*", "b+?", "a{2,3}", "a{3}", "(ab)*", r"[a-c\d]?",
    ".*?", ".*", ".{0,2}", "(?P<x>a)", "((a)|b)+", "(?:a*)*", "(?:)*", "|", "a{,2}", "(?=(?!b)a)", r"[\]\-b]", "[]a]",
    r"\_", "]", "(a??)+", "(?=a*b)",
]  # fmt: skip


def expression(pattern: str, *, whole: bool = True, config: ConfigFile | None = None) -> Expression:
    return Expression(pattern, "target_modules", config or ConfigFile(CONFIG), whole=whole)


def keys(*names: str) -> PatternKeys:
    return PatternKeys(names, "rank_pattern", ConfigFile(CONFIG))


def first_by_re(names: list[str], module: str) -> str | None:
    """Return what PEFT's `get_pattern_key` would."""
    return next((key for key in names if re.match(rf"(.*\.)?({key})$", module)), None)


def test_an_expression_matches_what_python_matches() -> None:
    chance, compared, true, unread = random.Random(0), 0, 0, 0
    for _ in range(8000):
        pattern = "".join(chance.choice(ATOMS) for _ in range(chance.randint(1, 7)))
        if chance.random() < 0.1:
            pattern = "(?i)" + pattern
        text = "".join(chance.choice("aabbAB.1 -]_") for _ in range(chance.randint(1, 9)))
        try:
            python = re.compile(pattern)
        except re.error:
            with pytest.raises(ValueError, match=r"."):
                compile_alike(pattern)
            continue
        if compile_alike(pattern) is None:
            unread += 1
            continue
        expected = python.match(text) is not None, python.fullmatch(text) is not None
        ours = expression(pattern, whole=False).matches(text), expression(pattern).matches(text)
        assert ours == expected, (pattern, text)
        compared, true = compared + 1, true + sum(expected)
    assert compared > 4000
    assert true > 1500
    assert not unread


@pytest.mark.parametrize(
    "pattern",
    [
        # as Unsloth writes them
        r"(?:.*?(?:vision|image|visual).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))",
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"^(?!.*visual).*(?:q_proj|v_proj).*",
        r"model\.layers\.(1[0-9]|[0-9])\.self_attn\.[qv]_proj",
        r"(.*\.)?(q_proj)$",
        r"(?:\w+\.)*q_proj",
        r"(?i)MODEL\.layers\.(?:[0-9]|1[0-5])\..*",
        r"^(?:(?!mlp|lm_head)[a-z0-9_.])+$",
    ],
)
def test_what_trainers_write_is_read(pattern: str) -> None:
    for name in ("model.layers.12.self_attn.q_proj", "visual.0.self_attn.k_proj", "q_proj", "decoder.SelfAttention.v"):
        assert expression(pattern).matches(name) == bool(re.fullmatch(pattern, name))


APART = [
    r"(a)\1", "(?P<x>a)(?P=x)", "(?>a)", "a*+", "(?i:A)", "(?m)^a", "(a)?(?(1)b)", "(?:ab){e<=1}", "[[:alpha:]]",
    "[a[:alpha:]]", "[a--b]", r"\x61", r"(?i)\u212a", "(?i)ß", r"(?s)a.b",
    "(?x) a  b # c", r"[\n\t]a", "a{2", r"(?a)\w+",
    r"(?:.{99}){999}|ab", "(?#why)ab", "a{0,3}{2}|b", r"\N{LATIN SMALL LETTER A}",
]  # fmt: skip
"""Expressions that Python takes, and that the two packages may read differently."""


@pytest.mark.filterwarnings("ignore:Possible (nested|set):FutureWarning")
def test_what_the_two_packages_may_read_differently_is_matched_by_python_itself() -> None:
    config, matched = ConfigFile(CONFIG), 0
    for pattern in APART:
        try:
            python = re.compile(pattern)
        except re.error:
            expression(pattern, config=config)
            assert config.problems.pop().startswith(f"target_modules: {pattern[:80]!r} is not a regular expression: ")
            continue
        assert compile_alike(pattern) is None
        both = expression(pattern, config=config), expression(pattern, whole=False, config=config)
        for text in (
            "a",
            "aa",
            "ab",
            "A",
            "a.b",
            "ab{e<=1}",
            "b",
            "a{2",
            "-",
            "[:a]",
            "ss",
            "SS",
            "a\nb",
            "k",
            "\na",
            "l]",
        ):
            expected = python.fullmatch(text) is not None, python.match(text) is not None
            assert tuple(each.matches(text) for each in both) == expected, (pattern, text)
            matched += sum(expected)
    assert matched > 60
    assert not config.problems


@pytest.mark.parametrize(
    "pattern",
    [r"\p{L}", r"\X", "(?R)", "(?|a|b)", "(*SKIP)", "(?<=a+)b", "*", "(", "[b-a]", "a" * 20_001, r"(a)\2", "(?P=x)"],
    ids=lambda pattern: pattern[:20],
)
def test_what_python_does_not_take_is_refused(pattern: str) -> None:
    config = ConfigFile(CONFIG)
    expression(pattern, config=config)
    (problem,) = config.problems
    assert "regular expression" in problem


def test_keys_are_expressions_of_any_kind_as_peft_counts_their_groups() -> None:
    """PEFT puts two groups around a key: the first of its own is the third."""
    listed = [r"layers\.(\d)\.x\3", r"(?P<n>\d)\.(?P=n)\.q", r"(?i:K)_proj", r"[^.]*+_v"]
    for module in ("layers.1.x1", "layers.1.xlayers.", "m.3.3.q", "3.4.q", "a.k_proj", "x_v", "b.x_v"):
        assert keys(*listed).first(module) == first_by_re(listed, module), module


def test_a_match_that_runs_away_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    for pattern in ("(?:a|a|aa)*b[cd]", r"((?:a|a|aa)*)b[cd]\1", r"(?s)(?:a|a|aa)*b[cd]"):
        said = r"config.json: target_modules: .*a\|a\|.*' takes too long to match"
        config = ConfigFile(CONFIG)
        one = expression(pattern, config=config)
        for _ in range(2):  # a new process takes up the work of one that was ended
            with pytest.raises(UnsupportedAdapter, match=said):
                one.matches("a" * 60 + "bx")
        assert one.matches("bc")


def test_a_process_ends_with_its_config() -> None:
    config = ConfigFile(CONFIG)
    one = expression(r"(a)\1", config=config)
    process = config.python._process
    assert process is not None
    assert process.poll() is None
    del one, config
    gc.collect()
    assert process.poll() is not None


def test_all_matches_of_a_config_share_a_limit() -> None:
    config = ConfigFile(CONFIG, seconds=0)
    with pytest.raises(UnsupportedAdapter, match="takes too long"):
        expression(".*q", config=config).matches("model.q")


def test_letters_whose_class_is_a_matter_of_tables_are_those_of_python() -> None:
    assert expression(".*q_proj").matches("модель.q_proj")
    for pattern in (r"\w+\.q_proj", r"[^\W\d]+\.q_proj", r"(?i)МОДЕЛЬ\.q_proj"):
        assert expression(pattern).matches("модель.q_proj") == bool(re.fullmatch(pattern, "модель.q_proj"))


def test_the_first_key_is_that_of_python() -> None:
    """Names with and without escapes and anchors, dots that stand for other characters, and expressions among them."""
    chance, true = random.Random(1), 0
    names = ["a.b", "a_b", "x.a.b", "a.1.b", "x.a_b", "b", "axb", "a.b.b", "x-y.b", ".b", ".a.b", "^b"]
    makers = (
        lambda name: name,
        re.escape,
        lambda name: "^" + name,
        lambda name: "^" + re.escape(name) + "$",
        lambda name: name.replace("a", "[ac]"),
        lambda name: name + "|" + name[::-1],
        lambda name: name.replace("b", r".*"),
    )
    for _ in range(3000):
        listed = list(dict.fromkeys(chance.choice(makers)(chance.choice(names)) for _ in range(chance.randint(0, 6))))
        module = chance.choice(names) if chance.random() < 0.6 else f"{chance.choice('xa')}.{chance.choice(names)}"
        assert keys(*listed).first(module) == first_by_re(listed, module), (listed, module)
        true += first_by_re(listed, module) is not None
    assert true > 1000


def test_more_shapes_of_names_than_are_looked_up() -> None:
    listed = [f"{i:010b}".replace("0", ".").replace("1", "a") for i in range(1024)]
    for module in ("a" * 10, "aaaaa.aaaa", "bbbbbbbbbb", "x.babababaab"):
        assert keys(*listed).first(module) == first_by_re(listed, module)


def test_a_line_break_in_a_module_name_is_refused() -> None:
    with pytest.raises(UnsupportedAdapter, match="line break"):
        keys("q").first("q\n")


def test_the_first_of_a_list_of_names() -> None:
    names = NameList(["b", "a.b", "c", "b"])
    assert [names.first(module) for module in ("x.a.b", "xb", "c", "b.c.d")] == ["b", None, "c", None]


def test_modules_that_are_saved_whole() -> None:
    listed = ["head", "a.b", "re[gk]"]
    saved = SavedModules(listed, ConfigFile(CONFIG))
    for module in ("head", "x.head", "x.head.y", "heads", "a.b.c", "a_b", "x.a_b.c", "ab", "reg", "x.rek.y"):
        assert saved.matches(module) == any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in listed), module


def test_two_fields_with_the_same_keys_are_used_apart() -> None:
    ranks, alphas = (PatternKeys(["a.b", "c", "d+"], field, ConfigFile(Path("x"))) for field in ("rank", "alpha"))
    assert (ranks.first("x.c"), ranks.first("x.dd"), alphas.first("a-b")) == ("c", "d+", "a.b")
    assert (ranks.unused(), alphas.unused()) == (["a.b"], ["c", "d+"])
