"""Every fault does what it says, as the real client sees it."""

import sys
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils._http import http_backoff

from tests.hub.server import LocalHub
from tests.hub.server.client import api, run
from tests.hub.server.sample import FILES, REPO, WEIGHTS, add

WEIGHTS_NAME = "adapter_model.safetensors"


def fetch(hub: LocalHub) -> bytes:
    """Download the weights with the real client."""
    return Path(api(hub).hf_hub_download(REPO, WEIGHTS_NAME)).read_bytes()


def test_a_status_is_given_as_often_as_asked_and_only_where_asked(hub: LocalHub) -> None:
    hub.seed(REPO, FILES)
    fault = hub.faults.add("GET", "/objects/", status=503, times=2, skip=1, headers={"X-Reason": "maintenance"})
    assert fetch(hub) == WEIGHTS
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="503") as caught:
            api(hub).hf_hub_download(REPO, WEIGHTS_NAME, force_download=True)
        assert caught.value.response.headers["X-Reason"] == "maintenance"
    api(hub).hf_hub_download(REPO, WEIGHTS_NAME, force_download=True)
    assert (fault.hits, fault.seen) == (2, 4)


def test_a_read_that_is_retried(hub: LocalHub, naps: list[float]) -> None:
    hub.seed(REPO, FILES)
    hub.faults.add("GET", "/tree/", status=500, times=2)
    answer = http_backoff("GET", f"{hub.endpoint}/api/models/{REPO}/tree/main", retry_on_status_codes=500)
    assert "README.md" in [entry["path"] for entry in answer.json()]
    assert [entry.status for entry in hub.log.select("GET", "/tree/")] == [500, 500, 200]
    assert naps == [1, 2]


def test_an_upload_that_is_retried(hub: LocalHub, naps: list[float]) -> None:
    hub.seed(REPO, {})
    hub.faults.add("PUT", "/upload/", status=503)
    api(hub).create_commit(REPO, add({WEIGHTS_NAME: WEIGHTS}), commit_message="x")
    tries = [(entry.status, entry.bytes_in) for entry in hub.log.select("PUT")]
    assert tries == [(503, len(WEIGHTS)), (200, len(WEIGHTS))]
    assert hub.files(REPO) == {WEIGHTS_NAME: WEIGHTS}
    assert naps == [1]


def test_an_upload_cut_short_has_no_effect(hub: LocalHub, naps: list[float]) -> None:
    hub.seed(REPO, {})
    hub.faults.add("PUT", "/upload/", cut_request_after=1000, times=None)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        api(hub).create_commit(REPO, add({WEIGHTS_NAME: WEIGHTS}), commit_message="x")
    # How often it is tried differs from client to client; each try went the same way.
    assert {(entry.status, entry.bytes_in) for entry in hub.log.select("PUT")} == {(0, 1000)}
    assert hub.files(REPO) == {}
    hub.faults.clear()
    api(hub).create_commit(REPO, add({WEIGHTS_NAME: WEIGHTS}), commit_message="x")
    assert hub.files(REPO) == {WEIGHTS_NAME: WEIGHTS}


@pytest.mark.parametrize(
    ("style", "header", "value"), [("retry-after", "Retry-After", "1"), ("ratelimit", "ratelimit", '"api";r=0;t=1')]
)
def test_a_rate_limit_in_both_header_styles(
    hub: LocalHub, naps: list[float], style: str, header: str, value: str
) -> None:
    hub.seed(REPO, FILES)
    hub.faults.rate_limit("GET", "/tree/", header=style, times=2)
    address = f"{hub.endpoint}/api/models/{REPO}/tree/main"
    refused = get_session().get(address)
    assert (refused.status_code, refused.headers[header]) == (429, value)
    assert http_backoff("GET", address, retry_on_status_codes=429).status_code == 200
    # Clients of 1.0 wait by their own rule; later ones for the time named and one second more.
    assert naps in ([1.0], [2.0])


def test_a_body_cut_short_fails_until_it_comes_whole(hub: LocalHub, naps: list[float]) -> None:
    hub.seed(REPO, FILES)
    fault = hub.faults.add("GET", "/objects/", cut_after=70_000, times=None)
    with pytest.raises(Exception, match=f"received 70000 bytes, expected {len(WEIGHTS)}"):
        fetch(hub)
    assert fault.hits == len(naps) + 1
    assert {entry.bytes_out for entry in hub.log.select("GET", "/objects/")} == {70_000}
    hub.faults.clear()
    assert fetch(hub) == WEIGHTS


def test_a_cut_always_loses_something(hub: LocalHub) -> None:
    hub.seed(REPO, FILES)
    hub.faults.add("GET", "notes", cut_after=10**9)
    with pytest.raises(Exception, match="peer closed connection"):
        get_session().get(f"{hub.endpoint}/{REPO}/resolve/main/extra/notes.txt")
    assert hub.log.bytes_out("GET", "notes") == len(FILES["extra/notes.txt"]) - 1


def test_a_reply_without_a_body_is_cut_whole(hub: LocalHub) -> None:
    hub.seed(REPO, FILES)
    hub.faults.add("HEAD", "notes", cut_after=0)
    with pytest.raises(Exception, match="disconnected"):
        get_session().head(f"{hub.endpoint}/{REPO}/resolve/main/extra/notes.txt")


def test_wrong_bytes_of_the_same_length_pass_the_client_unseen(hub: LocalHub) -> None:
    hub.seed(REPO, FILES)
    hub.faults.add("GET", "/objects/", corrupt_at=-1)
    got = fetch(hub)
    assert got[:-1] == WEIGHTS[:-1]
    assert got[-1] == WEIGHTS[-1] ^ 0xFF
    assert hub.files(REPO)[WEIGHTS_NAME] == WEIGHTS


def test_an_ignored_range_gives_the_whole_file(hub: LocalHub) -> None:
    hub.seed(REPO, FILES)
    hub.faults.add("GET", "/objects/", ignore_range=True)
    metadata = api(hub).parse_safetensors_file_metadata(REPO, WEIGHTS_NAME)
    assert len(metadata.tensors) == 2
    (entry,) = hub.log.select(origin="cdn")
    assert (entry.range, entry.status, entry.bytes_out) == ("bytes=0-100000", 200, len(WEIGHTS))


def test_a_redirect_loop_ends(hub: LocalHub) -> None:
    hub.seed(REPO, FILES)
    fault = hub.faults.add("GET", "/resolve/", times=None, redirect_loop=True)
    with pytest.raises(Exception, match="redirects"):
        api(hub).parse_safetensors_file_metadata(REPO, WEIGHTS_NAME)
    assert fault.hits == 21
    assert hub.log.leaks() == []


def test_missing_headers(hub: LocalHub, naps: list[float]) -> None:
    hub.seed(REPO, FILES)
    hub.faults.add("HEAD", "/resolve/", times=None, drop_headers=("x-repo-commit",))
    with pytest.raises(LocalEntryNotFoundError) as caught:
        fetch(hub)
    assert type(caught.value.__cause__).__name__ == "FileMetadataError"
    assert hub.log.select("GET") == []


def test_a_commit_refused_because_the_branch_moved(hub: LocalHub) -> None:
    hub.seed(REPO, {"a.txt": b"a"})
    hub.faults.moved_branch()
    with pytest.raises(HfHubHTTPError, match="412"):
        api(hub).create_commit(REPO, add({"b.txt": b"b"}), commit_message="x")
    assert hub.files(REPO) == {"a.txt": b"a"}


def test_a_branch_that_moves_between_read_and_commit(hub: LocalHub) -> None:
    head = hub.seed(REPO, {"a.txt": b"a"})
    hub.faults.add("POST", "/commit/", before=lambda: hub.seed(REPO, {"theirs.txt": b"t"}))
    with pytest.raises(HfHubHTTPError, match="412"):
        api(hub).create_commit(REPO, add({"mine.txt": b"m"}), commit_message="x", parent_commit=head.oid)
    assert hub.files(REPO) == {"a.txt": b"a", "theirs.txt": b"t"}


def test_a_creation_that_is_busy_is_tried_again(hub: LocalHub) -> None:
    fault = hub.faults.busy_creation(times=3)
    api(hub).create_repo(REPO)
    assert fault.hits == 3
    assert [entry.status for entry in hub.log.select("POST", "/api/repos/create")] == [409, 409, 409, 200]


@pytest.mark.parametrize("reply", [{"lose_reply": True}, {"status": 504, "apply_first": True}])
def test_a_commit_whose_reply_is_lost_has_happened(hub: LocalHub, reply: dict[str, object]) -> None:
    head = hub.seed(REPO, {"a.txt": b"a"})
    hub.faults.add("POST", "/commit/", **reply)
    with pytest.raises(Exception, match=r"disconnected|504"):
        api(hub).create_commit(REPO, add({"b.txt": b"b"}), commit_message="lost", parent_commit=head.oid)
    assert [commit.title for commit in hub.commits(REPO)] == ["lost", "seed", "initial commit"]
    # Sent again with the same parent it is refused, so it cannot be applied twice.
    with pytest.raises(HfHubHTTPError, match="412"):
        api(hub).create_commit(REPO, add({"b.txt": b"c"}), commit_message="again", parent_commit=head.oid)
    assert hub.files(REPO) == {"a.txt": b"a", "b.txt": b"b"}


def test_a_reply_is_held_until_it_is_released(hub: LocalHub) -> None:
    hub.seed(REPO, FILES)
    fault = hub.faults.add("GET", "/objects/", hold_after=50_000)
    got: list[bytes] = []
    reader = Thread(target=lambda: got.append(fetch(hub)))
    reader.start()
    assert fault.held.wait(30)
    assert hub.log.bytes_out("GET", "/objects/") == 50_000
    fault.release()
    reader.join(30)
    assert got == [WEIGHTS]


def test_a_slow_body_arrives_whole(hub: LocalHub) -> None:
    hub.seed(REPO, FILES)
    fault = hub.faults.add("GET", "/objects/", piece=20_000, pause=0.001)
    assert fetch(hub) == WEIGHTS
    assert fault.hits == 1


def test_stopping_the_hub_ends_replies_that_are_held(tmp_path: Path) -> None:
    with LocalHub(tmp_path) as hub:
        hub.seed(REPO, FILES)
        fault = hub.faults.add("GET", "/resolve/", hold_after=0)
        command = "import sys, urllib.request as u; print(len(u.urlopen(sys.argv[1]).read()))"
        address = f"{hub.endpoint}/{REPO}/resolve/main/README.md"
        got: list[str] = []
        reader = Thread(target=lambda: got.append(run(hub, tmp_path, sys.executable, "-c", command, address).stdout))
        reader.start()
        assert fault.held.wait(30)
    reader.join(30)
    assert not reader.is_alive()
    assert len(got) == 1


def test_a_process_of_its_own_sees_only_this_hub(hub: LocalHub, hub_home: Path) -> None:
    hub.seed(REPO, FILES, private=True)
    command = (
        "import huggingface_hub as h\n"
        "path = h.hf_hub_download('tester/adapter', 'extra/notes.txt')\n"
        "print(h.constants.ENDPOINT, open(path).read())"
    )
    done = run(hub, hub_home, sys.executable, "-c", command)
    assert (done.returncode, done.stdout.split(" ", 1)) == (0, [hub.endpoint, "a nested file\n\n"]), done.stderr
    refused = run(hub, hub_home, sys.executable, "-c", command.replace("notes", "other"), token=None)
    assert refused.returncode == 1
    assert "RepositoryNotFoundError" in refused.stderr
    assert hub.log.select(target="/resolve/")[0].has_auth
    assert not hub.log.select(target="other")[0].has_auth


def test_the_log_sees_a_credential_that_leaves_the_hub(hub: LocalHub) -> None:
    hub.seed(REPO, FILES)
    address = api(hub).get_hf_file_metadata(url=f"{hub.endpoint}/{REPO}/resolve/main/{WEIGHTS_NAME}").location
    assert get_session().get(address).content == WEIGHTS
    assert hub.log.leaks() == []
    refused = get_session().get(address, headers={"Authorization": f"Bearer {hub.token}"})
    assert refused.status_code == 400
    assert get_session().get(f"{address}&note={hub.token}").status_code == 200
    assert [(entry.has_auth, entry.carries_token) for entry in hub.log.leaks()] == [(True, True), (False, True)]
    assert get_session().get(address.split("?")[0]).status_code == 403
