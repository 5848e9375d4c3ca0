"""The ranks of all layers: a rule for each, one for all, or the best use of a budget."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from loratools.linalg.ranks import budget
from loratools.linalg.ranks.noise import AboveNoise
from loratools.linalg.ranks.rules import FULL, Bounded, Fixed, RankRule, bounded, check_bounds
from loratools.options import Options

Shapes = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Ranks:
    """How ranks are chosen. Exactly one of `rule`, `noise` and `budget` is set.

    `rule` is applied to each layer; `noise` keeps what stands above the rounding of the fine-tune's dtype; `budget` is
    a number of parameters, shared out so that the most energy is captured. Ranks lie in [minimum, maximum] and are
    multiples of `multiple_of` where the shape allows it; `uniform` gives all layers one rank: the largest that a rule
    calls for, or that the budget allows. Raises `InvalidOption` for bounds that contradict each other.
    """

    rule: RankRule | None = None
    noise: bool = False
    budget: int | None = None
    uniform: bool = False
    minimum: int = 1
    maximum: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        checked = Options()
        checked.flag("noise", self.noise)
        checked.flag("uniform", self.uniform)
        checked.number("budget", self.budget, least=1, optional=True)
        if sum((self.rule is not None, self.noise is True, self.budget is not None)) != 1:
            checked.problems.append("one way to choose ranks is needed: a rule (a rank, energy, …), noise or a budget")
        try:
            check_bounds(self.minimum, self.maximum, self.multiple_of)
        except ValueError as error:
            checked.problems.append(str(error))
        checked.done()

    @classmethod
    def of(cls, ranks: Ranks | int) -> Ranks:
        """Return `ranks` itself, or for a number that rank everywhere; raise `ValueError` for anything else."""

        if isinstance(ranks, Ranks):
            return ranks
        if not isinstance(ranks, int) or isinstance(ranks, bool):
            raise ValueError(f"{ranks!r} is no way to choose ranks; give a number, or `Ranks`")
        return cls(Fixed(ranks))

    def to_json(self) -> dict[str, Any]:
        """Return the choice as a record states it: what is set, and the rule as it is written."""
        stated = {field.name: getattr(self, field.name) for field in fields(self)}
        stated |= {"rule": self.rule and repr(self.rule), "noise": self.noise or None}
        return {name: value for name, value in stated.items() if value is not None}

    def __str__(self) -> str:
        """Say the choice in the words of the options.

        >>> from loratools.linalg.ranks.rules import SvFro
        >>> str(Ranks(SvFro(0.9), uniform=True, maximum=6))
        'sv-fro 0.9, one rank for all modules, at most 6'
        >>> str(Ranks(Fixed(FULL)))
        'the full rank'
        """
        said = "above the noise" if self.noise else f"a budget of {self.budget} parameters"
        if self.rule is not None:
            values = " ".join(str(getattr(self.rule, each.name)) for each in fields(self.rule))  # type: ignore[arg-type]
            name = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(self.rule).__name__).lower()
            said = f"{'rank' if name == 'fixed' else name} {values}" if values != str(FULL) else "the full rank"
        more = {
            "one rank for all modules": self.uniform, f"at least {self.minimum}": self.minimum != 1,
            f"at most {self.maximum}": self.maximum is not None,
            f"in multiples of {self.multiple_of}": self.multiple_of != 1,
        }  # fmt: skip
        return ", ".join([said, *(words for words, holds in more.items() if holds)])

    def first(self, shapes: Shapes, edge: float) -> RankRule:
        """Return the rule of the first look at a layer; `edge` is the noise edge of its fine-tuned weight."""

        if self.budget is not None:
            # Twice the uniform rank shows most layers as much as they will get; `decide` names those that need more.
            even = self.budget // max(1, sum(m + n for m, n in shapes))
            return Fixed(max(1, self.minimum, min(2 * even + 8, self.maximum or 2 * even + 8)))
        rule: RankRule = AboveNoise(edge) if self.rule is None else self.rule
        bounds = (self.minimum, self.maximum, self.multiple_of)
        return rule if bounds == (1, None, 1) else Bounded(rule, *bounds)

    def decide(self, spectra: Sequence[Sequence[float]], shapes: Shapes, known: Sequence[bool]) -> Decision:
        """Return the rank of each layer from the singular values seen, and which layers must be shown further.

        `known` says for each layer that no more singular values exist, or may be used. A layer that would take all it
        was shown may deserve more.
        """

        if self.budget is not None and self.uniform:
            spread = budget.uniform(spectra, shapes, self.budget, multiple_of=self.multiple_of)
            ranks = tuple(min(rank, self.maximum or rank) for rank in spread)
        elif self.budget is not None:
            ranks = budget.water_filling(
                spectra, shapes, self.budget,
                minimum=self.minimum, maximum=self.maximum, multiple_of=self.multiple_of,
            )  # fmt: skip
        elif self.uniform:
            # What one layer needs all get; the extra directions cost nothing in accuracy.
            rank = bounded(max(map(len, spectra), default=1), self.minimum, self.maximum, self.multiple_of)
            short = {i: rank for i, spectrum in enumerate(spectra) if len(spectrum) < rank and not known[i]}
            return Decision(tuple(min(rank, len(spectrum)) for spectrum in spectra), short)
        else:
            return Decision(tuple(map(len, spectra)), {})
        more = {
            i: 2 * len(spectrum)
            for i, (rank, spectrum) in enumerate(zip(ranks, spectra, strict=True))
            if rank == len(spectrum) and not known[i] and rank != self.maximum
        }
        return Decision(ranks, more)


@dataclass(frozen=True, slots=True)
class Decision:
    """The rank of each layer so far, and layer -> how many singular values it should be shown next."""

    ranks: tuple[int, ...]
    more: dict[int, int]
