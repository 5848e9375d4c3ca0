"""From arguments to exit code: what a user sees when all is well, and when it is not."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools import __version__
from loratools.cli import _talk
from loratools.cli._group import Commands
from loratools.cli._run import run
from loratools.decisions import warned
from tests.conftest import clean_env

# Commands that fail in ways that a sound command cannot be made to, each with the frame of a real one.
BROKEN = {
    "bug": "raise KeyError('lost')",
    "interrupt": "raise KeyboardInterrupt",
    "missing": "open('no/such/file')",
    "memory": "raise MemoryError",
    "wait": "import signal; print('ready', flush=True); signal.pause()",
    "hostile": r"return Report({}, 'a\x1b[31mred\x07 name\u202e')",
    "warns": "talk.warn('odd'); warned('%s', 'odd'); talk.note('aside'); decided('%s length', 'at')\n"
    "    return Report({'n': float('nan')}, 'x')",
    "holds": "talk.note('aside'); return Report({'notes': ['aside', 'more'], 'warnings': ['odd']}, 'x')",
    "many": "for i in range(120): talk.warn(f'm.layers.{i}.q: odd'); talk.note(f'layer {i} is even')\n"
    "    talk.warn('m.layers.0.k: odd'); return Report({'warnings': ['m.layers.7.q: odd']}, 'x')",
    "problems": "raise LoraToolsError('odd', [f'm.layers.{i}.q: odd' for i in range(120)] + ['m.k: odd'])",
    "differs": "return Report({'equal': False}, 'not equal', ok=False)",
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package `broken_commands` of such commands."""
    folder = tmp_path_factory.mktemp("broken")
    package = folder / "broken_commands"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, body in BROKEN.items():
        (package / f"{name}.py").write_text(
            "from loratools.cli._group import command as make\nfrom loratools.cli._show import Report\n"
            "from loratools.cli._talk import pass_talk\nfrom loratools.decisions import decided, warned\n"
            "from loratools.errors import LoraToolsError\n"
            f"@make(section='Look')\n@pass_talk\ndef command(talk):\n    '''Fail.'''\n    {body}\n"
        )
    return folder


@pytest.fixture
def root(broken: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    monkeypatch.syspath_prepend(str(broken))
    return Commands("broken_commands", name="loratools")


def error_of(text: str) -> dict:
    document = json.loads(text)
    assert document.keys() == {"schema", "error", "warnings"}
    assert document["error"].keys() == {"type", "message", "problems", "hint"}
    return document["error"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"loratools {__version__} (format 1.1)\n"


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], []])
def test_help_lists_the_commands_under_their_headings(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 0
    page = capsys.readouterr().out
    landmarks = ("Examples:", "\nLook:", "  inspect ", "\nCheck:", "  validate ", "\nLearn:", "Exit codes:")
    places = [page.index(word) for word in landmarks]
    assert places == sorted(places)
    assert max(map(len, page.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["inspct"], 2, "no such command 'inspct'"),
        (["inspect"], 2, "missing argument 'PATH'"),
        (["inspect", "--modles", "x"], 2, "no such option '--modles'; did you mean '--modules'"),
        (["hash", "base", "--tier", "leaf"], 2, "invalid value for '--tier'"),
        (["hash", "base", "--threads", "0"], 2, "invalid value for '--threads'"),
        (
            ["hash", "base", "--tier", "root", "--include", "*"],
            2,
            "--modules, --include and --exclude are for --tier tensors; it is root",
        ),
        (["hash", "base", "--include", "nothing*"], 1, "base: no tensor matches 'nothing*'"),
        (["inspect", "nowhere"], 1, "nowhere: no such file or folder"),
        (["hash", "nowhere"], 1, "nowhere: no such file or folder"),
        (["validate", "nowhere"], 1, "nowhere: no such file"),
        (["inspect", "empty"], 1, "empty: no model weights"),
        (["inspect", "cut"], 1, "truncated"),
        (["hash", "cut"], 1, "truncated"),
        (["inspect", "text.safetensors"], 1, "text.safetensors: not a safetensors file"),
        (["inspect", "adapter", "--dialect", "morse"], 2, "no dialect 'morse'"),
    ],
)
def test_every_fault_is_one_sentence(
    arguments: list[str],
    code: int,
    sentence: str,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (workplace / "empty").mkdir()
    (workplace / "cut").mkdir()
    whole = (workplace / "merged" / "model-00001-of-00002.safetensors").read_bytes()
    (workplace / "cut" / "model.safetensors").write_bytes(whole[:-1000])
    (workplace / "text.safetensors").write_text("this is not a model\n")
    monkeypatch.chdir(workplace)
    assert run(arguments) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[0].startswith("error: ")
    assert sentence in said.err.splitlines()[0]
    assert run([*arguments, "--json"]) == code
    said = capsys.readouterr()
    assert said.err == ""
    assert sentence in error_of(said.out)["message"]


def test_an_unreadable_file_is_named(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = workplace / "adapter" / "adapter_model.safetensors"
    file.unlink()
    file.mkdir()
    assert run(["inspect", str(file.parent)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {file.parent}")


def test_an_unknown_exception_is_one_line_and_debug_shows_the_rest(
    root: Commands, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bug"], root) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: internal error: KeyError: 'lost'"
    assert lines[1].startswith("hint: ")
    assert "LORATOOLS_DEBUG=1" in lines[1]
    assert len(lines) == 2
    monkeypatch.setenv("LORATOOLS_DEBUG", "1")
    assert run(["bug"], root) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "code", "line"),
    [
        ("interrupt", 130, "error: interrupted; nothing half-written was left"),
        ("missing", 1, "error: no/such/file: no such file or directory"),
        ("memory", 1, "error: not enough memory"),
    ],
)
def test_what_the_system_says(
    name: str, code: int, line: str, root: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([name], root) == code
    assert capsys.readouterr().err == f"{line}\n"


def test_an_answer_of_no_exits_with_1(root: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["differs"], root) == 1
    assert capsys.readouterr().out == "not equal\n"
    assert run(["differs", "--json"], root) == 1
    assert json.loads(capsys.readouterr().out)["equal"] is False


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], ["warning: odd", "aside"]),
        (["-q"], ["warning: odd"]),
        (["-v"], ["warning: odd", "aside", "at length"]),
        (["--json"], []),
    ],
)
def test_talk_is_as_loud_as_asked(
    options: list[str], said: list[str], root: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["warns", *options], root) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == said
    if "--json" in options:
        assert json.loads(out) == {"schema": 1, "n": None, "warnings": ["odd"]}
    else:
        assert out == "x\n"


def test_equal_lines_are_one_with_a_count(root: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["many"], root) == 0
    assert capsys.readouterr().err.splitlines() == [
        "warning: m.layers.0.q: odd",
        "layer 0 is even",
        "warning: m.layers.0.k: odd",
        "warning: 119 more like this one, of other modules or layers: m.layers.0.q: odd",
        "119 more like this one, of other modules or layers: layer 0 is even",
    ]
    assert run(["many", "--json"], root) == 0
    assert len(json.loads(capsys.readouterr().out)["warnings"]) == 121
    assert run(["problems"], root) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: odd",
        "  m.layers.0.q: odd (and 119 more like it, of other modules or layers)",
        "  m.k: odd",
    ]
    assert run(["problems", "--json"], root) == 1
    assert len(error_of(capsys.readouterr().out)["problems"]) == 121


def test_warnings_of_a_document_have_an_end() -> None:
    talk = _talk.Talk(json=True)
    for i in range(_talk.MOST_WARNINGS + 50):
        talk.warn(f"{i} is odd")
    assert len(talk.warnings) == _talk.MOST_WARNINGS + 1
    assert talk.warnings[-1] == "more than 1000 warnings; the others are left out"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("inspect lab/adapter", "A repository of the Hub is written hf://lab/adapter"),
        ("merge lab/base@main adapter -o out", "A repository of the Hub is written hf://lab/base@main"),
        ("hash lab/base", "A repository of the Hub is written hf://lab/base"),
        ("convert lab/a -o out", "A repository of the Hub is written hf://lab/a"),
        ("verify merged --base base --adapter lab/a", "A repository of the Hub is written hf://lab/a"),
        ("inspect adaptor", "Did you mean adapter?"),
        ("merge base2 adapter -o out", "Did you mean base?"),
        ("inspect sealed/adapter_mode.safetensors", "Did you mean sealed/adapter_model.safetensors?"),
        ("push lab/adapter lab/adapter", None),
        ("inspect nowhere", None),
    ],
)
def test_a_place_that_is_not_there_gets_a_suggestion(
    arguments: str, hint: str | None, workplace: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(workplace)
    assert run([*arguments.split(), "--json"]) == 1
    error = error_of(capsys.readouterr().out)
    assert "no such file or folder" in error["message"]
    assert error["hint"] == hint


def test_what_a_report_holds_is_shown_once(root: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["holds"], root) == 0
    assert capsys.readouterr().err.splitlines() == ["aside", "warning: odd", "more"]
    assert run(["holds", "--json"], root) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["notes"], document["warnings"]) == (["aside", "more"], ["odd"])


def test_an_error_before_the_work_comes_before_what_was_warned_of(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    config = Path("adapter/adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_hyper": 2}))
    assert run(["convert", "adapter", "-o", "plain", "--to", "mlx", "--base", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("error: nowhere: no such")
    assert run(["convert", "adapter", "-o", "plain", "--to", "gguf"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: plain: ")
    assert lines[-1].startswith("warning: ")
    assert lines[-1].endswith("use_hyper")


@pytest.mark.parametrize("command", ["inspect adapter", "merge base adapter -o out", "convert adapter -o out"])
def test_what_opening_an_adapter_warns_of_is_shown_by_commands(
    command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    config = Path("adapter/adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_hyper": 2}))
    sentence = f"{config}: fields that are not known here, and have no effect: use_hyper"
    assert run([*command.split(), "--json"]) == 0
    assert sentence in json.loads(capsys.readouterr().out)["warnings"]
    assert run([*command.split(), "-q", *(["--force"] if "-o" in command else [])]) == 0
    assert capsys.readouterr().err.splitlines().count(f"warning: {sentence}") == 1


def test_without_a_command_line_a_warning_is_one_of_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    warned("no %s: %d is taken", "alpha", 8)
    assert [(record.name, record.levelname, record.getMessage()) for record in caplog.records] == [
        ("loratools", "WARNING", "no alpha: 8 is taken")
    ]


def test_names_stay_in_their_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Ends of lines, directions and controls in names and metadata of a file are escaped; JSON has them as they are."""
    name, base = "layers.0.q\u202e\x1b[2J\u2028proj", "org/x\nmodules     none\x07"
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.ones(1, 4)}
    tensors |= {f"base_model.model.{name}.lora_B.weight": torch.ones(4, 1)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [name], "base_model_name_or_path": base}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert run(["inspect", str(tmp_path), "--modules"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines == printed.out.split("\n")[:-1]
    assert [line for line in lines if line.startswith("modules")] == ["modules     1"]
    assert r"org/x\nmodules     none\x07; no base hash" in printed.out
    assert r"layers.0.q\u202e\x1b[2J\u2028proj" in printed.out
    assert run(["inspect", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["base"]["id"] == base
    assert document["modules"][0]["module"] == name
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "a\nerror: b\x1b[31m"}))
    assert run(["inspect", str(tmp_path)]) == 1
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["error"]


def test_a_name_cannot_drive_the_terminal(root: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["hostile"], root) == 0
    assert capsys.readouterr().out == "a\\x1b[31mred\\x07 name\\u202e\n"


@pytest.mark.parametrize(
    ("variables", "colored"),
    [
        ({}, False),
        ({"FORCE_COLOR": "1"}, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, False),
    ],
)
def test_colors_follow_the_environment(
    variables: dict[str, str], colored: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run(["inspect", "nowhere"]) == 1
    assert ("\x1b[" in capsys.readouterr().err) == colored


def test_options_come_from_the_environment(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORATOOLS_HASH_TIER", "schema")
    monkeypatch.setenv("LORATOOLS_JSON", "1")
    assert run(["hash", str(prepared / "base")]) == 0
    assert json.loads(capsys.readouterr().out)["hash"].keys() == {"schema"}


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("LORATOOLS_THREADS", "two", "'two' is no whole number"),
        ("LORATOOLS_ALPHA", "much", "'much' is no number"),
        ("LORATOOLS_QUIET", "maybe", "'maybe' is neither yes nor no; write 1 or 0"),
    ],
)
def test_a_value_is_said_to_be_wrong_in_plain_words(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, value)
    assert run(["merge", "base", "adapter", "-o", "merged"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("line", [["--json", "hash", "{base}"], ["hash", "{base}", "--json"]])
def test_common_options_stand_before_or_after_the_command(
    line: list[str], prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([part.format(base=prepared / "base") for part in line]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("options", "stderr"),
    [
        ({}, io.StringIO()),
        ({"quiet": True}, Terminal()),
        ({"no_progress": True}, Terminal()),
        ({"json": True}, Terminal()),
    ],
)
def test_progress_is_not_drawn(options: dict[str, bool], stderr: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_talk, "PATIENCE", 0)
    monkeypatch.setattr(sys, "stderr", stderr)
    with _talk.Talk(**options).progress("hashing", 4_000_000) as advance:
        advance(4_000_000)
    assert stderr.getvalue() == ""


def test_progress_is_drawn_in_bytes_on_a_terminal() -> None:
    program = (
        "from threading import Thread; from loratools.cli import _talk; _talk.PATIENCE = 0\n"
        "with _talk.Talk().progress('hashing', 4_000_000) as advance:\n"
        "    threads = [Thread(target=advance, args=(1_000_000,)) for _ in range(4)]\n"
        "    [thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
    )
    try:
        terminal, stderr = os.openpty()
    except OSError as error:
        pytest.skip(f"this machine has no pseudo-terminals: {error}")
    termios.tcsetwinsize(stderr, (25, 80))
    env = clean_env() | {"TQDM_MININTERVAL": "0"}
    done = subprocess.run([sys.executable, "-c", program], stderr=stderr, stdout=subprocess.PIPE, env=env, check=False)
    os.set_blocking(terminal, False)
    seen = os.read(terminal, 65536).decode()
    os.close(terminal)
    os.close(stderr)
    assert (done.returncode, done.stdout) == (0, b"")
    assert "hashing: 100%" in seen
    assert "4.00M/4.00M" in seen


def test_control_c_is_quiet(broken: Path) -> None:
    program = (
        "import sys; from loratools.cli._group import Commands; from loratools.cli._run import run;"
        "sys.exit(run(['wait'], Commands('broken_commands', name='loratools')))"
    )
    env = clean_env()
    env["PYTHONPATH"] += f"{os.pathsep}{broken}"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "error: interrupted; nothing half-written was left"


@pytest.mark.parametrize("arguments", [["--help"], ["hash", "base"], ["inspect", "base", "--json"]])
def test_a_closed_pipe_is_quiet(arguments: list[str], prepared: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", "loratools", *arguments], cwd=prepared, env=clean_env(), stdout=out,
            stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
def test_a_full_disk_under_stdout_is_one_sentence(prepared: Path, shell: Callable, environment: dict[str, str]) -> None:
    done = shell("loratools hash base > /dev/full", prepared, **environment)
    assert (done.code, done.err) == (1, "error: no space left on device\n")


def test_completion_completes_commands_and_options(prepared: Path, shell: Callable) -> None:
    asked = 'COMP_WORDS="loratools {words}" COMP_CWORD={n} _LORATOOLS_COMPLETE=bash_complete loratools'
    assert shell(asked.format(words="ins", n=1), prepared).out == "plain,inspect\n"
    assert shell(asked.format(words="hash --ti", n=2), prepared).out == "plain,--tier\n"
    assert shell(asked.format(words="help mer", n=2), prepared).out == "plain,merging\nplain,merge\n"
    assert shell(asked.format(words="convert a --to koh", n=4), prepared).out == "plain,kohya\n"


def test_python_dash_m_runs_it(prepared: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loratools", "inspect", "adapter"], cwd=prepared, env=clean_env(), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "model.layers.[0-1].self_attn.{q,v}_proj" in done.stdout


ENDS = """
import atexit, sys, threading
{first}
import loratools.__main__ as front
def main():
    def late():
        threading.main_thread().join()
        print("a thread")
    threading.Thread(target=late).start()
    atexit.register(print, "registered")
    class Kept:
        def __del__(self):
            sys.__stderr__.write("taken apart")
    front.kept = Kept()
    print("main")
    return {code}
front.main = main
front.process()
"""


@pytest.mark.parametrize(
    ("first", "code", "out", "apart"),
    [
        ("", "3", ["main", "a thread", "registered"], ""),
        ("atexit.register(print, 'before')", "3", ["main", "a thread", "registered", "before"], "taken apart"),
        ("", "1 // 0", ["main", "a thread", "registered"], "taken apart"),
    ],
    ids=["alone", "others wait for the end", "exception"],
)
def test_a_process_ends_as_it_should_without_being_taken_apart(
    first: str, code: str, out: list[str], apart: str
) -> None:
    program = ENDS.format(first=first, code=code)
    done = subprocess.run([sys.executable, "-c", program], env=clean_env(), capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == out
    assert done.stderr.endswith(apart)
    assert ("ZeroDivisionError" in done.stderr) == (code == "1 // 0")
    assert done.returncode == (3 if code == "3" else 1)
