"""List how transformers' classes stack weights: `python -m tests.make.stacked_models`.

It is for `loratools/adapter/naming/stacked.py`.
Run it for a new transformers and put what it prints in place of the tables there. It reads the source of the modeling
files, so nothing is built: parameters in the order in which a class registers them, their shapes as they are written,
and what `use_experts_implementation` says of a class.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pprint import pformat

_PARAMETER = "Parameter"
_INSIDE = r"(?:(?:[ \t#)\]}].*)?\n)*"
_CLASS = re.compile(rf"^(?:@.*\n{_INSIDE})*class .*\n{_INSIDE}", re.MULTILINE)
"""A class at the top of a file: its decorators, its first line, and all that is indented below."""


@dataclass(frozen=True)
class Stacking:
    """A class with parameters of two or three dimensions.

    `parameters` maps each to its sides as written, in the order of registration; `marks` are the keywords of its
    decorator, `folder` is that of its model.
    """

    folder: Path
    parameters: dict[str, list[str]]
    marks: dict[str, object]

    @property
    def stacks(self) -> dict[str, list[str]]:
        return {name: sides for name, sides in self.parameters.items() if len(sides) == 3 and sides[0] != "1"}

    @property
    def is_mlp(self) -> bool:
        """Whether its parameters are the projections of experts, stacked or (DBRX) one below the other."""
        return len(self.parameters) > 1 and bool({"down_proj", "w2"} & self.parameters.keys())

    @property
    def side_by_side(self) -> bool:
        """Whether gate and up lie beside each other along the last side: the weights are (E, in, out)."""
        return "2 *" in self.stacks.get("gate_up_proj", ["", "", ""])[2]


def classes() -> Iterator[Stacking]:
    """Yield every class of transformers' models that has parameters of two or three dimensions of its own."""
    import transformers

    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for node in _nodes(file.read_text(encoding="utf-8")):
            if isinstance(node, ast.ClassDef) and (parameters := _parameters(node)):
                yield Stacking(file.parent, parameters, _marks(node))


def tables() -> dict[str, object]:
    """Return the tables of `stacked.py` by name."""
    stacking = [each for each in classes() if each.stacks or each.is_mlp]
    types = {each.folder: _model_types(each.folder) for each in stacking}
    return {
        "ORDERS": tuple(sorted({tuple(each.parameters) for each in stacking if each.is_mlp})),
        "KNOWN": frozenset(name for names in types.values() for name in names),
        "IS_TRANSPOSED": frozenset(
            n for each in stacking if each.marks.get("is_transposed") for n in types[each.folder]
        ),
        "STORED_IN_OUT": frozenset(n for each in stacking if each.side_by_side for n in types[each.folder]),
        "INTERLEAVED": frozenset(
            n for each in stacking if each.marks.get("is_concatenated") is False for n in types[each.folder]
        ),
    }


def _nodes(text: str) -> list[ast.stmt]:
    """Return the classes of a file that may make a parameter; to read all of every file takes five times as long."""
    try:
        return [node for one in _CLASS.findall(f"{text}\n") if _PARAMETER in one for node in ast.parse(one).body]
    except SyntaxError:  # a string has lines that are not indented
        return ast.parse(text).body


def _parameters(node: ast.ClassDef) -> dict[str, list[str]]:
    assigned = [
        (each.lineno, each.targets[0].attr, _sides(each.value))
        for each in ast.walk(node)
        if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Attribute)
        if isinstance(each.value, ast.Call) and ast.unparse(each.value.func).endswith(_PARAMETER)
    ]
    return {name: sides for _, name, sides in sorted(assigned) if len(sides) in (2, 3)}


def _sides(call: ast.Call) -> list[str]:
    """Return the sides of `Parameter(torch.empty(a, b, c))` or of a tuple of them; [] where it is written otherwise."""
    made = call.args[0] if call.args else None
    if not isinstance(made, ast.Call) or ast.unparse(made.func).rpartition(".")[2] not in ("empty", "zeros", "ones"):
        return []
    first = made.args[0] if made.args else None
    return [ast.unparse(side) for side in (first.elts if isinstance(first, ast.Tuple) else made.args)]


def _marks(node: ast.ClassDef) -> dict[str, object]:
    calls = [each for each in node.decorator_list if isinstance(each, ast.Call)]
    return {
        str(word.arg): ast.literal_eval(word.value)
        for call in calls
        if ast.unparse(call.func) == "use_experts_implementation"
        for word in call.keywords
    }


def _model_types(folder: Path) -> set[str]:
    nodes = (node for file in folder.glob("configuration_*.py") for node in ast.walk(ast.parse(file.read_text())))
    assigned = (node for node in nodes if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant))
    return {str(node.value.value) for node in assigned if ast.unparse(node.targets[0]) == "model_type"}


if __name__ == "__main__":
    for table, value in tables().items():
        names = (
            f"frozenset({pformat(sorted(value), width=118, compact=True)})" if isinstance(value, frozenset) else value
        )
        print(f"{table} = {names}\n")
