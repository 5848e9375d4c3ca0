"""What is shipped: an sdist, and a wheel built from it, which holds the package and nothing else.

Built here without a compiler, so that the wheel is one of pure Python; `.ci/wheel` builds the one with compiled C, runs
it in a bare environment, and has this file look at it too, in the folder $TESTS_DIST.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

from loratools.version import __version__
from tests.conftest import REPOSITORY, clean_env

NATIVE = "loratools/linalg/native"
COMPILED = {f"{NATIVE}/lib{path.stem}.so" for path in (REPOSITORY / NATIVE).glob("*.c")}
NOT_SHIPPED = {f"{NATIVE}/build.py", *COMPILED}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from what it holds."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("shipped")
    _build("sdist", REPOSITORY, folder)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    _build("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def _build(kind: str, source: Path, folder: Path) -> None:
    line = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    done = subprocess.run(
        line, cwd=source, env=clean_env() | {"CC": "/no/compiler"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def package() -> set[str]:
    """Return every file of the package in the checkout that a user needs."""
    files = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "loratools").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return files - NOT_SHIPPED


def look_at(wheel: Path, *, compiled: bool) -> None:
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        info = f"loratools-{__version__}.dist-info"
        assert {name for name in names if not name.startswith(f"{info}/")} == package() | (
            COMPILED if compiled else set()
        )
        assert {f"{info}/{name}" for name in ("licenses/LICENSE", "METADATA", "WHEEL", "entry_points.txt")} <= names
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert (metadata["Name"], metadata["Version"]) == ("loratools", __version__)
        assert metadata["License-Expression"] == "Apache-2.0"
        assert metadata.get_payload() == (REPOSITORY / "README.md").read_text(encoding="utf-8")
        assert b"loratools = loratools.__main__:process" in archive.read(f"{info}/entry_points.txt")


def test_the_package_and_nothing_else_is_in_the_wheel(shipped: tuple[Path, Path]) -> None:
    look_at(shipped[1], compiled=False)
    assert shipped[1].name == f"loratools-{__version__}-py3-none-any.whl"


@pytest.mark.parametrize(
    "name",
    ["py.typed", "adapter/kinds/wavelets.json", "adapter/naming/conversions.json", "adapter/placement/ties.json",
     "cli/schemas/merge.json", "demo/data/base/model-00001-of-00002.safetensors", "demo/data/plays.txt",
     "linalg/native/rows.c"],
)  # fmt: skip
def test_what_is_no_python_is_there_too(shipped: tuple[Path, Path], name: str) -> None:
    """Said by name: a file that git ignores would be missing in the checkout of `package` as well."""
    with ZipFile(shipped[1]) as archive:
        assert archive.getinfo(f"loratools/{name}").file_size == (REPOSITORY / "loratools" / name).stat().st_size


def test_the_sdist_has_what_its_tests_need(shipped: tuple[Path, Path]) -> None:
    with tarfile.open(shipped[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "tests/conftest.py", "spec/v1/kinds.csv", "constraints.txt", "LICENSE"} <= names
    assert package() | {f"{NATIVE}/build.py"} <= names
    assert not names & COMPILED


def test_the_wheel_that_was_built_with_a_compiler() -> None:
    folder = os.environ.get("TESTS_DIST")
    if not folder:
        pytest.skip("needs $TESTS_DIST: the folder in which .ci/wheel has built")
    (wheel,) = Path(folder).glob("*.whl")
    look_at(wheel, compiled=True)
    assert wheel.name.split("-")[2] == "py3"
    assert "linux_" not in wheel.name.replace("manylinux_", "")
