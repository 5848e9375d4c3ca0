"""A plan travels and is the same plan again; tensors are shared out, so that a model of one file has many hands."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.errors import BadFile, InvalidOption
from loratools.storage.atomic import locks
from loratools.storage.atomic.leftovers import parts_of
from loratools.surgery.merge import merge
from loratools.surgery.merge import planned as planning
from loratools.surgery.merge.parts import call_of, gather, merge_part
from loratools.surgery.merge.planned import Planned, decide_call
from loratools.surgery.merge.run import execute
from loratools.surgery.merge.shared import merge_shared
from tests.faults.killer import hashes
from tests.surgery.merge.test_parts import CASES, given
from tests.surgery.merge.test_resume import SHAPES, contents, leftovers
from tests.surgery.models import lora, random, save_adapter, save_base


@pytest.fixture
def fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Share out every tensor by itself."""
    monkeypatch.setattr(planning, "PIECE", 1)


def one_file(folder: Path) -> tuple[Path, Path]:
    """Save a base of one file with twelve tensors, and an adapter for six of them."""
    weights = {f"m{i}.weight": random(64, 96, seed=i, dtype=torch.bfloat16) for i in range(6)}
    weights |= {f"n{i}.weight": random(32 + i, seed=i, dtype=torch.bfloat16) for i in range(6)}
    return save_base(folder / "base", weights), save_adapter(folder / "adapter", lora(SHAPES))


@pytest.mark.parametrize("case", CASES)
def test_a_plan_goes_to_json_and_back_and_writes_the_same_bytes(case: str, workplace: Path) -> None:
    base, adapter, options = given(case, workplace)
    merge(base, [adapter], workplace / "whole", **options)
    call = call_of(base, [adapter], workplace / "out", **options)
    prepared = decide_call(call)
    planned = Planned.of(call, prepared)
    back = Planned.from_json(json.loads(json.dumps(planned.to_json())), "here")
    assert back == planned == pickle.loads(pickle.dumps(planned))  # noqa: S301  (our own)
    again = back.again()
    assert again.plan.to_json(1) == prepared.plan.to_json(1)
    execute(again)
    assert hashes(workplace / "out") == hashes(workplace / "whole")


@pytest.mark.parametrize("case", CASES)
def test_a_merge_that_is_decided_pickles_and_writes_the_same_bytes(case: str, workplace: Path) -> None:
    base, adapter, options = given(case, workplace)
    merge(base, [adapter], workplace / "whole", **options)
    prepared = decide_call(call_of(base, [adapter], workplace / "out", **options))
    execute(pickle.loads(pickle.dumps(prepared)))  # noqa: S301  (our own)
    assert hashes(workplace / "out") == hashes(workplace / "whole")


def test_a_plan_of_other_inputs_or_another_arithmetic_is_refused(workplace: Path) -> None:
    call = call_of(workplace / "base", [workplace / "adapter"], workplace / "out", weights=1)
    planned = Planned.of(call, decide_call(call))
    with pytest.raises(InvalidOption, match="computes by C, the caller by another"):
        replace(planned, arithmetic="another").again()
    with pytest.raises(BadFile, match="sees another merge than the caller"):
        replace(planned, call=replace(call, arguments={**call.arguments, "weights": 2})).again()
    for document in ({}, [], {**planned.to_json(), "key": 1}, {**planned.to_json(), "call": None}):
        with pytest.raises(BadFile, match="here: expected"):
            Planned.from_json(document, "here")


@pytest.mark.usefixtures("fine")
@pytest.mark.parametrize("of", [1, 2, 5, 12, 14])
def test_parts_of_one_file_in_any_order_make_the_bytes_of_one_process(of: int, tmp_path: Path) -> None:
    base, adapter = one_file(tmp_path)
    merge(base, [adapter], tmp_path / "whole", weights=0.5)
    call = call_of(base, [adapter], tmp_path / "out", weights=0.5)
    reports = [merge_part(call, f"{number}/{of}") for number in range(of, 0, -1)]
    assert sum(bool(report.files) for report in reports) == min(of, 12)
    assert sum(report.nbytes for report in reports) == decide_call(call).plan.to_json(1)["bytes"]["written"]
    assert gather(tmp_path / "out").changed == 6
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("fine")
@pytest.mark.parametrize("options", [{}, {"keep_residual": True}, {"dtype": "f32"}])
def test_an_output_that_is_one_file_is_shared_out(options: dict[str, Any], tmp_path: Path) -> None:
    base, adapter = one_file(tmp_path)
    for name in ("whole", "parts", "shared"):
        (tmp_path / name).mkdir()
    merge(base, [adapter], tmp_path / "whole" / "out.safetensors", **options)
    call = call_of(base, [adapter], tmp_path / "parts" / "out.safetensors", **options)
    for number in (3, 1, 2):
        merge_part(call, f"{number}/3")
    gather(tmp_path / "parts" / "out.safetensors")
    with ThreadPoolExecutor(1) as executor:
        merge_shared(call_of(base, [adapter], tmp_path / "shared" / "out.safetensors", **options), executor)
    assert contents(tmp_path / "parts") == contents(tmp_path / "shared") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("fine")
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_merge_is_shared_out_by_its_tensors(case: str, workplace: Path) -> None:
    base, adapter, options = given(case, workplace)
    merge(base, [adapter], workplace / "whole", **options)
    call = call_of(base, [adapter], workplace / "out", **options)
    for number in (3, 1, 2):
        merge_part(call, f"{number}/3")
    gather(workplace / "out")
    assert hashes(workplace / "out") == hashes(workplace / "whole")
    with ThreadPoolExecutor(1) as executor:
        merge_shared(call_of(base, [adapter], workplace / "apart", **options), executor)
    assert hashes(workplace / "apart") == hashes(workplace / "whole")


def test_a_part_that_is_done_again_after_its_result_has_come_is_waited_for(tmp_path: Path) -> None:
    base, adapter = one_file(tmp_path)
    written, held = list[int](), list[locks.Lock]()

    def let_go() -> None:
        for lock in held:
            lock.release()

    def begin_again(count: int) -> None:
        written[-1] -= count
        if not written[-1]:  # that was the last result
            folders = [each for each in parts_of(tmp_path / "apart") if not each.name.endswith("0000")]
            held.extend(map(locks.lock, folders))
            Timer(0.3, let_go).start()

    with ThreadPoolExecutor(1) as executor:
        merge_shared(call_of(base, [adapter], tmp_path / "whole"), executor, progress=written.append)
        written = [sum(written)]
        merge_shared(call_of(base, [adapter], tmp_path / "apart"), executor, progress=begin_again)
    assert held
    assert written == [0]
    assert hashes(tmp_path / "apart") == hashes(tmp_path / "whole")


@pytest.mark.usefixtures("fine")
def test_pieces_hold_every_tensor_once_and_codes_with_what_gives_them_their_meaning(workplace: Path) -> None:
    base, adapter, options = given("requantized", workplace)
    call = call_of(base, [adapter], workplace / "out", **options)
    prepared = decide_call(call)
    parts = Planned.of(call, prepared).parts(prepared, 7)
    slots = [(file.name, slot.name) for part in parts for file in part for slot in file.slots]
    assert sorted(slots) == sorted((file.name, slot.name) for file in prepared.plan.files for slot in file.slots)
    of = {slot: number for number, part in enumerate(parts) for file in part for slot in (s.name for s in file.slots)}
    together: dict[tuple[str, str], set[int]] = {}
    for file in prepared.plan.files:
        for slot in file.slots:
            if whole := prepared.plan.changes[slot.name].part_of:
                together.setdefault((file.name, whole), set()).add(of[slot.name])
    assert together
    assert all(len(numbers) == 1 for numbers in together.values())


@pytest.mark.usefixtures("fine")
def test_a_byte_that_changed_since_is_found_wherever_it_is_and_its_part_made_again(tmp_path: Path) -> None:
    base, adapter = one_file(tmp_path)
    merge(base, [adapter], tmp_path / "whole")
    call = call_of(base, [adapter], tmp_path / "out")
    parts = [merge_part(call, f"{number}/3") for number in (1, 2, 3)]
    path = Path(parts[0].room) / "model.safetensors"
    for place in (9, path.stat().st_size // 2, path.stat().st_size - 1):
        _flip(path, place)
        with pytest.raises(BadFile, match=r"model\.safetensors: not what it was when it was written"):
            gather(tmp_path / "out")
    assert [merge_part(call, f"{number}/3").kept for number in (1, 2, 3)].count(()) > 0
    gather(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("fine")
def test_bytes_that_nobody_wrote_are_found(tmp_path: Path) -> None:
    base, adapter = one_file(tmp_path)
    call = call_of(base, [adapter], tmp_path / "out")
    folders = [Path(merge_part(call, f"{number}/3").folder) for number in (1, 2, 3)]
    listed = json.loads((folders[1] / ".merge.json").read_text())
    listed["files"] = {}
    (folders[1] / ".merge.json").write_text(json.dumps(listed))
    with pytest.raises(BadFile, match="not what it was when it was written"):
        gather(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("fine")
def test_a_part_goes_on_from_what_it_has_written_of_a_file(tmp_path: Path) -> None:
    base, adapter = one_file(tmp_path)
    call = call_of(base, [adapter], tmp_path / "out")
    assert merge_part(call, "1/2").kept == ()
    assert merge_part(call, "1/2").kept == ("model.safetensors",)


def test_small_tensors_are_shared_out_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "PIECE", 2 * 64 * 96 + 1)
    base, adapter = one_file(tmp_path)
    call = call_of(base, [adapter], tmp_path / "out")
    prepared = decide_call(call)
    sizes = [len(file.slots) for part in Planned.of(call, prepared).parts(prepared, 12) for file in part]
    assert sorted(sizes) == [2, 2, 2, 6]


def _flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte: Any = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))


def test_a_worker_plans_once_unless_an_input_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = one_file(tmp_path)
    made = list[Planned]()
    again = Planned.again
    monkeypatch.setattr(planning, "PIECE", 1)
    monkeypatch.setattr(Planned, "again", lambda self: made.append(self) or again(self))

    def shared(output: str) -> dict[str, bytes]:
        with ThreadPoolExecutor(1) as executor:
            merge_shared(call_of(base, [adapter], tmp_path / output), executor)
        return contents(tmp_path / output)

    before = shared("out")
    assert len(made) == 1
    weights = {name: random(64, 96, seed=ord(name[1]), dtype=torch.bfloat16) for name in ("m0.weight", "m1.weight")}
    save_file({**load_file(base / "model.safetensors"), **weights}, base / "model.safetensors", {"format": "pt"})
    after = shared("other")
    assert len(made) == 2
    merge(base, [adapter], tmp_path / "whole")
    assert before != after == contents(tmp_path / "whole")
