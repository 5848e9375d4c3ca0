"""Megatron-Bridge and NeMo: interleaved projections, against Megatron's own way of taking them apart."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.errors import BadFile, LossyConversion, UnsupportedAdapter
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.merge import merge
from tests.conftest import Result
from tests.dialects.adapters import Q0, lora, opened
from tests.dialects.megatron.files import (
    ALPHA,
    BRIDGE,
    GROUPS,
    HEAD,
    HEADS,
    MODEL,
    NEMO,
    NEMO_CONFIG,
    RANK,
    ROWS,
    RUN_CONFIG,
    base,
    bridge,
    by_megatron,
    expect,
    factors,
    nemo,
    state,
    wanted,
)  # fmt: skip
from tests.make import tiny


@pytest.mark.parametrize("prefix", ["model.decoder.", "model.module.decoder.", "model.language_model.encoder."])
def test_an_archive_of_nemo(tmp_path: Path, prefix: str) -> None:
    path = nemo(tmp_path / "lora.nemo", state(NEMO, prefix), NEMO_CONFIG)
    assert dialects.detect(dialects.Listing.of(path))[0] == "megatron"
    expect(dialects.open_adapter(path), wanted(ALPHA / RANK))
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    expect(dialects.open_adapter(tmp_path / "unpacked"), wanted(ALPHA / RANK))


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("prefix", ["decoder.", "module.module.decoder."])
def test_a_state_dict_of_megatron_bridge(tmp_path: Path, prefix: str, ending: str) -> None:
    folder = bridge(tmp_path / "a", state(BRIDGE, prefix))
    if ending == "pt":
        torch.save(state(BRIDGE, prefix), folder / "adapter.pt")
        (folder / "adapter.safetensors").unlink()
    name, evidence = dialects.detect(dialects.Listing.of(folder))
    assert (name, evidence.score) == ("megatron", 85)
    assert evidence.reason.startswith(f"16 of the tensors in adapter.{ending} are called as {prefix}layers.0.")
    expect(dialects.open_adapter(folder), wanted(4.0))
    expect(dialects.open_adapter(folder / f"adapter.{ending}"), wanted(4.0))


@pytest.mark.parametrize("style", ["bridge", "nemo"])
def test_canonical_lora_has_its_projections_apart_already(tmp_path: Path, style: str) -> None:
    attention, mlp = {
        "bridge": ("self_attention.linear_qkv.adapter.adapter_{}", "mlp.linear_fc1.adapter.adapter_{}"),
        "nemo": (
            "self_attention.adapter_layer.lora_unfused_kqv_adapter.{}_adapter",
            "mlp.adapter_layer.lora_unfused_hto4h_adapter.{}_adapter",
        ),
    }[style]
    tensors, deltas = {}, {}
    for seed, (name, module) in enumerate({
        **{attention.format(x): f"self_attn.{x}_proj" for x in "qkv"},
        **{mlp.format(x): f"mlp.{x}_proj" for x in ("gate", "up")},
    }.items()):  # fmt: skip
        A, B = factors("proj", seed)
        tensors |= {f"decoder.layers.5.{name}.linear_in.weight": A, f"decoder.layers.5.{name}.linear_out.weight": B}
        deltas[f"model.layers.5.{module}"] = 4 * (B.double() @ A.double())
    no_model = {"peft": RUN_CONFIG["peft"]}  # heads and gate need not be known
    expect(dialects.open_adapter(bridge(tmp_path / "a", tensors, no_model)), deltas)


def test_doras_magnitude_goes_with_its_rows(tmp_path: Path) -> None:
    A, B = factors("qkv", 0)
    magnitude = torch.arange(1.0, ROWS["qkv"] + 1)
    path = f"decoder.layers.0.{BRIDGE['qkv']}"
    tensors = {f"{path}.linear_in.weight": A, f"{path}.linear_out.weight": B, f"{path}.weight_magnitude": magnitude}
    adapter = dialects.open_adapter(bridge(tmp_path / "a", tensors))
    for module, rows in by_megatron(magnitude[:, None], "model.layers.0").items():
        assert adapter.updates[module].kind == "dora"
        assert torch.equal(adapter.updates[module].parts["lora_magnitude_vector"].load(), rows.flatten())


def test_rows_are_those_of_megatron_bridges_own_split(tmp_path: Path) -> None:
    places = find_spec("megatron").submodule_search_locations or [] if find_spec("megatron") else []  # type: ignore[union-attr]
    source = next((file for place in places if (file := Path(place, _SPLIT)).is_file()), None)
    if source is None:
        pytest.skip("megatron-bridge is not installed (pip install --no-deps megatron-bridge: its source is enough)")
    split = real_function(source, "split_qkv_weights")
    folder = bridge(tmp_path / "a", state(BRIDGE, "decoder.", 1))
    adapter = dialects.open_adapter(folder)
    theirs = split(SimpleNamespace(**MODEL), factors("qkv", 0)[1])
    for name, rows in zip(("q_proj", "k_proj", "v_proj"), theirs, strict=True):
        ours = adapter.updates[f"model.layers.0.self_attn.{name}"].parts["lora_B.weight"]
        assert torch.equal(ours.load(), rows)


_SPLIT = "bridge/models/conversion/param_mapping.py"


def real_function(source: Path, name: str) -> Callable[..., Any]:
    """Return one function of a module whose other imports (megatron.core) are not there."""
    tree = ast.parse(source.read_text())
    kept = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    future = ast.parse("from __future__ import annotations").body
    scope: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module([*future, *kept], []), str(source), "exec"), scope)
    found: Callable[..., Any] = scope[name]
    return found


def test_it_merges_as_megatron_would(tmp_path: Path) -> None:
    """The base is a Llama of 4 heads in 2 groups: what Megatron adds to its fused weights is what is merged."""
    weights = {name: tensor.float() for name, tensor in tiny.llama_weights(1).items()}
    config = json.loads((tiny.save_llama(tmp_path / "base", weights) / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    assert heads > groups > 1
    q, k, v = (weights[f"model.layers.0.self_attn.{x}_proj.weight"].double() for x in "qkv")
    size, each = q.shape[0] // heads, heads // groups
    fused = torch.cat([  # as Megatron stores it: by hand, head by head
        rows for g in range(groups) for rows in
        (q[g * each * size : (g + 1) * each * size], k[g * size : (g + 1) * size], v[g * size : (g + 1) * size])
    ])  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    A = torch.randint(-4, 5, (2, q.shape[1]), generator=generator).float()
    B = torch.randint(-4, 5, (fused.shape[0], 2), generator=generator).float()
    path = f"decoder.layers.0.{BRIDGE['qkv']}"
    folder = bridge(
        tmp_path / "a", {f"{path}.linear_in.weight": A, f"{path}.linear_out.weight": B}, {"peft": {"alpha": 1}}
    )
    checkpoint = Checkpoint.open(tmp_path / "base")
    merge(checkpoint, [dialects.open_adapter(folder, base=checkpoint)], tmp_path / "out")
    changed = fused + 0.5 * (B.double() @ A.double())
    found = Checkpoint.open(tmp_path / "out")
    slots = changed.view(groups, each + 2, size, -1)
    for name, part in {"q": slots[:, :each], "k": slots[:, each], "v": slots[:, each + 1]}.items():
        merged = found.read(f"model.layers.0.self_attn.{name}_proj.weight")
        assert torch.equal(merged, part.reshape(merged.shape).float())


def test_alpha(tmp_path: Path) -> None:
    tensors = state(NEMO, "model.decoder.")
    silent = {**NEMO_CONFIG, "peft": {"lora_tuning": {"adapter_dim": RANK}}}
    expect(dialects.open_adapter(nemo(tmp_path / "a.nemo", tensors, silent)), wanted(1.0))  # alpha is dim
    expect(dialects.open_adapter(tmp_path / "a.nemo", alpha=6), wanted(2.0))
    path = nemo(tmp_path / "b.nemo", tensors, MODEL)
    with pytest.raises(UnsupportedAdapter, match="the scaling is unknown") as refusal:
        dialects.open_adapter(path)
    assert "--alpha" in str(refusal.value.hint)
    odd = {**NEMO_CONFIG, "peft": {"lora_tuning": {"adapter_dim": RANK, "alpha": "12"}}}
    with pytest.raises(BadFile, match="expected a number, found '12'"):
        dialects.open_adapter(nemo(tmp_path / "c.nemo", tensors, odd))
    other = {**NEMO_CONFIG, "peft": {"lora_tuning": {"adapter_dim": 5, "alpha": 12}}}
    with pytest.raises(BadFile) as faults:
        dialects.open_adapter(nemo(tmp_path / "d.nemo", tensors, other))
    assert faults.value.problems[0].endswith("its tensors have rank 3, the configuration says 5")


@pytest.mark.parametrize(
    ("peft", "refused", "said"),
    [
        ({"peft_scheme": "adapter", "lora_tuning": {"adapter_dim": RANK, "alpha": 12}}, "peft_scheme = adapter", None),
        ({"dim": RANK, "alpha": 12, "weight_tying": True}, "weight_tying = True", None),
        ({"dim": RANK, "alpha": 12, "use_rslora": True}, "use_rslora = True", None),
        ({"dim": RANK, "alpha": 12, "gate": 1, "dropout": 0.1, "weight_tying": False}, None, "effect: gate"),
        ({"dim": RANK}, None, "records no alpha; a scale of 1 is applied"),
    ],
)
def test_what_decides_beside_alpha(tmp_path: Path, peft: dict[str, Any], refused: str | None, said: str | None) -> None:
    path = nemo(tmp_path / "a.nemo", state(NEMO, "model.decoder."), {**NEMO_CONFIG, "peft": peft})
    if refused is not None:
        with pytest.raises(UnsupportedAdapter) as refusal:
            dialects.open_adapter(path)
        assert refusal.value.problems[0].startswith(refused)
        return
    (warning,) = opened(path)[1]
    assert said in warning


def test_what_only_the_base_tells(tmp_path: Path) -> None:
    path = nemo(tmp_path / "a.nemo", state(NEMO, "model.decoder.", 1), {"peft": NEMO_CONFIG["peft"]})
    with pytest.raises(UnsupportedAdapter, match="cannot be taken apart") as refusal:
        dialects.open_adapter(path)
    assert [line.partition(":")[0] for line in refusal.value.problems] == [
        "model.layers.0.self_attn.qkv", "model.layers.0.mlp.fc1",
    ]  # fmt: skip
    assert "--base" in str(refusal.value.hint)
    told = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": HEAD}
    expect(dialects.open_adapter(path, base=base(tmp_path / "base", **told)), wanted(4.0, 1))
    whole = nemo(tmp_path / "b.nemo", state(NEMO, "model.decoder.", 1), NEMO_CONFIG)
    with pytest.raises(BadFile, match="not that of the base") as contradiction:
        dialects.open_adapter(whole, base=base(tmp_path / "other", **{**told, "num_key_value_heads": 3}))
    assert contradiction.value.problems == ("groups: 2 here, 3 in the base",)


def test_without_a_gate_fc1_is_the_up_projection(tmp_path: Path) -> None:
    path = nemo(tmp_path / "a.nemo", state(NEMO, "model.decoder.", 1), {**NEMO_CONFIG, "activation": "squared-relu"})
    adapter = dialects.open_adapter(path)
    A, B = factors("fc1", 2)
    assert torch.equal(adapter.updates["model.layers.0.mlp.up_proj"].delta_weight(), 4 * (B @ A))
    assert "model.layers.0.mlp.gate_proj" not in adapter.updates
    told = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": HEAD}
    unsaid = nemo(tmp_path / "b.nemo", state(NEMO, "model.decoder.", 1), {"peft": NEMO_CONFIG["peft"]})
    found = dialects.open_adapter(unsaid, base=base(tmp_path / "base", gate=False, **told))
    assert "model.layers.0.mlp.gate_proj" not in found.updates


def test_rows_that_are_not_those_of_the_heads(tmp_path: Path) -> None:
    """As of attention with an output gate, whose fused weight has a gate for every query head."""
    wider = {**NEMO_CONFIG, "kv_channels": 2}
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(nemo(tmp_path / "a.nemo", state(NEMO, "model.decoder.", 1), wider))
    assert refusal.value.problems == (
        "model.layers.0.self_attn.qkv: 40 rows are not those of 6 heads in 2 groups, of 2 features",
    )


def test_it_is_read_only_and_becomes_peft(tmp_path: Path, shell: Callable[..., Result]) -> None:
    with pytest.raises(LossyConversion, match="read"):
        dialects.save_adapter(Adapter({Q0: lora(1)}), tmp_path / "a", dialect="megatron")
    nemo(tmp_path / "x.nemo", state(NEMO, "model.decoder."), NEMO_CONFIG)
    done = shell("loratools convert x.nemo -o peft --to peft", tmp_path)
    assert done.code == 0, done.err
    again = dialects.open_adapter(tmp_path / "peft")
    assert again.dialect == "peft"
    assert {module: update.scaling for module, update in again.updates.items()} == dict.fromkeys(wanted(1.0), 4.0)
    assert all(torch.equal(again.updates[m].delta_weight().double(), delta) for m, delta in wanted(4.0).items())
    done = shell("loratools inspect x.nemo --json", tmp_path)
    assert (done.code, json.loads(done.out)["dialect"]) == (0, "megatron")


def test_no_torch_is_needed_to_read_the_names(tmp_path: Path) -> None:
    path = nemo(tmp_path / "x.nemo", state(NEMO, "model.decoder."), NEMO_CONFIG)
    script = (
        "import sys; from loratools import dialects; adapter = dialects.open_adapter(sys.argv[1]);"
        "assert len(adapter.updates) == 14; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
