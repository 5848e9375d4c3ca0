"""The final name in one step, and what happens where the file system cannot do it in one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loratools.storage.atomic import place


@pytest.fixture(params=["exchange", "aside"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How a folder is replaced: as this system does it, or as one without renameat2."""
    place._function.cache_clear()
    if request.param == "aside":
        monkeypatch.setattr(place, "_NAME", "no_such_function")
    elif place._function() is None:
        pytest.skip("this system cannot exchange two names")
    yield request.param
    place._function.cache_clear()


def make(path: Path, text: str) -> Path:
    path.mkdir()
    (path / text).write_text(text)
    return path


def test_a_folder_is_replaced_and_the_old_one_is_told(way: str, tmp_path: Path) -> None:
    new, old, aside = make(tmp_path / "new", "new"), make(tmp_path / "old", "old"), tmp_path / "aside"
    left = place.put(new, old, aside, force=True)
    assert left == (new if way == "exchange" else aside)
    assert [path.name for path in old.iterdir()] == ["new"]
    assert [path.name for path in left.iterdir()] == ["old"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("force", [False, True])
def test_a_new_name(way: str, force: bool, tmp_path: Path) -> None:
    new = make(tmp_path / "new", "new")
    assert place.put(new, tmp_path / "out", tmp_path / "aside", force=force) is None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_replaces_a_file(way: str, tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    new.write_text("new")
    old.write_text("old")
    assert place.put(new, old, tmp_path / "aside", force=True) is None
    assert old.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("there", ["folder", "empty", "file", "link"])
def test_nothing_is_replaced_without_force(way: str, there: str, tmp_path: Path) -> None:
    """An empty folder too, which the plain rename of the kernel would replace."""
    new, old = make(tmp_path / "new", "new"), tmp_path / "old"
    {
        "folder": lambda: make(old, "old"),
        "empty": old.mkdir,
        "file": old.touch,
        "link": lambda: old.symlink_to("nowhere"),
    }[there]()
    with pytest.raises(FileExistsError):
        place.put(new, old, tmp_path / "aside", force=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
    assert [path.name for path in new.iterdir()] == ["new"]


def test_what_fails_leaves_the_old(way: str, tmp_path: Path) -> None:
    old = make(tmp_path / "old", "old")
    with pytest.raises(FileNotFoundError):
        place.put(tmp_path / "missing", old, tmp_path / "aside", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert [path.name for path in old.iterdir()] == ["old"]
