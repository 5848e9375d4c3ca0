"""Where the files of a tar archive lie: as Python's tarfile has them, and no header believed too far."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import pytest

from loratools.errors import BadFile
from loratools.storage.pickles import tar

LONG = "a/" * 80 + "weights.ckpt"
UNICODE = "gewichte/größe.ckpt"


def archive(path: Path, form: int, names: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=form) as file:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
        for name, content in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "folder"
        file.addfile(link)
    return path


def members(path: Path) -> dict[str, bytes]:
    with path.open("rb") as file:
        spans = tar.members(file, path)
    data = path.read_bytes()
    return {name: data[start:stop] for name, (start, stop) in spans.items()}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_files_lie_where_tarfile_has_them(tmp_path: Path, form: int) -> None:
    chance = random.Random(form)
    names = {"./model_config.yaml": b"a: 1\n", "empty": b"", "block": bytes(512), "data": chance.randbytes(5000)}
    names |= {LONG: b"long"} if form != tarfile.USTAR_FORMAT else {"p/" * 60 + "x": b"prefix"}
    names |= {UNICODE: b"unicode"}
    path = archive(tmp_path / "a.nemo", form, names)
    assert members(path) == {name.removeprefix("./"): content for name, content in names.items()}


def test_a_size_that_octal_digits_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.nemo"
    info = tarfile.TarInfo("x")
    info.size = 2**33 + 5
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    with path.open("r+b") as file:
        file.truncate(512 + 2**33 + 1024)
    with path.open("rb") as file:
        assert tar.members(file, path) == {"x": (512, 512 + 2**33 + 5)}


@pytest.mark.parametrize("number", range(400))
def test_damage_is_refused_or_read_as_it_lies(tmp_path: Path, number: int) -> None:
    """One byte of a header changed: another checksum, or a place where that does not count."""
    path = archive(tmp_path / "a.nemo", tarfile.PAX_FORMAT, {LONG: b"x" * 100, "y": b"z"})
    right, raw, chance = members(path), bytearray(path.read_bytes()), random.Random(number)
    at = chance.randrange(len(raw))
    raw[at] ^= 1 << chance.randrange(8)
    path.write_bytes(raw)
    try:
        read = members(path)
    except BadFile as error:
        assert "\n" not in error.message  # noqa: PT017
        return
    with tarfile.open(path) as file:
        expected = {_printed(each.name): file.extractfile(each).read() for each in file if each.isfile()}  # type: ignore[union-attr]
    assert read == expected or len(expected) < len(right)


def _printed(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("kind", "size", "sentence"),
    [
        (b"L", 2**33, "reaches beyond the archive"),
        (b"x", 2**33, "reaches beyond the archive"),
        (b"g", 2**33, "reaches beyond the archive"),
        (b"0", -512, "is no number of a header"),
        (b"0", 2**62, "reaches beyond the archive"),
    ],
)
def test_declared_sizes_are_not_believed(tmp_path: Path, kind: bytes, size: int, sentence: str) -> None:
    path, info = tmp_path / "a.nemo", tarfile.TarInfo("x")
    info.type, info.size = kind, size
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(BadFile, match=sentence):
        members(path)


@pytest.mark.parametrize("records", [b"9 a=1\n", b"99 path=x\n", b"6 path\n", b"x path=1\n", b"3 =\n"])
def test_extended_headers_that_contradict_themselves(tmp_path: Path, records: bytes) -> None:
    path, info = tmp_path / "a.nemo", tarfile.TarInfo("x")
    info.type, info.size = b"x", len(records)
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + records + bytes(512 - len(records)) + bytes(1024))
    with pytest.raises(BadFile, match="an extended header that contradicts itself"):
        members(path)


def test_a_long_name_of_a_megabyte(tmp_path: Path) -> None:
    path, info = tmp_path / "a.nemo", tarfile.TarInfo("x")
    info.type, info.size = b"L", 1_000_000
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"n" * 1_000_000 + bytes(2048))
    with pytest.raises(BadFile, match="a name or an extended header of 1000000 bytes"):
        members(path)


@pytest.mark.parametrize("raw", [b"", bytes(100), bytes(10_240)])
def test_what_has_no_header_is_no_archive(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.nemo").write_bytes(raw)
    with pytest.raises(BadFile, match="it has no header"):
        members(tmp_path / "a.nemo")


def test_too_many_files(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.nemo").write_bytes(header * (tar.MAX_MEMBERS + 1))
    with pytest.raises(BadFile, match="more than 10000 files"):
        members(tmp_path / "a.nemo")
    (tmp_path / "a.nemo").write_bytes(header * tar.MAX_MEMBERS)
    assert members(tmp_path / "a.nemo") == {"x": b""}
