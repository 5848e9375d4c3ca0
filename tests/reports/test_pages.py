"""Kinds of pages: which inputs make which, and that their tables have the numbers of the library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools.errors import InvalidOption
from loratools.reports import report
from loratools.reports.numbers import number, percent
from loratools.surgery.resize import resize
from loratools.surgery.spectrum import spectrum
from tests.reports.reading import Reading
from tests.surgery.models import Lora, lora, random, save_adapter, save_base

SHAPES = {f"model.layers.{i}.self_attn.{side}_proj": (24, 16) for i in range(3) for side in "qv"}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "adapter", lora(SHAPES, rank=4, seed=1))
    weights = {f"{module}.weight": random(*shape, seed=60 + i) for i, (module, shape) in enumerate(SHAPES.items())}
    save_base(tmp_path / "base", weights, model_type="llama")
    return tmp_path


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_the_tables_have_the_numbers_of_the_library(work: Path) -> None:
    measured = spectrum(work / "adapter", base=work / "base", relative=True)
    report(work / "adapter", work / "page.html", base=work / "base")
    reading = Reading.of(text_of(work / "page.html"))
    norms, shares, _, effective, ranks = reading.tables[:5]
    assert norms[0] == ["model.layers.*", "q_proj", "v_proj"]
    by_name = {module.module: module for module in measured.modules}
    shown = {name: (number(each.norm), percent(each.relative or 0.0), number(each.effective_rank))
             for name, each in by_name.items()}  # fmt: skip
    for which, table in enumerate((norms, shares, effective)):
        for layer, *cells in table[1:]:
            for side, cell in zip("qv", cells, strict=True):
                assert cell == shown[f"model.layers.{layer}.self_attn.{side}_proj"][which]
    for rank, kept, *_ in ranks[1:]:
        assert kept == percent(measured.kept(int(rank)))
        if rank != "4":
            resized = resize(work / "adapter", work / f"rank{rank}", int(rank))
            assert resized.error == pytest.approx((1 - measured.kept(int(rank))) ** 0.5, rel=1e-4)


def test_the_weight_is_measured_where_it_is_asked_for(work: Path) -> None:
    measured = spectrum(work / "adapter", base=work / "base", relative=True).modules
    for i, module in enumerate(SHAPES):
        W = random(24, 16, seed=60 + i).double()
        (found,) = [each for each in measured if each.module == module]
        assert found.base_norm == pytest.approx(float(W.norm()), rel=1e-12)
        assert found.relative == pytest.approx(found.norm / float(W.norm()), rel=1e-12)
    assert all(module.relative is None for module in spectrum(work / "adapter", base=work / "base").modules)
    with pytest.raises(InvalidOption, match="takes a base"):
        spectrum(work / "adapter", relative=True)


def test_no_input_and_a_model_alone_make_no_page(work: Path) -> None:
    with pytest.raises(InvalidOption, match="at least one"):
        report([], work / "page.html")
    with pytest.raises(InvalidOption, match=r"0 adapter\(s\) and 1 model\(s\) without") as refused:
        report(work / "base", work / "page.html")
    assert any(problem.startswith("adapter: one adapter") for problem in refused.value.problems)


def test_a_change_that_only_a_base_tells_is_named(work: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    (work / "scales").mkdir()
    config = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    (work / "scales" / "adapter_config.json").write_text(json.dumps(config))
    scales = {f"base_model.model.{module}.ia3_l": torch.full((24, 1), 1.5)}
    save_file(scales, work / "scales" / "adapter_model.safetensors")
    report(work / "scales", work / "page.html")
    reading = Reading.of(text_of(work / "page.html"))
    assert "What was not measured" in reading.headings
    assert [module] == [row[0] for row in reading.tables[0][1:]]
    report(work / "scales", work / "with.html", base=work / "base")
    reading = Reading.of(text_of(work / "with.html"))
    assert "What was not measured" not in reading.headings
    assert reading.tables[1][1][1] == "50.0 %"  # W' = 1.5·W


def test_a_module_of_zeros_is_no_fault(work: Path) -> None:
    zeros = {module: (torch.ones(2, 16), torch.zeros(24, 2)) for module in SHAPES}
    save_adapter(work / "zeros", Lora(zeros))
    assert "zero" in report(work / "zeros", work / "page.html", base=work / "base").lead
