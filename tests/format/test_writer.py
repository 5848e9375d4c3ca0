"""What a Writer owes, clause by clause."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratools.adapter.model import Adapter, BaseIdentity, Step
from loratools.errors import InvalidFormat, OutputRefused, UnsupportedAdapter
from loratools.format import keys, manifest, meaning, reader, validate, writer
from loratools.storage import digest, dtypes
from loratools.storage.header import read_header
from loratools.storage.lazy import LazyTensor

from .adapters import Q, V, bytes_of, lora, rich

NAMES = ("adapter_model.safetensors", "adapter_config.json")
TOUCHED = {Q: f"{Q}.weight", V: f"{V}.weight"}


def stated(path: Path) -> dict[str, Any]:
    """Return the manifest of a file."""
    document: dict[str, Any] = json.loads(read_header(path).metadata["loratools"])
    return document


def rewritten(path: Path, target: Path, change: Any, *, anew: bool = True) -> Path:
    """Copy an adapter file with another manifest, whose meaning is made anew unless not `anew`."""
    data, header = path.read_bytes(), read_header(path)
    document = json.loads(header.metadata["loratools"])
    change(document)
    parts: dict[str, list[str]] = {}
    for module, part in filter(None, map(keys.split, header.tensors)):
        parts.setdefault(module, []).append(part)
    if anew:
        document["meaning"] = meaning.of(document, parts)
    length = int.from_bytes(data[:8], "little")
    whole = json.loads(data[8 : 8 + length])
    whole["__metadata__"]["loratools"] = manifest.canonical(document)
    encoded = json.dumps(whole, ensure_ascii=False).encode()
    target.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])
    return target


@pytest.mark.parametrize("name", ["folder", "one.safetensors"])
def test_round_trip(name: str, tmp_path: Path) -> None:
    adapter = rich()
    written = writer.write(adapter, tmp_path / name, tensors=TOUCHED)
    assert validate.validate(tmp_path / name) == []
    again = reader.read(tmp_path / name, verify=True)
    assert bytes_of(again) == bytes_of(adapter)
    assert {path: (u.scaling, u.alpha, u.rank, u.kind) for path, u in again.updates.items()} == {
        path: (u.scaling, u.alpha, u.rank, u.kind) for path, u in adapter.updates.items()
    }
    assert (again.base, again.provenance) == (adapter.base, adapter.provenance)
    assert again.settings["task_type"] == "CAUSAL_LM"
    assert again.settings[manifest.ORIGIN]["digest"] == written
    assert manifest.base_tensors(again) == TOUCHED


def test_digest_is_the_root_over_the_files_own_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written = writer.write(rich(), path)
    raw = path.read_bytes()
    digests = {
        name: digest.tensor(spec.dtype, spec.shape, [raw[spec.start : spec.stop]])
        for name, spec in read_header(path).tensors.items()
    }
    assert written == stated(path)["digest"] == digest.root(digests)


def test_a_text_that_looks_like_the_digest_to_come_stays(tmp_path: Path) -> None:
    adapter = rich()  # the hashes of its base are all zeros
    shown = replace(adapter, settings={"task_type": manifest.NO_DIGEST})
    for name, each in (("a", shown), ("b", replace(adapter, base=None, provenance=()))):
        path = tmp_path / f"{name}.safetensors"
        written = writer.write(each, path)
        assert written == stated(path)["digest"] != manifest.NO_DIGEST
        assert validate.validate(path) == []
    assert stated(tmp_path / "a.safetensors")["settings"]["task_type"] == manifest.NO_DIGEST


def test_safetensors_library_reads_the_same_numbers(tmp_path: Path) -> None:
    adapter = rich()
    writer.write(adapter, tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    for path, update in adapter.updates.items():
        for part, lazy in update.parts.items():
            assert torch.equal(found.pop(f"base_model.model.{path}.{part}"), lazy.load())
    assert torch.equal(found.pop("base_model.model.lm_head.weight"), adapter.replacements["lm_head.weight"].load())
    assert found == {}


def test_M_24_no_place_no_machine_no_user(tmp_path: Path) -> None:
    base = BaseIdentity(str(tmp_path / "models" / "my-base"))
    writer.write(replace(rich(), base=base), tmp_path / "out")
    for name in NAMES:
        text = (tmp_path / "out" / name).read_bytes()
        for secret in (str(tmp_path), tmp_path.name, socket.gethostname(), str(Path.home()) + "/", str(os.getpid())):
            assert secret.encode() not in text, secret
    assert stated(tmp_path / "out" / NAMES[0])["base_model"]["id"] == "my-base"
    assert json.loads((tmp_path / "out" / NAMES[1]).read_text())["base_model_name_or_path"] == "my-base"


@pytest.mark.slow
def test_M_25_equal_bytes_in_every_process(tmp_path: Path) -> None:
    code = "import sys\nfrom pathlib import Path\nfrom tests.format.adapters import rich\n"
    code += "from loratools.format import writer\nwriter.write(rich(), Path(sys.argv[1]))"
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / f"place-{seed}")], check=True, env=env)
    for name in NAMES:
        assert (tmp_path / "place-1" / name).read_bytes() == (tmp_path / "place-2" / name).read_bytes()


def test_order_of_updates_does_not_matter(tmp_path: Path) -> None:
    adapter = rich()
    backwards = replace(adapter, updates=dict(reversed(list(adapter.updates.items()))))
    for name, one in (("a", adapter), ("b", backwards)):
        writer.write(one, tmp_path / name)
    for name in NAMES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_T_22_wide_dtypes_first_then_by_name(tmp_path: Path) -> None:
    writer.write(rich(), tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    order = [(-dtypes.bits(spec.dtype), name.encode()) for name, spec in header.tensors.items()]
    assert order == sorted(order)
    assert len({bits for bits, _ in order}) == 2
    assert all(spec.start % 2 == 0 for spec in header.tensors.values())


def test_T_23_stored_tensors_keep_bytes_that_no_arithmetic_keeps(tmp_path: Path) -> None:
    # A NaN with a payload and a negative zero: bytes, not numbers, are what is kept.
    bits = torch.tensor([[0x7FC1, -0x8000, 0x0001, 0x3F80]], dtype=torch.int16).view(torch.bfloat16)
    parts = {"lora_A.weight": LazyTensor.of(bits), "lora_B.weight": LazyTensor.of(torch.ones(2, 1).bfloat16())}
    from loratools.adapter import kinds

    first = Adapter({"q": kinds.get("lora").build(parts, 1.0, 1.0)})
    writer.write(first, tmp_path / "a.safetensors")
    writer.write(reader.read(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    spec = read_header(tmp_path / "b.safetensors").tensors["base_model.model.q.lora_A.weight"]
    raw = (tmp_path / "b.safetensors").read_bytes()[spec.start : spec.stop]
    assert raw == b"\xc1\x7f\x00\x80\x01\x00\x80\x3f"


def test_V_04_unknown_fields_survive_a_rewrite(tmp_path: Path) -> None:
    def grow(document: dict[str, Any]) -> None:
        document["format_version"] = "1.9"
        document["top"] = [1, {"a": None}]
        document["modules"][Q]["note"] = "x"
        document["modules"][Q]["layout"] = {"transposed": False, "more": 1}
        document["replacements"]["lm_head.weight"]["note"] = "y"
        document["base_model"]["licence"] = "z"
        document["base_model"]["hash"]["tier"] = 4
        document["provenance"][1]["note"] = "s"

    writer.write(rich(), tmp_path / "a.safetensors", tensors=TOUCHED)
    later = rewritten(tmp_path / "a.safetensors", tmp_path / "later.safetensors", grow)
    writer.write(reader.read(later), tmp_path / "again.safetensors")
    assert stated(tmp_path / "again.safetensors") == stated(later)


def test_X_05_optional_extensions_survive_a_rewrite(tmp_path: Path) -> None:
    found = [{"name": "org.example.x", "must_understand": False, "configuration": {"k": [1]}, "more": 2}]
    writer.write(rich(), tmp_path / "a.safetensors")
    later = rewritten(
        tmp_path / "a.safetensors", tmp_path / "later.safetensors", lambda document: document.update(extensions=found)
    )
    writer.write(reader.read(later), tmp_path / "again.safetensors")
    assert stated(tmp_path / "again.safetensors")["extensions"] == found


def test_V_05_new_adapters_are_marked_1_1(tmp_path: Path) -> None:
    writer.write(rich(), tmp_path / "a.safetensors")
    assert stated(tmp_path / "a.safetensors")["format_version"] == "1.1"


def test_V_04_what_came_as_1_0_is_rewritten_as_1_0(tmp_path: Path) -> None:
    old = Path(__file__).parents[2] / "spec/v1/vectors/valid/linear/plain/adapter.safetensors"
    writer.write(reader.read(old), tmp_path / "again.safetensors")
    assert stated(tmp_path / "again.safetensors") == stated(old)
    assert stated(old)["format_version"] == "1.0"
    assert "meaning" not in stated(old)


@pytest.mark.parametrize("field", ["kind", "rank", "alpha", "scaling", "layout", "tensor"])
def test_V_06_each_field_that_decides_is_under_the_meaning(field: str, tmp_path: Path) -> None:
    changed = {"kind": "dora", "rank": 5, "alpha": 7, "scaling": 3, "layout": {"transposed": True}, "tensor": "x"}

    def edit(document: dict[str, Any]) -> None:
        document["modules"][Q][field] = changed[field]

    writer.write(rich(), tmp_path / "a.safetensors", tensors=TOUCHED)
    edited = rewritten(tmp_path / "a.safetensors", tmp_path / "b.safetensors", edit, anew=False)
    assert "I-12" in {problem.clause for problem in validate.validate(edited)}
    with pytest.raises(InvalidFormat, match=r"\[I-12\] meaning: kinds, scalings, layouts or target tensors"):
        reader.read(edited)


def test_config_says_what_the_manifest_says(tmp_path: Path) -> None:
    writer.write(rich(), tmp_path / "out")
    config = json.loads((tmp_path / "out" / NAMES[1]).read_text())
    assert (config["peft_type"], config["r"], config["modules_to_save"]) == ("LORA", 3, ["lm_head"])
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "org/base")
    assert config["target_modules"] == [Q, V]


def test_several_faults_are_said_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    adapter = replace(rich(), updates={f"{Q}..x": lora(0), V: lora(1, scaling=1.0)}, settings={"task_type": None})
    base = replace(adapter.base or BaseIdentity(), root="md5:0")
    with pytest.raises(InvalidFormat) as caught:
        writer.write(replace(adapter, base=base), tmp_path / "out", tensors={V: "unknown.weight"})
    said = {problem[1:5] for problem in caught.value.problems}
    assert {"M-10", "I-06", "I-08"} <= said
    assert list(tmp_path.iterdir()) == []


def test_not_json_in_settings_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InvalidFormat, match="no form for 1 value") as caught:
        writer.write(replace(rich(), settings={"x": [1, {1}]}), tmp_path / "out")
    assert caught.value.problems == ("settings.x[1]: set is not a JSON type",)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alpha", [2.0**53, 1e17, 10**17, -3e20])
def test_numbers_that_no_manifest_holds_are_named(alpha: float, tmp_path: Path) -> None:
    far = replace(rich(), updates={Q: lora(0, alpha=alpha, scaling=0.5), V: lora(1, scaling=alpha)})
    with pytest.raises(InvalidFormat, match="cannot be written") as caught:
        writer.write(far, tmp_path / "out")
    named = {problem.partition(":")[0] for problem in caught.value.problems}
    assert {f"modules.{Q}.alpha", f"modules.{V}.scaling"} <= named
    assert f"modules.{Q}.scaling" not in named
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alpha", [1e21, 10**22, 2.5e21, -1e300, 5e-324, 2.0**53 - 1])
def test_numbers_on_both_sides_of_these_are_written_and_read(alpha: float, tmp_path: Path) -> None:
    writer.write(replace(rich(), updates={Q: lora(0, rank=1, alpha=alpha, scaling=alpha)}), tmp_path / "out")
    assert validate.validate(tmp_path / "out") == []
    (update,) = reader.read(tmp_path / "out").updates.values()
    assert (update.alpha, update.scaling) == (alpha, alpha)


def test_what_a_step_says_in_such_numbers_is_text(tmp_path: Path) -> None:
    step = Step("resize", "t", {"a": [1e17, 1e21, float("inf")], "b": {"c": 2**60, "d": 3}})
    writer.write(replace(rich(), provenance=(step,)), tmp_path / "out")
    assert validate.validate(tmp_path / "out") == []
    said = reader.read(tmp_path / "out").provenance[-1].parameters
    assert said == {"a": ["1e+17", 1e21, "inf"], "b": {"c": str(2**60), "d": 3}}


def test_existing_output_and_own_input_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    writer.write(rich(), path)
    before = path.read_bytes()
    with pytest.raises(OutputRefused, match="exists already"):
        writer.write(rich(), path)
    with pytest.raises(OutputRefused, match="also an input"):
        writer.write(reader.read(path), path, force=True)
    assert path.read_bytes() == before
    writer.write(replace(rich(), provenance=()), path, force=True)
    assert path.read_bytes() != before


def test_refusals_of_what_is_newer(tmp_path: Path) -> None:
    writer.write(rich(), tmp_path / "a.safetensors")
    for change, clause in (
        ({"format_version": "2.0"}, "V-01"),
        ({"extensions": [{"name": "x", "must_understand": True}]}, "X-04"),
    ):
        newer = rewritten(tmp_path / "a.safetensors", tmp_path / "b.safetensors", lambda m, c=change: m.update(c))
        with pytest.raises(UnsupportedAdapter, match=rf"\[{clause}\]"):
            reader.read(newer)
