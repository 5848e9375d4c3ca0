"""Every option of every help page is held against one table; old spellings and the environment follow one rule."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest

from loratools.cli import _spelling as spelling
from loratools.cli._group import Command
from loratools.cli._run import group, run
from loratools.cli._spelling import long_name
from loratools.cli._words import COMMON, GROUPS, RENAMED, WORDS

ROOT = group()
CONTEXT = click.Context(ROOT)
NAMES = ROOT.list_commands(CONTEXT)
COMMANDS: dict[str, Command] = {name: found for name in NAMES if (found := ROOT.get_command(CONTEXT, name))}


def own(command: Command) -> dict[str, click.Option]:
    """Return the options that a command has beside the common ones."""
    options = [each for each in command.params if isinstance(each, click.Option) and each not in command.common]
    return {long_name(option): option for option in options}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_a_word_of_the_table_and_means_it(name: str) -> None:
    wrong = []
    for option in own(COMMANDS[name]).values():
        word = WORDS.get(long_name(option))
        if word is None:
            wrong.append(f"{long_name(option)} is not in loratools/cli/_words.py")
        elif not f"{option.help} ".startswith(f"{word.meaning} "):
            wrong.append(f"{long_name(option)}: {option.help!r} does not begin with {word.meaning!r}")
        elif option.is_flag is not (word.metavar is None and not word.words):
            wrong.append(f"{long_name(option)}: the table says otherwise whether it takes a value")
        elif word.metavar not in (None, option.metavar):
            wrong.append(f"{long_name(option)}: its value is {option.metavar}, not {word.metavar}")
    assert not wrong, "\n".join(wrong)


def test_the_table_has_no_word_that_no_command_has() -> None:
    used = {option for command in COMMANDS.values() for option in own(command)}
    assert WORDS.keys() - used == set()
    assert {word.group for word in WORDS.values()} <= set(GROUPS)


NOTHING = "completion dialects demo gather recipe run help"  # they read no adapter and no model of a user by themselves
WITHOUT: dict[str, dict[str, str]] = {
    "--dialect": {
        "it reads none": NOTHING,
        "it reads models": "dequantize estimate extract-svd",
        "its files are told apart by their contents, one by one": "find report",
        "what is sent and fetched is what the files are": "push pull",
        "it asks whether a file is of our own format": "validate",
    },
    "--alpha": {
        "it reads none": NOTHING,
        "it reads models": "dequantize estimate extract-svd",
        "it tells of files as they are": "find report push pull validate edit",
    },
    "--model-type": {
        "no base and adapter meet": f"{NOTHING} combine dequantize edit estimate find hash push pull resize validate",
        "both of its models say it, or neither: what has the same name is subtracted": "extract-svd",
        "--base there measures weights as they lie": "report",
    },
    "--tied": {
        "no base and adapter meet": f"{NOTHING} combine dequantize edit estimate find hash push pull resize validate",
        "it looks at what a merge did, and takes no part in it": "verify report",
        "it measures changes, and changes no head": "compare inspect",
        "an adapter says itself what it changes": "convert extract-svd",
    },
    "--check-base": {
        "no base and adapter meet": f"{NOTHING} dequantize edit estimate extract-svd find hash push resize",
        "the record of the merge proves the base, bit by bit": "unmerge",
        "it is the check itself": "validate verify",
        "an adapter is measured on the base that is given; `validate --base` asks whether it is its own": "compare "
        "inspect report",
        "it seals the adapter with the base that is given": "convert",
    },
    "--dry-run": {
        "what it writes is decided already": "gather",
        "it writes nothing": "compare completion dialects estimate find hash inspect recipe validate verify help",
        "it writes one page, for which everything is measured": "report",
        "it makes what it shows, in a folder of its own": "demo",
    },
    "--threads": {
        "it reads headers and small files": f"{NOTHING} edit estimate",
        "its work is the network's": "push pull",
        "it takes a second, in the threads of torch": "inspect report find",
        "what it hashes and factors takes all cores for seconds": "convert",
    },
    "--device": {
        "it does no arithmetic": f"{NOTHING} edit estimate find hash push pull validate",
        "a proof is made by other means than the merge: on the processor, in float64": "verify",
        "factors are small, and found in float64": "compare convert inspect report",
        "its bytes are those of the processor, which they have to be to undo a merge": "unmerge switch",
        "the same codes make the same numbers, bit by bit": "dequantize",
    },
    "--seed": {
        "it draws nothing": f"{NOTHING} convert dequantize edit estimate find hash inspect push pull resize unmerge "
        "validate",
        "only the sample of tiles that is measured is drawn, always alike": "switch",
    },
    "--budget": {
        "it chooses no ranks": f"{NOTHING} compare dequantize edit find hash inspect merge push pull report switch "
        "unmerge validate verify",
        "it makes one rank of kinds that have none": "convert",
    },
    "--include": {
        "it has no modules to choose among": f"{NOTHING} dequantize edit estimate find push pull report",
        "a conversion says the same in another dialect; `resize` leaves modules out": "convert",
        "a file is valid as a whole": "validate",
    },
}
WITHOUT["--energy"] = {**WITHOUT["--budget"], "it asks for a rank, and knows no change yet": "estimate"}
WITHOUT["--exclude"] = WITHOUT["--include"]


@pytest.mark.parametrize("option", WITHOUT)
def test_a_shared_option_is_everywhere_where_no_reason_is_known(option: str) -> None:
    reasons = {name: why for why, names in WITHOUT[option].items() for name in names.split()}
    having = {name for name, command in COMMANDS.items() if option in own(command)}
    assert {name for name in having if name in reasons} == set(), "the reason is no longer true"
    missing = COMMANDS.keys() - having - reasons.keys()
    assert not missing, f"{option}: give it to {', '.join(sorted(missing))}, or say here why not"


def test_details_of_each_item_are_asked_for_by_one_name() -> None:
    """Whatever prints a line a module or tensor does so with --modules."""
    listing = {name for name, command in COMMANDS.items() if "--modules" in own(command)}
    assert listing >= {"combine", "compare", "extract-svd", "hash", "inspect", "resize", "verify"}
    for name, command in COMMANDS.items():
        assert {"--layers", "--tensors", "--items"}.isdisjoint(own(command)), name


@pytest.mark.parametrize("name", NAMES)
def test_a_help_page_prints_each_option_once_with_its_meaning(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    page = capsys.readouterr().out
    lines = page.splitlines()
    assert max(map(len, lines)) <= 100
    told = "".join(page.split())
    for option in own(COMMANDS[name]).values():
        starts = [
            line
            for line in lines
            if re.match(
                rf" +{', '.join(sorted(option.opts, key=lambda name: name.count('-', 0, 2)))}( [^a-z]| ?$|  |/)", line
            )
        ]
        assert len(starts) == 1, (option.opts, starts)
        assert option.help
        assert "".join(option.help.split()) in told
    headings = [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert [heading for heading in headings if heading in GROUPS] == [
        heading for heading in GROUPS if heading in headings
    ]
    assert headings[-1] == "Options of every command"
    assert "Others" not in headings


@pytest.mark.parametrize("command", RENAMED)
def test_an_old_spelling_is_no_longer_an_option(command: str) -> None:
    options = {
        spelled for option in own(COMMANDS[command]).values() for spelled in (*option.opts, *option.secondary_opts)
    }
    assert options.isdisjoint(RENAMED[command])
    assert options.issuperset(new.partition("=")[0] for new in RENAMED[command].values())


def test_an_old_spelling_works_with_a_warning(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    verify = ["verify", "merged", "--base", "base", "--adapter", "adapter", "--seed", "1"]
    told = "--tensors is now --modules; the old name goes away in the next version"
    assert run([*verify, "--modules"]) == 0
    new = capsys.readouterr()
    assert run([*verify, "--tensors"]) == 0
    assert capsys.readouterr() == (new.out, f"warning: {told}\n")
    assert run([*verify, "--tensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == [told]
    assert run(["merge", "base", "adapter", "-o", "m", "--keep-residual"]) == 0
    assert run(["switch", "m", "--out=adapter", "--in", "other", "-o", "s", "--json"]) == 0
    document = json.loads(capsys.readouterr().out.partition("residual")[2].partition("\n")[2])
    assert [warning.partition(";")[0] for warning in document["warnings"]] == [
        "--out is now --take",
        "--in is now --put",
    ]
    monkeypatch.setenv("LORATOOLS_VERIFY_TENSORS", "1")
    assert run(verify) == 0
    assert capsys.readouterr() == (
        new.out,
        "warning: LORATOOLS_VERIFY_TENSORS is now LORATOOLS_VERIFY_MODULES; "
        "the old name goes away in the next version\n",
    )


@pytest.mark.parametrize(
    ("environment", "tier"),
    [
        ({"LORATOOLS_HASH_TIER": "schema"}, "schema"),
        ({"LORATOOLS_TIER": "schema"}, "schema"),
        ({"LORATOOLS_TIER": "logical", "LORATOOLS_HASH_TIER": "schema"}, "schema"),
        ({"LORATOOLS_TIER": "schema", "LORATOOLS_HASH_TIER": ""}, "schema"),
    ],
)
def test_the_rule_of_the_environment(
    environment: dict[str, str], tier: str, prepared: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run(["hash", str(prepared / "base"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["hash"].keys() == {tier}
    assert document["warnings"] == []
    assert run(["hash", str(prepared / "base"), "--json", "--tier", "root"]) == 0
    assert json.loads(capsys.readouterr().out)["hash"].keys() == {"root"}


def test_every_option_of_every_command_has_its_variable() -> None:
    """Each by itself reaches the parameter of its command, named after the long option."""
    for name, command in COMMANDS.items():
        options = own(command)
        for long, option in options.items():
            for variable in (spelling.variable(long, name), spelling.variable(long)):
                values, warnings = spelling.defaults(name, options.values(), {variable: "x 'y z'"})
                assert values == {option.name: ["x", "y z"] if option.multiple else "x 'y z'"}
                assert warnings == []


def test_a_variable_sets_a_switch_a_number_a_list_and_a_required_option(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    for name, value in {
        "OUTPUT": "by environment", "MERGE_WEIGHT": "0.5 'q_proj=0.25,v_proj=1'", "THREADS": "1", "DRY_RUN": "yes",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"LORATOOLS_{name}", value)
    assert run(["merge", "base", "adapter", "other", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["dry_run"], plan["output"], plan["threads"]) == (True, "by environment", 1)
    monkeypatch.setenv("LORATOOLS_DRY_RUN", "off")
    monkeypatch.setenv("LORATOOLS_THREADS", "none")
    assert run(["merge", "base", "adapter", "other"]) == 2
    assert "invalid value for LORATOOLS_THREADS in the environment (--threads)" in capsys.readouterr().err
    monkeypatch.setenv("LORATOOLS_THREADS", "1")
    monkeypatch.setenv("LORATOOLS_COMBINE_METHOD", "tise")
    assert run(["combine", "adapter", "other"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: method is 'tise'; it can be ")
    assert said.endswith(
        "; did you mean ties?\nhint: --method is set by LORATOOLS_COMBINE_METHOD in the environment.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("convert adapter -o out --to kohia", "no dialect 'kohia'; loratools knows comfy, "),
        ("combine adapter other -o out --method tise", "method is 'tise'; it can be breadcrumbs, "),
        ("combine adapter other -o out --check-base stric", "'stric' is not one of 'strict', 'warn', 'off'"),
        ("hash adapter --algorithm blak3", "'blak3' is not one of "),
        ("inspect adapter other --dialect pefft", "no dialect 'pefft'; loratools knows comfy, "),
    ],
)
def test_a_word_that_is_none_is_wrong_use_with_the_nearest(
    arguments: str, said: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever checks it, the command line or the library: the exit code is 2, and what was meant is said."""
    monkeypatch.chdir(workplace)
    assert run(arguments.split()) == 2
    first = capsys.readouterr().err.splitlines()[0]
    assert said in first
    meant = {"kohia": "kohya", "tise": "ties", "stric": "strict", "blak3": "blake3", "pefft": "peft"}
    assert first.endswith(next(f"; did you mean {to}?" for word, to in meant.items() if word in arguments))
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("LORATOOLS_MERGE_TREADS", "; did you mean LORATOOLS_MERGE_THREADS?"),
        ("LORATOOLS_THREAD", "; did you mean LORATOOLS_THREADS?"),
        ("LORATOOLS_JSONN", "; did you mean LORATOOLS_JSON?"),
        ("LORATOOLS_XYZZY", ""),
    ],
)
def test_an_unknown_variable_is_told(
    variable: str, nearest: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "1")
    assert run(["dialects", "-q"]) == 0
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {variable} is no variable of loratools")
    assert (nearest in warning) if nearest else warning.endswith("loratools\n")


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["mrge"], "no such command 'mrge'; did you mean 'merge' or 'unmerge'?", ""),
        (["diff"], "no such command 'diff'; did you mean 'compare'?", ""),
        (["extract"], "no such command 'extract'; did you mean 'extract-svd'?", ""),
        (["hash", "--thread", "2"], "no such option '--thread'; did you mean '--threads'?", ""),
        (["hash", "--energy", "0.9"], "no such option '--energy'", "--energy is an option of combine,"),
        (["seal"], "no such command 'seal'; did you mean 'convert … --base BASE'?", ""),
        (["undo"], "no such command 'undo'; did you mean 'unmerge'?", ""),
        (["merge", "--scale", "2"], "no such option '--scale'; did you mean '-w'?", ""),
        (["merge", "--out", "x"], "no such option '--out'; did you mean '--output'?", ""),
        (["resize", "--dim", "4"], "no such option '--dim'; did you mean '--rank'?", "loratools resize --help"),
        (["merge", "--ratio", "0.8"], "no such option '--ratio'; did you mean '-w'?", "loratools merge --help"),
        (["combine", "--ratios", "0.8"], "no such option '--ratios'; did you mean '-w'?", ""),
        (["combine", "--save_to", "x"], "no such option '--save_to'; did you mean '--output'?", ""),
        (["resize", "--new_rank", "4"], "no such option '--new_rank'; did you mean '--rank'?", ""),
        (["convert", "--sd_model", "x"], "no such option '--sd_model'; did you mean '--base'?", ""),
        (["compare", "--ratio", "2"], "no such option '--ratio'", "--ratio is an option of combine,"),
        (["merge", "--hepl"], "no such option '--hepl'; did you mean '--help'?", ""),
        (["qqqqq"], "no such command 'qqqqq'", ""),
        (["inspect", "x", "--device", "cuda"], "inspect works on the processor alone: --device is an option of ", ""),
    ],
)
def test_what_is_mistyped_gets_a_suggestion(
    arguments: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    error, told = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {message}")
    assert message.endswith(" of ") or error == f"error: {message}"
    assert told.startswith(f"hint: {hint}")


def test_common_words_are_those_of_every_command() -> None:
    assert tuple(long_name(option) for option in COMMANDS["merge"].common) == COMMON
