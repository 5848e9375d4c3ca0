"""The local Hub takes what the real client sends, as the Hub does: whole, once, and only from those who may."""

import warnings
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
)

from tests.hub.server import LocalHub
from tests.hub.server.client import api
from tests.hub.server.sample import CARD, FILES, REPO, WEIGHTS, add, write


def test_a_folder_goes_up_in_one_commit_and_comes_down_byte_for_byte(hub: LocalHub, tmp_path: Path) -> None:
    client = api(hub)
    url = client.create_repo(REPO)
    assert str(url) == f"{hub.endpoint}/{REPO}"
    folder = write(tmp_path / "up", FILES)
    info = client.upload_folder(repo_id=REPO, folder_path=folder, commit_message="Add adapter")
    assert [commit.title for commit in hub.commits(REPO)] == ["Add adapter", "initial commit"]
    assert info.oid == hub.commits(REPO)[0].oid
    assert hub.files(REPO) == FILES
    assert [entry.status for entry in hub.log.select("POST", "/commit/main")] == [200]

    down = Path(client.snapshot_download(REPO, local_dir=tmp_path / "down"))
    assert {path: (down / path).read_bytes() for path in FILES} == FILES
    weights = Path(client.hf_hub_download(REPO, "adapter_model.safetensors", revision=info.oid))
    assert weights.read_bytes() == WEIGHTS
    assert weights.is_relative_to(tmp_path / "hf-home")
    # Large files come from the other origin, without the credential.
    fetched = hub.log.select("GET", "/objects/", origin="cdn")
    assert [entry.bytes_out for entry in fetched] == [len(WEIGHTS)] * 2
    assert all(entry.host.startswith("localhost:") for entry in fetched)
    assert hub.log.leaks() == []
    assert all(entry.has_auth for entry in hub.log.select(target="/api/(models|repos)"))


def test_a_second_push_of_the_same_content_makes_no_commit_and_uploads_nothing(hub: LocalHub, tmp_path: Path) -> None:
    client = api(hub)
    client.create_repo(REPO)
    folder = write(tmp_path / "up", FILES)
    first = client.upload_folder(repo_id=REPO, folder_path=folder)
    hub.log.clear()
    second = client.upload_folder(repo_id=REPO, folder_path=folder)
    assert second.oid == first.oid
    assert hub.log.select("POST", "/commit/") == []
    assert hub.log.select("PUT") == []
    assert len(hub.commits(REPO)) == 2


def test_large_files_go_up_in_parts(hub: LocalHub) -> None:
    hub.multipart_above, hub.part_size = 100_000, 65_536
    client = api(hub)
    client.create_repo(REPO)
    client.create_commit(REPO, add({"adapter_model.safetensors": WEIGHTS}), commit_message="weights")
    parts = hub.log.select("PUT", "/upload/", origin="cdn")
    assert [entry.bytes_in for entry in parts] == [65_536] * 4 + [len(WEIGHTS) - 4 * 65_536]
    assert len(hub.log.select("POST", "/api/complete_multipart")) == 1
    assert len(hub.log.select("POST", "/verify")) == 1
    assert hub.log.leaks() == []
    assert hub.files(REPO) == {"adapter_model.safetensors": WEIGHTS}
    # The same object again needs no upload: the batch gives no actions.
    client.create_commit(REPO, add({"copy.safetensors": WEIGHTS}), commit_message="copy")
    assert len(hub.log.select("PUT")) == 5
    assert hub.files(REPO)["copy.safetensors"] == WEIGHTS


def test_shards_uploaded_ahead_appear_with_the_commit_and_not_before(hub: LocalHub) -> None:
    client = api(hub)
    client.create_repo(REPO)
    shard = CommitOperationAdd("model-00001-of-00001.safetensors", WEIGHTS)
    client.preupload_lfs_files(REPO, [shard])
    assert hub.files(REPO) == {}
    client.create_commit(REPO, [shard], commit_message="one commit")
    assert hub.files(REPO) == {"model-00001-of-00001.safetensors": WEIGHTS}
    assert len(hub.log.select("PUT")) == 1


def test_a_commit_on_a_moved_branch_is_refused_whole(hub: LocalHub) -> None:
    client = api(hub)
    head = hub.seed(REPO, {"a.txt": b"a"})
    hub.seed(REPO, {"b.txt": b"b"})
    with pytest.raises(HfHubHTTPError) as caught:
        client.create_commit(REPO, add({"c.txt": b"c"}), commit_message="late", parent_commit=head.oid)
    assert caught.value.response.status_code == 412
    assert hub.files(REPO) == {"a.txt": b"a", "b.txt": b"b"}
    newest = hub.commits(REPO)[0].oid
    client.create_commit(REPO, add({"c.txt": b"c"}), commit_message="in time", parent_commit=newest)
    client.create_commit(REPO, add({"d.txt": b"d"}), commit_message="short", parent_commit=hub.commits(REPO)[0].oid[:7])
    assert sorted(hub.files(REPO)) == ["a.txt", "b.txt", "c.txt", "d.txt"]


def test_a_commit_applies_all_of_its_operations_or_none(hub: LocalHub) -> None:
    client = api(hub)
    hub.seed(REPO, {"a.txt": b"a", "folder/b.txt": b"b"})
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        client.create_commit(REPO, [*add({"c.txt": b"c"}), CommitOperationDelete("missing.txt")], commit_message="x")
    assert hub.files(REPO) == {"a.txt": b"a", "folder/b.txt": b"b"}
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    operations += [*add({"c.txt": b"c"}), CommitOperationDelete("a.txt"), CommitOperationDelete("folder/")]
    client.create_commit(REPO, operations, commit_message="x")
    assert hub.files(REPO) == {"c.txt": b"c"}


def test_a_large_file_never_uploaded_cannot_be_committed(hub: LocalHub) -> None:
    client = api(hub)
    hub.seed(REPO, {"a.txt": b"a"})
    operation = CommitOperationAdd("model.safetensors", WEIGHTS)
    operation._upload_mode, operation._should_ignore, operation._is_uploaded = "lfs", False, True
    with pytest.raises(BadRequestError, match="never uploaded"):
        client.create_commit(REPO, [operation], commit_message="x")
    assert len(hub.commits(REPO)) == 2


def test_storage_refuses_bytes_that_are_not_what_was_announced(hub: LocalHub) -> None:
    client = api(hub)
    hub.seed(REPO, {"a.txt": b"a"})
    operation = CommitOperationAdd("model.safetensors", WEIGHTS)
    operation.path_or_fileobj = WEIGHTS[:-1] + b"?"
    with pytest.raises(RuntimeError, match="Error while uploading"):
        client.create_commit(REPO, [operation], commit_message="x")
    assert hub.log.select("PUT")[0].status == 400
    assert len(hub.commits(REPO)) == 2


def test_pull_requests(hub: LocalHub) -> None:
    hub.seed(REPO, {"a.txt": b"a"})
    # Anyone with a write token may open one; nobody but the owner may write to main.
    stranger = api(hub, hub.other_token)
    info = stranger.create_commit(REPO, add({"b.txt": b"b"}), commit_message="please", create_pr=True)
    assert info.pr_url == f"{hub.endpoint}/{REPO}/discussions/1"
    assert hub.files(REPO) == {"a.txt": b"a"}
    assert hub.files(REPO, "refs/pr/1") == {"a.txt": b"a", "b.txt": b"b"}
    with pytest.raises(HfHubHTTPError, match="403"):
        stranger.create_commit(REPO, add({"b.txt": b"b"}), commit_message="now")

    client = api(hub)
    second = client.create_pull_request(REPO, title="second")
    assert second.num == 2
    assert second.target_branch == "refs/heads/main"
    client.create_commit(REPO, add({"c.txt": b"c"}), commit_message="c", revision="refs/pr/2")
    assert hub.files(REPO, "refs/pr/2") == {"a.txt": b"a", "c.txt": b"c"}
    assert [discussion.num for discussion in client.get_repo_discussions(REPO)] == [1, 2]
    refs = client.list_repo_refs(REPO, include_pull_requests=True).pull_requests
    assert refs is not None
    assert [ref.ref for ref in refs] == ["refs/pr/1", "refs/pr/2"]


def test_creating_a_repository(hub: LocalHub) -> None:
    client = api(hub)
    client.create_repo("lab/adapter", private=True)
    assert hub.store.repos["lab/adapter"].private
    with pytest.raises(HfHubHTTPError, match="409"):
        client.create_repo("lab/adapter")
    assert str(client.create_repo("lab/adapter", exist_ok=True)) == f"{hub.endpoint}/lab/adapter"
    with pytest.raises(HfHubHTTPError, match="403"):
        client.create_repo("stranger/adapter")
    with pytest.raises(HfHubHTTPError, match="403"):
        api(hub, hub.reader_token).create_repo("tester/other")
    client.delete_repo("lab/adapter")
    assert hub.store.repos == {}
    assert client.whoami()["name"] == "tester"
    assert client.whoami()["auth"]["accessToken"]["role"] == "write"


def test_cards_are_checked_before_anything_is_uploaded(hub: LocalHub) -> None:
    client = api(hub)
    hub.seed(REPO, {"a.txt": b"a"})
    bad = "---\nbase_model: /home/me/base\nlicense: mine\nbase_model_relation: child\n---\n"
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md") as caught:
        client.create_commit(REPO, add({"README.md": bad.encode(), "w.safetensors": WEIGHTS}), commit_message="x")
    assert all(name in str(caught.value) for name in ("/home/me/base", '"license"', '"base_model_relation"'))
    assert hub.log.select("PUT") == []
    assert len(hub.commits(REPO)) == 2
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        client.create_commit(REPO, add({"README.md": b"# no metadata\n"}), commit_message="x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        client.create_commit(REPO, add({"README.md": CARD.encode()}), commit_message="x")
    assert ModelCard.load(client.hf_hub_download(REPO, "README.md")).data.base_model == "org/base"
