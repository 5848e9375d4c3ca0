"""The house stands: no circle, no arrow up, short modules, a sign on every folder's door; imports are light.

An arrow is an import of `loratools…`, also inside a function or for type checkers only. Each check is a function that
lists the faults of a tree; a wrong tree beside it shows that it finds them.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import REPOSITORY, clean_env

FLOORS: Mapping[str, tuple[str, ...]] = {
    "loratools": (
        "errors",
        "decisions version",
        "options",
        "parallel",
        "linalg",
        "storage",
        "adapter",
        "format",
        "dialects engine",
        "live",
        "surgery",
        "hub reports",
        "recipe",
        "demo",
        "cli",
        "__main__ __init__",
    ),
    "loratools.adapter": (
        "basis factors parts shown site",
        "kinds",
        "model",
        "fusing identity input low_rank",
        "naming",
        "converted",
        "placement",
        "gathered weights",
    ),
    "loratools.adapter.naming": (
        "compact conversions llama_cpp_table stacked image",
        "loaded",
        "wrappers",
        "selection llama_cpp",
    ),
    "loratools.adapter.naming.image": (
        "components patterns",
        "families",
        "readings",
        "groups",
        "models",
        "translate one_file",
        "rename",
    ),
    "loratools.parallel": ("*", "executors", "tasks"),
    "loratools.storage": ("*", "pickles", "checkpoint", "companions"),
    "loratools.storage.stores": ("address", "faults ranges", "client", "probed", "skeleton", "landing"),
    "loratools.dialects": ("_frame", "*"),
    "loratools.dialects.peft": (
        "fields isolated names",
        "patterns",
        "types",
        "*",
        "typed",
        "typed_write assemble",
        "held",
    ),
    "loratools.surgery": (
        "hash inputs quantization",
        "folding inspect",
        "base extract",
        "change combine edit merge validate",
        "convert find paper resize spectrum verify",
        "compare dequantize unmerge",
        "switch",
        "sharing",
    ),
    "loratools.recipe": (
        "catalog made text",
        "identity mergekit_fields value",
        "mergekit",
        "account",
        "bind read",
        "chain run",
    ),
    "loratools.surgery.combine": ("methods", "*"),
    "loratools.engine": (
        "lane stochastic task turns",
        "device plan tensor",
        "copies load",
        "residual",
        "arithmetic coded sealed",
        "run",
    ),
    "loratools.reports": ("markup numbers scale", "arrange charts style", "page", "subjects", "pages"),
    "loratools.reports.charts": ("drawing", "*"),
    "loratools.live": (
        "below product",
        "site",
        "modules whole",
        "place",
        "identity",
        "export",
        "cost fresh opened restore summary watch",
        "uses",
        "acting",
        "handle",
        "trainer",
    ),
    "loratools.live.below": (
        "classes meta replay silent stack",
        "checkpoints",
    ),
    "loratools.format": (
        "canonical keys shapes",
        "meaning registry",
        "manifest",
        "digest peft_config",
        "clauses",
        "validate",
        "reader writer record",
    ),
    "loratools.linalg": (
        "angles native precision",
        "products",
        "orthonormal factored stacks",
        "ranks similarity",
        "svd",
        "delta",
        "sketch",
    ),
}
"""Folder -> what it holds, ground floor first: nothing imports its own floor or one above. "*" is all that is not
named, and may import its like. A folder that is not here has only files, which form no circle.

`loratools/__init__.py` shows what all rooms make, so it stands at the top.
"""

REGISTERED = {
    "adapter.kinds",
    "storage.codecs",
    "surgery.combine.methods",
    "cli",
    "dialects",
    "adapter.naming.image.families",
    "dialects.peft.types",
    "reports.pages",
}
"""Folders of siblings that are found by file name, one file a thing: their signs say what a sibling is."""

LONGEST = 300
MOST = 18
"""Entries of a folder, its `__init__.py` not counted; a newcomer looks through all of them."""
MOST_OF = {"storage": 20, "surgery": 23, "loratools": 19} | dict.fromkeys(REGISTERED - {"dialects"}, 1000)
VAGUE = {"utils", "util", "common", "core", "helpers", "helper", "misc", "tools"}


class Arrow(NamedTuple):
    """An import: the importing module and line, and the imported module; a folder's own file ends in `__init__`."""

    source: str
    line: int
    target: str


KINDS = "loratools.adapter.kinds"


@dataclass(frozen=True)
class House:
    """A package `loratools` and its imports."""

    root: Path

    @cached_property
    def modules(self) -> dict[str, Path]:
        """Dotted name -> file."""
        paths = sorted((self.root / "loratools").rglob("*.py"))
        return {".".join(path.relative_to(self.root).with_suffix("").parts): path for path in paths}

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.modules.items()}

    @cached_property
    def arrows(self) -> list[Arrow]:
        return [
            Arrow(module, node.lineno, target)
            for module, tree in self.trees.items()
            for node in ast.walk(tree)
            for target in self._targets(module, node)
            if target != module
        ]

    def _targets(self, module: str, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import; write loratools. ..."
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if self._module(name) else str(node.module) for name in names]
        else:
            return
        for name in {name for name in names if name.split(".")[0] == "loratools"}:
            target = self._module(name)
            assert target, f"{module}: imports {name}, which is not there"
            yield target

    def _module(self, name: str) -> str | None:
        return next((full for full in (f"{name}.__init__", name) if full in self.modules), None)

    @cached_property
    def folders(self) -> dict[str, set[str]]:
        """Folder, dotted -> the names of its files and folders."""
        found: dict[str, set[str]] = defaultdict(set)
        for module in self.modules:
            parts = module.split(".")
            for depth in range(1, len(parts)):
                found[".".join(parts[:depth])].add(parts[depth])
        return found

    def within(self, folder: str) -> dict[tuple[str, str], list[Arrow]]:
        """Return the arrows between a folder's entries: (entry, entry) -> those from or to anything in them."""
        found: dict[tuple[str, str], list[Arrow]] = defaultdict(list)
        inside = f"{folder}."
        for arrow in self.arrows:
            if arrow.source.startswith(inside) and arrow.target.startswith(inside):
                first, second = (name.removeprefix(inside).split(".")[0] for name in (arrow.source, arrow.target))
                if first != second:
                    found[first, second].append(arrow)
        return found


def circles(house: House) -> list[str]:
    """List every folder whose entries import each other in a circle; one of files is one of the entries above them."""
    faults = []
    for folder, entries in house.folders.items():
        arrows = house.within(folder)
        left = set(entries)
        while loose := {
            entry
            for entry in left
            if not any((entry, other) in arrows for other in left)
            or not any((other, entry) in arrows for other in left)
        }:
            left -= loose
        tied = [arrow for ends, several in arrows.items() if left.issuperset(ends) for arrow in several]
        faults += [f"a circle in {folder}: {arrow.source}:{arrow.line} imports {arrow.target}" for arrow in tied]
    return faults


def arrows_up(house: House) -> list[str]:
    """List every entry without a floor, and every import of an entry on the same floor or above."""
    faults = []
    for folder, floors in FLOORS.items():
        floor = {name: height for height, names in enumerate(floors) for name in names.split()}
        entries = house.folders.get(folder, set()) - {"__init__"}
        others = floor.get("*", -1)
        if others < 0:
            faults += [f"{folder}.{name} has no floor in FLOORS" for name in sorted(entries - floor.keys())]
        floor = dict.fromkeys(entries, others) | {"__init__": len(floors)} | floor
        for (high, low), arrows in house.within(folder).items():
            if floor[low] > floor[high] or (floor[low] == floor[high] != others):
                faults += [f"{a.source}:{a.line} imports {a.target}: {low} is not below {high}" for a in arrows]
    inner = {folder.rpartition(".")[0] for folder in house.folders} - {""}
    return faults + [f"{folder} has folders, and no floors in FLOORS" for folder in inner - FLOORS.keys()]


def sizes(house: House) -> list[str]:
    """List modules that are too long, folders of too many entries, and names that say nothing."""
    faults = []
    for module, path in house.modules.items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        faults += [f"{module} has {lines} lines"] if lines >= LONGEST else []
        faults += [f"{module}: {part} says nothing" for part in VAGUE & set(module.split("."))]
    for folder, entries in house.folders.items():
        most = MOST_OF.get(folder.removeprefix("loratools."), MOST)
        faults += [f"{folder} has {len(entries) - 1} entries"] if len(entries) - 1 > most else []
    return faults


def signs(house: House) -> list[str]:
    """List modules without a docstring, and folders whose docstring does not name each of their entries.

    A docstring names an entry at the beginning of a line, among others there, or as `entry`, `entry.py` or `entry/`.
    """
    faults = [f"{module} has no docstring" for module, tree in house.trees.items() if not ast.get_docstring(tree)]
    for folder, entries in house.folders.items():
        own = f"{folder}.__init__"
        if own not in house.trees:
            faults.append(f"{folder} has no __init__.py")
            continue
        sign = ast.get_docstring(house.trees[own]) or ""
        listed = REGISTERED | {"loratools"}
        public = set() if {folder, folder.removeprefix("loratools.")} & listed else entries
        missing = [
            name
            for name in sorted(public)
            if not name.startswith("_")
            and not re.search(rf"^\s*([a-z_]+, )*{name}\b|\b{name}(\.py|/)|`{name}`", sign, re.MULTILINE)
        ]
        faults += [f"{folder}/__init__.py does not say what is in it: {', '.join(missing)}"] if missing else []
    return faults


def strangers_to_kinds(house: House) -> list[str]:
    """List where code outside `adapter/kinds/` asks an update for its class, or for what its protocol lacks.

    That is `isinstance`, `type(…) is` or a `case` with a class of a kind, and `getattr` with the name of a member.
    """
    inside = [tree for module, tree in house.trees.items() if module.startswith(f"{KINDS}.")]
    bodies = [node for tree in inside for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    protocols = {node.name for node in bodies if any("Protocol" in ast.unparse(base) for base in node.bases)}
    classes = {node.name for node in bodies} - protocols
    members = {
        item.name if isinstance(item, ast.FunctionDef) else item.target.id
        for node in bodies
        for item in node.body
        if isinstance(item, ast.FunctionDef) or (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name))
    }
    faults = []
    for module, tree in house.trees.items():
        if module.startswith(f"{KINDS}."):
            continue
        for node in ast.walk(tree):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called == "isinstance" or (isinstance(node, ast.Compare) and ast.unparse(node.left).startswith("type(")):
                asked = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)} & classes
            elif isinstance(node, ast.MatchClass):
                asked = {ast.unparse(node.cls).rpartition(".")[2]} & classes
            elif called in ("getattr", "hasattr"):
                asked = {inner.value for inner in node.args[1:2] if isinstance(inner, ast.Constant)} & members
            else:
                continue
            faults += [f"{module}:{node.lineno} asks for {name}" for name in sorted(asked)]
    return faults


HOUSE = House(REPOSITORY)


@pytest.mark.parametrize("check", [circles, arrows_up, sizes, signs, strangers_to_kinds])
def test_the_house_has_no_fault(check: Callable[[House], list[str]]) -> None:
    assert len(HOUSE.modules) > 200 < len(HOUSE.arrows)
    faults = check(HOUSE)
    assert not faults, "\n".join(faults)


SOUND = {
    "__init__": '"""The house."""\nfrom loratools import surgery',
    "errors": '"""Errors."""',
    "storage.__init__": '"""Bytes: `pickles/`, and\n\n    lazy         later\n    checkpoint   models"""',
    "storage.lazy": '"""Later."""\nimport loratools.errors',
    "storage.pickles.__init__": '"""See `archive.py`."""',
    "storage.pickles.archive": '"""Zip."""\nfrom loratools.storage.lazy import x',
    "storage.checkpoint": '"""Models."""\nfrom loratools.storage.pickles import archive',
    "surgery.__init__": '"""Verbs.\n\ninspect, hash   look"""',
    "surgery.hash": '"""Hash."""\ndef f():\n import loratools.storage.checkpoint',
}
WRONG: Mapping[str, tuple[Callable[[House], list[str]], dict[str, str], list[str]]] = {
    "files in a circle": (
        circles,
        {
            "storage.lazy": "import loratools.storage.files",
            "storage.files": "from loratools.storage import lazy, atomic",
        },
        [
            "a circle in loratools.storage: loratools.storage.files:1 imports loratools.storage.lazy",
            "a circle in loratools.storage: loratools.storage.lazy:1 imports loratools.storage.files",
        ],
    ),
    "folders in a circle, files in none": (
        circles,
        {
            "linalg.__init__": "",
            "linalg.one": "from loratools.storage.lazy import x",
            "linalg.two": "",
            "storage.atomic": "from loratools.linalg.two import x",
        },
        [
            "a circle in loratools: loratools.linalg.one:1 imports loratools.storage.lazy",
            "a circle in loratools: loratools.storage.atomic:1 imports loratools.linalg.two",
        ],
    ),
    "a file and its folder's own in a circle": (
        circles,
        {"surgery.__init__": "from loratools.surgery.hash import f", "surgery.hash": "from loratools.surgery import f"},
        [
            "a circle in loratools.surgery: loratools.surgery.__init__:1 imports loratools.surgery.hash",
            "a circle in loratools.surgery: loratools.surgery.hash:1 imports loratools.surgery.__init__",
        ],
    ),
    "a room that imports a higher one, in a function": (
        arrows_up,
        {"storage.lazy": "def f():\n    from loratools import surgery"},
        ["loratools.storage.lazy:2 imports loratools.surgery.__init__: surgery is not below storage"],
    ),
    "a room that imports its neighbour, for type checkers": (
        arrows_up,
        {"linalg.__init__": "if TYPE_CHECKING:\n    import loratools.storage.lazy"},
        ["loratools.linalg.__init__:2 imports loratools.storage.lazy: storage is not below linalg"],
    ),
    "what is shown at the front door, taken there": (
        arrows_up,
        {"surgery.hash": "from loratools import merge"},
        ["loratools.surgery.hash:1 imports loratools.__init__: __init__ is not below surgery"],
    ),
    "a folder in a room that imports a higher one": (
        arrows_up,
        {"storage.pickles.archive": "from loratools.storage.checkpoint import x", "storage.checkpoint": ""},
        ["loratools.storage.pickles.archive:1 imports loratools.storage.checkpoint: checkpoint is not below pickles"],
    ),
    "a room, and folders in a room, without a floor": (
        arrows_up,
        {"attic.__init__": "", "surgery.sew": "", "hub.__init__": "", "hub.wire.__init__": ""},
        [
            "loratools.attic has no floor in FLOORS",
            "loratools.surgery.sew has no floor in FLOORS",
            "loratools.hub has folders, and no floors in FLOORS",
        ],
    ),
    "a module that is too long": (sizes, {"errors": "\n" * LONGEST}, ["loratools.errors has 300 lines"]),
    "a folder that is too full": (
        sizes,
        {f"dialects.d{i}": "" for i in range(MOST)} | {"dialects._frame": "", "dialects.__init__": ""},
        ["loratools.dialects has 19 entries"],
    ),
    "a name that says nothing": (sizes, {"storage.utils": ""}, ["loratools.storage.utils: utils says nothing"]),
    "a sign that leaves out a file": (
        signs,
        {"hub.__init__": '"""The Hub.\n\n    client    reads\n\nIt says nothing of push or pull."""'}
        | {f"hub.{name}": '"""What."""' for name in ("client", "push", "pull", "_own")},
        ["loratools.hub/__init__.py does not say what is in it: pull, push"],
    ),
    "a module, and a folder, without a docstring": (
        signs,
        {"errors": "", "hub.__init__": "import os"},
        ["loratools.errors has no docstring", "loratools.hub.__init__ has no docstring"],
    ),
    "a kind that is asked for by its class, or for what its protocol lacks": (
        strangers_to_kinds,
        {
            "adapter.__init__": "",
            "adapter.kinds.__init__": "class Update(Protocol):\n def term(self): ...",
            "adapter.kinds.lora": "class LoraUpdate:\n width: int\n def f(self):\n  isinstance(self, LoraUpdate)",
            "surgery.hash": "isinstance(x, int | LoraUpdate)\nisinstance(x, Update)\ngetattr(x, 'width')\nx.width",
            "surgery.inspect": "match x:\n case LoraUpdate():\n  x.term()\nx = type(x) is LoraUpdate",
        },
        [
            "loratools.surgery.hash:1 asks for LoraUpdate",
            "loratools.surgery.hash:3 asks for width",
            "loratools.surgery.inspect:2 asks for LoraUpdate",
            "loratools.surgery.inspect:4 asks for LoraUpdate",
        ],
    ),
    "a folder without a door": (signs, {"hub.client": '"""What."""'}, ["loratools.hub has no __init__.py"]),
}


def build(root: Path, modules: Mapping[str, str]) -> House:
    for name, text in modules.items():
        path = root / "loratools" / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return House(root)


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_house_would_be_seen(case: str, tmp_path: Path) -> None:
    check, wrong, faults = WRONG[case]
    assert check(build(tmp_path / "sound", SOUND)) == []
    assert sorted(check(build(tmp_path / "wrong", {**SOUND, **wrong}))) == sorted(faults)


@pytest.mark.parametrize("line", ["from . import errors", "from ..storage import lazy"])
def test_a_relative_import_would_be_seen(line: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="relative import"):
        build(tmp_path, {**SOUND, "surgery.hash": line}).arrows  # noqa: B018


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
