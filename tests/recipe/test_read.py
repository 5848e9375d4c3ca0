"""Recipes of strangers: what is no recipe is refused with its line, all of it at once, and nothing is written."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from loratools.cli._catalog import catalog_of
from loratools.errors import BadFile, InvalidOption, MissingExtra
from loratools.recipe import text
from loratools.recipe.read import read

HEAD = "inputs: {base: base, style: adapter}\nsteps:\n"


def problems(tmp_path: Path, yaml: str) -> list[str]:
    """Return what is wrong with a recipe."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml)
    with pytest.raises(InvalidOption) as refusal:
        read(path, catalog_of())
    return list(refusal.value.problems)


def refusal_of(tmp_path: Path, yaml: str | bytes) -> str:
    """Return the text of the refusal of what is no YAML of ours."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(yaml if isinstance(yaml, bytes) else yaml.encode())
    with pytest.raises(BadFile) as refusal:
        read(path, catalog_of())
    return str(refusal.value)


@pytest.mark.parametrize(
    ("yaml", "told"),
    [
        (b"", "empty"),
        (b"- a\n- b\n", "expected a mapping with inputs and steps"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"steps: [\n", "line 2: not the YAML"),
        (b"a: 1\n---\nb: 2\n", "not the YAML that was expected: but found another document"),
        (b"steps: !!python/object/apply:os.system [echo]\n", "line 1: the tag !!python/object/apply:os.system"),
        (b"steps: {a: !secret x}\n", "line 1: the tag !secret"),
        (b"steps: !!set {a, b}\n", "line 1: the tag !!set"),
        (b"steps: {}\nsteps: {}\n", "line 2: the key 'steps' a second time"),
        (b"a: &a {x: 1}\nb: {<<: *a}\n", "line 2: `<<` merges another mapping"),
        (b"? [a]\n: 1\n", "line 1: a key is a list or a mapping"),
        (b"a: &a [*a]\n", "nested deeper than 12"),
        (b"a: " + b"[" * 3000 + b"]" * 3000, "nested"),
        (b"a: " + b"{a: " * 40 + b"1" + b"}" * 40, "nested deeper than 12"),
        (b"#" * 256_001, "larger than 256000 bytes"),
    ],
)
def test_what_is_no_yaml_of_ours_is_refused(tmp_path: Path, yaml: bytes, told: str) -> None:
    assert told in refusal_of(tmp_path, yaml)


def test_aliases_that_grow_are_counted_as_what_they_name(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    start = time.process_time()
    assert "more than 20000 values, aliases resolved" in refusal_of(tmp_path, "\n".join(lines))
    assert time.process_time() - start < 60  # and not the age of the universe


def test_an_alias_that_does_not_grow_is_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{HEAD}  a: {{command: merge, base: base, adapters: &s [style]}}\n"
                    "  b: {command: combine, adapters: *s, weight: 2}\n")  # fmt: skip
    first, second = read(path, catalog_of()).steps
    assert dict(first.values)["adapters"] == dict(second.values)["adapters"] == ("style",)


def test_every_problem_is_told_at_once_with_its_line_and_the_nearest_name(tmp_path: Path) -> None:
    told = problems(
        tmp_path,
        "input: {}\n"
        "loratools: 2\n"
        "inputs: {base: base, 'a b': x, bad: {digest: 12, patth: x}, none: }\n"
        "steps:\n"
        "  merge-it:\n"
        "    command: merge\n"
        "    base: base\n"
        "    dtpye: bf16\n"
        "    keep_residual: 1\n"
        "    push: someone/else\n"
        "    force: true\n"
        "  odd: {command: mrege}\n"
        "  send: {command: push}\n"
        "  look: {command: inspect}\n"
        "  loop: {command: run}\n"
        "  short: {command: combine, output: x}\n"
        "  base: {command: combine, adapters: [base], weight: {a: 1}, density: }\n",
    )
    assert told == [
        "line 1: a recipe has no key 'input'; did you mean inputs?",
        "line 2: a recipe of version 2; this loratools reads 1",
        "line 3: 'a b' is no name: letters, digits, dots, hyphens and underscores are",
        "line 3: the input bad has no key 'patth'; did you mean path?",
        "line 3: bad.digest: '12' is no digest, such as blake3: and 64 hex digits",
        "line 3: the input none: expected a path, or a mapping with path and digest",
        "line 8: step merge-it: merge has no option 'dtpye'; did you mean dtype?",
        "line 9: step merge-it: keep_residual: expected true or false",
        "line 10: step merge-it: push: a recipe sends nothing to the Hub",
        "line 11: step merge-it: force: `loratools run --force` replaces outputs",
        "line 6: step merge-it: merge needs adapters",
        "line 12: step odd: no command 'mrege'; did you mean merge?",
        "line 13: step send: a recipe sends nothing to the Hub; `loratools push` does",
        "line 14: step look: inspect writes no file that a later step could take",
        "line 15: step loop: a recipe runs no other recipe",
        "line 16: step short: combine needs adapters",
        "line 17: step base: an input has this name",
        "line 17: step base: weight: expected a value, or a list of them; leave the key out for its default",
        "line 17: step base: density: expected one value; leave the key out for its default",
    ]


def test_the_order_of_steps_is_checked_and_circles_are_shown(tmp_path: Path) -> None:
    step = "{{command: combine, adapters: [{}]}}"
    told = problems(
        tmp_path,
        f"{HEAD}  late: {step.format('early')}\n  early: {step.format('style')}\n"
        f"  self: {step.format('self')}\n  one: {step.format('two')}\n  two: {step.format('one')}\n"
        "  look: {command: validate, adapter: style}\n"
        f"  of-look: {step.format('look')}\n",
    )
    assert told == [
        "step late: adapters: it takes the output of early, which comes after it; put it before",
        "step self: adapters: it takes the output of self, a circle: self takes self",
        "step one: adapters: it takes the output of two, a circle: one takes two takes one",
        "step of-look: adapters: look writes nothing that it could take",
    ]


@pytest.mark.parametrize(
    "output",
    [
        "/etc/x",
        "../x",
        "a/../../x",
        "~/x",
        "C:/x",
        "C:x",
        r"\\host\share",
        r"a\..\..\x",
        ".ssh",
        "a/.git/x",
        "./x",
        "a//b",
    ],
)
def test_an_output_stays_in_the_folder(tmp_path: Path, output: str) -> None:
    yaml = f"{HEAD}  a: {{command: combine, adapters: [style], output: '{output}'}}\n"
    (told,) = problems(tmp_path, yaml)
    assert told.startswith(f"step a: output {output!r} ")
    assert "--allow-outside" in told
    assert read(tmp_path / "recipe.yaml", catalog_of(), outside=True).steps[0].output == output


def test_outputs_do_not_lie_in_each_other(tmp_path: Path) -> None:
    step = "{{command: combine, adapters: [style], output: {}}}"
    told = problems(tmp_path, f"{HEAD}  a: {step.format('x')}\n  b: {step.format('x/y')}\n  c: {step.format('x')}\n")
    assert told == [
        "step b: its output x/y is, holds or lies in that of a",
        "step c: its output x is, holds or lies in that of a",
        "step c: its output x is, holds or lies in that of b",
    ]


def test_a_command_on_many_paths_takes_one_in_a_step(tmp_path: Path) -> None:
    told = problems(
        tmp_path,
        f"{HEAD}  a: {{command: resize, adapter: [style, base], rank: 1, jobs: 2}}\n  b: {{command: resize}}\n",
    )
    assert told == [
        "line 3: step a: adapter: expected one value; leave the key out for its default",
        "line 3: step a: jobs: a step takes one input; give each its own step",
        "line 4: step b: resize needs adapter",
    ]


def test_steps_may_be_a_list(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "inputs: {base: base, style: adapter}\nsteps:\n- name: half\n  command: combine\n  adapters: style\n"
        "  weight: -.5\n- command: merge\n  base: base\n  adapters: [half]\n  max_shard_size: 010MB\n"
    )
    half, merged = read(path, catalog_of()).steps
    assert (half.name, half.values["weight"], half.output) == ("half", ("-.5",), "half")
    assert (merged.name, merged.values["max-shard-size"]) == ("merge", ("010MB",))


def test_without_pyyaml_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingExtra) as refusal:
        text.read(tmp_path / "recipe.yaml")
    assert refusal.value.hint == "pip install 'loratools[run]'"


def test_keys_come_from_the_commands() -> None:
    catalog = catalog_of()
    assert {"combine", "convert", "dequantize", "extract-svd", "merge", "pull", "resize", "switch", "unmerge"} <= set(
        catalog.names()
    )
    merge = catalog.get("merge")
    assert (merge.keys["base"].role, merge.keys["adapters"].role, merge.keys["adapters"].many) == (
        "model", "adapter", True,
    )  # fmt: skip
    assert merge.keys["keep-residual"].takes == "flag"
    assert catalog.get("switch").keys["keep-residual"].takes == "switch"
    assert not merge.keys["threads"].recorded
