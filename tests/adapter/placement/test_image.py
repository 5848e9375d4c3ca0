"""Adapters of image models on the command line: names that only the base explains, layouts of bases, wrong bases."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools import dialects
from loratools.adapter import kinds
from loratools.adapter.model import Adapter, BaseIdentity
from loratools.adapter.naming.image import families
from loratools.adapter.placement import image
from loratools.adapter.placement.image import named_for
from loratools.cli import _run
from loratools.dialects.kohya.names import dotted
from loratools.errors import IncompatibleAdapter
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.lazy import LazyTensor
from tests.dialects.adapters import lora
from tests.dialects.test_comfy import product
from tests.surgery.models import save_base

Run = Callable[..., str]
LAYER = "text_model.encoder.layers.0"
Q, K, V, OUT = (f"{LAYER}.self_attn.{name}_proj" for name in ("q", "k", "v", "out"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return `run(*arguments, code=0)`: a command line in this process; it returns all that was printed."""

    def run(*arguments: object, code: int = 0) -> str:
        found = _run.run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert found == code, printed.out + printed.err
        return printed.out + printed.err

    return run


def saved(modules: Mapping[str, tuple[int, ...]], path: Path) -> Path:
    """Write a model with random weights of these shapes."""
    generator = torch.Generator().manual_seed(5)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{m}.weight": torch.randn(shape, generator=generator) for m, shape in modules.items()}, path)
    return path


def pipeline(folder: Path, **parts: Mapping[str, tuple[int, ...]]) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({name: ["diffusers", "X"] for name in parts}))
    for name, modules in parts.items():
        saved(modules, folder / name / "model.safetensors")
    return folder


def change(base: Path, merged: Path) -> dict[str, torch.Tensor]:
    """Return the difference of every tensor that a merge changed."""
    before, after = Checkpoint.open(base), Checkpoint.open(merged)
    assert before.specs.keys() == after.specs.keys()
    found = {name: after.read(name).double() - before.read(name).double() for name in before.specs}
    return {name: delta for name, delta in found.items() if delta.any()}


def close(found: torch.Tensor, update: kinds.Update) -> None:
    torch.testing.assert_close(found, update.delta_weight().double(), rtol=0, atol=2e-6)


def test_names_that_only_the_base_explains(run: Run, tmp_path: Path) -> None:
    """`new_block.to_q` is of no known architecture, and its flattened name could be split anywhere."""
    module = "stages.0.new_block.to_q"
    base = saved({module: (12, 10), "stages.0.other": (12, 10)}, tmp_path / "base" / "model.safetensors").parent
    update = lora(1)
    tensors = {part: lazy.load() for part, lazy in update.parts.items()}
    flat = {
        "lora_unet_stages_0_new_block_to_q.lora_down.weight": tensors["lora_A.weight"],
        "lora_unet_stages_0_new_block_to_q.lora_up.weight": tensors["lora_B.weight"],
        "lora_unet_stages_0_new_block_to_q.alpha": torch.tensor(update.alpha),
    }
    save_file(flat, tmp_path / "a.safetensors")
    assert "of no known family" in run("inspect", tmp_path / "a.safetensors", code=1)
    out = tmp_path / "merged"
    run("merge", base, tmp_path / "a.safetensors", "-o", out, "--keep-residual")
    found = change(base, out)
    assert list(found) == [f"{module}.weight"]
    close(found[f"{module}.weight"], update)
    run("verify", out, "--base", base, "--adapter", tmp_path / "a.safetensors", "--exact")
    run("unmerge", out, tmp_path / "a.safetensors", "-o", tmp_path / "back")
    assert not change(base, tmp_path / "back")
    sealed = tmp_path / "sealed"
    run("convert", tmp_path / "a.safetensors", "-o", sealed, "--base", base)
    run("validate", sealed, "--base", base)
    assert list(dialects.open_adapter(sealed).updates) == [module]
    run("switch", out, "--take", tmp_path / "a.safetensors", "--put", sealed, "-o", tmp_path / "switched")
    assert (load_file(tmp_path / "switched" / "model.safetensors")[f"{module}.weight"]).equal(
        load_file(out / "model.safetensors")[f"{module}.weight"]
    )


def encoder(width: int = 8) -> dict[str, tuple[int, ...]]:
    return {Q: (width, width), K: (width, width), V: (width, width), OUT: (width, width)}


def open_clip(width: int = 8) -> dict[str, torch.Tensor]:
    root = "conditioner.embedders.1.model."
    layer = f"{root}transformer.resblocks.0.attn"
    return {
        f"{layer}.in_proj_weight": torch.randn(3 * width, width),
        f"{layer}.out_proj.weight": torch.randn(width, width),
        f"{root}text_projection": torch.randn(width, width),
    }


def test_the_second_encoder_of_one_file_has_q_k_and_v_in_one(run: Run, tmp_path: Path) -> None:
    save_file(open_clip(), tmp_path / "base.safetensors")
    modules = {f"text_encoder_2.{Q}": product(8, 8, 1), f"text_encoder_2.{V}": product(8, 8, 2, 3, 0.7)}
    modules |= {f"text_encoder_2.{OUT}": product(8, 8, 3)}
    dialects.save_adapter(Adapter(modules), tmp_path / "a.safetensors", dialect="kohya")
    run("merge", tmp_path / "base.safetensors", tmp_path / "a.safetensors", "-o", tmp_path / "merged")
    run("verify", tmp_path / "merged", "--base", tmp_path / "base.safetensors", "--adapter", tmp_path / "a.safetensors")
    found = change(tmp_path / "base.safetensors", tmp_path / "merged" / "base.safetensors")
    layer = "conditioner.embedders.1.model.transformer.resblocks.0.attn"
    assert found.keys() == {f"{layer}.in_proj_weight", f"{layer}.out_proj.weight"}
    q, k, v = found[f"{layer}.in_proj_weight"].chunk(3)
    close(q, modules[f"text_encoder_2.{Q}"])
    close(v, modules[f"text_encoder_2.{V}"])
    assert not k.any()
    close(found[f"{layer}.out_proj.weight"], modules[f"text_encoder_2.{OUT}"])


def test_a_square_projection_that_the_file_keeps_transposed_is_refused(run: Run, tmp_path: Path) -> None:
    save_file(open_clip(), tmp_path / "base.safetensors")
    adapter = Adapter({"text_encoder_2.text_projection": product(8, 8, 1)})
    dialects.save_adapter(adapter, tmp_path / "a.safetensors", dialect="diffusers")
    said = run("merge", tmp_path / "base.safetensors", tmp_path / "a.safetensors", "-o", tmp_path / "m", code=1)
    assert "text_encoder_2.text_projection: not in the base" in said


@pytest.mark.parametrize("stored", [LAYER, LAYER.removeprefix("text_model.")])
@pytest.mark.parametrize("trained", [LAYER, LAYER.removeprefix("text_model.")])
@pytest.mark.parametrize("layout", ["pipeline", "component", "file"])
def test_the_level_that_transformers_5_took_out_of_clip(
    run: Run, tmp_path: Path, stored: str, trained: str, layout: str
) -> None:
    shapes = {f"{stored}.mlp.fc1": (16, 8)}
    roots = {"pipeline": "text_encoder.", "component": "", "file": "cond_stage_model.transformer."}
    base = tmp_path / "base"
    if layout == "pipeline":
        pipeline(base, text_encoder=shapes)
    else:
        saved({roots[layout] + module: shape for module, shape in shapes.items()}, base / "model.safetensors")
    update = product(16, 8, 1)
    for dialect in ("diffusers", "kohya", "comfy"):
        path = tmp_path / f"{dialect}.safetensors"
        dialects.save_adapter(Adapter({f"text_encoder.{trained}.mlp.fc1": update}), path, dialect=dialect)
        if dialect != "diffusers":  # whose readers know no other
            assert all("text_model" in name for name in load_file(path))
        run("merge", base, path, "-o", tmp_path / f"{dialect}-merged")
        found = change(base, tmp_path / f"{dialect}-merged")
        assert list(found) == [f"{roots[layout]}{stored}.mlp.fc1.weight"]
        close(found[f"{roots[layout]}{stored}.mlp.fc1.weight"], update)


def test_modules_of_another_model_are_refused_by_name(run: Run, tmp_path: Path) -> None:
    to_q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    base = pipeline(tmp_path / "base", unet={to_q: (8, 8)}, text_encoder=encoder())
    modules = {f"unet.{to_q}": product(8, 8, 1), f"text_encoder_2.{Q}": product(8, 8, 2)}
    for dialect in ("kohya", "diffusers", "comfy"):
        path = tmp_path / f"{dialect}.safetensors"
        dialects.save_adapter(Adapter(modules), path, dialect=dialect)
        said = run("merge", base, path, "-o", tmp_path / "merged", code=1)
        assert "the adapter does not fit this base model: 1 problem" in said
        assert f"text_encoder_2.{Q}: not in the base" in said  # and not put on text_encoder, which it fits
        said = run("merge", base / "unet", path, "-o", tmp_path / "merged", code=1)
        assert f"text_encoder_2.{Q}: not in the base" in said
        assert "to_q: not" not in said
        said = run("convert", path, "-o", tmp_path / "sealed", "--base", base / "unet", code=1)
        assert f"text_encoder_2.{Q}: not in the base" in said
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_image_model_is_called_so(run: Run, tmp_path: Path) -> None:
    """Two UNets share many names: whose each is, is said first, and three modules of the rest."""
    names = {name: families.get(name).renames for name in ("sd", "sdxl")}
    words = {"sd": "Stable Diffusion 1 and 2", "sdxl": "SDXL"}
    for name, other in (("sd", "sdxl"), ("sdxl", "sd")):
        original, theirs = ({key.replace("{}", "0"): (8, 8) for key in names[name]}, names[other])
        saved({f"model.diffusion_model.{key}": shape for key, shape in original.items()},
              tmp_path / name / "model.safetensors")  # fmt: skip
        pipeline(tmp_path / f"{name}-folder", unet={value.replace("{}", "0"): (8, 8) for value in names[name].values()})
        own = {value.replace("{}", "0") for value in theirs.values()} - {
            value.replace("{}", "0") for value in names[name].values()
        }
        assert len(own) > 4
        modules = {f"unet.{module}": product(8, 8, 1) for module in sorted(theirs[key].replace("{}", "0")
                                                                           for key in theirs)}  # fmt: skip
        path = tmp_path / f"{other}.safetensors"
        dialects.save_adapter(Adapter(modules), path, dialect="kohya", force=True)
        for base in (tmp_path / name / "model.safetensors", tmp_path / f"{name}-folder"):
            for command in (["merge", base, path, "-o"], ["convert", path, "--base", base, "-o"]):
                said = run(*command, tmp_path / "out", code=1).splitlines()
                said = [line for line in said if line.startswith(("error:", " "))]
                assert said[1] == f"  this is an adapter of {words[other]}, and the base model is {words[name]}"
                assert len(said) == 6
                assert said[-1].startswith("  and ")
    assert not (tmp_path / "out").exists()


def test_two_encoders_do_not_share_one_folder(run: Run, tmp_path: Path) -> None:
    base = saved(encoder(), tmp_path / "base" / "model.safetensors").parent
    modules = {f"text_encoder{n}.{Q}": product(8, 8, 1) for n in ("", "_2")}
    dialects.save_adapter(Adapter(modules), tmp_path / "a.safetensors", dialect="kohya")
    assert "not in the base" in run("merge", base, tmp_path / "a.safetensors", "-o", tmp_path / "m", code=1)


def test_names_without_a_component_find_the_pipelines(run: Run, tmp_path: Path) -> None:
    """As `save_lora_adapter` of diffusers and PEFT write them; kohya's reader is told the component."""
    to_q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    base = pipeline(tmp_path / "base", unet={to_q: (8, 8), "conv_in": (8, 4, 3, 3)})
    update = product(8, 8, 1)
    bare = Adapter({to_q: update}, dialect="diffusers")
    dialects.save_adapter(bare, tmp_path / "bare.safetensors", dialect="diffusers")
    assert f"{to_q}.lora_A.weight" in load_file(tmp_path / "bare.safetensors")
    run("merge", base, tmp_path / "bare.safetensors", "-o", tmp_path / "merged")
    close(change(base, tmp_path / "merged")[f"unet.{to_q}.weight"], update)
    run("convert", tmp_path / "bare.safetensors", "-o", tmp_path / "k.safetensors", "--to", "kohya")
    assert f"lora_unet_{to_q.replace('.', '_')}.lora_down.weight" in load_file(tmp_path / "k.safetensors")
    run("convert", tmp_path / "k.safetensors", "-o", tmp_path / "d.safetensors", "--to", "diffusers", "--base", base)
    assert f"unet.{to_q}.lora_A.weight" in load_file(tmp_path / "d.safetensors")
    other = ("-o", tmp_path / "e.safetensors", "--to", "diffusers", "--base", base / "unet")
    run("convert", tmp_path / "k.safetensors", *other)  # the base's own names have no component
    assert load_file(tmp_path / "e.safetensors").keys() == load_file(tmp_path / "d.safetensors").keys()


def test_sdxls_first_upsampler_is_told_by_the_base() -> None:
    """By the adapter's own modules it could be Stable Diffusion's, where the number differs."""
    parts = {"lora_A.weight": torch.randn(2, 8, 3, 3), "lora_B.weight": torch.randn(8, 2, 1, 1)}
    conv = kinds.get("conv").build({part: LazyTensor.of(tensor) for part, tensor in parts.items()}, 1.0, 2.0)
    adapter = Adapter({"unet.up_blocks.0.upsamplers.0.conv": conv})
    root = "model.diffusion_model.output_blocks"
    for number, other in ((2, {f"{root}.0.1.norm.weight": (8,)}), (1, {f"{root}.0.0.in_layers.0.weight": (8,)})):
        shapes = {f"{root}.2.{number}.conv.weight": (8, 8, 3, 3), **other}
        assert list(image.for_base(adapter, shapes).updates) == [f"{root}.2.{number}.conv"]


def test_an_encoders_prefix_stands_for_no_other_encoder() -> None:
    base = [f"text_encoder.{Q}.weight", "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.weight"]
    flat = Q.replace(".", "_")
    t5 = "encoder_block_0_layer_0_SelfAttention_q"
    found, faults = dotted([("lora_te1_", flat), ("lora_te2_", flat), ("lora_te3_", t5)], {}, base)
    assert not faults
    assert found["lora_te1_", flat] == f"text_encoder.{Q}"
    assert found["lora_te2_", flat] == f"text_encoder_2.{Q}"
    assert found["lora_te3_", t5] == "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"


def loha(out: int, width: int, seed: int, scaling: float = 1.5) -> kinds.Update:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hada_w1_a": (out, 2), "hada_w1_b": (2, width), "hada_w2_a": (out, 2), "hada_w2_b": (2, width)}
    parts = {name: LazyTensor.of(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    built: kinds.Update = kinds.get("loha").build(parts, scaling, 2 * scaling)
    return built


def lokr(out: int, width: int, seed: int) -> kinds.Update:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"lokr_w1": (out // 4, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, width // 2)}
    parts = {name: LazyTensor.of(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    built: kinds.Update = kinds.get("lokr").build(parts, 0.7, 0.7)
    return built


QKV, LINEAR1 = "double_blocks.3.img_attn.qkv", "single_blocks.7.linear1"
LAST = "final_layer.adaLN_modulation.1"
TO, ONE = "transformer_blocks.3.attn.to_", "single_transformer_blocks.7."


def test_lycoris_on_fused_projections_merges_where_they_are_apart(run: Run, tmp_path: Path) -> None:
    modules = {f"diffusion_model.{QKV}": lokr(24, 8, 1), f"diffusion_model.{LINEAR1}": loha(56, 8, 2)}
    modules |= {f"diffusion_model.{LAST}": loha(16, 8, 3)}
    apart = {f"{TO}{name}": (8, 8) for name in "qkv"} | {f"{ONE}attn.to_{name}": (8, 8) for name in "qkv"}
    base = pipeline(tmp_path / "base", transformer={**apart, f"{ONE}proj_mlp": (32, 8), "norm_out.linear": (16, 8)})
    wanted = {module: update.delta_weight().double() for module, update in modules.items()}
    for dialect in ("kohya", "comfy"):
        path, out = tmp_path / f"{dialect}.safetensors", tmp_path / f"{dialect}-merged"
        dialects.save_adapter(Adapter(modules), path, dialect=dialect)
        run("merge", base, path, "-o", out, "--keep-residual")
        found = {name.removeprefix("transformer.").removesuffix(".weight"): d for name, d in change(base, out).items()}
        q, k, v = (found[f"{TO}{name}"] for name in "qkv")
        torch.testing.assert_close(torch.cat([q, k, v]), wanted[f"diffusion_model.{QKV}"], rtol=0, atol=2e-6)
        parts = [*(f"{ONE}attn.to_{name}" for name in "qkv"), f"{ONE}proj_mlp"]
        one = torch.cat([found[part] for part in parts])
        torch.testing.assert_close(one, wanted[f"diffusion_model.{LINEAR1}"], rtol=0, atol=1e-5)
        shift, scale = wanted[f"diffusion_model.{LAST}"].chunk(2)
        torch.testing.assert_close(found["norm_out.linear"], torch.cat([scale, shift]), rtol=0, atol=1e-5)
        run("verify", out, "--base", base, "--adapter", path, "--exact")
        run("unmerge", out, path, "-o", tmp_path / f"{dialect}-back")
        assert not change(base, tmp_path / f"{dialect}-back")
        said = run("convert", path, "-o", tmp_path / "d", "--to", "diffusers", code=1)
        assert "diffusers has no updates of kind lokr" in said


def test_lycoris_on_single_projections_merges_where_they_are_fused(run: Run, tmp_path: Path) -> None:
    modules = {f"transformer.{TO}q": lokr(8, 8, 1), f"transformer.{TO}v": loha(8, 8, 2, 0.4)}
    modules |= {f"transformer.{ONE}proj_mlp": lokr(32, 8, 3), f"text_encoder_2.{K}": loha(8, 8, 4)}
    save_file(open_clip() | {f"{QKV}.weight": torch.randn(24, 8), f"{LINEAR1}.weight": torch.randn(56, 8),
              "double_blocks.0.img_mod.lin.weight": torch.randn(48, 8)}, tmp_path / "base.safetensors")  # fmt: skip
    names = {f"lycoris_{module.removeprefix('transformer.').replace('.', '_')}" if "transformer." in module
             else f"lora_te2_{K.replace('.', '_')}": update for module, update in modules.items()}  # fmt: skip
    tensors = {f"{name}.{part}": lazy.load() for name, update in names.items() for part, lazy in update.parts.items()}
    tensors |= {f"{name}.alpha": torch.tensor(update.alpha) for name, update in names.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    run("merge", tmp_path / "base.safetensors", tmp_path / "a.safetensors", "-o", tmp_path / "merged")
    found = change(tmp_path / "base.safetensors", tmp_path / "merged" / "base.safetensors")
    in_proj = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    assert found.keys() == {f"{QKV}.weight", f"{LINEAR1}.weight", in_proj}
    zero = torch.zeros(8, 8, dtype=torch.float64)
    q, v, mlp, k = (update.delta_weight().double() for update in modules.values())
    for name, blocks in (
        (f"{QKV}.weight", [q, zero, v]), (f"{LINEAR1}.weight", [zero, zero, zero, mlp]), (in_proj, [zero, k, zero]),
    ):  # fmt: skip
        torch.testing.assert_close(found[name], torch.cat(blocks), rtol=0, atol=1e-5)
    run("verify", tmp_path / "merged", "--base", tmp_path / "base.safetensors", "--adapter", tmp_path / "a.safetensors")


def test_language_models_are_left_alone(tmp_path: Path) -> None:
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(12, 10)}, tmp_path / "model.safetensors")
    base = Checkpoint.open(tmp_path)
    adapter = Adapter({"model.layers.0.self_attn.q_proj": lora(1)}, base=BaseIdentity("x"))
    assert named_for(adapter, base) is adapter
    strange = Adapter({"model.layers.9.self_attn.q_proj": lora(1)})
    assert named_for(strange, base).updates == strange.updates


LAYERS = {f"layers.{layer}.{name}": (8, 8) for layer in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")}


@pytest.mark.parametrize("root", ["model.", "", "model.language_model."])
@pytest.mark.parametrize(
    "prefix", ["", "model.", "lora_te_", "text_encoders.qwen3_06b.transformer.model.", "text_encoders.t5.transformer."]
)
def test_language_models_are_found_by_every_naming(run: Run, tmp_path: Path, prefix: str, root: str) -> None:
    """A text encoder that is a language model, in a folder of its own; and bare names are no image model's."""
    base = tmp_path / "base"
    base.mkdir()
    save_file({f"{root}{name}.weight": torch.zeros(shape) for name, shape in LAYERS.items()},
              base / "model.safetensors", {"format": "pt"})  # fmt: skip
    tensors, wanted = {}, {}
    for seed, name in enumerate(LAYERS):
        generator, flat = torch.Generator().manual_seed(seed), prefix.endswith("_")
        A, B = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
        module = prefix + (name.replace(".", "_") if flat else name)
        ends = ("down", "up") if flat else ("A", "B")
        tensors |= {f"{module}.lora_{end}.weight": factor for end, factor in zip(ends, (A, B), strict=True)}
        wanted[f"{root}{name}.weight"] = B @ A
    save_file(tensors, tmp_path / "adapter.safetensors")
    run("merge", base, tmp_path / "adapter.safetensors", "-o", tmp_path / "merged")
    found = change(base, tmp_path / "merged")
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        torch.testing.assert_close(found[name].float(), delta, rtol=1e-5, atol=1e-5)


def of_shape(rows: int, columns: int) -> kinds.Update:
    """Return an update of a weight of this shape."""
    A, B = torch.ones(2, columns), torch.ones(rows, 2)
    built: kinds.Update = kinds.get("lora").build(
        {"lora_A.weight": LazyTensor.of(A), "lora_B.weight": LazyTensor.of(B)}, 1.0, 2.0
    )
    return built


@pytest.mark.parametrize("shards", [1, 2])
def test_rows_that_lie_by_heads_in_shards_are_refused(tmp_path: Path, shards: int) -> None:
    """MiniMax-H3's own shards have q, k and v of each head in turn, single files all q, all k, all v."""
    qkv, width = "blocks.0.attn.qkv_proj", 8
    marks = [name for name in families.get("minimax_h3").renames if "{}" not in name]
    tensors = {f"{name}.weight": torch.ones(width, width) for name in (*marks, "blocks.0.attn.out_proj")}
    tensors[f"{qkv}.weight"] = torch.zeros(3 * 128, width)
    save_base(tmp_path / "base", tensors, shards=shards)
    base = Checkpoint.open(tmp_path / "base")
    fused = Adapter({qkv: of_shape(3 * 128, width)})
    assert set(named_for(Adapter({"blocks.0.attn.out_proj": of_shape(width, width)}), base).updates)
    if shards == 1:
        assert set(named_for(fused, base).updates) == {qkv}
    else:
        with pytest.raises(IncompatibleAdapter, match="of each head in turn in shards of MiniMax-H3"):
            named_for(fused, base)
