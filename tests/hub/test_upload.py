"""Files that are sent while others are still being made: gone from the disk at once, one commit at the end."""

import hashlib
import random
import sys
from pathlib import Path

import pytest

from loratools.errors import HubError
from loratools.hub.client import Hub
from loratools.hub.upload import Uploader, look
from tests.hub.server import LocalHub
from tests.hub.server.client import run
from tests.hub.trips import REPO, contents, shelf


def shards(folder: Path, count: int = 4, size: int = 11_000_000) -> dict[str, str]:
    """Send shards as a merge would, each deleted when it is sent; return name -> sha256."""
    hub = Hub()
    uploader = Uploader(hub, look(hub, REPO))
    digests = {}
    for number in range(count):
        data = random.Random(number).randbytes(size if number else 1000)
        path = folder / f"model-{number:05d}-of-{count:05d}.safetensors"
        path.write_bytes(data)
        digests[path.name] = hashlib.sha256(data).hexdigest()
        uploader.send(path.name, path)
        path.unlink()
        assert shelf(folder) == []
    uploader.send("config.json", b"{}")
    uploader.send("README.md", b"---\ntags: [merge]\n---\n")
    done = uploader.commit("Merged")
    assert done.new
    return digests


@pytest.mark.parametrize(
    "fault", [None, ("PUT", "/upload/", {"status": 503}), ("POST", "/commit/", {"lose_reply": True}),
              ("POST", "/commit/", {"status": 503}), ("POST", "/batch", {"cut_after": 3})],
)  # fmt: skip
def test_shards_may_go_as_soon_as_they_are_sent(
    hub: LocalHub, naps: list[float], tmp_path: Path, fault: tuple[str, str, dict[str, object]] | None
) -> None:
    armed = hub.faults.add(fault[0], fault[1], **fault[2]) if fault else None
    (tmp_path / "out").mkdir()
    digests = shards(tmp_path / "out")
    assert armed is None or armed.hits == 1
    assert [commit.title for commit in hub.commits(REPO)] == ["Merged", "initial commit"]
    head = hub.commits(REPO)[0].files
    assert {name: head[name].sha256 for name in digests} == digests
    assert hub.files(REPO)["config.json"] == b"{}"


def test_nothing_is_visible_before_the_commit(hub: LocalHub, tmp_path: Path) -> None:
    api = Hub()
    uploader = Uploader(api, look(api, REPO))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    uploader.send("model.safetensors", tmp_path / "model.safetensors")
    assert hub.files(REPO) == {}
    assert len(hub.log.select("PUT")) == 1


def test_removals_are_part_of_the_commit(hub: LocalHub, naps: list[float]) -> None:
    hub.seed(REPO, {"old.txt": b"x", "same.txt": b"s"})
    hub.faults.add("POST", "/commit/", status=504, apply_first=True)
    api = Hub()
    uploader = Uploader(api, look(api, REPO))
    uploader.send("same.txt", b"s")
    uploader.send("new.txt", b"n")
    uploader.remove("old.txt")
    uploader.commit("Renamed")
    assert uploader.unchanged == 1
    assert hub.files(REPO) == {"same.txt": b"s", "new.txt": b"n"}
    assert len(hub.commits(REPO)) == 3


def test_nothing_to_send_is_no_commit(hub: LocalHub) -> None:
    head = hub.seed(REPO, {"same.txt": b"s"})
    api = Hub()
    uploader = Uploader(api, look(api, REPO))
    uploader.send("same.txt", b"s")
    done = uploader.commit("Nothing")
    assert (done.new, done.commit) == (False, head.oid)


def test_a_branch_is_made_and_a_pull_request_needs_one(hub: LocalHub) -> None:
    hub.seed(REPO, {"a.txt": b"a"})
    api = Hub()
    uploader = Uploader(api, look(api, REPO, revision="trial"))
    uploader.send("b.txt", b"b")
    uploader.commit("On a branch")
    assert hub.files(REPO) == {"a.txt": b"a"}
    assert hub.files(REPO, "trial") == {"a.txt": b"a", "b.txt": b"b"}
    with pytest.raises(HubError, match="no revision 'nowhere'"):
        look(api, REPO, revision="nowhere", create_pr=True)


XET = """
import sys
from pathlib import Path
from tests.hub.trips import fetch, send
source, down = map(Path, sys.argv[1:])
first, second = send(source), send(source)
assert first.new and not second.new, (first, second)
assert first.commit == second.commit
fetch(down)
"""


def test_a_round_trip_through_real_xet(xet_hub: LocalHub, hub_home: Path, workplace: Path, tmp_path: Path) -> None:
    pytest.importorskip("hf_xet", reason="hf-xet is not installed")
    done = run(
        xet_hub, hub_home, sys.executable, "-c", XET, str(workplace / "adapter"), str(tmp_path / "down"), xet=True
    )
    if done.returncode and "local://" in done.stderr:
        pytest.skip("this hf-xet no longer takes local:// storage")
    assert done.returncode == 0, done.stderr
    assert contents(workplace / "adapter").items() <= contents(tmp_path / "down").items()
    assert len(xet_hub.commits(REPO)) == 2
    assert xet_hub.log.select("PUT") == []  # nothing went by LFS
