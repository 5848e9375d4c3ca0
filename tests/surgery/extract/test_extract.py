"""Extraction: near the optimum of float64, the printed error is the measured one, ranks are those that were asked."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import loratools
from loratools.adapter.naming.selection import Selection
from loratools.dialects import open_adapter
from loratools.errors import BadFile, IncompatibleAdapter, LoraToolsError, OutputRefused
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Energy, Fixed, Ratio
from loratools.surgery.extract import Extraction, extract
from loratools.surgery.extract.layers import Total, beside_optimum
from tests.conftest import clean_env
from tests.make import fp8, tiny
from tests.surgery.finetunes import H, llama, moved, optimum, pair
from tests.surgery.models import load, random, save_base

LINEAR = ("q_proj.weight", "up_proj.weight", "down_proj.weight", "lm_head.weight")
SHAPES = {"a": (96, 64), "b": (64, 300), "c": (640, 560), "d": (600, 700)}
"""Both sides over 512 in the last two: no exact decomposition is allowed there."""


def falling(m: int, n: int, power: float, seed: int) -> Tensor:
    """Return a matrix with singular values i^-power, in float64."""
    k = min(m, n)
    U, V = (torch.linalg.qr(random(side, k, seed=seed + i, dtype=torch.float64))[0] for i, side in enumerate((m, n)))
    return (U * torch.arange(1, k + 1).double() ** -power) @ V.T


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of four linear layers and a fine-tune, both bf16, with spectra that fall slowly and fast."""
    folder = tmp_path_factory.mktemp("flat")
    base = {
        f"{name}.weight": random(*shape, seed=i, dtype=torch.bfloat16) for i, (name, shape) in enumerate(SHAPES.items())
    }
    powers = dict(zip(SHAPES, (0.5, 1.0, 0.5, 1.0), strict=True))
    tuned = {name: (W.double() + falling(*W.shape, powers[name[0]], seed=7)).bfloat16() for name, W in base.items()}
    return pair(folder, base, tuned)


def deltas(models: tuple[Path, Path]) -> dict[str, Tensor]:
    before, after = load(models[0]), load(models[1])
    return {name.removesuffix(".weight"): after[name].double() - before[name].double() for name in before}


def products(folder: Path) -> dict[str, Tensor]:
    """Return what the adapter's file holds, B·A in float64 by module, without loratools."""
    tensors = load(folder)
    modules = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    return {
        module.removeprefix("base_model.model."): tensors[f"{module}.lora_B.weight"].double()
        @ tensors[f"{module}.lora_A.weight"].double()
        for module in modules
    }


def by_module(found: Extraction) -> dict[str, int]:
    return {one.pair.path: one.rank for one in found.outcomes if one.outcome == "factored"}


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_error_is_near_the_optimum_and_the_printed_one(models: tuple[Path, Path], tmp_path: Path, dtype: str) -> None:
    found = extract(*models, tmp_path / "out", Ranks(Fixed(12)), dtype=dtype)
    stored, wanted = products(tmp_path / "out"), deltas(models)
    assert stored.keys() == SHAPES.keys()
    for one in found.of("factored"):
        assert one.layer is not None
        D = wanted[one.pair.path]
        error, norm = float((D - stored[one.pair.path]).norm()), float(D.norm())
        assert one.layer.error == pytest.approx(error / norm, rel=1e-5)
        assert one.layer.captured == pytest.approx(1 - (error / norm) ** 2, rel=1e-5)
        assert one.layer.delta_norm == pytest.approx(norm, rel=1e-6)
        best = optimum(D, 12)
        assert best * (1 - 1e-6) <= error <= best * (1.0005 if dtype == "F32" else 1.002)
        assert error / (1 + one.layer.excess_bound) <= best * (1 + 1e-6)
        assert one.layer.stable_rank == pytest.approx(norm**2 / float(torch.linalg.matrix_norm(D, 2)) ** 2, rel=1e-3)


def test_tight_bounds_are_true_and_tighter(models: tuple[Path, Path], tmp_path: Path) -> None:
    loose = extract(*models, tmp_path / "loose", Ranks(Fixed(12)), arithmetic="float32")
    tight = extract(*models, tmp_path / "tight", Ranks(Fixed(12)), tight=True)
    assert tight.total.error == pytest.approx(loose.total.error, rel=1e-6)
    assert 0 < tight.total.excess_bound < 0.5 * loose.total.excess_bound
    for one in tight.of("factored"):
        assert one.layer is not None
        best = optimum(deltas(models)[one.pair.path], 12) / one.layer.delta_norm
        assert one.layer.error / (1 + one.layer.excess_bound) <= best * (1 + 1e-6)


@pytest.mark.parametrize("tight", [False, True])
def test_words_have_the_errors_that_are_proved(models: tuple[Path, Path], tmp_path: Path, tight: bool) -> None:
    sums = extract(*models, tmp_path / "out", Ranks(Fixed(12)), dtype="F16", tight=tight).total
    D = deltas(models)
    best = (
        sum(optimum(one, 12) ** 2 for one in D.values()) / sum(float(one.square().sum()) for one in D.values())
    ) ** 0.5
    words = beside_optimum(sums, " (how)")
    assert words.startswith("the best factors of these ranks would leave about ")
    found = re.fullmatch(r".* leave about ([0-9.]+|as much), and none leave less than ([0-9.]+) \(how\)", words)
    assert found
    near, least = sums.error if found[1] == "as much" else float(found[1]), float(found[2])
    assert near == pytest.approx(best, rel=1e-3)
    assert least <= best * 1.0001
    assert least > best * (0.99 if tight else 0.5)


@pytest.mark.parametrize(
    ("error", "excess", "bound", "words"),
    [
        (0.0, 0.0, 0.0, "nothing is missing"),
        (0.01, math.inf, math.inf, "that is rounding, for factors of these ranks can hold all of it"),
        (0.5, 1e-6, 1e-6, "no factors of these ranks leave less"),
        (0.5, 1e-6, 1.0, "the best factors of these ranks would leave about as much, and none leave less than 0.25!"),
        (0.5, 0.25, 0.637, "the best factors of these ranks would leave about 0.4, and none leave less than 0.3054!"),
        (0.5, 0.25, math.inf,
         "the best factors of these ranks would leave about 0.4, and how much less is possible is not proved!"),
    ],
)  # fmt: skip
def test_what_is_said_beside_an_error(error: float, excess: float, bound: float, words: str) -> None:
    assert beside_optimum(Total(1, 8, 1.0, 0.1, 1 - error**2, error, excess, bound, 0.0), "!") == words


def test_total_is_the_sum_of_the_layers(models: tuple[Path, Path], tmp_path: Path) -> None:
    found = extract(*models, tmp_path / "out", Ranks(Fixed(5)))
    D, stored = deltas(models), products(tmp_path / "out")
    energy = sum(float(one.square().sum()) for one in D.values())
    error2 = sum(float((D[name] - stored[name]).square().sum()) for name in D)
    assert found.total.error == pytest.approx((error2 / energy) ** 0.5, rel=1e-5)
    assert found.total.parameters == sum(5 * (m + n) for m, n in SHAPES.values()) == found.parameters


def test_certificate_is_in_the_file(models: tuple[Path, Path], tmp_path: Path) -> None:
    found = extract(*models, tmp_path / "out", Ranks(Fixed(5)), seed=3)
    (step,) = open_adapter(tmp_path / "out").provenance
    assert (step.operation, step.seed) == ("extract-svd", 3)
    assert [one["digest"] for one in step.inputs] == [found.base, found.tuned]
    table = step.parameters["certificate"]
    for one in found.of("factored"):
        row = dict(zip(table["columns"], table["modules"][one.pair.path], strict=True))
        assert one.layer is not None
        assert row["error"] == pytest.approx(one.layer.error, rel=1e-5)
        assert row["rank"] == 5


def test_adapter_is_sealed_with_the_base(models: tuple[Path, Path], tmp_path: Path) -> None:
    from loratools.storage.checkpoint import Checkpoint
    from loratools.surgery.hash import hash_checkpoint

    extract(*models, tmp_path / "out", Ranks(Fixed(2)), base_id="org/model")
    made, base = open_adapter(tmp_path / "out").base, hash_checkpoint(Checkpoint.open(models[0]))
    assert made is not None
    assert (made.id, made.root, made.schema, made.tensors) == ("org/model", base.root, base.schema, base.tensors)


@pytest.mark.parametrize(
    ("stated", "named"),
    [(None, "base"), ("org/base", "org/base"), ("org/another", "base"), ("/home/ann/base", "base")],
)
def test_the_base_is_named_by_its_folder_or_as_the_fine_tune_has_it(
    models: tuple[Path, Path], tmp_path: Path, stated: str | None, named: str
) -> None:
    base, tuned = (shutil.copytree(model, tmp_path / name) for model, name in zip(models, ("base", "t"), strict=True))
    config = json.loads((tuned / "config.json").read_text()) if (tuned / "config.json").is_file() else {}
    (tuned / "config.json").write_text(json.dumps(config | ({"_name_or_path": stated} if stated else {})))
    extract(base, tuned, tmp_path / "out", Ranks(Fixed(2)))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == named
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'base_model: "{named}"' in card
    assert str(tmp_path) not in card


def test_energy_and_ratio_choose_the_least_rank(models: tuple[Path, Path], tmp_path: Path) -> None:
    D = {name: torch.linalg.svdvals(delta) for name, delta in deltas(models).items()}
    energy = by_module(extract(*models, tmp_path / "energy", Ranks(Energy(0.6))))
    ratio = by_module(extract(*models, tmp_path / "ratio", Ranks(Ratio(0.3))))
    for name, sigma in D.items():
        share = sigma.square().cumsum(0) / sigma.square().sum()
        assert energy[name] == int((share < 0.6).sum()) + 1
        assert ratio[name] == int((sigma > 0.3 * sigma[0]).sum())


def test_bounds_and_multiples(models: tuple[Path, Path], tmp_path: Path) -> None:
    ranks = by_module(extract(*models, tmp_path / "out", Ranks(Energy(0.6), minimum=6, maximum=20, multiple_of=4)))
    assert set(ranks.values()) <= {8, 12, 16, 20}
    assert len(set(ranks.values())) > 1
    free = by_module(extract(*models, tmp_path / "free", Ranks(Energy(0.6))))
    assert all(ranks[name] == min(20, max(8, -(-rank // 4) * 4)) for name, rank in free.items())


def test_uniform_takes_the_largest_rank_for_all(models: tuple[Path, Path], tmp_path: Path) -> None:
    free = by_module(extract(*models, tmp_path / "free", Ranks(Energy(0.6), maximum=40)))
    even = extract(*models, tmp_path / "even", Ranks(Energy(0.6), maximum=40, uniform=True))
    assert set(by_module(even).values()) == {max(free.values())}
    assert len(set(free.values())) > 1
    config = json.loads((tmp_path / "even" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (40, 40, {})


def test_budget_is_kept_and_captures_more_than_one_rank_for_all(models: tuple[Path, Path], tmp_path: Path) -> None:
    budget = 10 * sum(m + n for m, n in SHAPES.values())
    filled = extract(*models, tmp_path / "filled", Ranks(budget=budget))
    even = extract(*models, tmp_path / "even", Ranks(budget=budget, uniform=True))
    assert set(by_module(even).values()) == {10}
    assert budget - 1300 < filled.total.parameters <= budget
    assert filled.total.captured > even.total.captured + 1e-3
    for one in filled.of("factored"):
        assert one.layer is not None
        error = float((deltas(models)[one.pair.path] - products(tmp_path / "filled")[one.pair.path]).norm())
        assert one.layer.error == pytest.approx(error / one.layer.delta_norm, rel=1e-5, abs=1e-8)
        assert error <= optimum(deltas(models)[one.pair.path], one.rank) * 1.0005 + 1e-6


def test_budget_looks_again_at_a_layer_that_deserves_more(tmp_path: Path) -> None:
    base = {f"{name}.weight": random(80, 80, seed=i) for i, name in enumerate("abcd")}
    tuned = {
        name: W + (random(80, 80, seed=9) if name == "a.weight" else 1e-6 * random(80, 1) @ random(1, 80))
        for name, W in base.items()
    }
    found = by_module(extract(*pair(tmp_path, base, tuned), tmp_path / "out", Ranks(budget=4 * 160 * 10)))
    assert found == {"a": 37, "b": 1, "c": 1, "d": 1}


def test_budget_that_is_too_small_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too small"):
        extract(*models, tmp_path / "out", Ranks(budget=100))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [1, 16])
def test_a_merge_in_float32_gives_its_adapter_back(tmp_path: Path, rank: int) -> None:
    shapes = {"a": (128, 96), "b": (96, 128), "c": (560, 600)}
    base = {f"{name}.weight": random(*shape, seed=i, scale=0.02) for i, (name, shape) in enumerate(shapes.items())}
    known = {
        name: random(m, rank, seed=20, scale=0.1).double() @ random(rank, n, seed=30, scale=0.1).double()
        for name, (m, n) in shapes.items()
    }
    tuned = {name: (W.double() + known[name[0]]).float() for name, W in base.items()}
    found = extract(*pair(tmp_path, base, tuned), tmp_path / "out", Ranks(Energy(0.999999)))
    assert set(by_module(found).values()) == {rank}
    for name, stored in products(tmp_path / "out").items():
        assert float((stored - known[name]).norm() / known[name].norm()) < 1e-5


def test_noise_finds_the_rank_of_a_merge_in_bf16(tmp_path: Path) -> None:
    base = {f"l{i}.weight": random(192, 256, seed=i, scale=0.02, dtype=torch.bfloat16) for i in range(8)}
    tuned = {
        name: (
            W.double()
            + random(192, 16, seed=40 + i, scale=0.05).double() @ random(16, 256, seed=60 + i, scale=0.02).double()
        ).bfloat16()
        for i, (name, W) in enumerate(base.items())
    }
    found = extract(*pair(tmp_path, base, tuned), tmp_path / "out", Ranks(noise=True))
    assert list(by_module(found).values()) == [16] * 8
    for one in found.of("factored"):
        assert one.layer is not None
        assert one.layer.noise == pytest.approx(one.layer.error**2, rel=0.25)  # what is left is rounding


def test_equal_seeds_give_equal_bytes(models: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        extract(*models, tmp_path / name, Ranks(Fixed(8)), seed=5, threads=2)
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    assert len(list((tmp_path / "one").iterdir())) == 3


@pytest.mark.parametrize("ranks", [Ranks(Fixed(8)), Ranks(Energy(0.6)), Ranks(budget=30_000)])
def test_threads_change_no_byte(models: tuple[Path, Path], tmp_path: Path, ranks: Ranks) -> None:
    made = []
    for threads in (1, 2, 9):
        extract(*models, tmp_path / str(threads), ranks, threads=threads)
        made.append({file.name: file.read_bytes() for file in (tmp_path / str(threads)).iterdir()})
    assert made[0] == made[1] == made[2]


def test_no_large_matrix_is_decomposed_in_full(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, tuple[int, ...]]] = []
    for name in ("svd", "svdvals", "eigh", "eigvalsh", "eig", "qr"):
        real = getattr(torch.linalg, name)

        def watched(A: Tensor, *args: object, _name: str = name, _real: object = real, **kwargs: object) -> object:
            seen.append((_name, tuple(A.shape)))
            return _real(A, *args, **kwargs)  # type: ignore[operator]

        monkeypatch.setattr(torch.linalg, name, watched)
    extract(*models, tmp_path / "out", Ranks(Energy(0.7)), tight=True)
    assert seen
    assert [one for one in seen if min(one[1][-2:]) > 512] == []


def test_sharding_of_the_two_does_not_matter(tmp_path: Path) -> None:
    base = llama(torch.bfloat16)
    tuned = moved(base, *LINEAR, "norm.weight")
    folders = [tmp_path / name for name in ("x", "y")]
    one = extract(*pair(folders[0], base, tuned), folders[0] / "out", Ranks(Fixed(3)))
    two = extract(*pair(folders[1], base, tuned, shards=3, after=2), folders[1] / "out", Ranks(Fixed(3)))
    assert one.digest == two.digest
    assert (one.base, one.tuned) == (two.base, two.tuned)


def test_every_problem_at_once(tmp_path: Path) -> None:
    base = llama()
    tuned = moved(base, *LINEAR)
    tuned["model.layers.0.mlp.up_proj.weight"][1, 2] = torch.nan
    tuned["model.norm.weight"] = torch.full((H,), torch.inf)
    with pytest.raises(BadFile, match="2 tensor") as caught:
        extract(*pair(tmp_path, base, tuned), tmp_path / "out", Ranks(Fixed(2)))
    assert {line.partition(":")[0] for line in caught.value.problems} == {
        "model.layers.0.mlp.up_proj",
        "model.norm.weight",
    }
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith((".", "out"))] == []


def test_quantized_weights_are_refused_by_name(tmp_path: Path) -> None:
    base = llama() | {"model.layers.0.self_attn.k_proj.weight": torch.ones(H, H, dtype=torch.int8)}
    tuned = dict(base) | {"model.layers.0.self_attn.k_proj.weight": torch.zeros(H, H, dtype=torch.int8)}
    with pytest.raises(BadFile) as caught:
        extract(*pair(tmp_path, base, tuned), tmp_path / "out", Ranks(Fixed(2)))
    assert "k_proj.weight: stored as I8: part of a quantized weight" in str(caught.value)


def test_equal_models_and_strangers_are_refused(tmp_path: Path) -> None:
    base, same = pair(tmp_path, llama(), llama())
    with pytest.raises(IncompatibleAdapter, match="does not differ"):
        extract(base, same, tmp_path / "out", Ranks(Fixed(2)))
    stranger = save_base(tmp_path / "stranger", {"x.weight": random(4, 4)})
    with pytest.raises(IncompatibleAdapter, match="no tensor in common"):
        extract(base, stranger, tmp_path / "out", Ranks(Fixed(2)))
    with pytest.raises(OutputRefused):
        extract(base, same, base, Ranks(Fixed(2)), force=True)


def test_patterns_that_match_nothing_are_all_named(tmp_path: Path) -> None:
    models = pair(tmp_path, llama(), moved(llama(), *LINEAR))
    selection = Selection(include=("q_proj", "r_proj"), save=("heads.*",))
    with pytest.raises(LoraToolsError) as caught:
        extract(*models, tmp_path / "out", Ranks(Fixed(2)), selection=selection)
    assert [line.partition(":")[0] for line in caught.value.problems] == ["--include r_proj", "--save-module heads.*"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process alone is known on Linux only")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Fourteen layers need no more than four: what is held is a few of the largest tensors."""
    peaks, numbers = {}, random(1024, 1024, dtype=torch.bfloat16)
    program = (
        "import sys; from loratools.surgery.extract import extract; from loratools.linalg.ranks.rules import Fixed;"
        "from loratools.linalg.ranks.allocate import Ranks;"
        "extract(sys.argv[1], sys.argv[2], sys.argv[3], Ranks(Fixed(8)), threads=1);"
        "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    for layers in (4, 14):
        folder = tmp_path / str(layers)
        base = {f"layers.{i}.proj.weight": numbers.roll(i, 0) for i in range(layers)}
        change = random(1024, 8, seed=1) @ random(8, 1024, seed=2)
        tuned = {name: (W.float() + change).bfloat16() for name, W in base.items()}
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, pair(folder, base, tuned)), str(folder / "out")],
            capture_output=True, text=True, check=True, env=clean_env() | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        peaks[layers] = int(done.stdout) * 1024
    assert peaks[14] - peaks[4] < 16 << 20  # ten more pairs hold 40 MB, their differences another 40 MB


def test_codes_are_subtracted_as_the_numbers_they_stand_for(tmp_path: Path) -> None:
    """A base in FP8 and a merge into it in every form: what the adapter did not change has no change."""
    fp8.save_llama(tmp_path / "codes", tiny.llama_weights())
    loratools.dequantize(tmp_path / "codes", tmp_path / "numbers")
    tiny.save_peft(tmp_path / "adapter", tiny.lora_factors())
    loratools.merge(tmp_path / "codes", tmp_path / "adapter", tmp_path / "plain")
    loratools.merge(tmp_path / "codes", tmp_path / "adapter", tmp_path / "partial", quantized="partial")
    stored = load_file(tmp_path / "codes" / "model.safetensors")
    merged = load_file(tmp_path / "plain" / "model.safetensors")
    for base in ("codes", "numbers"):
        for tuned in ("plain", "partial"):
            out = tmp_path / f"{base}-{tuned}"
            report = loratools.extract_svd(tmp_path / base, tmp_path / tuned, out, 32)
            assert sorted(each.path for each in report.of("factored")) == sorted(tiny.lora_factors())
            assert report.base == loratools.hash(tmp_path / base, "root").root
            assert report.tuned == loratools.hash(tmp_path / tuned, "root").root
            assert loratools.validate(out, tmp_path / base).differences == ()
            adapter = open_adapter(out)
            for path, update in adapter.updates.items():
                W = fp8.decoded(stored, path).double()
                W = W if base == "codes" else W.bfloat16().double()
                delta = merged[f"{path}.weight"].double() - W
                B, A = (update.parts[f"lora_{part}.weight"].load().double() for part in "BA")
                assert float((B @ A - delta).norm() / delta.norm()) < 2e-3
    assert loratools.merge(tmp_path / "numbers", tmp_path / "codes-plain", tmp_path / "again").verified == 4
