"""The real hf-xet client stores into, and reads from, the local Hub's own storage folder."""

import hashlib
import json
import random
import struct
import sys
from pathlib import Path

import pytest
from huggingface_hub import get_hf_file_metadata
from huggingface_hub.hf_api import RepoFile

from tests.hub.server import LocalHub
from tests.hub.server.client import api, run
from tests.hub.server.sample import REPO, write
from tests.hub.server.xet import files_in_shard, hash_hex

PUSH = """
import json, sys
from huggingface_hub import HfApi, snapshot_download
folder, down, repo = sys.argv[1:]
client = HfApi()
client.create_repo(repo, exist_ok=True)
first = client.upload_folder(repo_id=repo, folder_path=folder).oid
second = client.upload_folder(repo_id=repo, folder_path=folder).oid
print(json.dumps([first, second, snapshot_download(repo, local_dir=down)]))
"""


def test_a_round_trip_through_real_xet(xet_hub: LocalHub, hub_home: Path, tmp_path: Path) -> None:
    pytest.importorskip("hf_xet", reason="hf-xet is not installed")
    assert xet_hub.cas is not None
    # Random bytes with a repeat: chunks are found by content, so the second half adds no storage.
    half = random.Random(7).randbytes(1 << 20)
    files = {"model.safetensors": half + half, "config.json": b"{}"}
    folder = write(tmp_path / "up", files)
    done = run(xet_hub, hub_home, sys.executable, "-c", PUSH, str(folder), str(tmp_path / "down"), REPO, xet=True)
    if done.returncode and "local://" in done.stderr:
        pytest.skip(f"this hf-xet no longer takes local:// storage: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    first, second, down = json.loads(done.stdout.splitlines()[-1])
    assert first == second == xet_hub.commits(REPO)[0].oid
    assert len(xet_hub.commits(REPO)) == 2
    assert {path: (Path(down) / path).read_bytes() for path in files} == files
    # Nothing large went through LFS, nor came back by plain HTTP.
    assert xet_hub.log.select("PUT") == []
    assert xet_hub.log.select(origin="cdn") == []

    chunks = [path for path in xet_hub.cas.root.rglob("xorbs/default.*") if path.suffix != ".tagset"]
    assert 1 << 20 <= sum(path.stat().st_size for path in chunks) < 1.5 * (1 << 20)

    # The Hub found the xet hash of the sha256 in the shard, and gives the bytes to clients without xet too.
    sha256 = hashlib.sha256(files["model.safetensors"]).hexdigest()
    file = xet_hub.cas.find(sha256)
    assert file is not None
    assert file[1] == 2 << 20
    (head,) = [entry for entry in api(xet_hub).list_repo_tree(REPO) if entry.path == "model.safetensors"]
    assert isinstance(head, RepoFile)
    assert head.lfs is not None
    assert head.lfs.sha256 == sha256
    # Clients of 1.0 do not read the tree's xetHash; the reply to HEAD has it for all.
    metadata = get_hf_file_metadata(f"{xet_hub.endpoint}/{REPO}/resolve/main/model.safetensors", token=xet_hub.token)
    assert metadata.xet_file_data is not None
    assert metadata.xet_file_data.file_hash == file[0]
    plain = Path(api(xet_hub).hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path / "plain"))
    assert plain.read_bytes() == files["model.safetensors"]
    assert xet_hub.log.bytes_out(origin="cdn") == 2 << 20


def test_files_in_a_shard() -> None:
    sha256, xet = bytes(range(32)), bytes(range(100, 132))
    record = struct.Struct("<32sIIQ")
    segments = [struct.pack("<32sIIII", bytes(32), 0, size, 0, 1) for size in (70_000, 1_234)]
    shard = b"".join(
        [
            bytes(48),
            record.pack(b"\1" * 32, 0, 1, 0),
            segments[0],
            record.pack(xet, 1 << 31 | 1 << 30, 2, 0),
            *segments,
            bytes(96),
            sha256 + bytes(16),
            record.pack(b"\xff" * 32, 0, 0, 0),
            bytes(480),
        ]
    )
    assert hash_hex(sha256) == "07060504030201000f0e0d0c0b0a090817161514131211101f1e1d1c1b1a1918"
    assert files_in_shard(shard) == {hash_hex(sha256): (hash_hex(xet), 71_234)}
