"""What convert and validate say of an adapter that knows no base, and of an output that cannot hold its hash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loratools.cli._run import run

WORDS = "so a wrong base is not noticed; convert with --base seals it"


def test_an_unsealed_adapter_is_said_to_be(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, sealed = str(tmp_path / "plain"), str(prepared / "sealed")
    assert run(["convert", str(prepared / "adapter"), "-o", plain]) == 0
    assert f"base hash  none, {WORDS}" in capsys.readouterr().out
    assert run(["validate", plain]) == 0
    assert f"{plain}: no base hash, {WORDS}" in capsys.readouterr().out
    assert run(["validate", sealed]) == 0
    assert "no base hash" not in capsys.readouterr().out
    for path, expected in ((plain, False), (sealed, True)):
        assert run(["validate", path, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["sealed"] is expected


@pytest.mark.parametrize("to", ["peft", "mlx", "gguf", "kohya", "loralib"])
def test_no_hash_is_printed_that_the_output_cannot_hold(
    to: str, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(prepared / "sealed"), "-o", str(tmp_path / "out"), "--to", to, "--allow-loss"]
    assert run([*command, "--base", str(prepared / "base")]) == 0
    out = capsys.readouterr().out
    assert "base hash" not in out
    assert "lost" in out
    assert run([*command, "--base", str(prepared / "base"), "--force", "--json"]) == 0
    base = json.loads(capsys.readouterr().out)["base"]
    assert base is None or (base["root"], base["tensors"]) == (None, {})


def test_another_dialect_is_not_called_broken(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, sealed = str(prepared / "adapter"), str(tmp_path / "it is sealed")
    assert run(["validate", path]) == 1
    out = capsys.readouterr().out
    assert out.endswith(f"{path}: not sealed in this format; to seal it: loratools convert {path} -o OUTPUT\n")
    assert "not valid" not in out
    assert run(["convert", path, "-o", sealed]) == 0
    (tmp_path / "it is sealed" / "adapter_config.json").write_text("{}")
    capsys.readouterr()
    assert run(["validate", sealed]) == 1
    assert f"{sealed}: not valid: " in capsys.readouterr().out
