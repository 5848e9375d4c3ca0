"""A merge that several processes share has the bytes of one process, whoever is killed on the way."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sys
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.errors import BadFile, IncompatibleAdapter, InvalidOption, OutputRefused
from loratools.parallel.call import Call
from loratools.storage import atomic
from loratools.storage.atomic.leftovers import KEPT, parts_of, sweep
from loratools.storage.atomic.machine import mark
from loratools.surgery.dequantize import PLACES, dequantize
from loratools.surgery.merge import merge
from loratools.surgery.merge.parts import call_of, gather, merge_part
from loratools.surgery.merge.planned import decide_call
from loratools.surgery.merge.resume import fingerprint
from loratools.surgery.merge.run import settings_of
from loratools.surgery.merge.shared import merge_shared
from tests.faults.killer import hashes
from tests.surgery.merge.test_resume import contents, leftovers, prepare
from tests.surgery.models import Lora, random, save_adapter, save_base


@pytest.mark.parametrize("of", [1, 2, 3, 5])
def test_parts_in_any_order_make_the_bytes_of_one_process(of: int, tmp_path: Path) -> None:
    base, adapter = prepare(tmp_path)
    merge(base, [adapter], tmp_path / "whole", weights=0.5)
    call = call_of(base, [adapter], tmp_path / "out", weights=0.5)
    reports = [merge_part(call, f"{number}/{of}") for number in range(of, 0, -1)]
    assert sum(len(report.files) for report in reports) == 3
    assert not (tmp_path / "out").exists()
    gathered = gather(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert (gathered.changed, gathered.reused) == (6, ())
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("options", [{"dtype": "f32"}, {"keep_residual": True}, {"rounding": "stochastic", "seed": 3}])
def test_options_travel(options: dict[str, Any], tmp_path: Path) -> None:
    base, adapter = prepare(tmp_path)
    merge(base, [adapter], tmp_path / "whole", **options)
    with ThreadPoolExecutor(1) as executor:
        merge_shared(call_of(base, [adapter], tmp_path / "out", **options), executor)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert leftovers(tmp_path) == []


def test_a_part_that_is_missing_or_of_another_merge_is_named(tmp_path: Path) -> None:
    base, adapter = prepare(tmp_path)
    with pytest.raises(BadFile, match="out: no part of it is complete"):
        gather(tmp_path / "out")
    merge_part(call_of(base, [adapter], tmp_path / "out"), "1/3")
    merge_part(call_of(base, [adapter], tmp_path / "out", weights=2), "2/3")
    with pytest.raises(BadFile) as caught:
        gather(tmp_path / "out")
    problems = sorted(caught.value.problems)
    assert len(problems) == 2
    assert any("of another merge: other inputs, options or parts" in problem for problem in problems)
    assert "part 3/3 is missing" in problems
    assert not (tmp_path / "out").exists()


def test_a_part_of_another_arithmetic_is_refused(tmp_path: Path) -> None:
    base, adapter = prepare(tmp_path)
    call = call_of(base, [adapter], tmp_path / "out")
    for number in (1, 2):
        folder = Path(merge_part(call, f"{number}/2").folder)
    document = json.loads((folder / ".part.json").read_text())
    (folder / ".part.json").write_text(json.dumps(document | {"arithmetic": "torch 1.0, DEFAULT"}))
    with pytest.raises(BadFile) as caught:
        gather(tmp_path / "out")
    assert any("torch 1.0, DEFAULT" in problem for problem in caught.value.problems)


def test_a_file_that_changed_since_is_refused(tmp_path: Path) -> None:
    base, adapter = prepare(tmp_path)
    call = call_of(base, [adapter], tmp_path / "out")
    for number in (1, 2):
        part = merge_part(call, f"{number}/2")
    path = Path(part.room) / part.files[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadFile, match="not what it was when it was written"):
        gather(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert merge_part(call, "2/2").kept == ()  # it is made again
    gather(tmp_path / "out")


def test_a_file_of_which_nobody_wrote_some_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that has lost a file, of which another has the rest: what lies there is room that was never filled."""
    monkeypatch.setattr("loratools.surgery.merge.planned.PIECE", 1)
    base, adapter = prepare(tmp_path)
    call = call_of(base, [adapter], tmp_path / "out")
    one, other = (merge_part(call, f"{number}/2") for number in (1, 2))
    shared = next(name for name in other.files if name in one.files)
    path = Path(other.folder) / ".merge.json"
    document = json.loads(path.read_text())
    del document["files"][shared]
    path.write_text(json.dumps(document))
    with pytest.raises(BadFile, match=rf"{shared}: not what it was when it was written"):
        gather(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_goes_on_from_what_is_complete(tmp_path: Path) -> None:
    base, adapter = prepare(tmp_path)
    call = call_of(base, [adapter], tmp_path / "out")
    whole = merge_part(call, "1/1")
    assert merge_part(call, "1/1").kept == tuple(sorted(whole.files))


def test_an_error_of_a_part_says_where_it_was_met(tmp_path: Path) -> None:
    base, adapter = prepare(tmp_path)
    call = call_of(base, [adapter], tmp_path / "out", weights=1e40)
    with ThreadPoolExecutor(1) as executor, pytest.raises(IncompatibleAdapter) as caught:
        merge_shared(call, executor)
    here = f"process {os.getpid()}"
    assert any("of the work, by " in problem and here in problem for problem in caught.value.problems)
    assert leftovers(tmp_path) == []


def test_a_part_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    base, adapter = prepare(tmp_path)
    with pytest.raises(IncompatibleAdapter):
        merge_part(call_of(base, [adapter], tmp_path / "out", weights=1e40), "1/2")
    assert leftovers(tmp_path) == []


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    base, adapter = prepare(tmp_path)
    with pytest.raises(InvalidOption, match="held in memory"):
        call_of(base, [{"a": torch.zeros(1)}], tmp_path / "out")  # type: ignore[list-item]
    with ThreadPoolExecutor(1) as executor, pytest.raises(InvalidOption, match="s3://b/k: work that is shared out"):
        merge_shared(call_of(base, [adapter], "s3://b/k"), executor)
    with pytest.raises(InvalidOption, match="'resize' is no verb"):
        merge_part(Call.of("resize", {}), "1/2")


@pytest.mark.slow
def test_processes_make_the_bytes_of_one(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    base, adapter = prepare(tmp_path)
    merge(base, [adapter], tmp_path / "whole")
    merge_shared(call_of(base, [adapter], tmp_path / "out"), 2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert leftovers(tmp_path) == []


class Late(Executor):
    """Hands tasks on to an executor, and kills one of its workers as soon as the first is begun."""

    def __init__(self, inner: Executor, pids: list[int]) -> None:
        self.inner, self.pids = inner, pids

    def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> Any:
        future = self.inner.submit(work, *args, **kwargs)
        if self.pids:
            os.kill(self.pids.pop(), signal.SIGKILL)
        return future


@pytest.mark.slow
def test_a_killed_worker_changes_no_byte(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    base, adapter = prepare(tmp_path)
    merge(base, [adapter], tmp_path / "whole")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", silence_logs=50,
        scheduler_kwargs={"dashboard_address": "127.0.0.1:0", "dashboard": False},
    ) as cluster, distributed.Client(cluster, set_as_default=False) as client:  # fmt: skip
        pids = sorted(client.run(os.getpid).values())
        executor = Late(client.get_executor(pure=False), pids[:1])
        merge_shared(call_of(base, [adapter], tmp_path / "out"), executor)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert leftovers(tmp_path) == []


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("base", {}),
    "residual": ("base", {"keep_residual": True, "max_shard_size": 20_000}),
    "quantized": ("quantized", {"max_shard_size": 20_000}),
    "requantized": ("quantized", {"quantized": "requantize", "retention": "full", "check_base": "off"}),
    "in another dtype": ("base", {"dtype": "f16", "max_shard_size": 20_000}),
    "experts": ("experts", {}),
}


def given(case: str, workplace: Path) -> tuple[Path, Path, dict[str, Any]]:
    """Return the base, the adapter and the options of a case; make what the workplace has not."""
    base, options = CASES[case]
    if case == "dora" and not (workplace / "dora").exists():
        _save_dora(workplace / "adapter", workplace / "dora")
    if case == "experts" and not (workplace / "experts").exists():
        _save_experts(workplace)
    adapter = {"dora": "dora", "experts": "of experts"}.get(case, "adapter")
    return workplace / base, workplace / adapter, options


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("of", [2, 3])
def test_parts_of_every_kind_of_merge_have_the_bytes_of_one_process(case: str, of: int, workplace: Path) -> None:
    base, adapter, options = given(case, workplace)
    report = merge(base, [adapter], workplace / "whole", **options)
    assert report.changed > 0
    call = call_of(base, [adapter], workplace / "out", **options)
    for number in range(of, 0, -1):
        merge_part(call, f"{number}/{of}")
    gather(workplace / "out")
    assert hashes(workplace / "out") == hashes(workplace / "whole")
    with ThreadPoolExecutor(1) as executor:
        merge_shared(call_of(base, [adapter], workplace / "apart", **options), executor)
    assert hashes(workplace / "apart") == hashes(workplace / "whole")


@pytest.mark.parametrize("case", CASES)
def test_a_call_goes_to_json_and_back_to_a_plan_of_equal_fingerprint(case: str, workplace: Path) -> None:
    base, adapter, options = given(case, workplace)
    call = call_of(base, [adapter], workplace / "out", **options)
    back = Call.from_json(json.loads(json.dumps(call.to_json())), "here")
    again = pickle.loads(pickle.dumps(call))  # noqa: S301  (our own)
    plans = [decide_call(each) for each in (call, back, again)]
    assert len({fingerprint(plan.plan, settings_of(plan)) for plan in plans}) == 1
    other = decide_call(call_of(base, [adapter], workplace / "out", **options, weights=2))
    assert fingerprint(other.plan, settings_of(other)) != fingerprint(plans[0].plan, settings_of(plans[0]))


def test_a_model_is_dequantized_in_parts_and_on_workers(workplace: Path) -> None:
    arguments = {"model": workplace / "quantized", "max_shard_size": 20_000, "verify": True}
    alone = dequantize(output=workplace / "whole", **arguments)
    call = Call.of("dequantize", {**arguments, "output": workplace / "out"}, PLACES)
    for number in (3, 1, 2):
        merge_part(call, f"{number}/3")
    assert replace(gather(workplace / "out"), output="") == replace(alone, output="")
    assert hashes(workplace / "out") == hashes(workplace / "whole")
    with ThreadPoolExecutor(1) as executor:
        call = Call.of("dequantize", {**arguments, "output": workplace / "apart"}, PLACES)
        assert replace(merge_shared(call, executor), output="") == replace(alone, output="")
    assert hashes(workplace / "apart") == hashes(workplace / "whole")


def _save_dora(source: Path, target: Path) -> None:
    """Save a LoRA adapter again with magnitudes, which makes it DoRA."""
    shutil.copytree(source, target)
    factors = load_file(target / "adapter_model.safetensors")
    for name in [name for name in factors if "lora_B" in name]:
        magnitude = name.replace("lora_B.weight", "lora_magnitude_vector")
        factors[magnitude] = torch.linspace(0.5, 1.5, len(factors[name]))
    save_file(factors, target / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))


def _save_experts(folder: Path) -> None:
    """Save a base of stacked experts in three shards, and an adapter for them."""
    weights = {f"layers.{i}.mlp.experts.gate_up_proj": random(4, 48, 32, seed=i) for i in range(3)}
    save_base(folder / "experts", weights, shards=3)
    factors = {f"layers.{i}.mlp.experts": (random(8, 32, seed=9), random(48, 8, seed=8)) for i in range(3)}
    settings = {"r": 2, "target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}
    save_adapter(folder / "of experts", Lora(factors, settings=settings))


@pytest.mark.skipif(sys.platform == "win32", reason="folders have no shared locks there")
def test_what_parts_write_in_is_no_leftover_while_one_writes(tmp_path: Path) -> None:
    base, adapter = prepare(tmp_path)
    call = call_of(base, [adapter], tmp_path / "out")
    room = Path(merge_part(call, "1/2").room)
    merge_part(call, "2/2")
    with atomic.part_room(room, tmp_path / "out"), atomic.part_room(room, tmp_path / "out"):  # as two parts do
        with pytest.raises(OutputRefused, match="out is being written by another process"):
            gather(tmp_path / "out")
        sweep(tmp_path / "out", KEPT)
        assert list(room.iterdir())
    with atomic.part_folders(tmp_path / "out"), pytest.raises(OutputRefused, match="out is being written by another"):
        merge_part(call, "1/2")
    sweep(tmp_path / "out", KEPT)
    assert leftovers(tmp_path) == []


def test_workers_have_their_machine_in_the_names_of_their_folders(tmp_path: Path) -> None:
    base, adapter = prepare(tmp_path)
    seen: list[str] = []

    class Looking(ThreadPoolExecutor):
        def submit(self, *args: Any, **named: Any) -> Any:
            future = super().submit(*args, **named)
            future.result()
            seen.extend(path.name for path in parts_of(tmp_path / "out"))
            return future

    with Looking(1) as executor:
        merge_shared(call_of(base, [adapter], tmp_path / "out"), executor)
    made = {name for name in seen if not name.endswith("0000")}
    assert made
    assert all(len(name.rpartition("-")[2]) == 12 and name.endswith(mark()) for name in made)
