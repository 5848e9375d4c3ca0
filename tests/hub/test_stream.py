"""A model is sent shard by shard while it is made; the disk holds one shard at a time."""

from pathlib import Path

import pytest

from loratools.errors import HubError
from loratools.hub.client import Hub
from loratools.hub.refs import Ref
from loratools.hub.stream import Stream
from loratools.surgery.merge import MergeOptions, execute, prepare
from tests.hub.server import LocalHub
from tests.hub.trips import REPO, contents, fetch


def used(folder: Path) -> int:
    """Return the bytes that the files of a folder take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def test_a_model_is_sent_while_it_is_made(hub: LocalHub, workplace: Path, tmp_path: Path) -> None:
    hub.seed(REPO, {"model-00003-of-00003.safetensors": b"of an earlier version"})
    whole = contents(workplace / "base")
    shards = {name: data for name, data in whole.items() if name.endswith(".safetensors")}
    folder = tmp_path / "made"
    folder.mkdir()
    stream = Stream(Hub(), Ref(REPO), folder, license="mit")
    for name, data in shards.items():
        before = used(folder)
        (folder / name).write_bytes(data)
        assert used(folder) - before >= len(data)
        stream.shard(folder / name)
        assert used(folder) - before <= 16_384
    assert len(hub.commits(REPO)) == 2
    for name, data in whole.items() - shards.items():
        (folder / name).write_bytes(data)
    done, notes = stream.finish("Made on the way")
    assert notes == []
    sent = hub.files(REPO)
    assert sent.pop("README.md").startswith(b"---\nlibrary_name: transformers\n")
    assert sent == whole
    assert [commit.title for commit in hub.commits(REPO)] == ["Made on the way", "seed", "initial commit"]
    assert done.commit == hub.commits(REPO)[0].oid
    fetch(tmp_path / "down")
    assert contents(tmp_path / "down").items() >= whole.items()


def test_a_shard_that_could_not_be_sent_stays_whole(hub: LocalHub, workplace: Path, naps: list[float]) -> None:
    folder = workplace / "base"
    before = contents(folder)
    hub.faults.add("PUT", "/upload/", times=None, status=503)
    stream = Stream(Hub(), Ref(REPO), folder)
    with pytest.raises(HubError):
        stream.shard(folder / "model-00001-of-00002.safetensors")
    assert contents(folder) == before
    assert hub.files(REPO) == {}


def test_a_merge_holds_never_more_than_one_shard_on_the_disk(hub: LocalHub, workplace: Path, tmp_path: Path) -> None:
    held: list[int] = []

    class Watched(Stream):
        def shard(self, path: Path) -> None:
            held.append(sum(file.stat().st_blocks * 512 for file in self.place.rglob("*.safetensors")))
            super().shard(path)

    prepared = prepare(
        workplace / "base", [workplace / "adapter"], tmp_path / "out", options=MergeOptions(max_shard_size=8_000)
    )
    sizes = [file.size for file in prepared.plan.files]
    assert len(sizes) >= 4
    execute(prepared, sink=lambda folder: Watched(Hub(), Ref(REPO), folder, license="mit", base_model="lab/base"))
    block = 4096
    assert len(held) == len(sizes)
    assert all(used <= size + 2 * block * len(sizes) for used, size in zip(held, sizes, strict=True))
    assert len([name for name in hub.files(REPO) if name.endswith(".safetensors")]) == len(sizes)
