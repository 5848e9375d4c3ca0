"""push, pull and hf:// on the command line, each in a process of its own, against the local Hub."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub.fixtures import hub, hub_home
from tests.hub.server import LocalHub
from tests.hub.server.client import environment
from tests.hub.trips import contents, stored

__all__ = ["hub", "hub_home"]

REPO = "tester/sent"


@pytest.fixture
def line(hub: LocalHub, hub_home: Path, workplace: Path, shell: Callable) -> Callable:
    """Return a function that runs a line among the prepared files, as somebody who is logged in to the local Hub."""
    names = {name: value for name, value in environment(hub, hub_home).items() if name.startswith("HF_")}

    def run(command: str, **more: str):
        return shell(command, workplace, **{**names, **more})

    return run


def test_there_and_back(hub: LocalHub, line: Callable, workplace: Path) -> None:
    sent = line(f"loratools push sealed {REPO} --license mit --json")
    assert sent.code == 0, sent.err
    document = json.loads(sent.out)
    assert (document["repo"], document["new"], document["creates_repo"]) == (REPO, True, True)
    assert document["commit"] == hub.commits(REPO)[0].oid
    assert document["bytes"] == sum(map(len, hub.files(REPO).values()))
    got = line(f"loratools pull {REPO} -o down --json")
    assert got.code == 0, got.err
    assert json.loads(got.out)["commit"] == document["commit"]
    assert contents(workplace / "down") == hub.files(REPO)
    again = line(f"loratools push down {REPO}")
    assert again.code == 0
    assert "no commit was made" in again.out
    assert hub.token not in sent.out + sent.err + got.out + got.err + again.out + again.err
    assert hub.log.leaks() == []
    assert len(hub.commits(REPO)) == 2


def test_a_dry_run_writes_nothing_anywhere(hub: LocalHub, line: Callable, workplace: Path) -> None:
    done = line(f"loratools push adapter {REPO} --dry-run --json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert set(document["send"]) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert document["creates_repo"]
    assert REPO not in hub.store.repos
    stored(hub, workplace / "adapter", REPO)
    plan = line(f"loratools pull {REPO} -o down --dry-run --json")
    assert json.loads(plan.out)["files"] == {name: len(data) for name, data in hub.files(REPO).items()}
    assert not (workplace / "down").exists()
    assert hub.log.select("POST|PUT") == []
    assert "adapter_model.safetensors" in line(f"loratools pull {REPO} -o down --dry-run").out


def test_merging_from_the_hub_is_merging_here(hub: LocalHub, line: Callable, workplace: Path) -> None:
    stored(hub, workplace / "base", "lab/base")
    stored(hub, workplace / "adapter", REPO)
    planned = line(f"loratools merge hf://lab/base hf://{REPO} -o there --dry-run")
    assert planned.code == 0, planned.err
    assert "hf://lab/base" in planned.out
    assert "loratools-headers" not in planned.out
    assert hub.log.bytes_out("GET", origin="cdn") < 2 * 65_536 + 20_000  # two headers and an adapter
    for command in ("loratools merge base adapter -o here", f"loratools merge hf://lab/base hf://{REPO}@main -o there"):
        done = line(command)
        assert done.code == 0, done.err
    there, here = contents(workplace / "there"), contents(workplace / "here")
    records = [json.loads(model.pop("loratools.json")) for model in (there, here)]
    cards = [model.pop("README.md").decode() for model in (there, here)]
    assert there == here
    made = [record.pop("recipe")["inputs"] for record in records]
    assert {name: made[0]["base"].pop(name) for name in ("hub", "commit")}["hub"] == "lab/base"
    assert {name: made[0]["adapters"][0].pop(name) for name in ("hub", "commit")}["hub"] == REPO
    assert made[0] == made[1]
    # What came from the Hub is recorded by repository and commit, what lay in a folder by no name of that.
    (base, adapter), (own, other) = ((record["base"], record["adapters"][0]) for record in records)
    assert (base["id"], adapter["id"]) == ("lab/base", REPO)
    assert "id" not in other
    for entry in (base, adapter):
        assert re.fullmatch("[0-9a-f]{40}", entry["revision"])
        assert f"`{entry['id']}` at `{entry['revision']}`" in cards[0]
    assert "revision" not in own | other
    assert adapter["digest"] == other["digest"]
    assert str(workplace) not in "".join(cards) + json.dumps(records)


def test_inspect_and_hash_from_afar(hub: LocalHub, line: Callable, workplace: Path) -> None:
    stored(hub, workplace / "base", "lab/base")
    stored(hub, workplace / "sealed", REPO)
    here, there = line("loratools inspect sealed --json"), line(f"loratools inspect hf://{REPO} --json")
    assert there.code == 0, there.err
    assert json.loads(there.out) == {**json.loads(here.out), "path": f"hf://{REPO}"}
    assert line(f"loratools inspect hf://{REPO}").out.splitlines()[0].endswith(f"hf://{REPO}")
    here, there = (
        line("loratools hash base --tier all --json"),
        line("loratools hash hf://lab/base --tier schema --json"),
    )
    assert json.loads(there.out)["hash"]["schema"] == json.loads(here.out)["hash"]["schema"]
    whole = line("loratools hash hf://lab/base --tier all --json")
    assert json.loads(whole.out)["hash"] == json.loads(here.out)["hash"]
    assert line(f"loratools validate hf://{REPO}").code == 0


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("push adapter name", 1, "is not a model on the Hub"),
        ("push adapter lab/a/b", 2, "expected org/name, found"),
        ("push nothing lab/a", 1, "no such file or folder"),
        ("pull lab/none -o down", 1, "no such repository, or a private one"),
        ("pull lab/none -o base", 1, "exists already"),
        ("pull lab/none@v1 --revision v2 -o down", 2, "names the revision v1 too"),
        ("inspect hf://lab/none", 1, "no such repository"),
        ("inspect hf://none", 1, "is not a model on the Hub"),
        ("merge hf://lab/none adapter", 2, "--output"),
    ],
)
def test_what_is_wrong_is_one_sentence(hub: LocalHub, line: Callable, command: str, code: int, message: str) -> None:
    done = line(f"loratools {command}")
    assert done.code == code
    assert message in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    assert (code == 2) <= (hub.log.select() == [])  # wrong use is found before anything is asked


def test_an_error_from_afar_names_what_the_user_named(hub: LocalHub, line: Callable) -> None:
    hub.seed(REPO, {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"x" * 100})
    done = line(f"loratools inspect hf://{REPO} --json")
    assert done.code == 1
    assert f"hf://{REPO}/adapter_model.safetensors: " in json.loads(done.out)["error"]["message"]
    assert "loratools-headers" not in done.err


MODULES = """
import sys
from loratools.cli._run import run
code = run(sys.argv[1:])
found = {name.split(".")[0] for name in sys.modules} & {"torch", "numpy", "huggingface_hub"}
print(code, sorted(found), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("command", "modules"),
    [
        ("--help", "[]"),
        ("push --help", "[]"),
        ("inspect adapter", "[]"),
        ("hash base --tier schema", "[]"),
        ("inspect hf://tester/sent", "['huggingface_hub']"),
        ("pull tester/sent -o down", "['huggingface_hub']"),
        ("push adapter tester/sent", "['huggingface_hub']"),
    ],
)
def test_what_is_imported(hub: LocalHub, line: Callable, workplace: Path, command: str, modules: str) -> None:
    stored(hub, workplace / "adapter", REPO)
    (workplace / "modules.py").write_text(MODULES)
    done = line(f"{sys.executable} modules.py {command}")
    assert done.err.splitlines()[-1] == f"0 {modules}"
