"""How strong a change is, how much of its rank it uses, and what a smaller rank would keep."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median

from loratools.reports.arrange import arranged
from loratools.reports.charts.lines import COLOURS, Line, Lines
from loratools.reports.markup import element, joined
from loratools.reports.numbers import number, percent, plural, whole
from loratools.reports.page import Figure, Section, Table
from loratools.reports.pages._maps import Several, layer_map, middle
from loratools.reports.scale import Scale, few_ranks
from loratools.surgery.spectrum import AdapterSpectrum, ModuleSpectrum

_RANKS = 12  # ranks in a table


def sections(measured: AdapterSpectrum) -> Iterator[Section]:
    """Yield the sections of what was measured, none where nothing was."""
    modules = {module.module: module for module in measured.modules}
    if modules:
        yield _strength(modules)
        yield _use(modules)
        yield _smaller(measured)
    if unmeasured := {**measured.left_out, **measured.in_part}:
        yield _unmeasured(unmeasured, measured)


def lead(measured: AdapterSpectrum) -> str:
    """Return the headline: where most of the change is, and which rank would do."""
    if not measured.norm:
        return "It changes nothing that can be measured without its base model." if measured.left_out else (
            "Every change in it is zero.")  # fmt: skip
    energy: dict[str, float] = defaultdict(float)
    for projection, names in _by_projection([module.module for module in measured.modules]).items():
        members = set(names)
        norms = (module.norm / measured.norm for module in measured.modules if module.module in members)
        energy[projection] = math.fsum(norm**2 for norm in norms)
    first = max(energy, key=lambda projection: energy[projection])
    share = energy[first]
    where = f"{share * 100:.0f} % of its change ‖ΔW‖² is in {first}; " if len(energy) > 1 else ""
    if not _products(measured.modules):
        most = max(module.rank for module in measured.modules)
        rest = (
            f"as a matrix it has more than its rank: the best rank {most} keeps {percent(measured.kept(most))} of it."
        )
        return _sentence(where + (rest if most else "it is no product of two factors."))
    rank, most = measured.uniform_rank[0], max(module.rank for module in measured.modules)
    enough = next(r for r in range(1, rank + 1) if measured.kept(r) >= 0.99) if rank else 0
    lower = f"rank {most - 1} would keep {percent(measured.kept(most - 1))} of it" if most > 1 else "there is no less"
    text = where + (
        f"rank {enough} of {most} keeps {percent(measured.kept(enough))} of it."
        if enough < most
        else f"it needs its rank {most}: {lower}."
    )
    return _sentence(text)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _products(modules: Iterable[ModuleSpectrum]) -> bool:
    """Tell whether every change is a product of its rank, as a DoRA's with its base is not."""
    return all(len(module.sigma) <= module.rank for module in modules)


def joint_norm(modules: Mapping[str, ModuleSpectrum]) -> Several:
    """Return what gives √Σ‖ΔW‖² of several modules."""
    return lambda names: math.hypot(*(modules[name].norm for name in names))


def _strength(modules: Mapping[str, ModuleSpectrum]) -> Section:
    figures = [
        layer_map(
            "Strength of the change, ‖ΔW‖", "‖ΔW‖",
            "The stronger its colour, the more the adapter moves that weight; ‖ΔW‖ is the length of scaling·B·A.",
            list(modules), joint_norm(modules),
        )
    ]  # fmt: skip
    if relative := [name for name, module in modules.items() if module.base_norm]:

        def share(names: Sequence[str]) -> float:
            return joint_norm(modules)(names) / math.hypot(*(modules[name].base_norm or 0.0 for name in names))

        figures.append(
            layer_map(
                "Beside the weight it changes, ‖ΔW‖ / ‖W‖", "‖ΔW‖/‖W‖",
                "A cell of 1 % moves the weight by a hundredth of its own length: compare cells, for weights differ.",
                relative, share, show=percent,
            )
        )  # fmt: skip
    text = "Each cell is one weight of the model: layers go down, projections across. Hover over one for its number."
    return Section("Where it changes the model", text, figures)


def _use(modules: Mapping[str, ModuleSpectrum]) -> Section:
    moving = [name for name, module in modules.items() if module.norm]
    lines = [
        Line(projection, _falling([modules[name] for name in names]))
        for projection, names in _by_projection(moving, COLOURS).items()
    ]
    longest = max((len(line.points) for line in lines), default=0)
    spectra = Lines(
        "Line chart of singular values by their number, relative to the largest", "singular value", "σᵢ / σ₁",
        lines, logarithmic=True,
    )  # fmt: skip
    steps = few_ranks(longest)
    shares = {line.name: dict(line.points) for line in lines}
    table = Table(
        ["projection", *(f"σ{i}/σ1" for i in steps)],
        [[name, *(number(at[i]) if i in at else "" for i in steps)] for name, at in shares.items()],
    )  # fmt: skip
    figures = [
        Figure(
            "Singular values of ΔW", joined(spectra.draw(), spectra.key()),
            "A line that falls steeply needs few directions; a flat one uses its whole rank. Medians over layers.",
            table,
        )
    ]  # fmt: skip
    effective = {name: module.effective_rank for name, module in modules.items()}
    ranks = sorted({module.rank for module in modules.values()} - {0})
    bound = (f", at most its rank, {ranks[0]}" if len(ranks) == 1 else ", at most its rank") if ranks else ""
    within = _products(modules.values()) and ranks
    figures.append(
        layer_map(
            "Effective rank", "effective rank",
            f"How many directions a module uses as if all were equally strong{bound if within else ''}.",
            list(modules), middle(effective), scale=Scale(0.0, float(max(ranks))) if within else None,
        )
    )  # fmt: skip
    text = (
        "A module of rank r can use r directions. Its singular values say how strong each is; where they fall fast, a "
        "smaller rank would do."
    )
    return Section("How much of its rank it uses", text, figures)


def _smaller(measured: AdapterSpectrum) -> Section:
    most = max((module.true_rank for module in measured.modules), default=0)
    kept = [(float(rank), measured.kept(rank)) for rank in range(1, most + 1)]
    chart = Lines(
        "Line chart of the share of the change that a smaller rank keeps", "rank", "kept of ‖ΔW‖²",
        [Line("", kept)], low=0.0, high=1.0, show=lambda share: f"{share * 100:.3g} %",
    )  # fmt: skip
    rows = [
        [whole(rank), percent(measured.kept(rank)), number(_lost(measured, rank)),
         whole(sum(min(rank, module.true_rank) * sum(module.shape) for module in measured.modules))]
        for rank in few_ranks(most)
    ]  # fmt: skip
    needs = "; ".join(
        f"{share} of the change in every module takes rank {rank} at most, {whole(parameters)} parameters"
        for share, rank, parameters in zip(
            ("99 %", "99.9 %"), measured.uniform_rank, measured.needed_parameters, strict=True
        )
    )
    products = _products(measured.modules)
    by = element("code", "loratools resize --rank r") if products else "the best change of that rank"
    figure = Figure(
        "A resize to rank r keeps …" if products else "The best change of rank r keeps …", chart.draw(),
        joined("Read up from a rank to the share of ‖ΔW‖² that ", by, " keeps."),
    )  # fmt: skip
    table = Figure(
        "… in numbers", Table(["rank", "kept", "error", "parameters"], rows, 0).draw(),
        "The error is ‖ΔW − ΔWᵣ‖ / ‖ΔW‖, the least that a change of rank r can have.",
    )  # fmt: skip
    return Section("What a smaller rank would keep", f"{needs}.", [figure, table])


def _lost(measured: AdapterSpectrum, rank: int) -> float:
    """Return ‖ΔW − ΔWᵣ‖/‖ΔW‖ of the best changes of a rank, by what they leave out: 0 where that is nothing."""
    lost = math.fsum(value * value for module in measured.modules for value in module.sigma[rank:])
    return math.sqrt(lost) / measured.norm if measured.norm else 0.0


def _unmeasured(reasons: Mapping[str, str], measured: AdapterSpectrum) -> Section:
    rows = [[module, reason] for module, reason in reasons.items()]
    more = [[f"and {len(rows) - _RANKS} more", ""]] if len(rows) > _RANKS else []
    text = (
        f"{plural(len(measured.left_out), 'module')} could not be measured and {len(measured.in_part)} only in part: "
        "what they do depends on the weight under them, which --base gives."
    )
    return Section("What was not measured", text, table=Table(["module", "why"], [*rows[:_RANKS], *more], 2))


def _by_projection(names: Sequence[str], most: int | None = None) -> dict[str, list[str]]:
    """Return the modules of each projection; where there are more than `most`, those of the fewest modules as one."""
    found: dict[str, list[str]] = defaultdict(list)
    for grid in arranged(names):
        for (_, column), members in grid.members.items():
            found[grid.columns[column] or "other modules"] += members
    if most is None or len(found) <= most:
        return dict(found)
    kept = sorted(found, key=lambda projection: -len(found[projection]))[: most - 1]
    rest = [name for projection in found if projection not in kept for name in found[projection]]
    return {projection: found[projection] for projection in found if projection in kept} | {"the rest": rest}


def _falling(modules: Sequence[ModuleSpectrum]) -> list[tuple[float, float]]:
    """Return the median of σᵢ/σ₁ at each i, of the modules that have as many directions as half of them."""
    longest = sorted(module.true_rank for module in modules)[len(modules) // 2]
    return [
        (float(i + 1), median(module.sigma[i] / module.sigma[0] for module in modules if module.true_rank > i))
        for i in range(longest)
    ]
