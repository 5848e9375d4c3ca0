"""The front door, `loratools/__init__.py`: its lists agree, its page is true, and checkers see through it."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import click
import pytest

import loratools
from loratools.cli._run import group
from tests.conftest import REPOSITORY, clean_env
from tests.hub.fixtures import hub, hub_home
from tests.hub.server import LocalHub
from tests.hub.trips import stored

__all__ = ["hub", "hub_home"]

PAGE = loratools.__doc__ or ""
NAMES = {
    "dialects": "list_dialects",
    "demo": "run_demo",
    "extract-svd": "extract_svd",
    "run": "run_recipe",
    "recipe": "recipe_of",
}
"""Commands whose function has another name: a package bears the command's, or Python does not allow it."""

SCRIPT = """\
from pathlib import Path
import loratools
adapter = loratools.open_adapter(Path("adapter"))
rank = adapter.updates["model.layers.0.self_attn.q_proj"].rank
report = loratools.merge("base", adapter, "merged", weights=0.5, dtype="bf16", max_shard_size="5GB")
assert report.changed > rank and loratools.verify("merged", "base", "hf://lab/adapter", weights=0.5).ok
loratools.unmerge("merged", [adapter], "unmerged", base=loratools.Checkpoint.open("base"))
loratools.switch("merged", "adapter", [Path("other"), adapter], "switched", check_base="warn")
loratools.push("merged", "lab/merged", private=True)
digests: str | None = loratools.hash("base").root
"""
CONFIG = """\
[mypy]
strict = true
[mypy-loratools.*]
ignore_errors = true
[mypy-torch.*,numpy.*]
follow_imports = skip
"""
"""Of an installed package mypy shows no errors, only the user's. torch and numpy would take it minutes."""

WRONG = {
    'private=True)': ('privat=True)', 'Unexpected keyword argument "privat" for "push"'),
    'max_shard_size="5GB"': ("max_shard_size=[5]", 'Argument "max_shard_size" to "merge" has incompatible type'),
    "loratools.unmerge(": ("loratools.unmrege(", 'Module has no attribute "unmrege"'),
    'check_base="warn"': ('check_base="loud"', 'Argument "check_base" to "switch" has incompatible type'),
    'str | None =': ("int =", 'expression has type "str | None", variable has type "int"'),
}  # fmt: skip


def declared() -> tuple[dict[str, str], dict[str, str]]:
    """Return the names that checkers see, and those that are there at run time, each with where it comes from."""
    tree = ast.parse((REPOSITORY / "loratools" / "__init__.py").read_text(encoding="utf-8"))
    branch = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    home = next(node for node in branch.orelse if isinstance(node, ast.Assign))
    return seen, ast.literal_eval(home.value)


def test_checkers_and_python_see_the_same_names() -> None:
    seen, there = declared()
    assert seen == there
    assert loratools.__all__ == sorted([*there, "__version__"])
    assert list(there) == sorted(there)


@pytest.mark.parametrize("command", group().list_commands(click.Context(group())))
def test_every_command_is_a_function(command: str) -> None:
    if command not in ("completion", "help"):
        assert callable(getattr(loratools, NAMES.get(command, command)))


def test_no_package_bears_the_name_of_a_public_name() -> None:
    # importing it would put the package in the place of the function
    assert not {module.name for module in iter_modules(loratools.__path__)} & set(loratools.__all__)


def test_the_page_names_everything_in_a_line_each() -> None:
    listed = re.findall(r"^    ([a-zA-Z_.]+(?:, [a-z_]+)*)  +\S", PAGE, re.MULTILINE)
    named = {name.split(".")[0] for line in listed for name in line.split(", ")}
    other_names = {"extract", "hash_checkpoint", "LoraToolsError", "Adapter", "__version__"}
    assert named == set(loratools.__all__) - other_names
    assert all(len(line) <= 120 for line in PAGE.splitlines())


def test_the_first_example_runs(workplace: Path) -> None:
    example = re.search(r"A first example:\n\n((?:    .*\n|\n)+)", PAGE)
    assert example
    code = re.sub(r"^    ", "", example[1], flags=re.MULTILINE)
    assert code.count("loratools.") == 4
    for made in ("sealed", "merged"):
        shutil.rmtree(workplace / made)
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=workplace, env=clean_env(), check=True)


@dataclass
class Place:
    """A path that is no `Path`."""

    text: str

    def __fspath__(self) -> str:
        return self.text


def kinds_of_input(workplace: Path, hub: LocalHub) -> dict[str, Callable[[str], Any]]:
    """Return how an input of the workplace is given: by a text, a `Path`, a reference to the Hub, an open value."""
    for name in ("base", "adapter", "other", "sealed", "merged", "tuned"):
        stored(hub, workplace / name, f"lab/{name}")

    def opened(name: str) -> Any:
        is_model = name in ("base", "merged", "tuned")
        return (loratools.Checkpoint.open if is_model else loratools.open_adapter)(workplace / name)

    return {
        "text": lambda name: str(workplace / name),
        "path": lambda name: workplace / name,
        "path-like": lambda name: Place(str(workplace / name)),
        "reference": lambda name: f"hf://lab/{name}",
        "open": opened,
    }


@pytest.mark.parametrize("kind", ["text", "path", "path-like", "reference", "open"])
def test_every_function_takes_every_kind_of_input(
    kind: str, hub: LocalHub, workplace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    of = kinds_of_input(workplace, hub)[kind]
    base, adapter, other, tuned = of("base"), of("adapter"), of("other"), of("tuned")
    here = loratools.Checkpoint.open(workplace / "base")
    identity = loratools.hash(here)
    out = iter(tmp_path / f"made-{number}" for number in range(20))

    assert loratools.inspect(adapter).total.parameters == loratools.inspect(workplace / "adapter").total.parameters
    assert loratools.inspect(base).type == "checkpoint"
    assert loratools.hash(base) == identity
    assert loratools.hash(base, "schema").schema == identity.schema
    assert loratools.hash(adapter, "root") == loratools.hash(workplace / "sealed", "root")
    assert loratools.spectrum(adapter).norm == loratools.spectrum(workplace / "adapter").norm
    assert (
        loratools.compare(adapter, other, base).cosine
        == loratools.compare(workplace / "adapter", workplace / "other", here).cosine
    )
    if kind != "open":  # what is validated is a file
        assert loratools.validate(of("sealed"), base).valid
    assert loratools.verify(of("merged"), base, adapter).ok
    sealed = loratools.convert(adapter, next(out), base=base)
    assert sealed.base
    assert sealed.base.root == identity.root
    kept = next(out)
    assert loratools.merge(base, adapter, next(out), dtype="bf16", max_shard_size="5GB").changed == 4
    assert loratools.merge(base, [adapter], kept, weights=[1], keep_residual=True).residual
    assert loratools.unmerge(kept, adapter, next(out)).root == identity.root
    assert loratools.unmerge(loratools.Checkpoint.open(kept), [adapter], next(out), base=base).method == "base"
    assert loratools.switch(kept, adapter, other, next(out)).exact
    assert loratools.combine(adapter, next(out), weights=0.5).error < 1e-6
    assert loratools.combine([adapter, other], next(out), ranks=2, check_base="off").error < 1
    assert loratools.resize(adapter, next(out), 2).error < 1
    made = next(out)
    assert loratools.extract_svd(base, tuned, made, 4).total.layers
    assert loratools.certify(tuned, base, made).layers
    assert "loratools-headers" not in capfd.readouterr().err


def test_an_opened_value_where_none_can_be_is_refused_in_a_sentence(workplace: Path, tmp_path: Path) -> None:
    adapter: Any = loratools.open_adapter(workplace / "adapter")
    model: Any = loratools.Checkpoint.open(workplace / "base")
    out = tmp_path / "out"
    calls: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
        (loratools.validate, (adapter,), "Adapter"), (loratools.push, (adapter, "lab/adapter"), "Adapter"),
        (loratools.hash, (3,), "int"), (loratools.spectrum, (model,), "Checkpoint"),
        (loratools.compare, (adapter, model), "Checkpoint"), (loratools.merge, (adapter, adapter, out), "Adapter"),
        (loratools.merge, (model, model, out), "Checkpoint"), (loratools.merge, (model, [model], out), "Checkpoint"),
        (loratools.verify, (model, model, model), "Checkpoint"), (loratools.convert, (model, out), "Checkpoint"),
        (loratools.unmerge, (workplace / "merged", model, out), "Checkpoint"),
        (loratools.switch, (workplace / "merged", adapter, model, out), "Checkpoint"),
        (loratools.combine, (model, out), "Checkpoint"), (loratools.combine, ([model], out), "Checkpoint"),
        (loratools.resize, (model, out, 2), "Checkpoint"), (loratools.extract_svd, (adapter, model, out, 2), "Adapter"),
        (loratools.certify, (model, model, model), "Checkpoint"), (loratools.Checkpoint.open, (adapter,), "Adapter"),
        (loratools.open_adapter, (model,), "Checkpoint"), (loratools.inspect, (3,), "int"),
    ]  # fmt: skip
    for function, arguments, kind in calls:
        with pytest.raises(loratools.LoraToolsError, match=rf"^expected a path or a reference .*, found {kind}$"):
            function(*arguments)
    assert not out.exists()


def test_folders_of_headers_go_away(
    hub: LocalHub, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    of = kinds_of_input(workplace, hub)["reference"]
    before = set(tmp_path.iterdir())
    summary = loratools.inspect(of("sealed"))
    assert summary.path == "hf://lab/sealed"
    loratools.hash(of("base"), "schema")
    assert loratools.validate(of("sealed"), data=False).valid
    assert set(tmp_path.iterdir()) == before
    hub.seed("lab/bad", {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"x" * 100})
    with pytest.raises(loratools.LoraToolsError, match=r"^hf://lab/bad/adapter_model\.safetensors: "):
        loratools.inspect("hf://lab/bad")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed")
def test_mypy_finds_what_is_wrong_in_a_users_script_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(SCRIPT)
    wrong = SCRIPT
    for right, (other, _) in WRONG.items():
        assert wrong.count(right) == 1
        wrong = wrong.replace(right, other)
    (tmp_path / "wrong.py").write_text(wrong)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "right.py", "wrong.py"], cwd=tmp_path, capture_output=True, text=True,
        check=False, env={**os.environ, "MYPYPATH": str(REPOSITORY)},
    )  # fmt: skip
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    for other, message in WRONG.values():
        line = next(number for number, text in enumerate(wrong.splitlines(), 1) if other in text)
        assert any(error.startswith(f"wrong.py:{line}: ") and message in error for error in errors), done.stdout
    assert len(errors) == len(WRONG), done.stdout
