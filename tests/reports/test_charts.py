"""Figures: every number has its place and its colour, and says itself on hovering."""

from __future__ import annotations

import re

from loratools.reports.charts.bars import Bars
from loratools.reports.charts.drawing import WIDTH
from loratools.reports.charts.heat import Heat, key
from loratools.reports.charts.lines import Line, Lines
from loratools.reports.scale import Scale
from tests.reports.reading import Reading


def test_a_heat_map_has_a_cell_for_each_number() -> None:
    values = {(0, 0): 0.0, (0, 1): 1.0, (2, 1): 0.5}
    heat = Heat(
        "name",
        ["a", "b", "c"],
        ["x", "y"],
        values,
        Scale(0.0, 1.0),
        lambda row, column, value: f"{row}{column}={value}",
    )
    drawing = heat.draw()
    cells = re.findall(
        r'<path class="(\w\d)" d="M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)H\2z"><title>(.*?)</title>', drawing
    )
    assert [(colour, title) for colour, *_, title in cells] == [("s0", "ax=0.0"), ("s8", "ay=1.0"), ("s4", "cy=0.5")]
    places = [(float(x), float(y)) for _, x, y, *_ in cells]
    assert places[1][1] == places[0][1] < places[2][1]
    assert places[0][0] < places[1][0] == places[2][0]
    assert Reading.of(drawing).figures == ["name"]
    assert Reading.of(key(Scale(0.0, 1.0))).figures == ["colours from 0 to 1"]
    for high, end in ((1.0, "1"), (0.25, "0.25"), (20.0, "20"), (0.1, "0.1")):
        assert Reading.of(key(Scale(0.0, high), lambda value: f"{value:.3f}")).words[-1] == end


def test_lines_go_through_their_points() -> None:
    chart = Lines("name", "rank", "kept", [Line("a", [(1, 0.0), (2, 0.5), (3, 1.0)])], low=0.0, high=1.0)
    (path,) = re.findall(r'points="(.*?)"', chart.draw())
    x1, y1, x2, y2, x3, y3 = map(float, path.split())
    assert x1 < x2 < x3 <= WIDTH
    assert abs((x1 + x3) / 2 - x2) < 0.11
    assert abs((y1 + y3) / 2 - y2) < 0.11
    assert y1 > y3
    assert "a: rank 2, 0.5" in Reading.of(chart.draw()).titles
    assert chart.key() == ""


def test_a_logarithmic_axis_leaves_out_what_has_no_logarithm() -> None:
    chart = Lines(
        "name", "i", "σ", [Line("a", [(1, 1.0), (2, 0.1), (3, 0.0)]), Line("b", [(1, 0.0)])], logarithmic=True
    )
    assert chart.draw().count("<circle") == 2
    assert chart.key().count("<li>") == 2
    assert Lines("name", "i", "σ", [Line("a", [(1, 0.0)])], logarithmic=True).draw() == ""


def test_bars_are_as_long_as_their_numbers() -> None:
    drawing = Bars("name", [("a", 1.0), ("b", 0.5), ("c", 0.0)]).draw()
    lengths = [float(length) for length in re.findall(r'class="b" d="M[\d.]+ [\d.]+h([\d.]+)', drawing)]
    assert abs(lengths[0] / 2 - lengths[1]) < 0.11
    assert lengths[2] == 0
