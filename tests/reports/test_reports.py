"""Pages as files: the same bytes again, no path of the machine, nothing that runs, and strangers' names as text."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.errors import InvalidOption, OutputRefused
from loratools.reports import report
from loratools.reports.arrange import MOST_COLUMNS, MOST_ROWS, arranged
from loratools.reports.markup import Markup, element, escaped
from loratools.reports.numbers import names_of, shortened, width
from loratools.reports.scale import Scale, decades, ticks
from loratools.surgery.merge import merge
from tests.reports.conftest import text_of
from tests.reports.reading import Reading
from tests.surgery.models import lora, save_adapter, save_base


def test_equal_inputs_give_equal_bytes_wherever_they_lie(work: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    report(work / "adapter", work / "page.html", base=work / "base")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (work / "adapter").rename(elsewhere / "adapter")
    report([elsewhere / "adapter"], elsewhere / "again.html", base=work / "base")
    assert (work / "page.html").read_bytes() == (elsewhere / "again.html").read_bytes()
    page = text_of(work / "page.html")
    assert not [part for part in work.parts[1:] if part in page]


def test_the_bytes_of_models_are_told_as_they_are_read(work: Path) -> None:
    merge(work / "base", work / "adapter", work / "merged")
    told: list[int] = []
    report([work / "merged", work / "adapter"], work / "page.html", base=work / "base", progress=told.append)
    assert len(told) > 1
    assert sum(told) >= (work / "base" / "model.safetensors").stat().st_size - 2000  # all but the header


def test_the_page_needs_nothing_and_runs_nothing(work: Path) -> None:
    report(work / "adapter", work / "page.html", base=work / "base")
    page = text_of(work / "page.html")
    reading = Reading.of(page)
    assert not {tag for tag, _ in reading.tags} & {"script", "link", "img", "iframe", "object", "a", "form", "use"}
    assert not {name for _, attributes in reading.tags for name in attributes if name.startswith("on")}
    assert not re.search(r"https?:|url\(|@import|src=|href=", page)
    assert "default-src 'none'" in page
    assert reading.figures
    assert all(reading.figures)


def test_names_of_strangers_are_text(work: Path) -> None:
    name = 'model.layers.0.<script>alert("1")</script>\x1b\u202egnp.&amp;\u200b'
    folder = work / "a\nb<i>"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": "all-linear",
              "base_model_name_or_path": "/home/someone/<b>llama"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    factors = {"A": torch.ones(2, 8), "B": torch.ones(6, 2)}
    save_file(
        {f"base_model.model.{name}.lora_{side}.weight": factor for side, factor in factors.items()},
        folder / "adapter_model.safetensors",
    )
    report(folder, work / "page.html")
    page = text_of(work / "page.html")
    reading = Reading.of(page)
    assert "script" not in {tag for tag, _ in reading.tags}
    assert not re.search("[\u202e\u200b\x1b]", page)
    assert reading.headings[0] == "a\\nb<i>"
    assert any(r"<script>alert(" in words and r"\x1b\u202egnp.&amp;\u200b" in words for words in reading.words)
    assert "someone" not in page
    assert reading.facts["base model"].startswith("<b>llama, no hash")  # its last part alone


WIDE = {
    "experts": [f"model.layers.{i}.mlp.experts.{j}.{side}_proj" for i in range(60) for j in range(17) for side in "ud"],
    "deep": [f"model.layers.{i}.{'part' * 8}{j}.{'q' * 40}_proj" for i in range(100) for j in range(20)],
    "odd": [f"{'abcdefghij'[i % 10]}{i}.net.{i}.{i * i}.{'module' * 5}{i}" for i in range(2000)],
    "sorts": [f"{chr(97 + i % 26)}{'ab'[i % 2]}.{j}.w{i}{k}" for i in range(100) for j in range(10) for k in "ab"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WIDE)
def test_a_page_of_two_thousand_modules_is_small(case: str, work: Path) -> None:
    assert nbytes_of(work, WIDE[case], ["wide"]) < 300_000


@pytest.mark.slow
@pytest.mark.sweep(1)
@pytest.mark.parametrize("case", WIDE)
def test_a_comparison_of_two_thousand_modules_is_small(case: str, work: Path) -> None:
    """It arranges names as the page of one adapter does, which is there for every case."""
    assert nbytes_of(work, WIDE[case], ["wide", "other"]) < 300_000


def nbytes_of(work: Path, modules: Sequence[str], inputs: Sequence[str]) -> int:
    """Return the size of the page of these adapters, which change so many modules of a base."""
    shapes = dict.fromkeys(modules, (8, 8))
    assert len(shapes) >= 2000
    for seed, name in enumerate(inputs):
        save_adapter(work / name, lora(shapes, rank=2, seed=3 + seed))
    save_base(work / "large", {f"{module}.weight": torch.eye(8) for module in shapes})
    return report([work / name for name in inputs], work / "page.html", base=work / "large").nbytes


@pytest.mark.parametrize(
    "options", [{"seed": -1}, {"seed": 0.5}, {"force": "yes"}], ids=["negative", "broken", "no flag"]
)
def test_wrong_options_are_refused(options: dict[str, object], work: Path) -> None:
    with pytest.raises(InvalidOption, match=next(iter(options))):
        report(work / "adapter", work / "page.html", **options)  # type: ignore[arg-type]
    assert not (work / "page.html").exists()


def test_no_page_takes_the_place_of_an_input(work: Path) -> None:
    config = work / "adapter" / "adapter_config.json"
    with pytest.raises(OutputRefused, match="a page is an HTML file"):
        report(work / "adapter", config, force=True)
    assert json.loads(config.read_text())["r"] == 4
    assert report(work / "adapter", work / "adapter" / "page.html").kind == "adapter"


def test_what_is_there_stays(work: Path) -> None:
    (work / "page.html").write_text("mine")
    with pytest.raises(OutputRefused):
        report(work / "adapter", work / "page.html")
    assert text_of(work / "page.html") == "mine"
    report(work / "adapter", work / "page.html", force=True)
    assert text_of(work / "page.html").startswith("<!doctype html>")


def test_only_markup_is_not_escaped() -> None:
    assert element("p", "a<b", Markup("<br>")) == "<p>a&lt;b<br></p>"
    assert escaped('"\x1b') == "&quot;\\x1b"
    assert element("path", aria_label='"', d=None) == '<path aria-label="&quot;"></path>'


def test_names_are_told_apart_without_more_of_the_path_than_it_takes() -> None:
    assert names_of(["/a/b/c/adapter"]) == ["adapter"]
    assert names_of(["/x/1/seed", "/x/2/seed", "/y/2/seed"]) == ["1/seed", "x/2/seed", "y/2/seed"]
    assert names_of(["hf://lab/adapter", "./adapter/", "."]) == ["lab/adapter", "adapter", "this folder"]
    assert names_of(["C:\\me\\lora.safetensors"]) == ["lora.safetensors"]
    assert names_of(["same", "same"]) == ["same", "same (2)"]


@pytest.mark.parametrize("most", range(3, 12))
def test_shortened_names_fit(most: int) -> None:
    for name in ("down_blocks.1.attentions.0", "模型模型模型模型", "q"):
        assert width(shortened(name, most)) <= most
        assert (shortened(name, most) == name) == (width(name) <= most)


def test_scales_and_ticks() -> None:
    scale = Scale.of([0.1, 1.7])
    assert (scale.low, scale.high) == (0.0, 2.0)
    assert [scale.level(value) for value in (0.0, 0.99, 2.0, 9.0, float("inf"))] == ["s0", "s4", "s8", "s8", "s8"]
    signed = Scale.of([-0.3, 0.1], signed=True)
    assert [signed.level(value) for value in (-0.5, 0.0, 0.5)] == ["d0", "d4", "d8"]
    assert ticks(0.0, 0.7) == [0.0, 0.2, 0.4, 0.6]
    assert decades(1e-9, 1.0)[-1] == 0
    assert len(decades(1e-12, 1.0)) <= 6
    assert decades(1.0, 1.0) == [0, 1]


def test_every_module_is_in_one_cell_whatever_the_names() -> None:
    unet = [
        f"{block}.attentions.{i}.transformer_blocks.0.{part}"
        for block, count in (("down_blocks.0", 2), ("down_blocks.1", 2), ("mid_block", 1), ("up_blocks.1", 3))
        for i in range(count) for part in ("attn1.to_q", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    ]  # fmt: skip
    flux = [f"transformer_blocks.{i}.attn.to_q" for i in range(19)]
    flux += [f"single_transformer_blocks.{i}.proj_out" for i in range(38)]
    cases = {
        "llama": [f"model.layers.{i}.self_attn.{side}_proj" for i in range(100) for side in "qkvo"] + ["lm_head"],
        "unet": unet, "flux": flux, "flat": [f"module{i}" for i in range(2000)],
        "experts": [f"layers.{i}.experts.{j}.{side}" for i in range(9) for j in range(99) for side in ("up", "down")],
        "kohya": [f"lora_unet_blocks_{i}_1_proj_{side}" for i in range(9) for side in ("in", "out")],
        "odd": ["", ".", "0", "1.2.3", "a..b", "a.0", "a.0.b"], "many": [f"l.0.p{i}" for i in range(50)],
    }  # fmt: skip
    for case, names in cases.items():
        grids = arranged(names)
        members = [name for grid in grids for cell in grid.members.values() for name in cell]
        assert sorted(members) == sorted(names), case
        assert arranged(reversed(names)) == grids
        for grid in grids:
            assert len(grid.rows) <= MOST_ROWS
            assert len(grid.columns) == len(grid.labels) <= MOST_COLUMNS
    (grid,) = arranged(unet)
    assert grid.columns == ("attn1.to_q", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    assert len(grid.rows) == 8
    assert [grid.heading for grid in arranged(flux)] == ["single_transformer_blocks.*", "transformer_blocks.*"]
    assert arranged(cases["experts"])[0].columns == ("experts.*.up", "experts.*.down")


def test_a_folder_says_what_is_not_in_its_picture(work: Path) -> None:
    folder = work / "many"
    weights = load_file(work / "adapter" / "adapter_model.safetensors")
    for name, factor in {"a": 1.0, "b/z": 2.0, "c": 1.0, "n": torch.nan}.items():
        changed = {key: each * factor if "lora_A" in key else each for key, each in weights.items()}
        (folder / name).mkdir(parents=True)
        save_file(changed, folder / name / "adapter_model.safetensors")
        shutil.copy(work / "adapter" / "adapter_config.json", folder / name)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.lokr_w1": torch.ones(2, 2), f"{name}.lokr_w2": torch.ones(4, 4)}, folder / "z.safetensors")
    report(folder, work / "page.html")
    text = text_of(work / "page.html")
    assert "Not in the picture: 1 duplicate, 1 without a cosine, as find says why." in text
    listed = text[text.index("What each is") :]
    places = [listed.index(f"<bdi>{name}</bdi>") for name in ("a", "b/z", "c", "n", "z.safetensors")]
    assert places == sorted(places)
    assert 'right">none<' in listed


def test_the_whole_rank_leaves_no_error(work: Path) -> None:
    report(work / "adapter", work / "page.html")
    text = text_of(work / "page.html")
    rows = text[text.index("… in numbers") :]
    assert re.search(r'right">4</td><td class="right">100 %</td><td class="right">0</td>', rows)
