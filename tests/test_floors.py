"""The house stands: imports point down the floors, modules are short and well named, imports are light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, clean_env

PACKAGE = REPOSITORY / "loratools"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
FLOORS = (
    {"loratools", "errors"},
    {"options", "parallel"},
    {"storage", "linalg"},
    {"adapter"},
    {"format"},
    {"dialects", "engine"},
    {"surgery"},
    {"hub"},
    {"demo"},
    {"cli"},
    {"__main__"},
)
"""Top-level names of the package, ground floor first; of `loratools`, its __init__, others import the version only."""

FRONT_DOOR = PACKAGE / "__init__.py"
"""It imports what it shows, from every room below the command line, when that is asked for."""

LONGEST = 300
VAGUE = {"utils", "util", "common", "core", "helpers", "helper", "misc", "tools"}


def room(module: str) -> str:
    """Return the top-level name under loratools that a dotted module name belongs to."""
    return module.split(".")[1] if "." in module else "loratools"


def dotted(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import of loratools in a module, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write loratools. ..."
            # `from loratools import storage` imports a room, `from loratools import __version__` a name
            found = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "loratools" else []
            found = [name for name in found if room(name) in set().union(*FLOORS)] or [str(node.module)]
        else:
            continue
        yield from ((node.lineno, name) for name in found if name.split(".")[0] == "loratools")


def floor(name: str) -> int:
    return next((i for i, rooms in enumerate(FLOORS) if name in rooms), -1)


def test_every_room_has_a_floor() -> None:
    assert {room(dotted(path)) for path in MODULES} <= set().union(*FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_point_down(path: Path) -> None:
    here = room(dotted(path))
    height = floor("cli") if path == FRONT_DOOR else floor(here)
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{line}: {here} imports {name}"
        for line, name in imports(path)
        if room(name) != here and floor(room(name)) >= height
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_modules_are_short_and_say_what_they_are_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < LONGEST
    assert not VAGUE & set(path.relative_to(PACKAGE).with_suffix("").parts)
    assert path.stem == "__init__" or ast.get_docstring(ast.parse(text)), f"{path}: no docstring"


def test_a_wrong_import_would_be_seen(tmp_path: Path) -> None:
    source = tmp_path / "x.py"
    source.write_text(
        "import loratools.cli.hash\nfrom loratools import surgery, __version__\n"
        "def f():\n    from loratools.storage import header\n"
    )
    assert list(imports(source)) == [
        (1, "loratools.cli.hash"),
        (2, "loratools.surgery"),
        (4, "loratools.storage"),
    ]
    assert floor("cli") > floor("surgery") > floor("storage") > floor("errors") >= 0


def test_import_loratools_is_light() -> None:
    program = "import sys, loratools; print(sorted({'torch', 'numpy', 'click'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=clean_env())
    assert done.stdout == "[]\n"


def test_public_names_exist() -> None:
    import loratools

    for name in loratools.__all__:
        assert getattr(loratools, name) is not None
    assert set(dir(loratools)) == set(loratools.__all__)
    with pytest.raises(AttributeError, match="no attribute 'mend'"):
        loratools.mend  # noqa: B018
