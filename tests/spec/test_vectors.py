"""Both readers and the validator, on every vector; clauses that need no file of their own are tested by id."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reader as second
import torch
from container import Refused, checkpoint, tiers
from safetensors.torch import save_file

from loratools.adapter import kinds
from loratools.adapter.model import Adapter, BaseIdentity
from loratools.adapter.placement.layers import replicated
from loratools.adapter.placement.resolve import resolve
from loratools.errors import IncompatibleAdapter, InvalidFormat, LoraToolsError, UnsupportedAdapter
from loratools.format import manifest, reader, validate, writer
from loratools.format.clauses import Subject
from loratools.storage import digest, files
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.lazy import LazyTensor
from loratools.surgery.base import differences, other_type
from tests.adapter.kinds.reference import applied

from . import SPEC, VECTORS, adapter_of, base_of, cases, note

CODE = {".py", ".pyc"}  # Python leaves the second where the tests have run before


def test_there_are_enough_vectors_and_they_are_small() -> None:
    assert len(cases("valid")) >= 15
    assert len(cases("invalid")) >= 40
    sizes = {path: path.stat().st_size for path in VECTORS.rglob("*") if path.is_file() and path.suffix not in CODE}
    assert {path.name: size for path, size in sizes.items() if size > 2600 and path.name != "README.md"} == {}


def test_make_py_makes_the_committed_bytes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-S", str(VECTORS / "make.py"), str(tmp_path)], check=True)
    made = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    areas = ("valid", "invalid", "hash")
    kept = [path for area in areas for path in (VECTORS / area).rglob("*") if path.is_file()]
    assert made == {str(path.relative_to(VECTORS)): path.read_bytes() for path in kept}


@pytest.mark.parametrize("name", cases("valid"))
def test_second_reader_prints_the_expected_numbers(name: str) -> None:
    expected = note("valid", name)
    changes = second.read(adapter_of("valid", name), base_of("valid", name))
    assert close(changes, expected["modules"], expected["tolerance"]), changes


@pytest.mark.parametrize("name", cases("valid"))
def test_validator_finds_no_problem(name: str) -> None:
    assert validate.validate(adapter_of("valid", name)) == []


@pytest.mark.parametrize("form", ["folder", "one.safetensors"])
@pytest.mark.parametrize("name", cases("valid"))
def test_what_is_read_can_be_written_again_in_either_form(name: str, form: str, tmp_path: Path) -> None:
    path = adapter_of("valid", name)
    writer.write(reader.read(path), tmp_path / form)
    assert validate.validate(tmp_path / form) == []
    assert second.read(tmp_path / form) == second.read(path)


@pytest.mark.parametrize("name", [name for name in cases("valid") if name != "linear/bias"])
def test_reader_gives_the_expected_numbers(name: str) -> None:
    path, expected = adapter_of("valid", name), note("valid", name)
    subject = validate.open_subject(path)
    assert isinstance(subject, Subject)
    if unknown := {entry["kind"] for _, entry in subject.entries()} - set(kinds.names()):
        with pytest.raises(UnsupportedAdapter, match=f"kind '{unknown.pop()}'"):
            reader.read(path)
        return
    adapter = reader.read(path, verify=True)
    changes: dict[str, Any] = {}
    for module, update in adapter.updates.items():
        wanted = expected["modules"][module]
        changes[module] = {"rank": max(update.rank, 1), "scaling": update.scaling}  # 1 stands for none
        if base_of("valid", name) is not None and "changed" in wanted:
            changes[module]["changed"] = changed(adapter, base_of("valid", name))
        try:
            delta = update.delta_weight()
            # The vector shows experts as their base stores them; an update shows them as (expert, out, in).
            stored = delta.mT if (getattr(update, "layout", None) or {}).get("transposed") else delta
            changes[module]["delta_weight"] = stored.tolist()
        except ValueError:  # depends on W: the vector gives only s·B·A
            wanted.pop("delta_weight", None)
        parts = update.parts
        for part in parts.keys() & {"lora_magnitude_vector", "dora_scale"}:
            changes[module]["magnitude"] = parts[part].load().flatten().tolist()
        for part in parts.keys() & {"diff_b", "b_norm"}:
            changes[module]["bias"] = parts[part].load().tolist()
    for parameter, lazy in adapter.replacements.items():
        changes[parameter] = {"replacement": lazy.load().flatten().tolist()}
    assert close(changes, expected["modules"], expected["tolerance"]), changes


def changed(adapter: Adapter, base: Path | None) -> Any:
    """Return the one weight of a base as an adapter changes it, tile by tile."""
    assert base is not None
    checkpoint = Checkpoint.open(base)
    W = checkpoint.read("blk.q.weight").double()
    (placement,) = resolve(adapter, checkpoint.shapes)
    return applied(W, [(placement.update, 1.0)], transposed=False, rows=2, dtype=torch.float64).tolist()


def test_every_part_of_a_module_is_kept() -> None:
    update = reader.read(adapter_of("valid", "linear/bias")).updates["blk.q"]
    assert set(update.parts) == {"lora_A.weight", "lora_B.weight", "lora_B.bias"}
    assert update.parts["lora_B.bias"].load().shape == update.shape[:1]


@pytest.mark.parametrize("name", cases("invalid"))
def test_second_reader_names_the_clause(name: str) -> None:
    with pytest.raises(Refused) as caught:
        second.read(adapter_of("invalid", name), base_of("invalid", name))
    assert str(caught.value).startswith(f"[{note('invalid', name)['clause']}] ")


@pytest.mark.parametrize("name", cases("invalid"))
def test_S_10_validator_names_the_one_clause_and_reader_refuses(name: str) -> None:
    path, clause = adapter_of("invalid", name), note("invalid", name)["clause"]
    if clause in ("I-10", "I-13"):
        return  # nothing is wrong with the file; the base is tested below
    assert {problem.clause for problem in validate.validate(path)} == {clause}
    with pytest.raises((InvalidFormat, UnsupportedAdapter)) as caught:
        reader.read(path, verify=True)
    assert f"[{clause}] " in str(caught.value)


def test_I_10_base_is_compared_with_its_hash() -> None:
    for area, name in (("valid", "integrity/base-in-shards"), ("invalid", "integrity/wrong-base")):
        adapter, base = reader.read(adapter_of(area, name)), base_of(area, name)
        assert adapter.base is not None
        assert base is not None
        problems = differences(adapter.base, Checkpoint.open(base))
        assert any("blk.q.weight" in problem for problem in problems) == (area == "invalid")
        assert bool(problems) == (area == "invalid")


def test_I_13_model_type_is_compared() -> None:
    for area, name in (("valid", "integrity/model-type"), ("invalid", "integrity/base-of-another-type")):
        adapter, base = reader.read(adapter_of(area, name)), base_of(area, name)
        assert adapter.base is not None
        assert base is not None
        typed = other_type(adapter.base, Checkpoint.open(base))
        assert (typed is None) == (area == "valid")
        assert adapter.orientation == {"blk.q": True}


def test_T_44_orientation_is_the_sealed_one() -> None:
    adapter = reader.read(adapter_of("valid", "linear/transposed"))
    shapes = {"blk.q.weight": (3, 2)}
    for model_type in ("gpt2", "llama", None):
        (placement,) = resolve(adapter, shapes, {"model_type": model_type})
        assert placement.site.transposed
    with pytest.raises(IncompatibleAdapter, match=r"stored \[in, out\]"):
        resolve(adapter, {"blk.q.weight": (2, 3)})


def test_X_07_layers_are_repeated(tmp_path: Path) -> None:
    adapter = reader.read(adapter_of("valid", "extensions/layer-replication"))
    save_file({"layers.0.q.weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors", {"format": "pt"})
    base = replicated(Checkpoint.open(tmp_path), [adapter])
    assert base.origins == {"layers.0.q.weight": "layers.0.q.weight", "layers.1.q.weight": "layers.0.q.weight"}
    (placement,) = resolve(adapter, base.shapes)
    assert placement.site.tensor == "layers.1.q.weight"


@pytest.mark.parametrize("name", cases("hash"))
def test_base_hash_of_each_implementation(name: str) -> None:
    expected, folder = note("hash", name), VECTORS / "hash" / name / "checkpoint"
    specs = Checkpoint.open(folder).specs
    for algorithm in digest.ALGORITHMS:
        assert tiers(checkpoint(folder), algorithm) == expected[algorithm]
        tensors = {
            tensor: digest.tensor(spec.dtype, spec.shape, files.chunks(spec), algorithm)
            for tensor, spec in specs.items()
        }
        schema = digest.schema({tensor: (spec.dtype, spec.shape) for tensor, spec in specs.items()}, algorithm)
        assert {"tensors": tensors, "schema": schema, "root": digest.root(tensors, algorithm)} == expected[algorithm]


def test_what_a_hash_ignores_and_what_it_sees() -> None:
    root = {name: note("hash", name)["blake3"]["root"] for name in cases("hash")}
    same = {"one-file", "two-shards", "data-in-another-order"}
    assert len({root[name] for name in same}) == 1
    assert len(set(root.values())) == len(root) - len(same) + 1
    schema = {name: note("hash", name)["blake3"]["schema"] for name in ("one-file", "one-bit-flipped")}
    assert schema["one-file"] == schema["one-bit-flipped"]


def test_script_needs_the_standard_library_only_and_keeps_its_contract() -> None:
    def run(*arguments: object) -> tuple[int, str]:
        command = [sys.executable, "-S", "-E", str(SPEC / "reader.py"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=SPEC)
        assert done.stderr == ""
        return done.returncode, done.stdout

    plain = {"blk.q": {"rank": 1, "scaling": 2, "delta_weight": [[2, 1, -4], [6, 3, -12]]}}
    assert run(adapter_of("valid", "linear/plain")) == (0, manifest.canonical(plain) + "\n")
    code, out = run(adapter_of("invalid", "manifest/scaling-missing"))
    assert (code, out[:7]) == (1, "[M-14] ")
    wrong = adapter_of("invalid", "integrity/wrong-base")
    assert run(wrong)[0] == 0
    code, out = run(wrong, "--base", wrong.parent / "base")
    assert (code, out[:7]) == (1, "[I-10] ")
    code, out = run("--hash", VECTORS / "hash" / "two-shards" / "checkpoint")
    assert code == 0
    assert json.loads(out)["sha256"] == note("hash", "two-shards")["sha256"]


def test_T_21_products_are_computed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(shape, generator=generator).bfloat16() for shape in ((16, 40), (30, 16)))
    parts = {"lora_A.weight": LazyTensor.of(A), "lora_B.weight": LazyTensor.of(B)}
    change = kinds.get("lora").build(parts, 0.3, 1.0).delta_weight().double()
    exact = 0.3 * (B.double() @ A.double())
    assert (change - exact).norm() <= 1e-6 * exact.norm()


def test_a_kind_that_is_not_implemented_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "names", lambda: ("dora",))
    with pytest.raises(UnsupportedAdapter, match=r"blk\.q: kind 'lora'"):
        reader.read(adapter_of("valid", "linear/plain"))


def test_unsealed_adapter_is_said_to_be_just_that() -> None:
    path = adapter_of("invalid", "layout/manifest-missing")
    (problem,) = validate.validate(path)
    assert problem.clause == "L-03"
    assert "no loratools manifest" in problem.message


def test_missing_path_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LoraToolsError, match="no such file"):
        validate.validate(tmp_path / "nothing.safetensors")


def test_base_identity_is_read_whole() -> None:
    base = reader.read(adapter_of("valid", "integrity/base-in-shards")).base
    assert isinstance(base, BaseIdentity)
    assert (base.id, base.revision, base.sealed) == ("org/base", "main", True)
    assert base.tensors.keys() == {"blk.q.weight"}


def close(ours: Any, wanted: Any, tolerance: float) -> bool:
    if isinstance(wanted, dict):
        return (
            isinstance(ours, dict)
            and ours.keys() == wanted.keys()
            and all(close(ours[key], wanted[key], tolerance) for key in wanted)
        )
    if isinstance(wanted, list):
        return (
            isinstance(ours, list)
            and len(ours) == len(wanted)
            and all(close(a, b, tolerance) for a, b in zip(ours, wanted, strict=True))
        )
    return bool(abs(ours - wanted) <= tolerance * abs(wanted))
