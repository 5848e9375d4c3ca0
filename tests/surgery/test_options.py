"""Options of every verb: a wrong one is told with the list, before anything is opened; inputs in every form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loratools import dialects
from loratools.dialects.peft import profiles
from loratools.errors import InvalidOption
from loratools.options import words
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.base import agree
from loratools.surgery.combine import combine
from loratools.surgery.convert import convert
from loratools.surgery.hash import hash_checkpoint
from loratools.surgery.inspect import AdapterSummary, CheckpointSummary, inspect
from loratools.surgery.merge import merge
from loratools.surgery.switch import switch
from loratools.surgery.unmerge import unmerge
from loratools.surgery.validate import validate
from loratools.surgery.verify import verify
from tests.surgery.models import load, lora, same_bytes, save, weights_of

MISSING = Path("/nowhere")
CALLS: dict[str, Callable[..., Any]] = {
    "unmerge": lambda **options: unmerge(MISSING, MISSING, MISSING, **options),
    "switch": lambda **options: switch(MISSING, MISSING, MISSING, MISSING, **options),
    "verify": lambda **options: verify(MISSING, MISSING, MISSING, **options),
    "convert": lambda **options: convert(MISSING, MISSING, **options),
    "validate": lambda **options: validate(MISSING, MISSING, **options),
    "hash": lambda **options: hash_checkpoint(MISSING, **options),
}
THREADS = "it can be a whole number of at least 1 or None"
FLAG = "it can be True or False"
PROFILES = "it can be serving, vllm or sglang"


@pytest.mark.parametrize(
    ("verb", "options", "problems"),
    [
        ("unmerge", {"threads": 0}, [f"threads is 0; {THREADS}"]),
        ("unmerge", {"threads": 1.5, "force": "no"}, [f"threads is 1.5; {THREADS}", f"force is 'no'; {FLAG}"]),
        ("switch", {"check_base": "Strict"}, ["check_base is 'Strict'; it can be strict, warn or off"]),
        ("switch", {"threads": True, "force": 0}, [f"threads is True; {THREADS}", f"force is 0; {FLAG}"]),
        ("verify", {"exact": 1}, [f"exact is 1; {FLAG}"]),
        ("verify", {"seed": 1.5, "threads": "2"},
         ["seed is 1.5; it can be a whole number or None", f"threads is '2'; {THREADS}"]),
        ("convert", {"to": "peft", "profile": "tgi"}, [f"profile is 'tgi'; {PROFILES}"]),
        ("convert", {"profile": "vllm"}, ["profile is 'vllm', which is for to='peft', not 'loratools'"]),
        ("convert", {"allow_loss": "a", "force": "b"}, [f"allow_loss is 'a'; {FLAG}", f"force is 'b'; {FLAG}"]),
        ("validate", {"data": None, "threads": -1}, [f"data is None; {FLAG}", f"threads is -1; {THREADS}"]),
        ("hash", {"tiers": "all"}, ["tiers is 'all'; it can be schema, tensors or root"]),
        ("hash", {"tiers": ["root", "rot"], "algorithm": "md5", "threads": 0},
         ["tiers is 'rot'; it can be schema, tensors or root", "algorithm is 'md5'; it can be blake3 or sha256",
          f"threads is 0; {THREADS}"]),
    ],
)  # fmt: skip
def test_wrong_options_are_told_with_what_can_be(verb: str, options: dict[str, Any], problems: list[str]) -> None:
    with pytest.raises(InvalidOption) as refusal:
        CALLS[verb](**options)
    assert ([refusal.value.message] if len(problems) == 1 else list(refusal.value.problems)) == problems


def test_the_base_of_a_combination() -> None:
    with pytest.raises(InvalidOption, match="check_base is 'of'; it can be strict, warn or off"):
        agree(["a", "b"], [None, None], "of")  # type: ignore[arg-type]


def test_every_profile_is_in_the_list() -> None:
    assert words(profiles.Name) == tuple(profiles.PROFILES)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Save a base, and two adapters `adapter0` and `adapter1` that fit it."""
    shapes = {"a": (24, 16), "b": (16, 24)}
    save(tmp_path, weights_of(shapes, torch.bfloat16), [lora(shapes, seed=1), lora({"a": (24, 16)}, seed=2)])
    return tmp_path


def test_paths_texts_and_opened_values_are_taken_alike(models: Path) -> None:
    base, adapter = models / "base", models / "adapter0"
    checkpoint, opened = Checkpoint.open(base), dialects.open_adapter(adapter)
    forms: dict[str, tuple[Any, Any]] = {
        "paths": (base, [adapter]), "path": (base, adapter), "text": (str(base), str(adapter)),
        "opened": (checkpoint, opened), "listed": (checkpoint, (opened,)), "mixed": (str(base), [opened]),
    }  # fmt: skip
    results = []
    for name, (model, adapters) in forms.items():
        merge(model, adapters, models / name, keep_residual=True)
        results.append(load(models / name))
        assert verify(models / name, model, adapters).ok
        merged = Checkpoint.open(models / name) if name == "opened" else models / name
        assert unmerge(merged, adapters, models / f"un{name}").proved == "root hash"
        assert switch(merged, adapters, str(models / "adapter1"), models / f"switched-{name}").exact
    assert all(same_bytes(found[key], results[0][key]) for found in results for key in results[0])
    assert hash_checkpoint(base, "root") == hash_checkpoint(checkpoint, ["root"])
    assert hash_checkpoint(str(base), include="a.*").tensors.keys() == {"a.weight"}
    described, summarized = inspect(opened), inspect(adapter)
    assert isinstance(described, AdapterSummary)
    assert isinstance(summarized, AdapterSummary)
    assert (described.groups, described.path) == (summarized.groups, summarized.path)
    assert isinstance(inspect(checkpoint), CheckpointSummary)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], 0.5, []])
def test_each_adapter_takes_one_weight(weights: Any, models: Path) -> None:
    adapters = [models / "adapter0", models / "adapter1"]
    for call in (merge, switch_in):
        with pytest.raises(InvalidOption, match="each adapter takes one weight"):
            call(models / "base", adapters, models / "out", weights=weights)


WRONG_WEIGHTS = [float("nan"), float("inf"), "1", "12", "x", True, 1j, 10**400, {0: 1}, torch.tensor(0.5), b"1"]


@pytest.mark.parametrize("weight", WRONG_WEIGHTS, ids=repr)
def test_a_weight_is_a_finite_number(weight: Any, models: Path) -> None:
    for weights in (weight, [weight]):
        for call in (merge, lambda *inputs, **options: verify(models / "base", *inputs[:2], **options)):
            with pytest.raises(InvalidOption, match="a weight is a finite number") as refusal:
                call(models / "base", models / "adapter0", models / "out", weights=weights)
            assert refusal.value.problems == (f"weight 1 is {weight!r}",)


def test_numbers_of_numpy_are_weights(models: Path) -> None:
    merge(models / "base", models / "adapter0", models / "out", weights=np.float32(0.5))
    merge(models / "base", models / "adapter0", models / "same", weights=[0.5])
    merged, same = load(models / "out"), load(models / "same")
    assert merged.keys() == same.keys() != set()
    assert all(same_bytes(merged[name], same[name]) for name in merged)


@pytest.mark.parametrize("weight", ["x", "q_proj=x", "1,2", "nan", None, 1j, [1]], ids=repr)
def test_a_weight_of_combine_is_a_number_or_a_text_with_patterns(weight: Any, models: Path) -> None:
    with pytest.raises(InvalidOption, match="weight"):
        combine([models / "adapter0", models / "adapter1"], models / "out", weights=[weight, 1])


def test_an_empty_text_is_no_path(models: Path) -> None:
    for call in (lambda: inspect(""), lambda: hash_checkpoint(""), lambda: merge(models / "base", "", models / "out")):
        with pytest.raises(InvalidOption, match="found an empty text"):
            call()


def switch_in(base: Path, adapters: list[Path], output: Path, weights: Any) -> None:
    """Merge the first adapter, then switch it for all of them."""
    if not (output.parent / "merged").exists():
        merge(base, adapters[0], output.parent / "merged")
    switch(output.parent / "merged", adapters[0], adapters, output, weights=weights)
