"""Recipes: outputs say how they were made, and are made again byte for byte; only what changed is made again."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import loratools
from loratools.cli._run import run
from loratools.errors import BadFile, InvalidOption, LoraToolsError, OutputRefused
from loratools.recipe import account, identity
from loratools.recipe.run import RecipeReport
from loratools.storage.beside.making import ENTRY, making, note_root, noted_root
from loratools.storage.header import read_header
from tests.hub.fixtures import hub, hub_home
from tests.hub.server import LocalHub
from tests.hub.trips import contents, stored
from tests.make import tiny

TWO = """\
inputs:
  base: base
  style: sealed
steps:
  half: {command: combine, adapters: [style], weight: [0.5]}
  done: {command: merge, base: base, adapters: [half], dtype: bf16}
  proof: {command: verify, model: done, base: base, adapter: half}
"""


__all__ = ["hub", "hub_home"]


@pytest.fixture
def here(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of tiny files, as the current one, with a recipe."""
    monkeypatch.chdir(workplace)
    (workplace / "two.yaml").write_text(TWO)
    return workplace


def states(report: RecipeReport) -> list[str]:
    return [step.state for step in report.steps]


def whys(report: RecipeReport) -> list[str]:
    return [step.why for step in report.steps]


def test_steps_that_did_the_same_both_say_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = "{command: resize, adapter: sealed, rank: %d}"
    Path("alike.yaml").write_text(f"steps:\n  a: {step % 1}\n  b: {step % 1}\n  layer-2: {step % 2}\n")
    assert run(["run", "alike.yaml"]) == 0
    told = capsys.readouterr().err
    for fact, count in {"  rank  ": 3, "  error  ": 3, "  digest  ": 3, "more like this one": 0}.items():
        assert told.count(fact) == count, fact


def test_the_one_of_several_inputs_that_changed_is_named(here: Path) -> None:
    for name in "abc":
        shutil.copytree("adapter", name)
    steps = "steps:\n  sum: {command: combine, adapters: [a, b, c], check-base: 'off'}\n"
    Path("sum.yaml").write_text(steps)
    assert states(loratools.run_recipe("sum.yaml")) == ["made"]
    (here / "b" / "adapter_config.json").write_text((here / "b" / "adapter_config.json").read_text() + " ")
    assert whys(loratools.run_recipe("sum.yaml", dry_run=True)) == ["number 2 of adapters changed"]


def test_a_recipe_is_piped_in(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["combine", "sealed", "-w", "0.5", "-o", "half"]) == 0
    capsys.readouterr()
    assert run(["recipe", "half"]) == 0
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(capsys.readouterr().out.encode())))
    assert run(["run", "-", "--search", ".", "--folder", "again"]) == 0
    assert contents(here / "again" / "half") == contents(here / "half")


def test_only_what_changed_is_made_again(here: Path) -> None:
    first = loratools.run_recipe("two.yaml")
    assert states(first) == ["made", "made", "checked"]
    assert states(loratools.run_recipe("two.yaml")) == ["up to date"] * 3
    (here / "two.yaml").write_text(TWO.replace("dtype: bf16", "dtype: f32"))
    again = loratools.run_recipe("two.yaml")
    assert states(again) == ["up to date", "made", "checked"]
    assert whys(again) == ["", "dtype changed", "model changed"]
    config = here / "base" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"llama" '))
    assert whys(loratools.run_recipe("two.yaml")) == ["", "base changed", "base, model changed"]
    weights = here / "half" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    mended = loratools.run_recipe("two.yaml")
    assert whys(mended) == ["the output is not what was made", "", ""]
    assert weights.read_bytes() == whole
    assert states(loratools.run_recipe("two.yaml", force=True)) == ["made", "made", "checked"]


def test_another_version_makes_it_again(here: Path) -> None:
    loratools.run_recipe("two.yaml")
    note = here / ".loratools" / "done.json"
    document = json.loads(note.read_text())
    document["by"]["torch"] = "1.0"
    note.write_text(json.dumps(document))
    assert whys(loratools.run_recipe("two.yaml")) == ["", 'made by something else: torch was "1.0"', ""]
    note.write_text("{")
    with pytest.raises(OutputRefused):
        loratools.run_recipe("two.yaml")


def test_a_dry_run_plans_every_step_and_writes_nothing(here: Path) -> None:
    before = contents(here)
    report = loratools.run_recipe("two.yaml", dry_run=True, folder="elsewhere")
    assert states(report) == ["planned"] * 3
    assert whys(report) == [
        "new", "after half, which will be made first", "after done, half, which will be made first",
    ]  # fmt: skip
    assert contents(here) == before
    loratools.run_recipe("two.yaml")
    shutil.rmtree(here / "done")
    report = loratools.run_recipe("two.yaml", dry_run=True)
    assert states(report) == ["up to date", "planned", "planned"]
    plan = report.steps[1].result
    assert plan is not None
    assert plan["tensors"]["changed"] == 4


def test_the_first_failure_stops_the_run_and_names_the_step(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "bad.yaml").write_text(
        TWO.replace("done: {command: merge", "bad: {command: combine, adapters: [nowhere]}\n  done: {command: merge")
    )
    report = loratools.run_recipe("bad.yaml")
    assert states(report) == ["made", "failed"]
    assert report.left == ("done", "proof")
    assert run(["run", "bad.yaml", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert [step["state"] for step in document["steps"]] == ["up to date", "failed"]
    assert "nowhere" in document["steps"][1]["error"]["message"]
    assert run(["run", "bad.yaml"]) == 1
    assert "error: step bad: " in capsys.readouterr().err
    assert not (here / "done").exists()


def test_what_options_cannot_be_is_told_before_anything_is_made(here: Path) -> None:
    (here / "odd.yaml").write_text(TWO.replace("dtype: bf16", "dtype: 16, threads: many"))
    with pytest.raises(InvalidOption, match="1 step") as refusal:
        loratools.run_recipe("odd.yaml")
    assert len(refusal.value.problems) == 1
    assert not (here / "half").exists()


def test_an_output_that_no_recipe_made_is_not_replaced(here: Path) -> None:
    (here / "done").mkdir()
    (here / "done" / "thesis.txt").write_text("all of it")
    with pytest.raises(OutputRefused) as refusal:
        loratools.run_recipe("two.yaml")
    assert [line.partition(":")[0] for line in refusal.value.problems] == ["step done"]
    assert not (here / "half").exists()
    (here / "out").symlink_to(here.parent)
    (here / "link.yaml").write_text(TWO.replace("dtype: bf16", "output: out/done"))
    with pytest.raises(OutputRefused, match="refused"):
        loratools.run_recipe("link.yaml")


SINGLE = {
    "merge": "merge base sealed -o made --dtype f32 --keep-residual",
    "stochastic": "merge base sealed other -w 0.7 -w -0.3 -o made --rounding stochastic --seed 3 --check-base off",
    "combine": "combine adapter other -w q_proj=0.5,v_proj=1 -w -1 --method ties --density 0.5 --rank 3 -o made",
    "resize": "resize sealed --energy 0.9 --max-rank 3 -o made",
    "kohya": "convert adapter --to kohya -o made.safetensors",
    "seal": "convert adapter --base base --base-id lab/base -o made",
    "peft": "convert adapter --to peft --profile serving --base base --allow-loss -o made",
    "extract-svd": "extract-svd base tuned --rank 3 --exclude down_proj --dtype bf16 -o made",
    "dequantize": "dequantize quantized -o made --dtype f32",
    "approximate": "unmerge merged adapter -o made --weight 1",
}


@pytest.mark.parametrize("name", SINGLE)
def test_every_command_can_be_repeated_from_its_output(name: str, here: Path) -> None:
    assert run([*SINGLE[name].split(), "-q"]) == 0
    made = next(path for path in here.iterdir() if path.stem == "made")
    text = loratools.recipe_of(made).yaml
    assert str(here) not in text
    (here / "again.yaml").write_text(text)
    report = loratools.run_recipe("again.yaml", search=here, folder="again")
    assert states(report) == ["made"], report.steps[0].error
    again = here / "again" / made.name
    if made.is_dir():
        assert contents(again) == contents(made)
    else:
        assert again.read_bytes() == made.read_bytes()


def test_a_chain_is_repeated_from_its_last_output(here: Path) -> None:
    for line in (
        "resize other --rank 1 -o small", "combine sealed small -w 0.5 -w 2 --check-base off -o sum",
        "merge base sum -o one --keep-residual", "switch one --take sum --put sealed -o two",
    ):  # fmt: skip
        assert run([*line.split(), "-q"]) == 0
    found = loratools.recipe_of("two").recipe
    assert [step["command"] for step in found["steps"].values()] == ["resize", "combine", "merge", "switch"]
    assert len(found["inputs"]) == 3
    (here / "again.yaml").write_text(loratools.recipe_of("two").yaml)
    for name in ("small", "sum", "one"):
        (here / name).rename(here / f"{name}-moved")
    report = loratools.run_recipe("again.yaml", inputs={"base": "base"}, search=".", folder="again")
    assert states(report) == ["made"] * 4, report.steps[-1].error
    assert contents(here / "again" / "two") == contents(here / "two")
    assert contents(here / "again" / "merge") == contents(here / "one-moved")
    last = loratools.recipe_of("two", last=True).recipe
    assert list(last["steps"]) == ["switch"]
    assert set(last["inputs"]) == {"model", "take", "put"}


def test_a_step_before_the_last_makes_a_file_where_it_was_one(here: Path) -> None:
    save_file(tiny.llama_weights(), here / "one.safetensors", {"format": "pt"})
    for line in (
        "convert adapter --to kohya -o k.safetensors", "merge one.safetensors k.safetensors -o out.safetensors",
        "switch out.safetensors --take k.safetensors --put other -o switched.safetensors",
    ):  # fmt: skip
        assert run([*line.split(), "-q"]) == 0
    (here / "again.yaml").write_text(loratools.recipe_of("switched.safetensors").yaml)
    report = loratools.run_recipe("again.yaml", search=here, folder="again")
    assert states(report) == ["made"] * 3, report.steps[-1].error
    for before, now in (("k", "convert"), ("out", "merge"), ("switched", "switched")):
        assert (here / f"{before}.safetensors").read_bytes() == (here / "again" / f"{now}.safetensors").read_bytes()


def test_what_came_from_the_hub_is_made_again_of_copies_here(here: Path, hub: LocalHub) -> None:
    stored(hub, here / "base", "lab/base")
    stored(hub, here / "adapter", "lab/adapter")
    assert run(["merge", "hf://lab/base", "hf://lab/adapter", "-o", "made", "-q"]) == 0
    recipe = loratools.recipe_of("made").recipe
    places = [source["path"] for source in recipe["inputs"].values()]
    assert [place.partition("@")[0] for place in places] == ["hf://lab/base", "hf://lab/adapter"]
    assert all(len(place.partition("@")[2]) == 40 for place in places)
    (here / "again.yaml").write_text(loratools.recipe_of("made").yaml)
    for inputs, folder in (({"base": "base", "adapter": "adapter"}, "copies"), ({}, "fetched")):
        report = loratools.run_recipe("again.yaml", inputs=inputs, folder=folder)
        assert states(report) == ["made"], report.steps[0].error
        assert contents(here / folder / "made") == contents(here / "made")
    assert states(loratools.run_recipe("again.yaml", folder="planned", dry_run=True)) == ["planned"]


def test_an_edited_output_says_that_it_was_edited(here: Path) -> None:
    for name, target in (("combine", "half"), ("kohya", "k.safetensors")):
        line = {
            "combine": "combine sealed -w 0.5 -o half", "kohya": "convert adapter --to kohya -o k.safetensors",
        }[name]  # fmt: skip
        assert run([*line.split(), "-q"]) == 0
        assert run(["edit", target, "--title", "Half", "--output", f"e-{target}", "-q"]) == 0
        recipe = loratools.recipe_of(f"e-{target}").recipe
        assert [step["command"] for step in recipe["steps"].values()] == [line.partition(" ")[0], "edit"]
        (here / f"{name}.yaml").write_text(loratools.recipe_of(f"e-{target}").yaml)
        report = loratools.run_recipe(f"{name}.yaml", search=here, folder=f"again-{name}")
        assert states(report) == ["made", "made"], report.steps[-1].error
        again, made = here / f"again-{name}" / f"e-{target}", here / f"e-{target}"
        if made.is_dir():
            assert contents(again) == contents(made)
        else:
            assert again.read_bytes() == made.read_bytes()
    assert run(["edit", "k.safetensors", "--license", "mit", "--output", "l.safetensors", "-q"]) == 0
    assert loratools.recipe_of("l.safetensors").recipe["steps"]["edit"]["license"] == "mit"
    loratools.edit("half", title="Other")
    with pytest.raises(LoraToolsError, match="no record in it"):
        loratools.recipe_of("half")
    assert run(["edit", "adapter", "--title", "Mine", "-q"]) == 0
    assert ENTRY not in read_header(here / "adapter" / "adapter_model.safetensors").metadata


def test_several_outputs_of_one_command_line_say_each_its_own_making(here: Path) -> None:
    assert run(["resize", "sealed", "other", "--rank", "1", "-o", "small", "-q"]) == 0
    assert run(["resize", "other", "--rank", "1", "-o", "alone", "-q"]) == 0
    assert contents(here / "small" / "other") == contents(here / "alone")
    digests = [
        loratools.recipe_of(f"small/{name}").recipe["inputs"]["adapter"]["digest"] for name in ("sealed", "other")
    ]
    assert digests == [loratools.hash(name).root for name in ("sealed", "other")]


def test_a_model_that_was_read_whole_is_not_read_again(here: Path) -> None:
    """What an extraction noted of its two models is what their files hold, and what the record then says."""
    with making(lambda: None):
        loratools.extract_svd("base", "tuned", "found", 2)
        noted = [noted_root(Path(name)) for name in ("base", "tuned")]
        assert noted == [loratools.hash(name, "root").root for name in ("base", "tuned")]
        note_root(Path("base"), "blake3:noted")
        inputs = {name: name for name in ("base", "tuned")}
        said = account.describe("extract-svd", {}, inputs, dict.fromkeys(inputs, "model"))["inputs"]
        assert [said[name]["digest"] for name in inputs] == ["blake3:noted", noted[1]]
    assert noted_root(Path("base")) is None
    assert run(["extract-svd", "base", "tuned", "--rank", "2", "-o", "made", "-q"]) == 0
    said = loratools.recipe_of("made").recipe["inputs"]
    assert [said[name]["digest"] for name in inputs] == noted


def test_a_wrong_input_is_refused(here: Path) -> None:
    assert run(["merge", "base", "sealed", "-o", "made", "-q"]) == 0
    (here / "again.yaml").write_text(loratools.recipe_of("made").yaml)
    shutil.copytree(here / "base", here / "wrong")
    shard = next((here / "wrong").glob("*00002*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # a tensor that no adapter touches
    with pytest.raises(BadFile, match="not at hand") as refusal:
        loratools.run_recipe("again.yaml", inputs={"base": "wrong", "adapter": "other"}, folder="again")
    assert len(refusal.value.problems) == 2
    assert "another model" in refusal.value.problems[0]
    assert "another adapter" in refusal.value.problems[1]
    with pytest.raises(InvalidOption, match="no input 'bsae'; did you mean base") as unknown:
        loratools.run_recipe("again.yaml", inputs={"bsae": "base"})
    assert unknown.value.hint == "Its inputs are base, adapter."
    with pytest.raises(BadFile) as absent:
        loratools.run_recipe("again.yaml", search=here / "other")
    assert [problem.partition(":")[0] for problem in absent.value.problems] == ["base", "adapter"]


def test_an_output_of_another_input_is_not_the_one_of_the_recipe(here: Path) -> None:
    assert run(["resize", "other", "--rank", "1", "-o", "made", "-q"]) == 0
    config = json.loads((here / "other" / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2  # no tensor changes
    (here / "other" / "adapter_config.json").write_text(json.dumps(config))
    (here / "again.yaml").write_text(loratools.recipe_of("made").yaml)
    report = loratools.run_recipe("again.yaml", search=here, folder="again")
    assert states(report) == ["failed"]
    assert "not those that the recipe names" in str(report.steps[0].error)


def test_records_hold_no_path_and_do_not_depend_on_names(here: Path) -> None:
    shutil.copytree(here / "base", here / "b" / "model")
    shutil.copytree(here / "sealed", here / "a")
    assert run(["merge", "base", "sealed", "-o", "one", "-q"]) == 0
    assert run(["merge", "b/model", "a", "-o", "two", "-q", "--seed", "0"]) == 0
    assert contents(here / "one") == contents(here / "two")
    record = json.loads((here / "one" / "loratools.json").read_text())["recipe"]
    (adapter,) = record["inputs"]["adapters"]
    assert adapter["digest"] == loratools.open_adapter("sealed").settings["loratools"]["digest"]
    assert record["options"] == {}


def test_an_adapter_made_of_another_says_only_its_own_making(here: Path) -> None:
    assert run(["convert", "adapter", "--to", "kohya", "-o", "k.safetensors", "-q"]) == 0
    assert run(["convert", "k.safetensors", "--to", "peft", "--base", "base", "-o", "back", "-q", "--allow-loss"]) == 0
    entry = json.loads(read_header(here / "back" / "adapter_model.safetensors").metadata[ENTRY])
    assert entry["options"] == {"to": "peft", "allow-loss": True}
    assert entry["inputs"]["adapter"]["recipe"]["options"] == {"to": "kohya"}
    again = loratools.save_adapter(loratools.open_adapter("back"), "copied", dialect="peft")
    assert again == []
    assert ENTRY not in read_header(here / "copied" / "adapter_model.safetensors").metadata


@pytest.mark.parametrize(
    "value", [[], 3, {"command": 1}, {"command": "merge", "options": [], "inputs": {}},
              {"command": "merge", "options": {}, "inputs": {"base": 3}},
              {"command": "merge", "options": {}, "inputs": {"base": {"digest": 3}}},
              {"command": "merge", "options": {}, "inputs": {"base": {"recipe": {}}}}],
)  # fmt: skip
def test_a_record_of_a_stranger_that_is_none_is_none(value: Any, here: Path) -> None:
    path = here / "merged" / "loratools.json"
    path.write_text(json.dumps({"recipe": value}))
    assert account.of(here / "merged") is None
    with pytest.raises(LoraToolsError, match="no record in it says how it was made"):
        loratools.recipe_of("merged")
    with pytest.raises(LoraToolsError, match="no such file or folder"):
        loratools.recipe_of("nowhere")


def test_the_digest_of_files_is_that_of_names_and_bytes(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, bytes]) -> str:
        for path, data in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_bytes(data)
        return identity.files_of(tmp_path / name)

    one = folder("one", {"a": b"1", "b/c": b"2"})
    assert one == folder("same", {"b/c": b"2", "a": b"1", ".hidden/x": b"3"})
    others = [{"a": b"1", "b/c": b"3"}, {"a": b"1", "bc": b"2"}, {"a": b"1"}, {"a": b"1", "b/c": b"2", "d": b""}]
    assert len({one, *(folder(f"other{i}", each) for i, each in enumerate(others))}) == 5
    assert identity.files_of(tmp_path / "one" / "a") == identity.files_of(tmp_path / "same" / "a")


def test_the_environment_changes_no_recipe(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATOOLS_MERGE_DTYPE", "f32")
    monkeypatch.setenv("LORATOOLS_DTYPE", "f32")
    (here / "two.yaml").write_text(TWO.replace(", dtype: bf16", ""))
    report = loratools.run_recipe("two.yaml")
    assert states(report) == ["made", "made", "checked"]
    assert loratools.Checkpoint.open("done").specs["lm_head.weight"].dtype == "BF16"
    assert run(["merge", "base", "half", "-o", "single", "-q"]) == 0
    assert loratools.recipe_of("single").recipe["steps"]["merge"]["dtype"] == "f32"


def test_the_command_line_prints_what_the_library_returns(here: Path) -> None:
    assert run(["recipe", "blend", "--json"]) == 0
    assert run(["run", "two.yaml", "--input", "style"]) == 2
