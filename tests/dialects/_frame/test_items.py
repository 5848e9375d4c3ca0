"""What counts as an adapter or a model in a folder, by names alone: nothing in these files can be opened."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from loratools.dialects._frame.items import items_in
from loratools.errors import BadFile


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[str], Path]:
    def make(names: str) -> Path:
        for name in names.split():
            path = tmp_path / "top" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / "top"

    return make


def listed(top: Path) -> list[str]:
    return [str(path.relative_to(top)) for path in items_in(top).paths]


@pytest.mark.parametrize(
    ("names", "items"),
    [
        ("b.safetensors a.safetensors c/d.gguf c/e.pt c/readme.md c/f.nemo",
         "a.safetensors b.safetensors c/d.gguf c/e.pt c/f.nemo"),
        ("a10.safetensors a9.safetensors", "a9.safetensors a10.safetensors"),
        ("x/adapter_config.json x/adapter_model.safetensors x/optimizer.pt x/training_args.bin", "x"),
        ("x/adapter_config.json x/adapter_model-00001-of-00002.bin x/adapter_model-00002-of-00002.bin", "x"),
        ("r/adapter_config.json r/checkpoint-500/adapter_config.json r/checkpoint-1000/adapter_config.json",
         "r r/checkpoint-500 r/checkpoint-1000"),
        ("r/adapter_config.json r/scheduler.pt r/global_step500/mp_rank_00_model_states.pt", "r"),
        ("m/config.json m/model.safetensors m/pytorch_model.bin", "m"),
        ("m/model-00001-of-00002.safetensors m/model-00002-of-00002.safetensors m/model.safetensors.index.json", "m"),
        ("m/model-00001-of-00002.safetensors m/model-00002-of-00002.safetensors", "m"),
        ("q/config.json q/q4.gguf q/q8.gguf", "q/q4.gguf q/q8.gguf"),
        ("q/big-00001-of-00002.gguf q/big-00002-of-00002.gguf", "q/big-00001-of-00002.gguf"),
        ("p/model_index.json p/unet/config.json p/unet/model.safetensors p/vae/x.safetensors", "p"),
        ("s/modules.json s/config.json s/model.safetensors s/2_Dense/model.safetensors s/lora/a.pt", "s s/lora/a.pt"),
        (".cache/a.safetensors x/.b.safetensors x/._c.safetensors __pycache__/d.pt x/e.safetensors",
         "x/e.safetensors"),
        ("models--o--n/blobs/0f models--o--n/refs/main models--o--n/snapshots/1/adapter_config.json",
         "models--o--n/snapshots/1"),
        ("adapter_config.json adapter_model.safetensors", "."),
        ("d/weights/__0_0.distcp d/weights/common.pt d/x.mlpackage/weight.bin", "d/weights"),
    ],
)  # fmt: skip
def test_what_is_one_item(names: str, items: str, tree: Callable[[str], Path]) -> None:
    assert listed(tree(names)) == items.split()


def test_links(tree: Callable[[str], Path], tmp_path: Path) -> None:
    top = tree("run/checkpoint-5/adapter_config.json z.safetensors")
    far = tmp_path / "far"
    (far / "inner").mkdir(parents=True)
    (far / "inner" / "f.safetensors").touch()
    (far / "blob").touch()
    (top / "last").symlink_to(top / "run" / "checkpoint-5")  # within: met there
    (top / "best.safetensors").symlink_to("z.safetensors")  # the same file by another name
    (top / "blob.safetensors").symlink_to(far / "blob")  # a file elsewhere, as in the Hub's cache
    (top / "gone.safetensors").symlink_to(far / "nothing")  # to be opened, which says what is wrong
    (top / "out").symlink_to(far)
    (top / "out2").symlink_to(far)  # the same folder again
    (top / "up").symlink_to(tmp_path)
    (far / "inner" / "circle").symlink_to(far)
    (top / "self").symlink_to("self")
    inside = "blob.safetensors gone.safetensors z.safetensors out/inner/f.safetensors run/checkpoint-5"
    assert listed(top) == inside.split()


def test_a_folder_that_cannot_be_listed_is_told_and_the_others_go_on(
    tree: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tree("a/x.safetensors b/y.safetensors")
    (top / "b").chmod(0)
    if os.access(top / "b", os.R_OK):  # root may read everything
        scan = os.scandir

        def refusing(path: str) -> object:
            if str(path).endswith("/b"):
                raise PermissionError(13, "Permission denied", path)
            return scan(path)

        monkeypatch.setattr(os, "scandir", refusing)
    found = items_in(top)
    (top / "b").chmod(0o700)
    assert [path.name for path in found.paths] == ["x.safetensors"]
    assert found.unread == ((top / "b", "permission denied"),)


def test_deep_folders_and_those_to_skip(tree: Callable[[str], Path]) -> None:
    top = tree("out/y.safetensors out2/z.safetensors")
    assert [path.name for path in items_in(top, skip=[top / "out", top / "no"]).paths] == ["z.safetensors"]
    deep = "/".join([str(top), *["d"] * 1200])
    subprocess.run(["mkdir", "-p", deep], check=True)
    Path(deep, "x.safetensors").touch()
    assert [path.name for path in items_in(top).paths] == ["x.safetensors", "y.safetensors", "z.safetensors"]
    subprocess.run(["rm", "-r", str(top / "d")], check=True)


@pytest.mark.parametrize(
    ("path", "reason"), [("nowhere", "no such folder"), ("file", "this is a file"), ("hf://a/b", "a reference")]
)
def test_what_is_no_folder(path: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(BadFile, match=reason) as refusal:
        items_in(path)
    assert "--each" not in (refusal.value.hint or "")  # `find` and `report` take a folder without it


def test_a_folder_that_is_not_there_is_told_with_the_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / "styles").mkdir()
    (tmp_path / "stylus.safetensors").touch()
    for name, said in (("stiles", "; did you mean styles?"), ("else", "lie."), ("no/where", "lie.")):
        with pytest.raises(BadFile, match="no such folder") as caught:
            items_in(tmp_path / name)
        assert (caught.value.hint or "").endswith(said)
