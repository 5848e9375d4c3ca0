"""Digests taken ahead: those that a hash of the whole model finds, none of what was not finished, and they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import loratools
from loratools.storage.checkpoint import Checkpoint, ahead
from loratools.surgery.hash import hash_tensors
from tests.conftest import clean_env
from tests.surgery.models import random


def models(folder: Path) -> tuple[Checkpoint, Checkpoint]:
    """Two models: tensors that are equal, that differ from the first byte or the last one on, and that do not pair."""
    old = {name: random(40, 30, seed=seed) for seed, name in enumerate(("equal", "first", "last", "shape", "alone"))}
    new = {name: W.clone() for name, W in old.items()}
    new["first"][0, 0] += 1
    new["last"][-1, -1] += 1
    new["shape"] = new["shape"].view(30, 40)
    del new["alone"]
    old["dtype"], new["dtype"] = random(8, 8).half(), random(8, 8)
    old["empty"] = new["empty"] = torch.zeros(0, 4)
    for name, tensors in (("old", old), ("new", new)):
        save_file(tensors, folder / f"{name}.safetensors")
    return Checkpoint.open(folder / "old.safetensors"), Checkpoint.open(folder / "new.safetensors")


def finished(first: Checkpoint, second: Checkpoint) -> ahead.Ahead:
    """Return what a thread found that nobody stopped."""
    taken = ahead.Ahead(first, second)
    taken._thread.join()
    return taken


@pytest.mark.parametrize("piece", [7, 64, 4799, 4800, 1 << 23])
def test_they_are_those_of_a_hash(tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "PIECE", piece)
    first, second = models(tmp_path)
    digests = finished(first, second).digests
    for model in (first, second):
        whole = hash_tensors(model.specs)
        assert {name: digests[model.specs[name]] for name in ("equal", "first", "last", "empty")} == {
            name: whole[name] for name in ("equal", "first", "last", "empty")
        }
    assert len(digests) == 8
    assert digests[first.specs["equal"]] == digests[second.specs["equal"]]


def test_what_cannot_be_read_is_left_to_who_computes_on_it(tmp_path: Path) -> None:
    first, second = models(tmp_path)
    path = tmp_path / "new.safetensors"
    path.write_bytes(path.read_bytes()[:-4000])
    assert second.specs["shape"] not in finished(first, second).digests
    path.unlink()
    assert finished(first, second).digests == {}


def test_they_are_known_inside_the_block_alone_and_never_by_halves(tmp_path: Path) -> None:
    first, second = models(tmp_path)
    assert ahead.found() == {}
    with ahead.hashing(first, second) as taken:
        taken.stop()
        known = dict(ahead.found())
        assert known == taken.digests
        whole = {first.specs[name]: found for name, found in hash_tensors(first.specs).items()}
        assert all(whole[spec] == found for spec, found in known.items() if spec in whole)
    assert ahead.found() == {}


def test_an_extraction_takes_what_is_known_and_writes_the_same(workplace: Path) -> None:
    base, tuned = (Checkpoint.open(workplace / name) for name in ("base", "tuned"))
    plain = loratools.extract_svd(base, tuned, workplace / "plain", 2)
    with ahead.hashing(base, tuned) as taken:
        taken._thread.join()
        found = loratools.extract_svd(base, tuned, workplace / "taken", 2)
        assert (found.digest, found.base, found.tuned) == (plain.digest, plain.base, plain.tuned)
        said = [[(one.pair, one.outcome, one.norm2, one.layer) for one in each.outcomes] for each in (found, plain)]
        assert said[0] == said[1]
        changed = found.of("factored")[0].pair.name
        taken.digests[tuned.specs[changed]] = f"blake3:{'0' * 64}"
        assert loratools.extract_svd(base, tuned, workplace / "wrong", 2).tuned != plain.tuned
        taken.digests[tuned.specs[changed]] = taken.digests[base.specs[changed]]
        equal = loratools.extract_svd(base, tuned, workplace / "equal", 2)
        assert changed in {one.pair.name for one in equal.of("unchanged")}


def test_hashing_begins_before_torch_is_imported(workplace: Path) -> None:
    code = (
        "import sys\n"
        "class Look:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            print('loratools.storage.checkpoint.ahead' in sys.modules)\n"
        "sys.meta_path.insert(0, Look())\n"
        "from loratools.cli._run import run\n"
        "sys.exit(run(['-q', '--json', 'extract-svd', 'base', 'tuned', '-o', 'made', '--rank', '2']))\n"
    )
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=workplace, env=clean_env())
    assert done.stdout.splitlines()[0] == "True"
