"""mergekit's YAML for adapters as a recipe of two steps: combine the adapters, and merge the result into their base.

mergekit merges each adapter into the base first, Wᵢ = W + ΔWᵢ, and works on whole weights:

    linear    Σ wᵢ·Wᵢ/Σwᵢ = W + Σ (wᵢ/Σwᵢ)·ΔWᵢ; without `normalize` it is (Σwᵢ)·W + …, no adapter unless Σwᵢ = 1
    the rest  W + λ·f(W₁ − W, W₂ − W, …), where Wᵢ − W is ΔWᵢ but for the rounding of Wᵢ to the dtype of the merge

So f is `combine` on ΔWᵢ with mergekit's definitions (`--like mergekit`), at the full rank, and λ is the weight of the
merge. In float32 both are equal but for the last bits; in bfloat16 mergekit's W' has the rounding of every Wᵢ in it,
ours one rounding. Where elements are drawn at random the chances are mergekit's, and the draws are not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools.adapter.parts import factors_of
from loratools.errors import BadFile, UnsupportedAdapter, counted
from loratools.linalg.ranks.rules import FULL
from loratools.recipe.catalog import nearest
from loratools.recipe.mergekit_fields import Entry, Fields
from loratools.recipe.text import Items, Node, Table
from loratools.storage.header import read_header

METHODS: Mapping[str, tuple[str, frozenset[str]]] = {
    "linear": ("linear", frozenset({"weight", "normalize"})),
    "task_arithmetic": ("linear", frozenset({"weight", "normalize", "lambda", "density", "rescale", "int8_mask"})),
    "ties": ("ties", frozenset({"weight", "density", "normalize", "rescale", "lambda", "int8_mask"})),
    "dare_linear": ("dare", frozenset({"weight", "density", "normalize", "rescale", "lambda", "int8_mask"})),
    "dare_ties": ("dare_ties", frozenset({"weight", "density", "normalize", "rescale", "lambda", "int8_mask"})),
    "della": ("della", frozenset({"weight", "density", "epsilon", "normalize", "rescale", "lambda", "int8_mask"})),
    "della_linear": (
        "della_linear", frozenset({"weight", "density", "epsilon", "normalize", "rescale", "lambda", "int8_mask"})
    ),
}  # fmt: skip
"""mergekit's method -> that of `combine`, and the parameters that it has."""

_OTHERS = frozenset({
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "karcher", "model_stock", "multislerp", "nearswap", "nuslerp",
    "passthrough", "ram", "ramplus_tl", "sce", "slerp",
})  # fmt: skip
_ELECTS = frozenset({"ties", "dare_ties", "della"})
_NORMALIZES = frozenset({"linear", "ties", "della"})  # where nothing says otherwise
_DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}
_TOP = frozenset({"merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source"})
_EPSILON, _NOTHING = 0.15, 1e-8
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_mergekit(table: Table) -> bool:
    """Tell whether a mapping is a configuration of mergekit."""
    return "merge_method" in table.entries


def translated(table: Table, path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the recipe of a configuration of mergekit, and notes on it.

    Raises `UnsupportedAdapter` with everything in it that has no equal here, each by its name.
    """
    reader = _Reader(path)
    document = reader.document(table)
    if reader.problems:
        raise UnsupportedAdapter(
            f"{path}: not done here: {counted(len(reader.problems), 'thing')} in this configuration of mergekit",
            reader.problems,
        )
    return document, tuple(reader.notes)


class _Reader(Fields):
    """Notes what is not done while it reads."""

    def document(self, table: Table) -> dict[str, Any]:
        """Return the recipe as far as it can be said."""
        of = table.entries
        name = self.text(of["merge_method"], "merge_method")
        if "slices" in of or "modules" in of:
            which = "slices" if "slices" in of else "modules"
            self.fault(of[which], f"{which}: layers of models are put together there, and recipes combine adapters")
            return {}
        if name not in METHODS:
            like = (
                "" if name in _OTHERS else nearest(name, METHODS)
            ) or f"; of mergekit's methods {', '.join(METHODS)} are read"
            self.fault(of["merge_method"], f"merge_method: {name} is not done with adapters{like}")
            return {}
        for key in of.keys() - _TOP:
            self.fault(of[key], f"{key}: there is no equal of it here")
        if "tokenizer_source" in of and self.text(of["tokenizer_source"], "tokenizer_source") != "base":
            self.fault(
                of["tokenizer_source"], "tokenizer_source: the base's tokenizer comes along, so only base is done"
            )
        shared = self.table(of.get("parameters"), "parameters")
        entries = self._entries(of.get("models"))
        base = self._base(of.get("base_model"), entries, name)
        if self.problems or base is None:
            return {}
        return self._recipe(name, base, entries, shared, of)

    def _recipe(
        self, name: str, base: str, entries: Sequence[Entry], shared: Mapping[str, Node], of: Mapping[str, Node]
    ) -> dict[str, Any]:
        method, known = METHODS[name]
        for where in [shared, *(entry.parameters for entry in entries)]:
            for key in where.keys() - known:
                self.fault(where[key], f"parameters: {key}: {name} has no such parameter{nearest(key, known)}")
        for where in [entry.parameters for entry in entries]:
            for key in where.keys() & {"normalize", "rescale", "lambda", "int8_mask"}:
                self.fault(where[key], f"parameters: {key}: it is one for all models, beside merge_method")
        listed = entries if name == "linear" else [entry for entry in entries if entry.adapter]
        weights = [self.number(entry, shared, "weight", None) for entry in listed]
        normalize = self.switch(shared, "normalize", name in _NORMALIZES)
        rescale = self.switch(shared, "rescale", method not in ("linear", "ties"))
        factor = self.number(None, shared, "lambda", 1.0)
        total = math.fsum(weights)
        if name == "linear" and abs(total) < _NOTHING:
            self.problems.append("parameters: weight: the weights add up to 0, and linear divides by that")
        elif name == "linear" and not normalize and not math.isclose(total, 1, rel_tol=1e-9):
            self.problems.append(
                f"parameters: normalize: false, with weights that add up to {total:g}, makes {total:g} times the base, "
                "which no adapter does"
            )
        if normalize and name not in _ELECTS and abs(total) >= _NOTHING:
            weights = [weight / total for weight in weights]
        adapters = [entry.adapter for entry in listed if entry.adapter]
        kept = [weight for entry, weight in zip(listed, weights, strict=True) if entry.adapter]
        names = _names(adapters)
        step: dict[str, Any] = {"command": "combine", "adapters": [names[each] for each in adapters], "weight": kept}
        if method != "linear":
            step |= {"method": method, "density": self._one(listed, shared, "density", 1.0), "like": "mergekit"}
            if "epsilon" in known:  # which is nothing where all is kept
                epsilon = self._one(listed, shared, "epsilon", _EPSILON)
                step["epsilon"] = epsilon if step["density"] < 1 else 0.0
            step |= {"normalize": normalize} if name in _ELECTS else {}
            step |= {"rescale": rescale, "rank": FULL}
            self.notes.append(
                "the combined adapter has the full rank, as mergekit's result has; a smaller rank cuts it"
            )
            self._check_chances(step)
        if method not in ("linear", "ties"):
            self.notes.append(
                "elements are kept with mergekit's chances, drawn by --seed of combine, not by torch's stream"
            )
        if method == "linear" and {"density", "rescale"} & {
            *shared,
            *(key for each in listed for key in each.parameters),
        }:
            self.notes.append(f"density and rescale have no effect on {name}, as in mergekit")
        step["dtype"] = "f32"
        merge: dict[str, Any] = {"command": "merge", "base": "base", "adapters": ["combined"]}
        merge |= {"weight": [factor]} if factor != 1 else {}
        merge |= self._dtype(of)
        inputs = {"base": self._place(base)} | {names[each]: self._place(each) for each in adapters}
        return {"inputs": inputs, "steps": {"combined": step, "merged": merge}}

    def _check_chances(self, step: Mapping[str, Any]) -> None:
        density, epsilon = step["density"], step.get("epsilon")
        if not 0 < density <= 1:
            self.problems.append(f"parameters: density: {density:g} keeps nothing, or more than all")
        elif epsilon is not None and density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            self.problems.append(f"parameters: epsilon: {density:g} ± {epsilon:g} leaves the range from 0 to 1")

    def _dtype(self, of: Mapping[str, Node]) -> dict[str, str]:
        if (node := of.get("out_dtype") or of.get("dtype")) is None:
            return {}
        name = self.text(node, "dtype").removeprefix("torch.")
        if name not in _DTYPES:
            self.fault(node, f"dtype: {name} is none of {', '.join(_DTYPES)}")
        return {"dtype": _DTYPES.get(name, "")}

    def _entries(self, node: Node | None) -> list[Entry]:
        if not isinstance(node, Items) or not node.items:
            self.problems.append("models: expected a list of models, each base+adapter")
            return []
        entries = []
        for item in node.items:
            if not isinstance(item, Table) or "model" not in item.entries:
                self.fault(item, "models: expected an entry with model: base+adapter")
                continue
            for key in item.entries.keys() - {"model", "parameters"}:
                self.fault(item.entries[key], f"models: {key}: an entry has model and parameters")
            base, adapter = self._reference(item.entries["model"])
            entries.append(Entry(base, adapter, self.table(item.entries.get("parameters"), "parameters")))
        return entries

    def _reference(self, node: Node) -> tuple[str, str | None]:
        """Return base and adapter of a model, as mergekit's `ModelReference` reads it."""
        if isinstance(node, Table):
            for key in node.entries.keys() - {"model", "lora"}:
                self.fault(node.entries[key], f"model: {key}: there is no equal of it here")
            base, lora = (self._path(node.entries[key]) if key in node.entries else None for key in ("model", "lora"))
            return base or "", lora
        text = self.text(node, "model")
        base, plus, lora = text.partition("+")
        if "+" in lora:
            self.fault(node, f"model: {text!r:.100} has more than one adapter")
        return base, lora if plus else None

    def _path(self, node: Node) -> str:
        if isinstance(node, Table):
            path, revision = (node.entries.get(key) for key in ("path", "revision"))
            text = self.text(path, "path") if path else ""
            return f"{text}@{self.text(revision, 'revision')}" if revision else text
        return self.text(node, "model")

    def _base(self, node: Node | None, entries: Sequence[Entry], method: str) -> str | None:
        """Return the one base of all models; what differs is a problem."""
        if node is not None:
            base, adapter = self._reference(node)
            if adapter:
                self.fault(node, "base_model: it has an adapter itself; merge that into it first")
        elif method != "linear":
            self.problems.append(f"base_model: {method} needs one")
            return None
        else:
            base = entries[0].base if entries else ""
        alone = [entry.base for entry in entries if not entry.adapter and self._is_adapter(entry.base)]
        self.problems += [f"models: {one} is an adapter without its base; mergekit's form is base+adapter, as in "
                          f"'model: BASE+{one}'" for one in alone]  # fmt: skip
        if alone:
            return None
        for entry in entries:
            if entry.base != base:
                what = "another base" if entry.adapter else "a whole model"
                self.problems.append(f"models: {entry.base} is {what}; adapters of {base} are combined here")
        if entries and not any(entry.adapter for entry in entries):
            self.problems.append("models: none of them has an adapter, as base+adapter has")
        return base

    def _is_adapter(self, text: str) -> bool:
        """Tell whether what mergekit would take for a model is a file or a folder of an adapter."""
        path = next((path for path in (self.path.parent / text, Path(text)) if path.exists()), None)
        if path is None or path.suffix != ".safetensors":
            return path is not None and (path / "adapter_config.json").is_file()
        try:
            return bool(factors_of(read_header(path).tensors))
        except BadFile:
            return False

    def _place(self, text: str) -> str:
        """Return where mergekit finds a model or an adapter: a path that is there, or a repository of the Hub."""
        path, _, revision = text.partition("@")
        if (self.path.parent / text).exists():
            return text
        if Path(text).exists():
            return str(Path(text).absolute())
        return f"hf://{path}" + (f"@{revision}" if revision else "") if _HUB.fullmatch(path) else text

    def _one(self, entries: Sequence[Entry], shared: Mapping[str, Node], key: str, default: float) -> float:
        """Return a parameter that all models have alike."""
        values = [self.number(entry, shared, key, default) for entry in entries]
        if len(set(values)) > 1:
            told = ", ".join(f"{value:g}" for value in values)
            self.problems.append(f"parameters: {key}: {told}; combine has one for all adapters")
        return values[0] if values else default


def _names(adapters: Sequence[str]) -> dict[str, str]:
    """Return a name of the recipe for each adapter, after the last part of its path."""
    names: dict[str, str] = {}
    for adapter in adapters:
        if adapter in names:
            continue
        last = re.split(r"[/\\]", adapter.partition("@")[0].rstrip("/\\"))[-1]
        plain = re.sub(r"[^A-Za-z0-9._-]", "-", last).lstrip("._-")[:80] or "adapter"
        taken = {"base", "combined", "merged", *names.values()}
        numbers = (f"{plain}-{number}" for number in range(2, len(adapters) + 5))
        names[adapter] = plain if plain not in taken else next(name for name in numbers if name not in taken)
    return names
