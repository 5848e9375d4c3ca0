from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loratools.errors import InvalidFormat
from loratools.format import reader, validate, writer

from .adapters import rich

REPOSITORY = Path(__file__).parents[2]


def test_reading_and_validating_import_neither_torch_nor_numpy(tmp_path: Path) -> None:
    writer.write(rich(), tmp_path / "out")
    code = (
        "import sys\nfrom pathlib import Path\nfrom loratools.format import reader, validate\n"
        "assert validate.validate(Path(sys.argv[1])) == []\nadapter = reader.read(Path(sys.argv[1]))\n"
        "assert [u.rank for u in adapter.updates.values()] == [4, 3]\n"
        "sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=True, cwd=REPOSITORY)


def test_flipped_data_are_found_when_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    writer.write(rich(), path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    reader.read(path)
    with pytest.raises(InvalidFormat, match=r"\[I-02\]"):
        reader.read(path, verify=True)
    assert [problem.clause for problem in validate.validate(path)] == ["I-02"]
    assert validate.validate(path, digest=False) == []


def test_report_says_what_was_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    writer.write(rich(), path)
    found = validate.report(path)
    assert found.problems == ()
    assert (found.format_version, found.modules, found.replacements, found.tensors) == ("1.1", 2, 1, 5)
    assert found.bytes_hashed == 4 * (4 * 10 + 12 * 4) + 2 * (3 * 10 + 12 * 3) + 2 * 7 * 10
    assert "I-02" in found.clauses
    headers = validate.report(path, digest=False)
    assert headers.bytes_hashed == 0
    assert "I-02" not in headers.clauses


def test_all_problems_at_once(tmp_path: Path) -> None:
    writer.write(rich(), tmp_path / "out")
    config = tmp_path / "out" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 3', '"r": 5').replace('"lm_head"', '"head"'))
    assert {problem.clause for problem in validate.validate(tmp_path / "out")} == {"L-06", "L-09"}


def test_a_link_to_the_file_is_followed_as_the_hub_cache_needs_it(tmp_path: Path) -> None:
    writer.write(rich(), tmp_path / "blob.safetensors")
    (tmp_path / "snapshot.safetensors").symlink_to(tmp_path / "blob.safetensors")
    assert validate.validate(tmp_path / "snapshot.safetensors") == []
