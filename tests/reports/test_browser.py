"""Pages in headless Chromium: no text is cut, none lies over another, nothing is wider than the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from shutil import copytree

import pytest

from loratools.reports import report
from loratools.surgery.extract import extract
from loratools.surgery.merge import merge
from loratools.surgery.resize import resize
from tests.make import REPOSITORY
from tests.reports.browser import FAULTS, NAMES, Browser, executable
from tests.surgery.models import lora, save_adapter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(executable() is None, reason=f"none of {', '.join(NAMES)} is installed"),
]
DEMO = REPOSITORY / "loratools" / "demo" / "data"
LOOKS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser.started(tmp_path_factory.mktemp("browser")) as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind, and some of names that are hard to place."""
    work = tmp_path_factory.mktemp("pages")
    long = {
        f"model.{'very_' * 12}long.layers.{i}.{'projection' * 4}_{side}": (9, 7) for i in range(70) for side in "qv"
    }
    save_adapter(work / "long", lora(long, rank=3))
    wide = {f"模型.层.{i}.投影{j}": (9, 7) for i in range(6) for j in range(30)}
    save_adapter(work / ("n" * 200), lora(wide, rank=3))
    merge(DEMO / "base", DEMO / "adapter", work / "merged")
    extract(DEMO / "base", work / "merged", work / "extracted", 4)
    resize(DEMO / "adapter", work / "small", 2)
    inputs: dict[str, tuple[list[Path], Path | None]] = {
        "adapter": ([DEMO / "adapter"], DEMO / "base"),
        "two": ([DEMO / "adapter", work / "small"], DEMO / "base"),
        "several": ([DEMO / "adapter", work / "small", work / "extracted", work / "small"], None),
        "merge": ([work / "merged", DEMO / "adapter"], DEMO / "base"),
        "folder": ([work], None),
        "extraction": ([work / "extracted"], None),
        "anew": ([work / "merged", work / "extracted"], DEMO / "base"),
        "long": ([work / "long"], None),
        "wide": ([work / ("n" * 200)], None),
    }
    for name, (sources, base) in inputs.items():
        report(sources, work / f"{name}.html", base=base)
    return {name: work / f"{name}.html" for name in inputs}


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_nothing_is_cut_or_covered(width: int, scheme: str, browser: Browser, pages: dict[str, Path]) -> None:
    for page in pages.values():
        browser.open(page, width, scheme)
        assert browser.value("document.querySelectorAll('svg').length") > 1
        assert browser.value(FAULTS) == [], page.stem


@pytest.mark.parametrize("page", ["adapter", "merge", "folder"])
def test_tables_of_short_names_are_whole_on_a_telephone(page: str, browser: Browser, tmp_path: Path) -> None:
    copytree(DEMO / "adapter", tmp_path / "of" / "adapter.safetensors")
    resize(DEMO / "adapter", tmp_path / "of" / "small", 2)
    merge(DEMO / "base", DEMO / "adapter", tmp_path / "merged")
    sources = {"adapter": [DEMO / "adapter"], "merge": [tmp_path / "merged", DEMO / "adapter"]}
    base = DEMO / "base" if page == "merge" else None
    report(sources.get(page, [tmp_path / "of"]), tmp_path / "page.html", base=base)
    browser.open(tmp_path / "page.html", 390)
    beyond = "[...document.querySelectorAll('.whole .scroll')].map(each => each.scrollWidth - each.clientWidth)"
    assert max(browser.value(beyond)) <= 0


def test_light_dark_and_paper_have_their_own_colours(browser: Browser, pages: dict[str, Path]) -> None:
    colour = "getComputedStyle(document.body).backgroundColor + getComputedStyle(document.querySelector('.s4')).fill"
    seen = []
    for scheme, medium in (("light", "screen"), ("dark", "screen"), ("dark", "print")):
        browser.open(pages["adapter"], 1280, scheme, medium)
        seen.append(browser.value(colour))
    assert len(set(seen)) == 3
    assert seen[2].startswith("rgb(255, 255, 255)")


def test_faults_are_found(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "wrong.html"
    page.write_text(
        '<body><div style="width:3000px">wide</div><p style="width:40px;overflow:hidden;white-space:nowrap">long words '
        'that are cut</p><svg role="img" width="200" height="40"><text x="5" y="20">one text</text>'
        '<text x="9" y="22">another</text><text x="190" y="20">beyond its figure</text></svg>'
    )
    browser.open(page, 390)
    found = " ".join(browser.value(FAULTS))
    for fault in ("the page is", "beyond the page", "cut: ", "one text lies over another", "outside its figure: beyond",
                  "a figure without a name"):  # fmt: skip
        assert fault in found
