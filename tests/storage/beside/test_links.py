"""Links of strangers lead nowhere but into their own folder, and into the Hub's cache that holds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools.errors import BadFile
from loratools.storage.beside.links import refuse_outside


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.json").write_text("{}")
    return tmp_path / "secret"


def test_links_in_a_folder(tmp_path: Path, secret: Path) -> None:
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / "plain.json").write_text("{}")
    (model / "inside.json").symlink_to("plain.json")
    (model / "sub" / "up.json").symlink_to("../plain.json")
    refuse_outside([model / "plain.json", model / "inside.json", model / "sub" / "up.json"], model)
    (model / "out.json").symlink_to("../secret/key.json")
    (model / "absolute.json").symlink_to(secret / "key.json")
    (model / "twice.json").symlink_to("out.json")
    (model / "folder").symlink_to(secret)
    outside = [model / "out.json", model / "absolute.json", model / "twice.json", model / "folder" / "key.json"]
    with pytest.raises(BadFile, match=r"4 links in it lead out of it") as refusal:
        refuse_outside([model / "plain.json", *outside], model)
    assert refusal.value.problems == tuple(f"{path}: leads to {secret / 'key.json'}" for path in outside)
    (tmp_path / "elsewhere").symlink_to(model)  # a folder that the user names may itself be a link
    refuse_outside([tmp_path / "elsewhere" / "inside.json"], tmp_path / "elsewhere")


def test_a_name_that_only_begins_alike_is_another_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model2").mkdir()
    (tmp_path / "model2" / "w").write_text("")
    (tmp_path / "model" / "w").symlink_to("../model2/w")
    with pytest.raises(BadFile, match=r"leads? out of it"):
        refuse_outside([tmp_path / "model" / "w"], tmp_path / "model")


@pytest.mark.parametrize(
    ("target", "good"),
    [
        ("models--a--b/blobs/0f", True),
        ("models--c--d/blobs/0f", False),
        ("models--a--b/refs/main", False),
        ("secret/key.json", False),
    ],
)
def test_the_hub_s_cache(target: str, good: bool, tmp_path: Path, secret: Path) -> None:
    place = tmp_path / target
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("{}")
    unet = tmp_path / "models--a--b" / "snapshots" / "0123" / "unet"
    unet.mkdir(parents=True)
    (unet / "config.json").symlink_to(place)
    for root in (unet, unet.parent):
        if good:
            refuse_outside([unet / "config.json"], root)
        else:
            with pytest.raises(BadFile, match=r"leads? out of it"):
                refuse_outside([unet / "config.json"], root)
