"""Kinds of pages: which inputs make which, and that their tables have the numbers of the library."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.dialects import open_adapter
from loratools.errors import InvalidOption
from loratools.reports import pages, report
from loratools.reports.numbers import number, percent
from loratools.reports.pages._matrix import ordered
from loratools.reports.pages._pair import phi, signed
from loratools.reports.subjects import opened
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.compare import compare
from loratools.surgery.extract import extract
from loratools.surgery.extract.certify import certify
from loratools.surgery.extract.changes import changes
from loratools.surgery.extract.layers import from_json, to_json
from loratools.surgery.merge import merge
from loratools.surgery.resize import resize
from loratools.surgery.spectrum import spectrum
from loratools.surgery.verify import verify
from tests.reports.conftest import SHAPES, text_of
from tests.reports.reading import Reading
from tests.surgery.models import Lora, load, lora, random, save_adapter, save_base


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


def test_a_comparison_has_the_numbers_of_compare(work: Path) -> None:
    save_adapter(work / "other", lora(SHAPES, rank=3, seed=7))
    found = compare(work / "adapter", work / "other", work / "base", paper=True, seed=5)
    page = report([work / "adapter", work / "other"], work / "page.html", base=work / "base", seed=5)
    assert page.kind == "comparison"
    reading = Reading.of((work / "page.html").read_text(encoding="utf-8"))
    assert reading.facts["‖ΔW₁ − ΔW₂‖ / ‖ΔW₁‖"] == number(found.distance)
    assert reading.facts["cosine"] == signed(found.cosine)
    cosines, inputs, outputs, diagonal = reading.tables[:4]
    modules = {module.module: module for module in found.modules}
    shown = {
        name: (signed(each.cosine), phi(each.input_overlap), phi(each.output_overlap)) for name, each in modules.items()
    }
    for which, table in enumerate((cosines, inputs, outputs)):
        for layer, *cells in table[1:]:
            assert cells == [shown[f"model.layers.{layer}.self_attn.{side}_proj"][which] for side in "qv"]
    assert [row[0] for row in diagonal[1:]] == ["ΔW, input side", "ΔW, output side", "A alone", "random control"]
    medians = [median(module.paper.control[i][i] for module in found.modules if module.paper) for i in range(3)]
    assert diagonal[4][1:] == list(map(phi, medians))
    picture = next(heading for heading in reading.headings if heading.startswith("model.layers.1."))  # in the middle
    chosen = modules[picture]
    assert chosen.paper is not None
    grids = (chosen.input_similarity, chosen.paper.factor_similarity, chosen.paper.control)
    for table, values in zip(reading.tables[4:7], grids, strict=True):
        assert [row[1:] for row in table[1:]] == [[phi(value) for value in row] for row in values]
    rows = reading.tables[-1][1:]
    assert len(rows) == 2 * len(modules)
    for module, adapter, *cells in rows:
        beside = modules[module].paper
        row = beside.projections[adapter == "other"] if beside else None
        assert row is not None
        assert cells == [str(row.rank), *map(number, (row.weight_norm, row.update_norm, row.of_update, row.of_weight,
                                                      row.of_random, row.amplification))]  # fmt: skip


def test_several_adapters_are_ordered_by_likeness(work: Path) -> None:
    first = lora(SHAPES, rank=4, seed=1)
    near = Lora({module: (A + 0.01, B) for module, (A, B) in first.factors.items()})
    save_adapter(work / "far", lora(SHAPES, rank=4, seed=9))
    save_adapter(work / "near", near)
    page = report([work / "adapter", work / "far", work / "near"], work / "page.html")
    assert page.lead.startswith("The most alike are adapter and near")
    reading = Reading.of((work / "page.html").read_text(encoding="utf-8"))
    names = [row[0].split()[1] for row in reading.tables[0][1:]]
    assert abs(names.index("adapter") - names.index("near")) == 1
    i, j = names.index("adapter"), names.index("far")
    assert reading.tables[0][1 + i][1 + j] == signed(compare(work / "adapter", work / "far").cosine)


def test_like_ones_stand_together_in_one_order() -> None:
    alike = {(0, 3), (1, 4), (2, 5)}
    cosines = {(i, j): 0.9 if (i, j) in alike else 0.1 for i in range(6) for j in range(i + 1, 6)}
    order = ordered(6, cosines)
    assert sorted(order) == list(range(6))
    assert all(abs(order.index(i) - order.index(j)) == 1 for i, j in alike)
    assert ordered(1, {}) == [0]
    assert sorted(ordered(3, {(0, 1): 0.5})) == [0, 1, 2]  # pairs that have no module in common


def test_what_only_one_changes_is_listed(work: Path) -> None:
    save_adapter(work / "part", lora(dict(list(SHAPES.items())[:2]), rank=2, seed=3))
    report([work / "adapter", work / "part"], work / "page.html")
    reading = Reading.of((work / "page.html").read_text(encoding="utf-8"))
    assert reading.tables[-1][1:] == [["adapter", "model.layers.[1-2].self_attn.{q,v}_proj"]]


def test_a_merge_has_what_verify_and_changes_find(work: Path) -> None:
    merge(work / "base", work / "adapter", work / "merged", weights=0.5)
    page = report([work / "merged", work / "adapter"], work / "page.html", base=work / "base", seed=3)
    assert page.kind == "merge"
    assert "it is base + adapter" in page.lead
    reading = Reading.of((work / "page.html").read_text(encoding="utf-8"))
    assert reading.facts["weight of adapter"] == "0.5"  # by its record
    found = changes(work / "merged", work / "base")
    checked = verify(work / "merged", work / "base", work / "adapter", weights=0.5, seed=3)
    norms, shares, kept, _, held = reading.tables[1:6]
    by_name = {change.path: change for change in found.changed}
    applied = {check.name.removesuffix(".weight"): check.applied for check in checked.checked}
    for row, column in ((row, column) for row in range(3) for column in range(2)):
        module = f"model.layers.{row}.self_attn.{'qv'[column]}_proj"
        W, after = (load(work / which)[f"{module}.weight"].double() for which in ("base", "merged"))
        assert by_name[module].norm == pytest.approx(float((after - W).norm()), rel=1e-6)
        assert by_name[module].base_norm == pytest.approx(float(W.norm()), rel=1e-6)
        assert norms[1 + row][1 + column] == number(by_name[module].norm)
        assert shares[1 + row][1 + column] == percent(by_name[module].relative)
        assert kept[1 + row][1 + column] == f"{applied[module] * 100:.2f} %"
    assert held[1][1] == "0.5"
    alone = report(work / "merged", work / "alone.html", base=work / "base")
    assert "Give its adapters" in alone.lead


def test_a_model_that_is_no_merge_is_called_that(work: Path) -> None:
    weights = load(work / "base")
    wrong = next(iter(SHAPES)) + ".weight"
    save_base(work / "odd", {**weights, wrong: weights[wrong] + 1, "more": weights[wrong]}, model_type="llama")
    assert "NOT base" in report([work / "odd", work / "adapter"], work / "page.html", base=work / "base").lead
    reading = Reading.of((work / "page.html").read_text(encoding="utf-8"))
    assert [wrong, "more"] == [row[0] for row in reading.tables[1][1:] if row[0] in (wrong, "more")]


def test_an_extraction_has_its_certificate(work: Path) -> None:
    weights = load(work / "base")
    tuned = {name: W + random(*W.shape, seed=90 + i, scale=0.1) for i, (name, W) in enumerate(weights.items())}
    save_base(work / "tuned", tuned, model_type="llama")
    made = extract(work / "base", work / "tuned", work / "extracted", 3)
    page = report(work / "extracted", work / "page.html")
    assert page.kind == "extraction"
    reading = Reading.of((work / "page.html").read_text(encoding="utf-8"))
    assert reading.facts["captured"] == percent(made.total.captured)
    classes, held, errors = reading.tables[:3]
    assert dict(classes[1:])["as B·A"] == "6"
    assert held[1] == ["model.layers.[0-2].self_attn.{q,v}_proj", "as factors"]
    by_name = {outcome.layer.module: outcome.layer for outcome in made.outcomes if outcome.layer}
    for layer, *cells in errors[1:]:
        assert cells == [number(by_name[f"model.layers.{layer}.self_attn.{side}_proj"].error) for side in "qv"]
    anew = report([work / "tuned", work / "extracted"], work / "anew.html", base=work / "base")
    assert anew.kind == "extraction"
    reading = Reading.of((work / "anew.html").read_text(encoding="utf-8"))
    certified = certify(work / "tuned", work / "base", work / "extracted")
    assert reading.facts["error"] == number(certified.total.error)
    assert page.lead.endswith(f"Its error is {made.total.error:.4g} of ‖ΔW‖: no factors of these ranks leave less.")


def test_the_error_of_an_extraction_stands_beside_the_least_that_is_proved(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"  # too large for an exact decomposition
    W = random(640, 600, seed=1)
    fall = torch.arange(1, 301).double() ** -0.5
    U, V = (torch.linalg.qr(random(side, 300, seed=side, dtype=torch.float64))[0] for side in (640, 600))
    save_base(tmp_path / "base", {name: W}, model_type="llama")
    save_base(tmp_path / "tuned", {name: (W.double() + (U * fall) @ V.T).float()}, model_type="llama")
    for tight in (False, True):
        sums = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / f"{tight}", 8, tight=tight).total
        lead = report(tmp_path / f"{tight}", tmp_path / f"{tight}.html").lead
        best = float((fall[8:].square().sum() / fall.square().sum()).sqrt())
        assert f"Its error is {sums.error:.4g} of ‖ΔW‖: the best factors of these ranks would leave about " in lead
        least = float(re.findall("none leave less than ([0-9.]*[0-9])", lead)[0])
        assert least == pytest.approx(sums.error / (1 + sums.excess_bound), abs=1e-4)
        assert best * (0.98 if tight else 0.4) < least <= best * 1.0001
        assert ("extract-svd --tight proves a closer bound" in lead) is not tight


@pytest.mark.parametrize(
    "document",
    [None, [], {"columns": []}, {"columns": 1, "modules": {}}, {"modules": {"a": 1}}, {"modules": {"a": [1] * 12}},
     {"modules": {"a": ["lora", [1, 2], 1, 1, *["x"] * 8]}}, {"modules": {"a": ["lora", [1, 2], 1, 1, *[10**400] * 8]}},
     {"modules": {"a": ["lora", 3, 1, 1, *[0.5] * 8]}}],
)  # fmt: skip
def test_a_certificate_that_a_file_states_is_checked(document: object) -> None:
    columns = to_json([])["columns"]
    if isinstance(document, dict):
        document = {"columns": columns} | document
    assert from_json(document) == ()
    sound = {"columns": columns, "modules": {"a": ["lora", [1, 2], 1, 1, *[0.5] * 7, None]}}
    (layer,) = from_json(sound)
    assert to_json([layer]) == sound


def test_a_folder_shows_who_resembles_whom(work: Path) -> None:
    folder = work / "zoo"
    first = lora(SHAPES, rank=4, seed=1)
    save_adapter(folder / "a" / "first", first)
    save_adapter(folder / "far", lora(SHAPES, rank=4, seed=9))
    save_adapter(folder / "near", Lora({module: (A + 0.01, B) for module, (A, B) in first.factors.items()}))
    twice = Lora({module: (2 * A, B / 2) for module, (A, B) in first.factors.items()})
    save_adapter(folder / "twice", twice)
    (folder / "broken.safetensors").write_bytes(b"lora_A")
    page = report(folder, work / "page.html")
    assert (page.kind, page.name) == ("folder", "zoo")
    text = (work / "page.html").read_text(encoding="utf-8")
    assert str(work) not in text
    reading = Reading.of(text)
    cosines, same, near, listed, failed = reading.tables
    names = [row[0].split()[1] for row in cosines[1:]]
    assert sorted(names) == ["a/first", "far", "near"]
    assert abs(names.index("a/first") - names.index("near")) == 1
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            expected = 1.0 if i == j else compare(folder / one, folder / other).cosine
            assert cosines[1 + i][1 + j] == signed(expected)
    assert same[1][:3] == ["a/first", "twice", "ΔW"]
    assert [near[1][0], near[1][1]] == ["a/first", "near"]
    assert [row[0] for row in listed[1:]] == ["a/first", "far", "near", "twice"]
    assert failed[1] == ["broken.safetensors"]


def test_a_folder_of_one_adapter_is_that_adapter(work: Path) -> None:
    save_adapter(work / "above" / "only", lora(SHAPES, rank=2))
    assert report(work / "above", work / "page.html").kind == "adapter"


def test_what_an_image_adapter_was_trained_on_is_told(work: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": random(2, 8), f"{name}.lora_up.weight": random(8, 2, seed=1),
               f"{name}.alpha": torch.tensor(2.0)}  # fmt: skip
    counts = {"set": {"<b>cat</b>": 12, "red hat": 7}}
    metadata = {"ss_tag_frequency": json.dumps(counts), "ss_steps": "1200", "ss_learning_rate": "0.0001",
                "modelspec.trigger_phrase": "xyz cat"}  # fmt: skip
    save_file(tensors, work / "cat.safetensors", metadata)
    report(work / "cat.safetensors", work / "page.html")
    reading = Reading.of((work / "page.html").read_text(encoding="utf-8"))
    assert (reading.facts["steps"], reading.facts["trigger words"]) == ("1,200", "xyz cat")
    assert reading.tables[-1][1:] == [["<b>cat</b>", "12"], ["red hat", "7"]]


def test_opened_values_make_the_pages_of_their_files(work: Path) -> None:
    report([work / "adapter"], work / "path.html", base=work / "base")
    report(open_adapter(work / "adapter"), work / "adapter 1.html", base=Checkpoint.open(work / "base"))
    path, value = ((work / f"{name}.html").read_text(encoding="utf-8") for name in ("path", "adapter 1"))
    assert value == path.replace(">adapter<", ">adapter 1<").replace("<title>adapter:", "<title>adapter 1:")
    state = load_file(work / "adapter" / "adapter_model.safetensors")
    pair = state, json.loads((work / "adapter" / "adapter_config.json").read_text())
    assert report(pair, work / "held.html").kind == "adapter"
    tables = [Reading.of((work / f"{name}.html").read_text(encoding="utf-8")).tables[0] for name in ("held", "path")]
    assert tables[0] == tables[1]


def test_no_inputs_make_two_kinds_of_pages(work: Path) -> None:
    weights = load(work / "base")
    save_base(work / "tuned", {name: W + 0.1 * random(*W.shape) for name, W in weights.items()}, model_type="llama")
    extract(work / "base", work / "tuned", work / "extracted", 2)
    merge(work / "base", work / "adapter", work / "merged")
    kinds = {}
    for inputs in (
        ["adapter"], ["extracted"], ["adapter", "extracted"], ["merged"], ["merged", "adapter"], ["tuned", "extracted"],
        ["merged", "extracted"], ["merged", "adapter", "adapter"], ["tuned", "adapter"], ["tuned", "merged"],
        ["."], [".", "adapter"],
    ):  # fmt: skip
        for base in (None, work / "base"):
            subjects = opened([work / name for name in inputs], base, 0)
            fitting = [name for name in pages.names() if pages.get(name).fits(subjects)]
            assert len(fitting) <= 1
            kinds[" ".join(inputs), base is not None] = "".join(fitting)
    assert kinds["adapter", False] == kinds["adapter", True] == "adapter"
    assert kinds["extracted", False] == kinds["tuned extracted", True] == "extraction"
    assert kinds["adapter extracted", False] == "comparison"
    assert {kinds[inputs, True] for inputs in ("merged", "merged adapter", "tuned adapter", "merged extracted")} == {
        "merge"
    }
    assert kinds[".", False] == kinds[".", True] == "folder"
    assert kinds[". adapter", False] == ""
    assert kinds["merged", False] == kinds["tuned merged", True] == ""


def test_no_input_and_a_model_alone_make_no_page(work: Path) -> None:
    with pytest.raises(InvalidOption, match="at least one"):
        report([], work / "page.html")
    with pytest.raises(InvalidOption, match=r"0 adapters and 1 model without") as refused:
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
