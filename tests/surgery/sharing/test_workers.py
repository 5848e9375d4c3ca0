"""Two processes, begun once for all tests here, give what one gives: every kind of merge, extractions, digests."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loratools.parallel.call import Call
from loratools.parallel.executors import opened
from loratools.surgery.dequantize import PLACES, dequantize
from loratools.surgery.extract import extract
from loratools.surgery.merge import merge, planned
from loratools.surgery.merge.parts import call_of as merge_call
from loratools.surgery.merge.parts import merge_part
from loratools.surgery.merge.shared import merge_shared
from loratools.surgery.sharing import call_of, gather, share, write_part
from loratools.surgery.sharing import verbs as known
from loratools.surgery.verify import verify
from tests.faults.killer import hashes
from tests.surgery.merge.test_parts import CASES, given
from tests.surgery.sharing.test_sharing import COMBINED, EXTRACTIONS, account, combining, inputs, left

pytestmark = pytest.mark.slow

pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def two() -> Iterator[Executor]:
    """Two processes, as `--workers 2` begins them."""
    with opened(2) as pool:
        yield pool.executor


def apart(two: Executor, work: Any, call: Call, of: int) -> list[Any]:
    """Have every part of a call written by one of the processes, in any order."""
    tasks = [two.submit(work, call, f"{number}/{of}") for number in range(of, 0, -1)]
    wait(tasks)
    return [task.result() for task in tasks]


@pytest.mark.parametrize("case", ["plain", *CASES])
def test_every_kind_of_merge_has_the_bytes_of_one_process(
    case: str, two: Executor, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two share every file among them, tensor by tensor, and in parts its pieces."""
    monkeypatch.setattr(planned, "PIECE", 1)
    base, adapter, options = (
        (workplace / "base", workplace / "sealed", {}) if case == "plain" else given(case, workplace)
    )
    alone = merge(base, [adapter], workplace / "whole", **options)
    right = hashes(workplace / "whole")
    shared = merge_shared(merge_call(base, [adapter], workplace / "shared", **options), two)
    assert hashes(workplace / "shared") == right
    apart(two, merge_part, merge_call(base, [adapter], workplace / "parts", **options), 3)
    gathered = gather(workplace / "parts")
    assert hashes(workplace / "parts") == right
    assert replace(shared, output="") == replace(gathered, output="") == replace(alone, output="")
    assert alone.changed > 0
    assert left(workplace) == []


def test_a_model_is_dequantized_by_two_processes(two: Executor, workplace: Path) -> None:
    arguments = {"model": workplace / "quantized", "max_shard_size": 20_000, "verify": True}
    alone = dequantize(output=workplace / "whole", **arguments)
    shared = merge_shared(Call.of("dequantize", {**arguments, "output": workplace / "out"}, PLACES), two)
    assert hashes(workplace / "out") == hashes(workplace / "whole")
    assert replace(shared, output="") == replace(alone, output="")


@pytest.mark.parametrize("case", EXTRACTIONS)
def test_an_extraction_has_the_factors_the_certificate_and_the_digests_of_one_process(
    case: str, two: Executor, workplace: Path
) -> None:
    arguments = {"base": str(workplace / "base"), "tuned": str(workplace / "tuned"), **EXTRACTIONS[case]}
    alone = extract(**arguments, output=workplace / "alone")
    shared = share("extract-svd", two, **arguments, output=str(workplace / "shared"))
    written = apart(two, write_part, call_of("extract-svd", {**arguments, "output": workplace / "parts"}), 3)
    assert sum(part.items for part in written) == len(alone.outcomes)
    gathered = gather(workplace / "parts")
    assert hashes(workplace / "shared") == hashes(workplace / "parts") == hashes(workplace / "alone")
    assert account(shared) == account(gathered) == account(alone)
    assert left(workplace) == []


@pytest.mark.parametrize("case", COMBINED)
def test_adapters_are_combined_by_two_processes_as_by_one(case: str, two: Executor, workplace: Path) -> None:
    verb, arguments = combining(case, workplace, "alone")
    alone = known.verb(verb).load()(**arguments)
    shared = share(verb, two, **combining(case, workplace, "shared")[1])
    apart(two, write_part, call_of(verb, combining(case, workplace, "parts")[1]), 3)
    gathered = gather(workplace / "parts")
    assert hashes(workplace / "shared") == hashes(workplace / "parts") == hashes(workplace / "alone")
    assert replace(shared, output="") == replace(gathered, output="") == replace(alone, output="")
    assert left(workplace) == []


@pytest.mark.parametrize("case", ["hash", "hash codes", "verify", "verify another"])
def test_digests_and_proofs_are_those_of_one_process(case: str, two: Executor, workplace: Path) -> None:
    function, arguments = inputs(workplace)[case]
    assert share(case.partition(" ")[0], two, **arguments) == function(**arguments)


def test_a_seed_that_is_drawn_is_that_of_all(two: Executor, workplace: Path) -> None:
    arguments = inputs(workplace)["verify"][1]
    drawn = share("verify", two, **arguments | {"seed": None})
    assert drawn == verify(**arguments | {"seed": drawn.seed})
