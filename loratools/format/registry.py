"""The kinds of update that the format registers: their tensors and the shapes these have. Twin of `spec/v1/kinds.csv`.

What a kind does to a weight is in `loratools/adapter/kinds/`; a registered kind says only what a header can show, by
the rules of `shapes.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loratools.adapter.parts import A_EMBEDDING, B_EMBEDDING, BIAS, MAGNITUDE, A, B
from loratools.format import shapes
from loratools.format.shapes import Rule

ROWS, FLAG = "token_adapter.trainable_tokens_delta", "on_input"
"""Parts with rules of their own: rows trained whole, and the one part that may be no floating-point number."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A registered kind: the clauses of its shapes and of its formula, the sets of parts it may have, and `fault`.

    `fault(shapes, rank, layout)` returns a sentence about the first shape that does not fit, or None. `since` is the
    version that registered it; `peft` tells whether PEFT's LoRA has it, `targeted` whether its `target_modules` name
    it, and `numbers` which of rank and scaling its formula has.
    """

    name: str
    clause: str
    formula: str
    required: tuple[frozenset[str], ...]
    fault: Rule
    optional: frozenset[str] = frozenset()
    layout: Mapping[str, type] | None = None
    """Fields of a layout that the kind REQUIRES; None where it needs no layout."""
    since: tuple[int, int] = (1, 1)
    peft: bool = False
    targeted: bool = True
    numbers: tuple[str, ...] = ("rank", "scaling")

    @property
    def parts(self) -> frozenset[str]:
        """Every part that a module of this kind may have."""
        return self.optional.union(*self.required)

    def accepts(self, parts: frozenset[str]) -> bool:
        """Tell whether a module of this kind may have exactly these parts."""
        return parts in self.required or any(
            required <= parts <= required | self.optional for required in self.required
        )

    def ones(self, parts: Iterable[str]) -> list[str]:
        """Return which of rank and scaling mean nothing for a module with these parts, and so are 1."""
        numbers = () if shapes.WHOLE_KRONECKER.issubset(parts) else self.numbers
        return [name for name in ("rank", "scaling") if name not in numbers] if len(numbers) < 2 else []


def _sets(*names: Iterable[str]) -> tuple[frozenset[str], ...]:
    return tuple(map(frozenset, names))


_PAIR, _BIAS = {A, B}, frozenset({BIAS})
_LOCON = {A, B, "lora_mid.weight"}
_HADAMARD = {f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
_LOHA = _sets(_HADAMARD, _HADAMARD | {"hada_t1", "hada_t2"})
_LOKR = _sets(*(
    {f"lokr_{name}" for name in (*first, *second)}
    for first in (("w1",), ("w1_a", "w1_b"))
    for second in (("w2",), ("w2_a", "w2_b"), ("w2_a", "w2_b", "t2"))
))  # fmt: skip
_STACK = {"experts": int, "parameter": str, "transposed": bool}
_WDORA = tuple(parts | {shapes.SCALE} for parts in (*_sets(_PAIR, _LOCON), *_LOHA, *_LOKR))

_OF_1_0 = (
    Kind("conv", "T-08", "T-15", _sets(_PAIR), shapes.conv, _BIAS, None, (1, 0), True),
    Kind(
        "dora", "T-09", "T-16", _sets(_PAIR | {MAGNITUDE}, {A_EMBEDDING, B_EMBEDDING, MAGNITUDE}), shapes.dora, _BIAS,
        None, (1, 0), True,
    ),
    Kind(
        "embedding", "T-07", "T-14", _sets({A_EMBEDDING, B_EMBEDDING}), shapes.embedding, frozenset(), None, (1, 0),
        True,
    ),
    Kind("experts", "T-10", "T-17", _sets(_PAIR), shapes.experts, frozenset(), _STACK, (1, 0), True, targeted=False),
    Kind("lora", "T-06", "T-13", _sets(_PAIR), shapes.linear, _BIAS, None, (1, 0), True),
)  # fmt: skip
_OF_1_1 = (
    Kind("full", "T-36", "T-37", _sets({"diff"}), shapes.full, frozenset({"diff_b"}), numbers=()),
    Kind("glora", "T-30", "T-31", _sets(shapes.GLORA), shapes.glora),
    Kind("ia3", "T-34", "T-35", _sets({"weight", FLAG}), shapes.ia3, numbers=()),
    Kind("locon", "T-24", "T-25", _sets(_LOCON), shapes.locon),
    Kind("loha", "T-26", "T-27", _LOHA, shapes.loha),
    Kind("lokr", "T-28", "T-29", _LOKR, shapes.lokr),
    Kind("norm", "T-38", "T-39", _sets({"w_norm"}), shapes.norm, frozenset({"b_norm"}), numbers=()),
    Kind("oft", "T-32", "T-33", _sets({"oft_blocks"}), shapes.oft, frozenset({"rescale"}), {"constraint": float},
         numbers=("rank",)),
    Kind(
        "tokens", "T-42", "T-43", _sets({ROWS}), shapes.tokens, layout={"rows": list}, peft=True, targeted=False,
        numbers=(),
    ),
    Kind("wdora", "T-40", "T-41", _WDORA, shapes.wdora),
)  # fmt: skip

KINDS: Mapping[str, Kind] = {
    kind.name: kind for kind in sorted((*_OF_1_0, *_OF_1_1), key=lambda kind: (kind.since, kind.name))
}
"""Registry of version 1.1, by name; those of 1.0 first."""

_ALL = {part for kind in KINDS.values() for part in kind.parts}
_OWN_NAMES = sorted(part for part in _ALL if not part.startswith(("lora_", "token_")))


def split(path: str, kinds: Mapping[str, Kind]) -> tuple[str, str] | None:
    """Return (module, part) of a name without prefix whose part does not begin as PEFT's do; None if it is none.

    `kinds` are those of the modules that the manifest lists: only they tell `x.weight`, a part of the module x, from
    the parameter of that name.
    """
    for part in _OWN_NAMES:
        module = path.removesuffix(f".{part}")
        if module != path and module in kinds and part in kinds[module].parts:
            return module, part
    return None
