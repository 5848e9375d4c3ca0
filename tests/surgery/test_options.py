"""Options of every verb: a wrong one is told with the list, before anything is opened; inputs in every form."""

from __future__ import annotations

import inspect as inspect_module
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import loratools
from loratools import dialects
from loratools.dialects.peft import profiles
from loratools.errors import InvalidOption, UnknownKind
from loratools.options import words
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.dtypes import FACTORS, FloatName, parse_float
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

MISSING, OUT = Path("/nowhere"), Path("/nowhere-to-be")
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
        ("switch", {"check_base": "Strict"},
         ["check_base is 'Strict'; it can be strict, warn or off; did you mean strict?"]),
        ("switch", {"threads": True, "force": 0}, [f"threads is True; {THREADS}", f"force is 0; {FLAG}"]),
        ("verify", {"exact": 1}, [f"exact is 1; {FLAG}"]),
        ("verify", {"seed": 1.5, "threads": "2"},
         ["seed is 1.5; it can be a whole number or None", f"threads is '2'; {THREADS}"]),
        ("convert", {"to": "peft", "profile": "tgi"}, [f"profile is 'tgi'; {PROFILES}"]),
        ("convert", {"profile": "vllm"}, ["profile is 'vllm', which is for to='peft', not 'loratools'"]),
        ("convert", {"allow_loss": "a", "force": "b"}, [f"allow_loss is 'a'; {FLAG}", f"force is 'b'; {FLAG}"]),
        ("validate", {"data": None, "threads": -1}, [f"data is None; {FLAG}", f"threads is -1; {THREADS}"]),
        ("hash", {"tiers": "all"}, ["tiers is 'all'; it can be schema, tensors, root or logical"]),
        ("hash", {"tiers": ["root", "rot"], "algorithm": "md5", "threads": 0},
         [
            "tiers is 'rot'; it can be schema, tensors, root or logical; did you mean root?",
          "algorithm is 'md5'; it can be blake3 or sha256",
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


PLACES: dict[str, tuple[Any, ...]] = {
    "merge": (MISSING, MISSING, OUT), "unmerge": (MISSING, MISSING, OUT), "switch": (MISSING, MISSING, MISSING, OUT),
    "combine": ([MISSING, MISSING], OUT), "resize": (MISSING, OUT, 4), "extract": (MISSING, MISSING, OUT),
    "certify": (MISSING, MISSING, MISSING), "convert": (MISSING, OUT), "hash": (MISSING,), "inspect": (MISSING,),
    "spectrum": (MISSING,), "validate": (MISSING,), "verify": (MISSING, MISSING, MISSING), "open_adapter": (MISSING,),
    "save_adapter": (loratools.Adapter({}), OUT), "pull": ("lab/x", OUT), "push": (MISSING, "lab/x"),
    "find": (MISSING,), "compare_all": (MISSING,), "gather": (OUT,),
    "compare": (MISSING, MISSING), "dequantize": (MISSING, OUT), "run_demo": (), "run_recipe": (MISSING,),
    "recipe_of": (MISSING,), "list_dialects": (),
}  # fmt: skip
WRONG: dict[str, tuple[Any, ...]] = {
    "weights": ("x",), "profile": ("VLLM", 1), "to": ("Peft", "PEFT"), "method": ("dare-ties", "TIES", 3),
    "like": ("PEFT",), "dialect": ("Peft",), "tiers": ("Root", 1), "algorithm": ("SHA256", "md5"),
    "check_base": ("Strict", "no", None), "rounding": ("Stochastic", None), "retention": ("Full", True),
    "tied": ("Both", True), "device": ("CUDA", "gpu", "cuda:", "cuda:01", None), "dtype": ("fp8", "int8", 32),
    "max_shard_size": ("lots", "5 bananas", 0, -1, 1.5), "model_type": (3,), "seed": ("x", 1.5), "threads": (0, "2"),
    "force": ("yes", 1), "durable": ("yes", 1), "keep_residual": ("yes", 1), "resume": ("no", 0), "exact": ("no",),
    "data": ("no",), "allow_loss": ("yes",), "ranks": ("x", 0, -3, 1.5), "tolerance": ("x", -1), "tight": ("x",),
    "arithmetic": ("Float32", "bf16", 1),
    "base_id": (3, ""), "include": (3,), "exclude": (3,), "alpha": ("x",), "enabled": ("x", [1]), "original": (3, ""),
    "trained_on": ("Folded", 3), "similar": (0, 1.5, "x"),
    "keep_loss": (0, 1.5),
    "private": ("x",), "create_pr": ("x",), "card": ("left",), "message": (3,), "revision": (3,), "license": (3,),
    "token": (3,), "density": ("x", 2), "gamma": (2,), "epsilon": (-1,), "selection": ("x",), "base_model": (3,),
}  # fmt: skip
WORDS = {
    "method", "arithmetic", "dialect", "to", "check_base", "tied", "dtype", "device", "rounding", "retention",
    "algorithm",
}  # fmt: skip
# Inputs, whose errors are those of files, and functions that are called as the work goes on.
NO_WORDS = {"base", "onto", "initial", "progress", "folder", "search", "told", "talk"}


def options_of(name: str) -> list[str]:
    parameters = inspect_module.signature(getattr(loratools, name)).parameters.values()
    return [p.name for p in parameters if p.default is not p.empty and p.name not in NO_WORDS]


@pytest.mark.parametrize("name", sorted(PLACES))
def test_every_option_of_every_function_is_a_value(name: str, tmp_path: Path) -> None:
    """A wrong one is an error of its own, before a missing input or the output is looked at, with what can be."""
    for option in options_of(name):
        for value in WRONG.get(option, ("yes",)):  # which is right for no switch and no number
            # Where None is the default it can be; a folder's weights of the Hub are checked by switches alone.
            if value is None and inspect_module.signature(getattr(loratools, name)).parameters[option].default is None:
                continue
            with pytest.raises((InvalidOption, UnknownKind)) as refusal:
                getattr(loratools, name)(*PLACES[name], **{option: value})
            told = " ".join([refusal.value.message, *refusal.value.problems, refusal.value.hint or ""])
            assert repr(value) in told or f"takes no {option}" in told, (option, value, told)
            if isinstance(value, str) and option in (
                "method",
                "dialect",
                "to",
                "check_base",
                "tied",
                "dtype",
                "device",
            ):
                assert " or " in told or " knows " in told, told


def test_every_public_function_is_swept() -> None:
    functions = {name for name in loratools.__all__ if inspect_module.isfunction(getattr(loratools, name))}
    elsewhere = {"estimate", "edit", "report"}  # tests/live/test_cost.py, tests/surgery/edit, tests/reports
    assert functions - PLACES.keys() - elsewhere == {"extract_svd", "hash_checkpoint"}
    assert loratools.extract_svd is loratools.extract
    assert loratools.hash_checkpoint is loratools.hash


@pytest.mark.parametrize("name", [n for n, places in PLACES.items() if OUT in places])
def test_an_output_on_the_hub_points_to_push(name: str) -> None:
    for reference in ("hf://lab/out", Path("hf://lab/out")):
        places = [reference if place is OUT else place for place in PLACES[name]]
        with pytest.raises(InvalidOption, match="hf://lab/out is a place on the Hub") as refusal:
            getattr(loratools, name)(*places)
        assert refusal.value.hint == "Write it to a folder, and send that: loratools push FOLDER lab/out"


@pytest.mark.parametrize("dtype", words(FloatName))
def test_factors_are_stored_in_every_dtype_that_the_library_has(dtype: Any, models: Path) -> None:
    """The command line has the same list."""
    assert {spelling.upper() for spelling in FACTORS} == {"F32", "BF16", "F16", "F64"}
    combine(models / "adapter0", models / f"out-{dtype}", dtype=dtype)
    stored = dialects.open_adapter(models / f"out-{dtype}")
    found = {part.dtype for update in stored.updates.values() for part in update.parts.values()}
    assert found == {parse_float(dtype)}
