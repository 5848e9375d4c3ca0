"""find: what is the same is found in every dress, what is near has its exact cosine, and nothing else is either."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.errors import BadFile, InvalidOption
from loratools.surgery.find import find
from loratools.surgery.find.alike import NEIGHBOURS
from tests.dialects.adapters import lora
from tests.make import tiny

Tensors = dict[str, torch.Tensor]


def variant(source: Path, target: Path, change: Callable[[Tensors], Tensors] = lambda w: w, **config: Any) -> Path:
    """Write a PEFT adapter with other tensors and other fields in its config."""
    shutil.copytree(source, target)
    weights = change(load_file(source / "adapter_model.safetensors"))
    save_file({name: W.contiguous() for name, W in weights.items()}, target / "adapter_model.safetensors")
    document = json.loads((source / "adapter_config.json").read_text()) | config
    (target / "adapter_config.json").write_text(json.dumps(document))
    return target


def turned(weights: Tensors) -> Tensors:
    """Return the same products with factors in another basis."""
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in weights if "lora_A" in name]:
        A, B = weights[name].double(), weights[name.replace("lora_A", "lora_B")].double()
        M = torch.randn(len(A), len(A), dtype=torch.float64, generator=generator) + 3 * torch.eye(len(A))
        weights[name.replace("lora_A", "lora_B")] = (B @ torch.linalg.inv(M)).float()
        weights[name] = (M @ A).float()
    return weights


def disturbed(amount: float, seed: int = 2) -> Callable[[Tensors], Tensors]:
    generator = torch.Generator().manual_seed(seed)

    def change(weights: Tensors) -> Tensors:
        return {n: W + amount * W.std() * torch.randn(W.shape, generator=generator) for n, W in weights.items()}

    return change


def only(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda weights: {name: change(W) if part in name else W for name, W in weights.items()}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return tiny.save_peft(tmp_path / "source", tiny.lora_factors())


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    (tmp_path / "zoo").mkdir()
    return tmp_path / "zoo"


def test_one_change_in_every_dress_is_one_group(adapter: Path, zoo: Path, prepared: Path) -> None:
    shutil.copytree(adapter, zoo / "plain")
    variant(adapter, zoo / "bf16", lambda weights: {name: W.bfloat16() for name, W in weights.items()})
    variant(adapter, zoo / "f16", lambda weights: {name: W.half() for name, W in weights.items()})
    variant(adapter, zoo / "turned", turned)
    variant(adapter, zoo / "folded", only("lora_B", lambda B: 2 * B), lora_alpha=4)
    shutil.copytree(prepared / "base", zoo / "base")
    opened = loratools.open_adapter(adapter)
    loratools.convert(adapter, zoo / "sealed", base=zoo / "base")
    for dialect in ("kohya", "mlx", "diffusers"):
        loratools.save_adapter(opened, zoo / f"in-{dialect}", dialect=dialect, allow_loss=True)
    loratools.save_adapter(opened, zoo / "lone.safetensors", dialect="kohya", allow_loss=True)
    found = find(zoo)
    (group,) = found.duplicates
    assert sorted(group.paths) == sorted(each.path for each in found.adapters)
    assert len(group.paths) == 10
    assert (found.near, found.failed, found.others, found.unlisted) == ((), (), 1, 0)
    distances = dict(zip(group.paths, group.distances, strict=True))
    assert 1e-4 < distances["bf16"] < 4e-3
    exactly = [off for path, off in distances.items() if path not in ("bf16", "f16")]
    assert max(exactly) < 1e-6
    assert group.norm == pytest.approx(loratools.spectrum(adapter).norm)
    digests = {each.path: each.digest for each in found.adapters}
    assert digests["sealed"] == digests["plain"] == digests["lone.safetensors"] == loratools.hash(adapter).root
    assert all(row["group"] == 1 and row["ranks"] == (4, 4) for row in found.rows())


def test_near_ones_have_the_cosine_that_compare_computes(adapter: Path, zoo: Path) -> None:
    shutil.copytree(adapter, zoo / "a")
    variant(adapter, zoo / "half", lora_alpha=4)
    variant(adapter, zoo / "near", disturbed(0.15))
    variant(adapter, zoo / "far", disturbed(30))
    found = find(zoo, similar=0.9)
    assert found.duplicates == ()
    assert [(pair.first, pair.second) for pair in found.near] == [("a", "half"), ("a", "near"), ("half", "near")]
    for pair in found.near:
        compared = loratools.compare(zoo / pair.first, zoo / pair.second)
        assert pair.cosine == pytest.approx(compared.cosine, abs=1e-12)
        assert pair.ratio == pytest.approx(compared.norms[1] / compared.norms[0], rel=1e-12)
    assert found.near[0].ratio == pytest.approx(0.5)
    assert find(zoo, similar=0.999).near == found.near[:1]


def test_a_small_difference_is_no_rounding(adapter: Path, zoo: Path) -> None:
    shutil.copytree(adapter, zoo / "a")
    variant(adapter, zoo / "b", disturbed(1e-3))
    variant(adapter, zoo / "c", lambda weights: {name: W.bfloat16() for name, W in disturbed(0.02)(weights).items()})
    found = find(zoo)
    assert found.duplicates == ()
    assert found.near[0].cosine == pytest.approx(1, abs=1e-5)
    assert len(found.near) == 3


def test_changes_of_nothing_are_the_same_only_where_they_change_the_same_modules(adapter: Path, zoo: Path) -> None:
    variant(adapter, zoo / "a", only("lora_B", torch.zeros_like))
    variant(zoo / "a", zoo / "b", only("lora_A", lambda A: A + 1))
    small = tiny.save_peft(zoo.parent / "small", tiny.lora_factors(tiny.SHAPES, rank=2, seed=4))
    variant(small, zoo / "other", only("lora_B", torch.zeros_like))
    found = find(zoo)
    assert [(group.paths, group.norm) for group in found.duplicates] == [(("a", "b"), 0.0)]
    assert found.near == ()


def test_what_depends_on_the_base_is_compared_by_its_parameters(prepared: Path, zoo: Path) -> None:
    pytest.importorskip("peft")
    dora = zoo / "dora"
    weights = load_file(prepared / "adapter" / "adapter_model.safetensors")
    weights |= {
        name.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(len(weights[name.replace("_A", "_B")]))
        for name in list(weights)
        if "lora_A" in name
    }
    variant(prepared / "adapter", dora, lambda _: dict(weights), use_dora=True)
    loratools.save_adapter(dora, zoo / "sealed")
    variant(dora, zoo / "scaled", lora_alpha=3)
    variant(dora, zoo / "longer", only("magnitude", lambda m: 2 * m))
    found = find(zoo)
    assert [(group.paths, group.by_parameters, group.norm) for group in found.duplicates] == [
        (("dora", "sealed"), True, None)
    ]
    assert found.near == ()
    assert all("depend on the base" in adapter.by_parameters for adapter in found.adapters)


def test_a_base_selects_by_name_hash_and_shape(workplace: Path) -> None:
    names = {each.path for each in find(workplace).adapters}
    assert names == {"adapter", "blend", "other", "sealed"}
    assert {each.path for each in find(workplace, base=workplace / "base").adapters} == names
    shorter = {name: (A, B[:-1]) for name, (A, B) in tiny.lora_factors(seed=5).items()}
    tiny.save_peft(workplace / "elsewhere", shorter)
    found = find(workplace, base=loratools.Checkpoint.open(workplace / "base"))
    assert ({each.path for each in found.adapters}, found.unselected) == (names, 1)
    assert {each.path for each in find(workplace, base="org/tiny-llama").adapters} >= {"sealed"}
    assert find(workplace, base="org/quite-another").adapters == ()


def test_a_name_selects_what_was_sealed_with_the_same_base_under_another_name(
    adapter: Path, zoo: Path, prepared: Path, tmp_path: Path
) -> None:
    shutil.copytree(prepared / "base", tmp_path / "base")
    changed = shutil.copytree(prepared / "base", tmp_path / "changed")
    for path in changed.glob("*.safetensors"):
        save_file({name: W + 1 for name, W in load_file(path).items()}, path)
    for name, base_name, base in (
        ("named", "org/tiny", "base"), ("renamed", "org/alias", "base"), ("another", "org/else", "changed"),
    ):  # fmt: skip
        source = variant(adapter, tmp_path / name, base_model_name_or_path=base_name)
        loratools.convert(source, zoo / name, base=tmp_path / base)
    variant(adapter, zoo / "unsealed", base_model_name_or_path="org/alias")
    found = find(zoo, base="org/tiny")
    assert [each.path for each in found.adapters] == ["named", "renamed"]
    assert [each.base for each in found.adapters] == ["org/tiny", "org/alias"]
    assert (found.unselected, found.failed) == (2, ())
    shutil.rmtree(zoo / "named")
    assert find(zoo, base="org/tiny").adapters == ()


def test_what_cannot_be_read_is_told_and_the_others_are_found(
    adapter: Path, zoo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(adapter, zoo / "good")
    shutil.copytree(adapter, zoo / "cut")
    file = zoo / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    (zoo / "notes.txt").write_text("nothing")
    found = find(zoo)
    assert [each.path for each in found.adapters] == ["good"]
    assert [(each.path, "cut" in each.reason) for each in found.failed] == [("cut", True)]
    assert "cut" in caplog.text
    with pytest.raises(BadFile, match="no such folder"):
        find(zoo / "nowhere")
    with pytest.raises(InvalidOption, match="similar"):
        find(zoo, similar=0)


def test_of_many_alike_each_is_measured_against_few(adapter: Path, zoo: Path) -> None:
    count = 3 * NEIGHBOURS
    for i in range(count):
        variant(adapter, zoo / f"{i:02d}", disturbed(0.05, i))
    found = find(zoo)
    assert found.duplicates == ()
    assert count * NEIGHBOURS / 2 <= len(found.near) <= count * NEIGHBOURS
    assert len(found.near) + found.unlisted == count * (count - 1) // 2


def test_names_of_image_models_are_one_name(tmp_path: Path) -> None:
    """The same FLUX adapter under diffusers' names and the original's, whose qkv are fused."""
    from tests.dialects.test_comfy import flux_original

    original = loratools.Adapter(flux_original())
    loratools.save_adapter(original, tmp_path / "comfy.safetensors", dialect="comfy", allow_loss=True)
    loratools.save_adapter(original, tmp_path / "diffusers.safetensors", dialect="diffusers", allow_loss=True)
    loratools.save_adapter(original, tmp_path / "kohya.safetensors", dialect="kohya", allow_loss=True)
    (group,) = find(tmp_path).duplicates
    assert len(group.paths) == 3
    assert max(group.distances) < 1e-6


def test_wrappers_do_not_matter(tmp_path: Path) -> None:
    names = ("model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj")
    for i, name in enumerate(names):
        loratools.save_adapter(loratools.Adapter({name: lora(1)}), tmp_path / f"{i}")
    (group,) = find(tmp_path).duplicates
    assert group.paths == ("0", "1")


def test_a_row_for_each_adapter_makes_a_frame(prepared: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(find(prepared).rows())
    assert list(frame["path"]) == ["adapter", "blend", "other", "sealed"]
    assert list(frame["group"].fillna(0)) == [1, 0, 0, 1]


def test_changes_whose_squares_overflow_are_found(adapter: Path, zoo: Path) -> None:
    variant(adapter, zoo / "small")
    variant(adapter, zoo / "large", lambda weights: {name: 1e10 * W for name, W in weights.items()})
    variant(zoo / "large", zoo / "turned", turned)
    found = find(zoo)
    assert [group.paths for group in found.duplicates] == [("large", "turned")]
    assert [(near.first, near.second) for near in found.near] == [("large", "small")]
    assert found.near[0].cosine == pytest.approx(1, abs=1e-6)


def test_numbers_that_are_none_are_told(adapter: Path, zoo: Path) -> None:
    variant(adapter, zoo / "plain")
    variant(adapter, zoo / "nan", only("lora_B", lambda W: W * torch.nan))
    variant(zoo / "nan", zoo / "nan-again")
    found = find(zoo)
    assert [(group.paths, group.by_parameters) for group in found.duplicates] == [(("nan", "nan-again"), True)]
    assert [adapter.by_parameters for adapter in found.adapters] == [
        *["its change has NaN, infinity, or numbers that are too large for float32"] * 2, ""
    ]  # fmt: skip


def test_a_scaling_that_a_manifest_has_no_number_for_is_one_like_others(adapter: Path, zoo: Path) -> None:
    variant(adapter, zoo / "one", lora_alpha=2**60)
    variant(adapter, zoo / "two", lora_alpha=2**60)
    variant(adapter, zoo / "three", lora_alpha=2**61)
    assert [group.paths for group in find(zoo).duplicates] == [("one", "two")]
