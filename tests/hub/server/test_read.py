"""The local Hub gives the real client what the Hub gives, to those who may have it."""

import hashlib
import json
from pathlib import Path

import pytest
from huggingface_hub import (
    HfFileSystem,
    get_session,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from tests.hub.server import LocalHub
from tests.hub.server.client import api
from tests.hub.server.sample import FILES, REPO, WEIGHTS, add, safetensors


def test_refs_and_revisions(hub: LocalHub) -> None:
    client = api(hub)
    first = hub.seed(REPO, {"a.txt": b"1"})
    client.create_tag(REPO, tag="v1")
    client.create_branch(REPO, branch="dev/next")
    with pytest.raises(HfHubHTTPError, match="409"):
        client.create_branch(REPO, branch="dev/next")
    client.create_branch(REPO, branch="dev/next", exist_ok=True)
    client.create_commit(REPO, add({"a.txt": b"2"}), commit_message="on a branch", revision="dev/next")
    for revision, content in {"v1": b"1", "main": b"1", first.oid: b"1", "dev/next": b"2"}.items():
        assert Path(client.hf_hub_download(REPO, "a.txt", revision=revision)).read_bytes() == content
    assert client.model_info(REPO, revision="v1").sha == first.oid
    refs = client.list_repo_refs(REPO)
    assert [(ref.name, ref.ref) for ref in refs.branches] == [
        ("main", "refs/heads/main"),
        ("dev/next", "refs/heads/dev/next"),
    ]
    assert [ref.target_commit for ref in refs.tags] == [first.oid]
    assert [commit.title for commit in client.list_repo_commits(REPO, revision="dev/next")] == [
        "on a branch",
        "seed",
        "initial commit",
    ]
    client.delete_branch(REPO, branch="dev/next")
    client.delete_tag(REPO, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        client.hf_hub_download(REPO, "a.txt", revision="dev/next")
    with pytest.raises(RevisionNotFoundError):
        client.create_commit(REPO, add({"a.txt": b"3"}), commit_message="x", revision="nowhere")


def test_listing(hub: LocalHub) -> None:
    client = api(hub)
    hub.seed(REPO, FILES)
    hub.page_size = 2
    listed = {entry.path: entry for entry in client.list_repo_tree(REPO, recursive=True)}
    assert sorted(listed) == sorted([".gitattributes", "extra", *FILES])
    assert len(hub.log.select("GET", "/tree/main")) == 4
    weights = listed["adapter_model.safetensors"]
    assert isinstance(weights, RepoFile)
    assert weights.size == len(WEIGHTS)
    assert weights.lfs is not None
    assert weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    config, listed_file = FILES["adapter_config.json"], listed["adapter_config.json"]
    assert isinstance(listed_file, RepoFile)
    assert listed_file.blob_id == hashlib.sha1(b"blob %d\0" % len(config) + config).hexdigest()
    assert [entry.path for entry in client.list_repo_tree(REPO, "extra")] == ["extra/notes.txt"]
    with pytest.raises(EntryNotFoundError):
        list(client.list_repo_tree(REPO, "nothing"))
    infos = client.get_paths_info(REPO, ["extra", "README.md", "missing"], expand=True)
    assert [(info.path, info.last_commit.title) for info in infos if info.last_commit] == [
        ("extra", "seed"),
        ("README.md", "seed"),
    ]
    assert client.file_exists(REPO, "README.md")
    assert not client.file_exists(REPO, "missing")
    info = client.model_info(REPO, files_metadata=True)
    assert {item.rfilename: item.size for item in info.siblings or []}["adapter_model.safetensors"] == len(WEIGHTS)
    assert info.card_data is not None
    assert info.card_data["base_model"] == "org/base"
    assert info.config == {"peft": {"base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM"}}


def test_a_header_costs_one_range(hub: LocalHub) -> None:
    hub.seed(REPO, FILES)
    metadata = api(hub).parse_safetensors_file_metadata(REPO, "adapter_model.safetensors")
    assert metadata.tensors["layers.0.q_proj.lora_B.weight"].data_offsets == (160_000, 320_000)
    (fetched,) = hub.log.select(origin="cdn")
    assert (fetched.range, fetched.status, fetched.bytes_out) == ("bytes=0-100000", 206, 100_001)
    assert hub.log.bytes_out() <= 101_000
    assert hub.log.leaks() == []


def test_ranges(hub: LocalHub) -> None:
    hub.seed(REPO, FILES)
    files = HfFileSystem(endpoint=hub.endpoint, token=hub.token, skip_instance_cache=True)
    with files.open(f"{REPO}/adapter_model.safetensors", "rb", block_size=4096) as file:
        file.seek(100_000)
        assert file.read(50) == WEIGHTS[100_000:100_050]
    get = {"Authorization": f"Bearer {hub.token}"}
    address = f"{hub.endpoint}/{REPO}/resolve/main/extra/notes.txt"
    size = len(FILES["extra/notes.txt"])
    expected = {
        "bytes=2-5": (206, f"bytes 2-5/{size}", b"nest"),
        "bytes=-5": (206, f"bytes {size - 5}-{size - 1}/{size}", b"file\n"),
        "bytes=9-": (206, f"bytes 9-{size - 1}/{size}", b"file\n"),
        f"bytes={size}-": (416, f"bytes */{size}", b""),
        "bytes=5-2": (200, None, b"a nested file\n"),
        "bytes=0-0,2-2": (200, None, b"a nested file\n"),
    }
    for wanted, (status, content_range, body) in expected.items():
        answer = get_session().get(address, headers={**get, "Range": wanted})
        assert (answer.status_code, answer.headers.get("Content-Range"), answer.content) == (
            status,
            content_range,
            body,
        )
    with pytest.raises(HfHubHTTPError, match="416"):
        api(hub).parse_safetensors_file_metadata(REPO, "empty.txt")


def test_metadata_of_files(hub: LocalHub) -> None:
    head = hub.seed(REPO, FILES)
    client = api(hub)
    weights = client.get_hf_file_metadata(url=f"{hub.endpoint}/{REPO}/resolve/main/adapter_model.safetensors")
    assert weights.commit_hash == head.oid
    assert weights.etag == hashlib.sha256(WEIGHTS).hexdigest()
    assert weights.size == len(WEIGHTS)
    assert weights.location.startswith(f"{hub.cdn}/objects/{weights.etag}?")
    notes = client.get_hf_file_metadata(url=f"{hub.endpoint}/{REPO}/resolve/main/extra/notes.txt")
    assert notes.etag == head.files["extra/notes.txt"].oid
    assert notes.size == 14
    assert all(entry.bytes_out == 0 for entry in hub.log.select("HEAD"))


def test_a_missing_file_is_remembered_as_missing(hub: LocalHub, hub_home: Path) -> None:
    head = hub.seed(REPO, FILES)
    with pytest.raises(EntryNotFoundError):
        api(hub).hf_hub_download(REPO, "missing.json")
    assert len(list(hub_home.rglob(f".no_exist/{head.oid}/missing.json"))) == 1


@pytest.mark.parametrize("token", [LocalHub.other_token, None])
def test_private_and_missing_repositories_look_the_same(hub: LocalHub, token: str | None) -> None:
    hub.seed(REPO, FILES, private=True)
    client = api(hub, token)
    for repo in (REPO, "tester/missing"):
        with pytest.raises(RepositoryNotFoundError) as caught:
            client.model_info(repo)
        assert caught.value.response.status_code == (404 if token else 401)
        assert not isinstance(caught.value, GatedRepoError)
        with pytest.raises(RepositoryNotFoundError):
            client.auth_check(repo)
        with pytest.raises(RepositoryNotFoundError):
            client.parse_safetensors_file_metadata(repo, "adapter_model.safetensors")
    assert api(hub).model_info(REPO).private


@pytest.mark.parametrize("token", [LocalHub.other_token, None])
def test_gated_repositories_show_their_page_but_not_their_files(hub: LocalHub, token: str | None) -> None:
    hub.seed(REPO, FILES, gated="manual")
    client = api(hub, token)
    assert client.model_info(REPO).gated == "manual"
    assert "README.md" in client.list_repo_files(REPO)
    with pytest.raises(GatedRepoError) as caught:
        client.parse_safetensors_file_metadata(REPO, "adapter_model.safetensors")
    assert caught.value.response.status_code == (403 if token else 401)
    with pytest.raises(GatedRepoError):
        client.auth_check(REPO)
    assert hub.log.select(origin="cdn") == []
    hub.store.repos[REPO].granted.add("stranger")
    if token:
        assert Path(client.hf_hub_download(REPO, "adapter_model.safetensors")).read_bytes() == WEIGHTS


def test_a_wrong_token_is_not_a_missing_repository(hub: LocalHub) -> None:
    hub.seed(REPO, FILES)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
        api(hub, "hf_nobody").model_info(REPO)
    assert not isinstance(caught.value, RepositoryNotFoundError)
    assert caught.value.response.status_code == 401


def test_many_files_come_down_at_once(hub: LocalHub, tmp_path: Path) -> None:
    files = {f"part-{number:02}.bin": bytes([number]) * 5000 for number in range(24)}
    hub.seed(REPO, files)
    down = Path(
        snapshot_download(
            REPO, endpoint=hub.endpoint, token=hub.token, local_dir=tmp_path / "down", allow_patterns="*.bin"
        )
    )
    assert {path: (down / path).read_bytes() for path in files} == files
    assert hub.log.select(target="gitattributes") == []


def test_shard_headers_in_one_answer(hub: LocalHub) -> None:
    client = api(hub)
    if not hasattr(client, "get_sharded_safetensors_metadata"):
        pytest.skip("this huggingface_hub has no get_sharded_safetensors_metadata")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"metadata": {"total_size": 24}, "weight_map": {"a": names[0], "b": names[1]}}
    shards = {names[0]: safetensors({"a": 2}), names[1]: safetensors({"b": 4})}
    hub.seed(REPO, {**shards, "model.safetensors.index.json": json.dumps(index).encode()})
    metadata = client.get_sharded_safetensors_metadata(REPO)
    assert metadata.weight_map == index["weight_map"]
    assert metadata.files_metadata[names[1]].tensors["b"].shape == [4]
    assert len(hub.log.select()) == 1
