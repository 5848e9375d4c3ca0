"""Whatever goes wrong while pushing: one commit or none, and one sentence."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loratools.errors import HubError
from tests.hub.server import LocalHub
from tests.hub.server.client import environment
from tests.hub.trips import REPO, contents, send

# Every kind of request of a push to a new repository; those with a second element only to one that is there.
KINDS = {
    "exists": ("GET", "/api/models/tester/sent$"),
    "create": ("POST", "/api/repos/create"),
    "revision": ("GET", "/revision/main"),
    "tree": ("GET", "/tree/"),
    "card check": ("POST", "/validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/lfs/objects/batch"),
    "storage": ("PUT", "/upload/"),
    "verify": ("POST", "/verify"),
    "commit": ("POST", "/commit/"),
}
PASSING: dict[str, dict[str, Any]] = {
    "503": {"status": 503},
    "504 after it took effect": {"status": 504, "apply_first": True},
    "no answer": {"lose_reply": True},
    "request cut": {"cut_request_after": 0},
    "answer cut": {"cut_after": 5},
    "429": {"status": 429, "headers": {"Retry-After": "1"}},
}


@pytest.fixture(autouse=True)
def no_naps(naps: list[float]) -> None:
    """Back-off takes no time."""


def is_whole(hub: LocalHub, folder: Path, revision: str = "main") -> bool:
    """Whether the repository has all files of a folder, in one commit."""
    head, *_ = hub.commits(REPO, revision)
    sent = hub.files(REPO, revision)
    return contents(folder).items() <= sent.items() and "README.md" in sent and head.title.startswith("Push adapter")


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_that_passes_still_makes_one_commit(hub: LocalHub, workplace: Path, kind: str, fault: str) -> None:
    armed = hub.faults.add(*KINDS[kind], **PASSING[fault])
    done = send(workplace / "adapter")
    assert armed.hits == 1
    assert [commit.title for commit in hub.commits(REPO)] == ["Push adapter with loratools", "initial commit"]
    assert is_whole(hub, workplace / "adapter")
    assert done.commit == hub.commits(REPO)[0].oid
    assert hub.log.leaks() == []


# A storage that cannot verify has the file all the same, and says so when it is offered again.
@pytest.mark.parametrize("fault", ["503", "request cut", "429"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "verify"])
def test_a_fault_that_stays_makes_no_commit(hub: LocalHub, workplace: Path, kind: str, fault: str) -> None:
    hub.seed(REPO, {"theirs.txt": b"x"})
    if kind == "create":
        del hub.store.repos[REPO]
    armed = hub.faults.add(*KINDS[kind], times=None, **PASSING[fault])
    with pytest.raises(HubError) as caught:
        send(workplace / "adapter")
    assert armed.hits >= 3
    assert "\n" not in caught.value.message
    assert re.search(r"hf_[a-z]|Signature", str(caught.value)) is None
    assert REPO not in hub.store.repos or hub.files(REPO) == {"theirs.txt": b"x"}
    hub.faults.clear()
    send(workplace / "adapter")
    assert is_whole(hub, workplace / "adapter")


@pytest.mark.parametrize("fault", ["504 after it took effect", "no answer", "answer cut"])
def test_a_commit_whose_answer_never_comes_is_found(hub: LocalHub, workplace: Path, fault: str) -> None:
    armed = hub.faults.add(*KINDS["commit"], times=None, **PASSING[fault])
    done = send(workplace / "adapter")
    assert armed.hits == 1
    assert done.commit == hub.commits(REPO)[0].oid
    assert len(hub.commits(REPO)) == 2


def test_a_lost_answer_and_then_no_way_to_ask(hub: LocalHub, workplace: Path) -> None:
    hub.seed(REPO, {"theirs.txt": b"x"})

    def cut_off() -> None:
        hub.faults.add("GET", "/api/models/", times=None, status=503)

    hub.faults.add(*KINDS["commit"], before=cut_off, lose_reply=True)
    with pytest.raises(HubError, match="the answer to the commit was lost") as caught:
        send(workplace / "adapter")
    assert "Run it again" in str(caught.value.hint)
    hub.faults.clear()
    again = send(workplace / "adapter")
    assert not again.new
    assert len(hub.commits(REPO)) == 3


@pytest.mark.parametrize("fault", ["504 after it took effect", "no answer"])
def test_a_pull_request_whose_answer_is_lost_is_opened_once(hub: LocalHub, workplace: Path, fault: str) -> None:
    hub.seed(REPO, {"theirs.txt": b"x"})
    hub.faults.add(*KINDS["commit"], **PASSING[fault])
    done = send(workplace / "adapter", create_pr=True)
    assert len(hub.store.repos[REPO].pulls) == 1
    assert done.pull_request == f"{hub.endpoint}/{REPO}/discussions/1"
    assert is_whole(hub, workplace / "adapter", "refs/pr/1")
    assert hub.files(REPO) == {"theirs.txt": b"x"}


def test_a_branch_that_moves_meanwhile_is_left_alone(hub: LocalHub, workplace: Path) -> None:
    hub.seed(REPO, {"theirs.txt": b"x"})
    hub.faults.add(*KINDS["commit"], before=lambda: hub.seed(REPO, {"theirs.txt": b"y"}))
    with pytest.raises(HubError, match=f"{REPO} changed while it was pushed to; nothing was committed"):
        send(workplace / "adapter")
    assert hub.files(REPO) == {"theirs.txt": b"y"}
    send(workplace / "adapter")
    assert is_whole(hub, workplace / "adapter")


def test_a_card_that_the_hub_refuses_is_refused_before_anything_is_sent(hub: LocalHub, workplace: Path) -> None:
    with pytest.raises(HubError, match="refuses the front matter") as caught:
        send(workplace / "adapter", license="free-as-in-beer")
    assert '"license" must be one of' in caught.value.problems[0]
    assert REPO not in hub.store.repos


PUSH = "import sys\nfrom pathlib import Path\nfrom tests.hub.trips import send\nsend(Path(sys.argv[1]))"


@pytest.mark.parametrize("kind", ["storage", "commit"])
def test_a_killed_push_is_made_good_by_the_next(
    hub: LocalHub, hub_home: Path, workplace: Path, tmp_path: Path, kind: str
) -> None:
    running: list[subprocess.Popen[bytes]] = []
    fault = hub.faults.add(*KINDS[kind], before=lambda: os.kill(running[0].pid, signal.SIGKILL))
    command = [sys.executable, "-c", PUSH, str(workplace / "adapter")]
    running.append(subprocess.Popen(command, env=environment(hub, hub_home), cwd=tmp_path))
    assert running[0].wait(60) == -signal.SIGKILL
    assert fault.hits == 1
    again = send(workplace / "adapter")
    assert again.new == (kind == "storage")  # what the Hub had in full by then, it made
    assert len(hub.commits(REPO)) == 2
    assert is_whole(hub, workplace / "adapter")
