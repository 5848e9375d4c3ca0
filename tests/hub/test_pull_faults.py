"""Whatever goes wrong while pulling: the right folder, or none and one sentence."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loratools.errors import HubError, LoraToolsError
from tests.hub.server import LocalHub
from tests.hub.server.client import environment
from tests.hub.trips import REPO, contents, fetch, shelf, stored

# Every kind of request of a pull, and whether its answer has a body.
KINDS = {
    "info": ("GET", "/api/models/tester/sent(/revision/main)?$"),
    "tree": ("GET", "/tree/"),
    "head": ("HEAD", "/resolve/.*safetensors"),
    "small file": ("GET", "/resolve/.*adapter_config"),
    "storage": ("GET", "/objects/"),
}
PASSING: dict[str, dict[str, Any]] = {
    "503": {"status": 503},
    "500": {"status": 500},
    "no answer": {"lose_reply": True},
    "cut": {"cut_after": 40},
    "429": {"status": 429, "headers": {"Retry-After": "1"}},
    "429 new": {"status": 429, "headers": {"ratelimit": '"api";r=0;t=1'}},
}


@pytest.fixture(autouse=True)
def adapter_on_the_hub(hub: LocalHub, naps: list[float], workplace: Path) -> None:
    """The sealed adapter is there, with a licence that storage does not keep."""
    (workplace / "sealed" / "LICENSE").write_text("MIT")
    stored(hub, workplace / "sealed", REPO)


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_that_passes_is_not_seen(
    hub: LocalHub, workplace: Path, tmp_path: Path, kind: str, fault: str, naps: list[float]
) -> None:
    armed = hub.faults.add(*KINDS[kind], times=2, **PASSING[fault])
    fetch(tmp_path / "down")
    assert armed.hits == 2
    assert contents(tmp_path / "down") == contents(workplace / "sealed")
    assert max(naps) <= 4


@pytest.mark.parametrize("fault", ["503", "cut", "no answer"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_that_stays_leaves_no_folder(hub: LocalHub, tmp_path: Path, kind: str, fault: str) -> None:
    before = shelf(tmp_path)
    armed = hub.faults.add(*KINDS[kind], times=None, **PASSING[fault])
    with pytest.raises(HubError) as caught:
        fetch(tmp_path / "down")
    assert armed.hits >= 3
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith(f"{REPO}: ")
    assert re.search(r"hf_[a-z]|https?://localhost|Signature", str(caught.value)) is None
    assert [name for name in shelf(tmp_path) if not name.startswith(".down.pull-")] == before
    hub.faults.clear()
    fetch(tmp_path / "down")  # and it goes on
    assert "down" in shelf(tmp_path)
    assert not [name for name in shelf(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("kind", ["small file", "storage"])
def test_bytes_that_change_on_the_way_are_fetched_again(
    hub: LocalHub, workplace: Path, tmp_path: Path, kind: str
) -> None:
    hub.faults.add(*KINDS[kind], times=2, corrupt_at=-2)
    fetch(tmp_path / "down")
    assert contents(tmp_path / "down") == contents(workplace / "sealed")


def test_bytes_that_are_wrong_every_time_are_refused(hub: LocalHub, tmp_path: Path) -> None:
    armed = hub.faults.add("GET", "/objects/", times=None, corrupt_at=-2)
    with pytest.raises(HubError, match=r"the bytes of adapter_model.safetensors that arrived are not those of the Hub"):
        fetch(tmp_path / "down")
    assert armed.hits == 3
    assert "down" not in shelf(tmp_path)


def test_a_file_that_does_not_fit_its_own_digest_is_refused(hub: LocalHub, workplace: Path, tmp_path: Path) -> None:
    weights = bytearray((workplace / "sealed" / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    hub.seed(REPO, {"adapter_model.safetensors": bytes(weights)})
    with pytest.raises(LoraToolsError, match="I-02"):
        fetch(tmp_path / "down")
    assert "down" not in shelf(tmp_path)


def test_a_long_rate_limit_is_reported_and_not_waited_for(hub: LocalHub, tmp_path: Path, naps: list[float]) -> None:
    hub.faults.add(
        "GET", "/tree/", times=None, status=429, headers={"Retry-After": "299", "ratelimit": '"api";r=0;t=299'}
    )
    with pytest.raises(HubError) as caught:
        fetch(tmp_path / "down")
    assert "rate limit" in caught.value.message
    assert "299 seconds" in str(caught.value.hint)


def test_a_server_that_ignores_ranges_does_no_harm(hub: LocalHub, tmp_path: Path, workplace: Path) -> None:
    hub.faults.add("GET", "/objects/", times=None, ignore_range=True)
    fetch(tmp_path / "down")
    assert contents(tmp_path / "down") == contents(workplace / "sealed")


def test_the_branch_may_move_while_it_is_pulled(hub: LocalHub, workplace: Path, tmp_path: Path) -> None:
    expected = contents(workplace / "sealed")
    hub.faults.add("GET", "/tree/", before=lambda: hub.seed(REPO, {"adapter_config.json": b"{}"}))
    done = fetch(tmp_path / "down")
    assert contents(tmp_path / "down") == expected
    assert done.commit == hub.commits(REPO)[1].oid


PULL = "import sys\nfrom pathlib import Path\nfrom tests.hub.trips import fetch\nfetch(Path(sys.argv[1]))"


def test_a_killed_pull_leaves_nothing_under_the_name_and_goes_on(
    hub: LocalHub, hub_home: Path, tmp_path: Path, workplace: Path
) -> None:
    fault = hub.faults.add("GET", "/objects/", hold_after=1000)
    process = subprocess.Popen([sys.executable, "-c", PULL, str(tmp_path / "down")], env=environment(hub, hub_home))
    held = fault.held.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    fault.release()
    assert held
    assert "down" not in shelf(tmp_path)
    hub.log.clear()
    fetch(tmp_path / "down")
    assert contents(tmp_path / "down") == contents(workplace / "sealed")
    assert hub.log.select("GET", "/resolve/.*adapter_config") == []  # that one was there already
    assert not [name for name in shelf(tmp_path) if name.startswith(".")]


def test_nothing_of_another_commit_is_taken_up(hub: LocalHub, tmp_path: Path, workplace: Path) -> None:
    hub.faults.add("GET", "/objects/", times=None, status=503)
    with pytest.raises(HubError):
        fetch(tmp_path / "down")
    hub.faults.clear()
    hub.seed(REPO, {"LICENSE": b"Apache"})
    fetch(tmp_path / "down")
    assert contents(tmp_path / "down") == {**contents(workplace / "sealed"), "LICENSE": b"Apache"}
    assert not [name for name in shelf(tmp_path) if name.startswith(".")]


def test_what_stays_after_a_failure_is_said(
    hub: LocalHub, tmp_path: Path, workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And a folder with nothing in it but the client's own notes does not stay."""
    before = shelf(tmp_path)
    hub.faults.add("HEAD", "/resolve/", times=None, status=503)
    with pytest.raises(HubError):
        fetch(tmp_path / "down")
    assert shelf(tmp_path) == before
    assert caplog.messages == []
    hub.faults.clear()
    hub.faults.add("GET", "/objects/", times=None, status=503)
    with pytest.raises(HubError):
        fetch(tmp_path / "down")
    (stage,) = [name for name in shelf(tmp_path) if name not in before]
    size = sum(len(data) for name, data in contents(workplace / "sealed").items() if not name.endswith(".safetensors"))
    said = f"{size} bytes that were fetched stay in {tmp_path / stage}, and the same pull goes on from there"
    assert caplog.messages == [said]
