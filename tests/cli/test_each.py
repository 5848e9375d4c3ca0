"""Several paths and `--each FOLDER`: a line or a document for each, errors among them, outputs below one folder."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.cli._batch import named_for
from loratools.cli._pool import in_order
from loratools.cli._run import run
from loratools.cli._show import size
from tests.cli.test_schemas import assert_valid
from tests.conftest import clean_env
from tests.parallel.items import made, square

Spoken = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def spoken(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Spoken:
    """Run a command line in the workplace: the exit code, and the lines of stdout and stderr."""
    monkeypatch.chdir(workplace)

    def speak(*arguments: str) -> tuple[int, list[str], list[str]]:
        code = run(arguments)
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err.splitlines()

    return speak


@pytest.fixture
def library(workplace: Path) -> Path:
    """A folder of adapters: two sealed ones, one of them in a trainer's folder, a file that is none, a plain one."""
    top = workplace / "library"
    shutil.copytree(workplace / "sealed", top / "run")
    shutil.copytree(workplace / "sealed", top / "run" / "checkpoint-5")
    shutil.copytree(workplace / "adapter", top / "plain")
    (top / "broken.safetensors").write_text("no tensors at all")
    return top


def test_a_line_for_each(spoken: Spoken, library: Path) -> None:
    code, out, err = spoken("inspect", "--each", "library")
    assert code == 1
    assert [line.partition(":")[0] for line in out] == ["library/plain", "library/run", "library/run/checkpoint-5"]
    assert out[0] == "library/plain: peft, lora of rank 4, 4 modules, 7.17 kB F32, base tiny-llama"
    assert out[1].startswith("library/run: loratools, lora of rank 4, 4 modules, ")
    assert out[1].endswith(", sealed")
    assert [line for line in err if line.startswith("error: ")] == err[:1]
    assert err[0].startswith("error: library/broken.safetensors: not a safetensors file")
    assert err[-1] == "4 paths, 1 failed"


def test_a_document_a_line_errors_too(spoken: Spoken, library: Path) -> None:
    code, out, err = spoken("inspect", "--each", "library", "--json")
    assert code == 1
    assert err == []
    documents = [json.loads(line) for line in out]
    assert [document["path"] for document in documents] == [
        "library/broken.safetensors", "library/plain", "library/run", "library/run/checkpoint-5",
    ]  # fmt: skip
    assert documents[0].keys() == {"schema", "path", "error", "warnings"}
    assert documents[0]["error"]["type"] == "BadFile"
    code, alone, _ = spoken("inspect", "library/run", "--json")
    assert code == 0
    assert json.loads("\n".join(alone)) == documents[2]


@pytest.mark.parametrize("options", [["-v"], ["--json"]])
def test_several_processes_say_the_same(options: Sequence[str], spoken: Spoken, library: Path) -> None:
    arguments = ["inspect", "base", "--each", "library", "adapter", *options]
    assert spoken(*arguments, "-j", "3") == spoken(*arguments)


def test_valid_and_not(spoken: Spoken, library: Path) -> None:
    code, out, err = spoken("validate", "--each", "library")
    assert code == 1
    assert out[-2].startswith("library/run: valid, format 1.")
    broken = "not valid: [S-01] broken.safetensors: not a safetensors file but a text, "
    assert [line for line in out if line.startswith(f"library/broken.safetensors: {broken}")] == [out[0]]
    assert out[1] == "library/plain: not sealed in this format: it has no loratools manifest [L-03]"
    assert len(out) == 4
    assert err == ["4 paths, 2 failed"]
    assert spoken("validate", "library/run", "sealed", "-q")[::2] == (0, [])


def test_each_command_tells_its_answer_in_a_line(spoken: Spoken, library: Path) -> None:
    _, one, _ = spoken("hash", "base", "--tier", "root")
    assert spoken("hash", "base", "merged", "-q")[1][0] == f"base: {one[0]}"
    code, out, _ = spoken("verify", "merged", "base", "--base", "base", "--adapter", "adapter", "--seed", "1")
    assert code == 1
    assert out[0].startswith("merged: verified: 4 of 4 changed tensors are")
    assert out[1].startswith("base: NOT verified: 0 of 4")


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_what_a_command_does_not_take_is_passed_over_in_a_folder(spoken: Spoken, library: Path, jobs: str) -> None:
    shutil.copytree(library.parent / "base", library / "model")
    shutil.copytree(library.parent / "merged", library / "other" / "model")
    code, out, err = spoken("resize", "--each", "library", "--rank", "1", "-o", "out", "-j", jobs)
    assert [line.partition(":")[0] for line in out] == ["library/plain", "library/run", "library/run/checkpoint-5"]
    assert (code, len(err), err[-1]) == (1, 2, "6 paths, 1 failed, 2 models passed over")
    assert err[0].startswith("error: library/broken.safetensors: ")
    assert not (library.parent / "out" / "other").exists()
    (library / "broken.safetensors").unlink()
    assert spoken("validate", "--each", "library/run", "--each", "library/other", "-j", jobs)[::2] == (
        0, ["3 paths, none failed, 1 model passed over"]
    )  # fmt: skip
    code, out, err = spoken("verify", "--each", "library", "--base", "base", "--adapter", "adapter", "-j", jobs)
    assert [line.partition(",")[0] for line in out] == [
        "library/model: NOT verified: 0 of 4 changed tensors are base + adapter within rounding",
        "library/other/model: verified: 4 of 4 changed tensors are base + adapter within rounding",
    ]
    assert (code, err) == (1, ["5 paths, 1 failed, 3 adapters passed over"])


def test_what_is_passed_over_has_a_document_and_a_path_that_is_named_fails(spoken: Spoken, library: Path) -> None:
    shutil.copytree(library.parent / "base", library / "model")
    _, out, err = spoken("validate", "--each", "library", "--json")
    documents = {document["path"]: document for document in map(json.loads, out)}
    for document in documents.values():
        assert_valid("validate", document)
    assert documents["library/model"] == {
        "schema": 1, "path": "library/model", "passed_over": "model", "warnings": []
    }  # fmt: skip
    assert [path for path, document in documents.items() if "passed_over" in document] == ["library/model"]
    code, out, err = spoken("resize", "--each", "library", "library/model", "--rank", "1", "-o", "out")
    assert (code, err[-1]) == (1, "5 paths, 2 failed")
    assert err[0].startswith("error: library/model looks like a base model")
    assert spoken("validate", "--each", "library", "library/model")[2][-1] == "5 paths, 3 failed"


def test_the_line_of_verify_says_what_is_against_a_model(spoken: Spoken, workplace: Path) -> None:
    def line(change: Callable[[dict[str, torch.Tensor]], object]) -> str:
        target = workplace / "altered"
        shutil.rmtree(target, ignore_errors=True)
        loratools.merge("base", "adapter", target)
        path = next(path for path in target.glob("*.safetensors") if norm in load_file(path))
        weights = load_file(path)
        change(weights)
        save_file(weights, path)
        code, out, _ = spoken("verify", "altered", "merged", "--base", "base", "--adapter", "adapter")
        assert (code, out[1].startswith("merged: verified: 4 of 4 changed")) == (1, True)
        return out[0]

    norm = "model.norm.weight"
    rest = "; 4 of 4 changed tensors are base + adapter within rounding, "
    assert line(lambda weights: weights[norm].add_(1)).startswith(
        f"altered: NOT verified: tensors that no adapter changes differ from the base (1, first {norm}){rest}"
    )
    config = json.loads((workplace / "merged" / "config.json").read_text())
    (workplace / "merged" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    _, out, _ = spoken("verify", "merged", "base", "--base", "base", "--adapter", "adapter")
    assert out[0].startswith("merged: NOT verified: config.json: rms_norm_eps ")


def test_several_inputs_are_one_page_and_each_a_page_of_its_own(spoken: Spoken, library: Path) -> None:
    code, out, _ = spoken("report", "adapter", "other", "-o", "both.html")
    assert code == 0
    assert out[1] == "page        comparison"
    code, out, err = spoken("report", "--each", "library", "-o", "pages")
    assert code == 1
    assert err[0].startswith("error: library/broken.safetensors: ")
    pages = ["plain.html", "run.html", "run/checkpoint-5.html"]
    told = [f"wrote pages/{page} (adapter, {size((library.parent / 'pages' / page).stat().st_size)})" for page in pages]
    assert [line.partition(": ")[2] for line in out] == told


def test_details_are_shown_for_each(spoken: Spoken) -> None:
    code, out, _ = spoken("inspect", "adapter", "other", "--modules")
    assert code == 0
    assert [line for line in out if line in ("adapter:", "other:")] == ["adapter:", "other:"]
    assert sum("self_attn.q_proj" in line for line in out if line.startswith("model.layers.0")) == 2


def test_warnings_name_their_path(spoken: Spoken, library: Path) -> None:
    (library / "plain" / "more.safetensors").write_bytes((library / "run" / "adapter_model.safetensors").read_bytes())
    code, out, err = spoken("inspect", "library/run", "library/plain")
    assert code == 0
    assert [line for line in err if line.startswith("warning: ") and "library/plain: " in line and "more" in line]
    _, out, _ = spoken("inspect", "library/run", "library/plain", "--json")
    assert [len(json.loads(line)["warnings"]) for line in out] == [0, 1]


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_outputs_mirror_the_folder(jobs: str, spoken: Spoken, library: Path, workplace: Path) -> None:
    code, out, err = spoken("convert", "--each", "library", "-o", "new", "--to", "kohya", "--allow-loss", "-j", jobs)
    assert code == 1
    assert len(out) == 3
    assert out[2].startswith("library/run/checkpoint-5: wrote new/run/checkpoint-5 (kohya, 4 modules")
    assert "error: library/broken.safetensors: not a safetensors file" in "\n".join(err)
    assert not (workplace / "new" / "broken.safetensors").exists()
    assert sorted(str(path.relative_to(workplace / "new")) for path in (workplace / "new").rglob("*.safetensors")) == [
        "plain/lora.safetensors", "run/checkpoint-5/lora.safetensors", "run/lora.safetensors",
    ]  # fmt: skip


def test_outputs_of_files_have_the_endings_of_the_dialect(spoken: Spoken, workplace: Path) -> None:
    (workplace / "files").mkdir()
    code, _, _ = spoken("convert", "adapter", "-o", "files/a.safetensors", "--to", "kohya", "--allow-loss")
    assert code == 0
    code, out, err = spoken("convert", "--each", "files", "-o", "pefts", "--to", "peft", "--base", "base")
    assert (code, err) == (0, ["1 path, none failed"])
    assert (workplace / "pefts" / "a" / "adapter_config.json").is_file()
    assert Path(named_for("x/a.gguf", "loratools")) == Path("x/a.safetensors")
    code, out, err = spoken("resize", "--each", "pefts", "adapter", "--rank", "2", "-o", "small")
    assert code == 0
    assert "wrote small/adapter (4 modules, error " in out[0]
    assert (workplace / "small" / "a").is_dir()


def test_two_results_in_one_place_are_refused_before_anything_is_written(spoken: Spoken, workplace: Path) -> None:
    shutil.copytree("adapter", "twins/adapter")
    code, out, err = spoken("convert", "adapter", "twins/adapter", "-o", "new")
    assert code == 1
    assert out == []
    assert err[:2] == [
        "error: 1 output cannot be; nothing was written",
        f"  adapter and twins/adapter: both would be {workplace / 'new' / 'adapter'}",
    ]
    assert not (workplace / "new").exists()
    code, _, err = spoken("convert", "--each", "twins", "-o", "twins", "--force")
    assert code == 1
    assert err[1] == "  twins/adapter: its result would take its place"
    code, _, err = spoken("convert", "adapter", "other", "-o", "base/config.json")
    assert code == 1
    assert "a file; the results of several inputs go into a folder" in err[0]


def test_what_was_written_is_not_read_the_next_time(spoken: Spoken, library: Path) -> None:
    (library / "broken.safetensors").unlink()
    first = spoken("resize", "--each", "library", "-o", "library/small", "--rank", "1")
    assert first[0] == 0
    code, out, _ = spoken("resize", "--each", "library", "-o", "library/small", "--rank", "1", "--force")
    assert (code, out) == (0, first[1])


def test_an_empty_folder_and_a_wrong_command_line(spoken: Spoken, workplace: Path) -> None:
    (workplace / "empty").mkdir()
    assert spoken("inspect", "--each", "empty")[::2] == (1, ["error: empty: no adapter or model in this folder"])
    assert spoken("inspect", "--each", "nowhere")[::2][1][0] == "error: nowhere: no such folder"
    code, out, err = spoken("inspect", "adapter", "other", "--base", "base")
    assert (code, out) == (2, [])
    assert err[0].startswith("error: --base goes with --spectrum")
    assert spoken("inspect", "adapter", "--jobs", "0")[0] == 2


def test_one_path_is_as_it_was(spoken: Spoken) -> None:
    code, out, err = spoken("inspect", "adapter", "-j", "4")
    assert (code, err) == (0, [])
    assert out[0].split() == ["adapter", "adapter"]


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "loratools", *arguments]


def test_processes_are_copies_of_this_one_on_the_command_line(workplace: Path, library: Path) -> None:
    def answer(*options: str) -> subprocess.CompletedProcess[str]:
        arguments = _command("validate", "--each", "library", "sealed", *options)
        return subprocess.run(arguments, cwd=workplace, env=clean_env(), capture_output=True, text=True, check=False)

    one, two = answer(), answer("-j", "2")
    assert (one.returncode, one.stdout, one.stderr) == (two.returncode, two.stdout, two.stderr)
    assert len(one.stdout.splitlines()) == 5


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_signal_ends_all_at_once(jobs: str, workplace: Path) -> None:
    for number in range(200):
        shutil.copytree(workplace / "sealed", workplace / "lots" / f"n{number}")
    with subprocess.Popen(
        _command("resize", "--each", "lots", "-o", "out", "--rank", "1", "-j", jobs),
        cwd=workplace, env=clean_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    assert err.splitlines() == ["error: interrupted; nothing half-written was left"]
    assert len(out.splitlines()) < 199
    done = {path.name for path in (workplace / "out").iterdir()}
    assert not {name for name in done if not name.startswith("n")}
    assert all((workplace / "out" / name / "adapter_model.safetensors").is_file() for name in done)


def test_a_reader_that_goes_away(workplace: Path, library: Path) -> None:
    command = f"{' '.join(_command('inspect', *['adapter'] * 2, '--each', 'library', '-j', '2'))} 2>&1 >/dev/full"
    done = subprocess.run(
        ["bash", "-c", command], cwd=workplace, env=clean_env(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no space left" in done.stdout


def test_a_process_that_ends_costs_its_item_only() -> None:
    results = in_order(square, range(8), 2, {}, lambda item, code: -(code or 0))
    assert list(results) == [0, 1, 4, -7, 16, 25, 36, 49]


def test_an_item_waits_for_those_before_it(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "a" / "x", tmp_path / "a" / "x" / "y", tmp_path / "c"]
    assert list(in_order(made, folders, 3, {2: [0], 3: [0, 2]}, lambda item, code: False)) == [True] * 5


def test_results_do_not_go_into_a_model(shell: Callable, workplace: Path) -> None:
    done = shell("loratools resize --each . --rank 2 -o base", workplace)
    assert done.code == 1
    assert done.err.startswith("error: base: a model or an adapter itself; results beside its files")
    assert sorted(path.name for path in (workplace / "base").iterdir() if path.is_dir()) == []
