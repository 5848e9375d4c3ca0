"""Converting: what the base tells, and what is recorded where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools import dialects
from loratools.adapter.model import Adapter, BaseIdentity
from loratools.errors import IncompatibleAdapter, LossyConversion, WrongBase
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.base import agree
from loratools.surgery.convert import convert
from loratools.surgery.merge import merge
from loratools.surgery.validate import validate
from tests.adapter.kinds.reference import build
from tests.conftest import Result
from tests.dialects.adapters import lora


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("to", ["peft", "mlx", "kohya", "gguf", "diffusers"])
def test_a_base_tells_names_and_heads_without_sealing_what_cannot_be_sealed(
    prepared: Path, tmp_path: Path, to: str
) -> None:
    base = Checkpoint.open(prepared / "base")
    found = convert(prepared / "adapter", tmp_path / "x", to=to, base=base)
    assert (found.losses, found.dialect) == ((), to)
    again = dialects.open_adapter(tmp_path / "x", base=base)
    assert again.dialect == to
    merge(base, [dialects.open_adapter(prepared / "adapter")], tmp_path / "one")
    merge(base, [again], tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)  # s = 2, and all is moved by powers of two


@pytest.mark.parametrize("to", ["peft", "mlx", "kohya", "gguf", "diffusers", "loratools"])
def test_the_digest_of_what_was_written_is_the_one_that_hash_has(prepared: Path, tmp_path: Path, to: str) -> None:
    from loratools.format.digest import adapter_digest

    base = Checkpoint.open(prepared / "base")
    found = convert(prepared / "adapter", tmp_path / "x", to=to, base=base)
    assert found.output_digest == adapter_digest(dialects.open_adapter(tmp_path / "x", base=base))


def test_both_digests_are_told_where_a_dialect_has_other_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from loratools.cli._run import run
    from loratools.format.digest import adapter_digest

    name = "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn1.to_q"  # of SDXL
    path, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    dialects.save_adapter(Adapter({name: lora(1)}), path, dialect="kohya")
    assert run(["convert", str(path), "--to", "diffusers", "-o", str(output)]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    read, written = (adapter_digest(dialects.open_adapter(each)) for each in (path, output))
    assert (said["digest"], said["read"]) == (written, read)
    assert written != read


def test_a_sealed_adapter_remembers_what_gguf_needs(prepared: Path, tmp_path: Path) -> None:
    convert(prepared / "adapter", tmp_path / "sealed", base=prepared / "base")
    with pytest.raises(LossyConversion) as refusal:
        convert(tmp_path / "sealed", tmp_path / "a.gguf", to="gguf")
    assert [line.partition(":")[0] for line in refusal.value.problems] == ["base model", "provenance"]
    assert convert(tmp_path / "sealed", tmp_path / "a.gguf", to="gguf", allow_loss=True).modules == 4


def test_the_adapter_must_fit_the_base(prepared: Path, tmp_path: Path) -> None:
    from tests.make import tiny

    small = tiny.save_llama(tmp_path / "small", {n: t[:8] for n, t in tiny.llama_weights(1).items()})
    with pytest.raises(IncompatibleAdapter):
        convert(prepared / "adapter", tmp_path / "a.gguf", to="gguf", base=small)
    assert not (tmp_path / "a.gguf").exists()


def test_profiles_and_alpha_on_the_command_line(workplace: Path, shell: Callable[..., Result]) -> None:
    done = shell("loratools convert adapter -o x --to peft --profile serving --base base --json", workplace)
    assert done.code == 0, done.err
    config: dict[str, Any] = json.loads((workplace / "x" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["rank_pattern"]) == (["q_proj", "v_proj"], {})
    done = shell("loratools convert adapter -o x --to mlx --profile serving", workplace)
    assert (done.code, "--profile is for --to peft" in done.err) == (2, True)
    torch.save({"a.b.lora_A": torch.ones(2, 3), "a.b.lora_B": torch.ones(4, 2)}, workplace / "l.pt")
    done = shell("loratools convert l.pt -o y", workplace)
    assert (done.code, "--alpha" in done.err) == (1, True)
    done = shell("loratools convert l.pt -o y --alpha 6", workplace)
    assert done.code == 0, done.err
    assert dialects.open_adapter(workplace / "y").updates["a.b"].scaling == 3.0
    done = shell("loratools dialects --json", workplace)
    listed = {one["name"]: one for one in json.loads(done.out)["dialects"]}
    assert listed.keys() >= {"comfy", "diffusers", "gguf", "kohya", "loralib", "loratools", "mlx", "peft"}
    assert "provenance" in listed["kohya"]["cannot"]


SQUARE = "h.0.attn.c_proj"
PARTS: dict[str, dict[str, tuple[int, ...]]] = {
    "lora": {"lora_A.weight": (2, 8), "lora_B.weight": (8, 2)},
    "loha": {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)},
    "lokr": {"lokr_w1": (2, 4), "lokr_w2": (4, 2)},
    "full": {"diff": (8, 8)},
    "ia3": {"weight": (8,), "on_input": ()},
}


@pytest.mark.parametrize(("kind", "base"), [("loha", ""), ("hira", " --base BASE")])
def test_of_what_a_dialect_has_no_kind_for_a_lora_can_be_made(kind: str, base: str, tmp_path: Path) -> None:
    shapes = {"hira_A": (2, 8), "hira_B": (8, 2)} if kind == "hira" else PARTS[kind]
    adapter = Adapter({"unet.conv_in": build({name: torch.ones(shape) for name, shape in shapes.items()})})
    with pytest.raises(LossyConversion) as refusal:
        dialects.save_adapter(adapter, tmp_path / "out.safetensors", dialect="diffusers")
    assert refusal.value.problems == (f"unet.conv_in: diffusers has no updates of kind {kind}",)
    assert (
        refusal.value.hint == f"Make a LoRA of it with --to-lora --rank R{base}, or choose a dialect that keeps them."
    )


def test_what_is_no_update_can_be_left_out(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(LossyConversion) as refusal:
        dialects.save_adapter(prepared / "sealed", tmp_path / "out.safetensors", dialect="kohya")
    way = "Write it without them with --allow-loss, or choose a dialect that keeps them."
    assert refusal.value.hint == way


@pytest.mark.parametrize("model_type", ["llama", "gpt2", None])
@pytest.mark.parametrize("kind", sorted(PARTS))
def test_a_sealed_adapter_says_how_a_square_weight_lies(kind: str, model_type: str | None, tmp_path: Path) -> None:
    """No hash covers config.json: another model_type is refused, and where the user insists the sealed one counts."""
    generator = torch.Generator().manual_seed(0)
    parts = {name: torch.randn(shape, generator=generator) for name, shape in PARTS[kind].items()}
    if "on_input" in parts:
        parts["on_input"] = torch.tensor(1)
    adapter = Adapter({SQUARE: build(parts)})
    assert adapter.updates[SQUARE].kind == kind
    W = {f"{SQUARE}.weight": torch.randn(8, 8, generator=generator)}
    for name, stated in (("base", "gpt2"), ("edited", model_type)):
        (tmp_path / name).mkdir()
        save_file(W, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": stated} if stated else {}))
    base, edited = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "edited")
    convert(adapter, tmp_path / "sealed", base=base)
    assert validate(tmp_path / "sealed", base).differences == ()
    merge(base, [adapter], tmp_path / "plain")
    merge(base, [tmp_path / "sealed"], tmp_path / "wanted")
    torch.testing.assert_close(weights(tmp_path / "wanted"), weights(tmp_path / "plain"), rtol=1e-6, atol=1e-6)
    if model_type == "llama":
        types = "the sealed base is of type gpt2, and config.json says llama"
        typed = f"model_type: {types}; the type decides how weights lie"
        assert validate(tmp_path / "sealed", edited).differences == (typed,)
        with pytest.raises(WrongBase, match="not the base model that was recorded") as refusal:
            merge(edited, [tmp_path / "sealed"], tmp_path / "ours")
        assert refusal.value.problems == (f"adapter 1: {typed}",)
        assert not (tmp_path / "ours").exists()
    merge(edited, [tmp_path / "sealed"], tmp_path / "ours", check_base="warn")
    wanted, ours = weights(tmp_path / "wanted"), weights(tmp_path / "ours")
    assert all(torch.equal(wanted[name], ours[name]) for name in wanted)


def test_adapters_of_two_model_types_are_not_combined(tmp_path: Path) -> None:
    bases = [BaseIdentity("org/base", schema=f"blake3:{'0' * 64}", model_type=name) for name in ("gpt2", "llama")]
    with pytest.raises(WrongBase, match="different base models") as refusal:
        agree(["one", "other"], bases)
    assert refusal.value.problems == ("one and other: their bases are of the types gpt2 and llama",)
    assert agree(["one", "other"], bases[:1] * 2)[0] == bases[0]


def test_what_was_sealed_by_1_0_is_sealed_anew_as_1_1(tmp_path: Path) -> None:
    vectors = Path(__file__).parents[2] / "spec" / "v1" / "vectors" / "valid"
    base = vectors / "integrity" / "base-in-shards" / "base"
    convert(vectors / "linear" / "plain" / "adapter.safetensors", tmp_path / "rewritten")
    convert(vectors / "linear" / "plain" / "adapter.safetensors", tmp_path / "sealed", base=base)
    documents = [dialects.open_adapter(tmp_path / name).settings["loratools"] for name in ("rewritten", "sealed")]
    assert [document["format_version"] for document in documents] == ["1.0", "1.1"]
    assert ["meaning" in document for document in documents] == [False, True]
    assert documents[1]["modules"]["blk.q"]["layout"] == {"transposed": False}
