"""A verb that shares its items gives what it gives alone: the same digests, factors, certificate and account."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loratools.cli.extract_svd import document
from loratools.errors import BadFile, InvalidOption, LoraToolsError
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Energy
from loratools.parallel import tasks
from loratools.parallel.plain import from_plain, to_plain
from loratools.surgery.extract import extract, plan
from loratools.surgery.hash import hash_checkpoint
from loratools.surgery.sharing import VERBS, call_of, crew, gather, share, task, write_part
from loratools.surgery.sharing import verbs as known
from loratools.surgery.verify import verify
from tests.faults.killer import hashes


def inputs(workplace: Path) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    base, adapter, merged = (str(workplace / name) for name in ("base", "adapter", "merged"))
    return {
        "hash": (hash_checkpoint, {"checkpoint": base}),
        "hash codes": (hash_checkpoint, {"checkpoint": str(workplace / "quantized"), "tiers": ["root", "logical"]}),
        "verify": (verify, {"model": merged, "base": base, "adapters": [adapter], "seed": 3}),
        "verify another": (verify, {"model": str(workplace / "tuned"), "base": base, "adapters": [adapter], "seed": 3}),
    }


@pytest.mark.parametrize("case", ["hash", "hash codes", "verify", "verify another"])
@pytest.mark.parametrize("count", [1, 2])
def test_what_is_shared_is_what_one_process_gives(case: str, count: int, workplace: Path) -> None:
    function, arguments = inputs(workplace)[case]
    with ThreadPoolExecutor(count) as executor:
        assert share(case.partition(" ")[0], executor, **arguments) == function(**arguments)


EXTRACTIONS: dict[str, dict[str, Any]] = {
    "rank": {"ranks": 4},
    "energy": {"ranks": Ranks(Energy(0.7), maximum=8), "dtype": "BF16"},
    "budget": {"ranks": Ranks(budget=3000)},
}


@pytest.mark.parametrize("case", EXTRACTIONS)
def test_an_extraction_on_workers_has_the_bytes_and_the_certificate_of_one(case: str, workplace: Path) -> None:
    arguments = {"base": str(workplace / "base"), "tuned": str(workplace / "tuned"), **EXTRACTIONS[case]}
    alone = extract(**arguments, output=workplace / "alone")
    done = list[int]()
    with ThreadPoolExecutor(1) as executor:
        apart = share("extract-svd", executor, progress=done.append, **arguments, output=str(workplace / "apart"))
    assert hashes(workplace / "apart") == hashes(workplace / "alone")
    assert account(apart) == account(alone)
    assert sum(done) > 0
    assert left(workplace) == []


@pytest.mark.parametrize("of", [1, 2, 3])
@pytest.mark.parametrize("case", EXTRACTIONS)
def test_parts_of_an_extraction_in_any_order_have_the_bytes_of_one(case: str, of: int, workplace: Path) -> None:
    arguments = {"base": str(workplace / "base"), "tuned": str(workplace / "tuned"), **EXTRACTIONS[case]}
    alone = extract(**arguments, output=workplace / "alone")
    call = call_of("extract-svd", {**arguments, "output": workplace / "apart"})
    written = [write_part(call, f"{number}/{of}") for number in range(of, 0, -1)]
    assert not (workplace / "apart").exists()
    assert sum(part.items for part in written) == len(alone.outcomes)
    apart = gather(workplace / "apart")
    assert hashes(workplace / "apart") == hashes(workplace / "alone")
    assert account(apart) == account(alone)
    assert left(workplace) == []


COMBINED: dict[str, tuple[str, dict[str, Any]]] = {
    "resized": ("resize", {"adapter": "other", "ranks": 1}),
    "resized by energy": ("resize", {"adapter": "other", "ranks": Ranks(Energy(0.7)), "dtype": "BF16"}),
    "resized to a budget": ("resize", {"adapter": "other", "ranks": Ranks(budget=2500)}),
    "summed": ("combine", {"adapters": ["adapter", "other"], "weights": [0.7, -0.3]}),
    "summed to one rank": ("combine", {"adapters": ["adapter", "other"], "ranks": Ranks(Energy(0.9), uniform=True)}),
    "ties": ("combine", {"adapters": ["adapter", "other"], "method": "ties", "density": 0.5, "ranks": 3}),
    "dare": ("combine", {"adapters": ["adapter", "other"], "method": "dare", "density": 0.5, "seed": 4}),
}


def combining(case: str, workplace: Path, output: str) -> tuple[str, dict[str, Any]]:
    """Return a verb that combines, and its arguments."""
    verb, arguments = COMBINED[case]
    arguments = dict(arguments, output=str(workplace / output))
    if "adapter" in arguments:
        arguments["adapter"] = str(workplace / arguments["adapter"])
    else:
        arguments["adapters"] = [str(workplace / name) for name in arguments["adapters"]]
    return verb, arguments


@pytest.mark.parametrize("case", COMBINED)
def test_adapters_are_combined_on_workers_and_in_parts_as_alone(case: str, workplace: Path) -> None:
    verb, arguments = combining(case, workplace, "alone")
    alone = known.verb(verb).load()(**arguments)
    with ThreadPoolExecutor(1) as executor:
        apart = share(verb, executor, **combining(case, workplace, "apart")[1])
    call = call_of(verb, combining(case, workplace, "parts")[1])
    written = [write_part(call, f"{number}/3") for number in (3, 1, 2)]
    assert sum(part.items for part in written) > 1
    gathered = gather(workplace / "parts")
    assert hashes(workplace / "apart") == hashes(workplace / "parts") == hashes(workplace / "alone")
    assert replace(apart, output="") == replace(gathered, output="") == replace(alone, output="")
    assert left(workplace) == []


def test_a_product_without_exact_changes_travels(workplace: Path) -> None:
    """B whose columns depend on each other is decomposed by Householder's QR: its long sides travel themselves."""
    from safetensors.torch import load_file, save_file

    path = workplace / "other" / "adapter_model.safetensors"
    factors = load_file(path)
    for name in [name for name in factors if "lora_B" in name]:
        factors[name][:, 1] = factors[name][:, 0]
    save_file(factors, path, {"format": "pt"})
    test_adapters_are_combined_on_workers_and_in_parts_as_alone("resized to a budget", workplace)


def test_what_draws_from_one_stream_is_done_by_one(workplace: Path) -> None:
    arguments = {"adapters": [str(workplace / "adapter"), str(workplace / "other")], "method": "dare", "like": "peft"}
    call = call_of("combine", {**arguments, "density": 0.5, "output": workplace / "out"})
    with pytest.raises(InvalidOption, match="dare with like 'peft' draws from one stream"):
        write_part(call, "1/2")
    assert left(workplace) == []


def test_a_module_that_fails_is_named_with_its_worker(workplace: Path) -> None:
    _with_nan(workplace / "adapter", workplace / "odd")
    arguments = {"adapter": str(workplace / "odd"), "ranks": 2, "output": str(workplace / "out")}
    with ThreadPoolExecutor(1) as executor, pytest.raises(LoraToolsError) as caught:
        share("resize", executor, **arguments)
    problems = caught.value.problems
    assert any("q_proj: adapter 1 has NaN" in problem for problem in problems)
    assert any(f"process {os.getpid()}" in problem and "in part " in problem for problem in problems)
    assert left(workplace) == []


def test_parts_that_are_missing_or_of_another_input_are_named(workplace: Path) -> None:
    arguments = {"base": str(workplace / "base"), "tuned": str(workplace / "tuned"), "output": workplace / "apart"}
    call = call_of("extract-svd", {**arguments, "ranks": 2})
    with pytest.raises(BadFile, match="apart: no part of it is complete"):
        gather(workplace / "apart")
    write_part(call, "1/2")
    with pytest.raises(BadFile) as caught:
        gather(workplace / "apart")
    assert caught.value.problems == ("part 2/2 is missing",)
    folder = Path(write_part(call, "2/2").folder)
    document = json.loads((folder / ".part.json").read_text())
    (folder / ".part.json").write_text(json.dumps(document | {"arithmetic": "torch 1.0, DEFAULT"}))
    with pytest.raises(BadFile) as caught:
        gather(workplace / "apart")
    assert any("torch 1.0, DEFAULT" in problem for problem in caught.value.problems)
    write_part(call, "2/2")
    os.utime(workplace / "tuned" / "config.json", ns=(1, 1))
    for shard in (workplace / "tuned").glob("*.safetensors"):
        os.utime(shard, ns=(1, 1))
    with pytest.raises(BadFile, match="sees other files than the caller"):
        gather(workplace / "apart")
    assert not (workplace / "apart").exists()


def test_a_worker_that_sees_other_inputs_or_computes_otherwise_is_refused(workplace: Path) -> None:
    call = call_of("hash", {"checkpoint": workplace / "base"})
    shards = [str(path) for path in (workplace / "base").glob("*.safetensors")]
    good = task.Task(call, known_part(), "0", {}, "any")
    with pytest.raises(BadFile, match="finds other work than the caller") as caught:
        task.do(good)
    assert caught.value.problems == (f"in part 1/2 of the work, by {tasks.place()}",)
    with pytest.raises(BadFile, match="sees other files than the caller") as caught:
        task.do(replace(good, stamps=dict.fromkeys(shards, (1, 1))))
    assert {*shards} <= {*caught.value.problems}
    with pytest.raises(InvalidOption, match="computes by any, the caller by torch 1"):
        task.do(replace(good, arithmetic="torch 1"))


def test_an_error_names_the_worker_and_the_tensor(workplace: Path) -> None:
    arguments = {"base": str(workplace / "base"), "tuned": str(workplace / "odd"), "ranks": 2}
    _with_nan(workplace / "tuned", workplace / "odd")
    with ThreadPoolExecutor(1) as executor, pytest.raises(BadFile) as caught:
        share("extract-svd", executor, **arguments, output=str(workplace / "out"))
    problems = caught.value.problems
    assert any("q_proj" in problem for problem in problems)
    assert any(f"process {os.getpid()}" in problem and "in part " in problem for problem in problems)
    assert left(workplace) == []


def test_a_plan_of_an_extraction_pickles_and_goes_to_json_and_back(workplace: Path) -> None:
    made = plan(workplace / "base", workplace / "tuned")
    assert from_plain(json.loads(json.dumps(to_plain(made)))) == made
    assert pickle.loads(pickle.dumps(made)) == made  # noqa: S301  (our own)


def test_what_cannot_be_shared_is_refused(workplace: Path) -> None:
    with pytest.raises(InvalidOption, match="'edit' is no verb whose items are shared"):
        call_of("edit", {})
    with pytest.raises(InvalidOption, match="hash writes no output"):
        write_part(call_of("hash", {"checkpoint": workplace / "base"}), "1/2")
    stored = call_of("extract-svd", {"base": workplace / "base", "tuned": workplace / "tuned", "output": "s3://b/k"})
    with pytest.raises(InvalidOption, match="s3://b/k: work that is shared out needs a folder here"):
        write_part(stored, "1/2")
    with pytest.raises(InvalidOption, match="held in memory"):
        call_of("hash", {"checkpoint": object()})
    with pytest.raises(InvalidOption, match="workers is 'http://x'"), crew("hash", {"checkpoint": "base"}, "http://x"):
        pass


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_is_there_and_has_the_arguments_that_are_places(name: str) -> None:
    from inspect import signature

    verb = known.verb(name)
    names = signature(verb.load()).parameters
    assert {*verb.places, "threads", "progress"} <= names.keys()
    assert verb.output == ("output" in names)


def known_part() -> Any:
    from loratools.parallel.shares import Part

    return Part(1, 2)


def account(extraction: Any) -> Any:
    """Return the account of every tensor, the certificate and the digests."""
    return document(extraction) | {"output": ""}


def left(folder: Path) -> list[str]:
    """Return what lies hidden beside the output; the fixture has the two parts of `gathered`."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".") and "gathered" not in path.name)


def _with_nan(source: Path, target: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    for path in target.glob("*.safetensors"):
        weights = load_file(path)
        for name in weights:
            if "layers.0.self_attn.q_proj" in name:
                weights[name][0, 0] = float("nan")
        save_file(weights, path, {"format": "pt"})
