"""Adapters held in memory: a state dict with its config, a PeftModel, a live handle; judged by what PEFT saves."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loratools
from loratools import dialects, live
from loratools.errors import BadFile, InvalidOption, LoraToolsError
from loratools.format.digest import adapter_digest
from tests.conftest import clean_env
from tests.make import REPOSITORY

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": {"q_proj", "v_proj"}},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"up_proj": 3}},
    "embedding": {"target_modules": ["embed_tokens", "k_proj"]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "bias": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}},
}


def base_model() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
    )


def randomize(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if any(mark in name for mark in ("lora_", "modules_to_save", "trainable_tokens_delta")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def peft_model(options: dict[str, Any], seed: int = 1) -> Any:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(base_model(), peft.LoraConfig(r=4, lora_alpha=10, **options))
    randomize(model, seed)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    base_model().save_pretrained(folder)
    return folder


def pair(model: Any, name: str = "default") -> tuple[dict[str, torch.Tensor], Any]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=name), model.peft_config[name]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("label", KINDS)
def test_a_merge_from_memory_is_that_of_the_saved_folder(label: str, base: Path, tmp_path: Path) -> None:
    model = peft_model(KINDS[label])
    model.save_pretrained(tmp_path / "adapter")
    loratools.merge(base, tmp_path / "adapter", tmp_path / "from the folder")
    state, config = pair(model)
    forms: dict[str, Any] = {
        "PeftModel": model,
        "config": (state, config),
        "mapping": (state, config.to_dict()),
        "without the prefix": ({n.removeprefix("base_model.model."): t for n, t in state.items()}, config),
        "opened": dialects.open_adapter(model),
    }
    for form, value in forms.items():
        loratools.merge(base, value, tmp_path / form)
        assert weights(tmp_path / form) == weights(tmp_path / "from the folder"), form
    assert weights(base) != weights(tmp_path / "from the folder")
    assert adapter_digest(forms["opened"]) == adapter_digest(dialects.open_adapter(tmp_path / "adapter"))


def test_every_verb_takes_them(base: Path, tmp_path: Path) -> None:
    model, other = peft_model(KINDS["rslora"]), peft_model(KINDS["rslora"], seed=2)
    model.save_pretrained(tmp_path / "a")
    other.save_pretrained(tmp_path / "b")
    on = base_model()
    lora = live.load(on, model, name="a")
    held: list[Any] = [model, pair(model), lora, lora.adapter("a")]
    for i, value in enumerate(held):
        expected = loratools.compare(tmp_path / "a", tmp_path / "b", base)
        measured = loratools.compare(value, pair(other), base)
        assert (measured.cosine, measured.norms) == (expected.cosine, expected.norms)
        assert loratools.spectrum(value) == loratools.spectrum(tmp_path / "a")
        summary: Any = loratools.inspect(value)
        on_disk: Any = loratools.inspect(tmp_path / "a")
        assert (summary.modules, summary.total, summary.dtypes) == (on_disk.modules, on_disk.total, on_disk.dtypes)
        assert loratools.save_adapter(value, tmp_path / f"saved {i}") == []
        converted = loratools.convert(value, tmp_path / f"converted {i}", to="peft")
        assert converted.digest == adapter_digest(dialects.open_adapter(tmp_path / "a"))
        assert adapter_digest(dialects.open_adapter(tmp_path / f"saved {i}")) == converted.digest
        together = loratools.combine([value, pair(other)], tmp_path / f"combined {i}", weights=[0.5, 2])
        if not i:
            digest = loratools.combine([tmp_path / "a", tmp_path / "b"], tmp_path / "c", weights=[0.5, 2]).digest
        assert together.digest == digest
        loratools.resize(value, tmp_path / f"small {i}", 2)
        loratools.merge(base, [value], tmp_path / f"merged {i}")
        account = loratools.verify(tmp_path / f"merged {i}", base, value)
        assert account.ok
        assert len(account.checked) == 14
        unmerged = tmp_path / f"unmerged {i}"
        loratools.unmerge(tmp_path / f"merged {i}", value, unmerged, base=base)
        assert weights(unmerged) == weights(base)


def test_a_pair_is_one_adapter_and_two_pairs_are_two(base: Path, tmp_path: Path) -> None:
    first, second = (pair(peft_model(KINDS["lora"], seed)) for seed in (1, 2))
    loratools.merge(base, (first, second), tmp_path / "both", weights=[1, 0.5])
    loratools.merge(base, [dialects.open_adapter(first), dialects.open_adapter(second)], tmp_path / "opened",
                    weights=[1, 0.5])  # fmt: skip
    assert weights(tmp_path / "both") == weights(tmp_path / "opened")


def test_what_came_from_memory_is_a_copy() -> None:
    model = peft_model(KINDS["lora"])
    adapter = dialects.open_adapter(model)
    before = adapter_digest(adapter)
    randomize(model, 7)
    assert adapter_digest(adapter) == before != adapter_digest(dialects.open_adapter(model))


def test_several_adapters_of_a_peft_model(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = peft_model(KINDS["lora"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["k_proj"]))
    randomize(model, 5)
    one = dialects.open_adapter(model)
    model.set_adapter("second")
    other = dialects.open_adapter(model)
    assert adapter_digest(other) == adapter_digest(dialects.open_adapter(pair(model, "second")))
    assert {module.rpartition(".")[2] for module in other.updates} == {"k_proj"} != set(one.updates)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(InvalidOption, match="2 adapters are active in this PeftModel: default, second"):
        dialects.open_adapter(model)


def test_a_model_with_adapters_of_transformers_gives_names_without_a_prefix(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model_state_dict

    model, config = base_model(), LoraConfig(r=4, target_modules=["q_proj"])
    model.add_adapter(config)
    randomize(model, 3)
    model.save_pretrained(tmp_path / "adapter")
    state = get_peft_model_state_dict(model)
    assert not any(name.startswith("base_model") for name in state)
    adapter = dialects.open_adapter((state, config))
    assert adapter_digest(adapter) == adapter_digest(dialects.open_adapter(tmp_path / "adapter"))


def change(key: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda mapping: mapping | {key: value}


A = "base_model.model.q.lora_A.weight"
STATE = {A: torch.ones(2, 4), "base_model.model.q.lora_B.weight": torch.ones(3, 2)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
WRONG: dict[str, tuple[Any, type[LoraToolsError], str]] = {
    "number": (7, InvalidOption, "found int$"),
    "module": (torch.nn.Linear(2, 2), InvalidOption, "found Linear$"),
    "no config": (STATE, InvalidOption, "without its config"),
    "config is a path": ((STATE, "adapter_config.json"), InvalidOption, "PEFT's LoraConfig, found str$"),
    "no tensor": ((STATE | {A: [1.0]}, CONFIG), BadFile, f"{A}: found list, expected a torch.Tensor"),
    "meta": ((STATE | {A: torch.ones(2, 4, device="meta")}, CONFIG), BadFile, f"{A}: it is on the device meta"),
    "no name": ((STATE | {3: torch.ones(1)}, CONFIG), BadFile, "3: found a key of type int"),
    "rank": ((STATE, CONFIG | {"r": 3}), BadFile, "its tensors have rank 2, the config says 3"),
    "type": ((STATE, CONFIG | {"r": "many"}), BadFile, "the config of the state dict: 1 field.* cannot be used"),
    "field": ((STATE, CONFIG | {"x": object()}), BadFile, "x: found object"),
    "missing": (({A: STATE[A]}, CONFIG), BadFile, "lora_B"),
    "empty": (({}, CONFIG), BadFile, "the state dict: no LoRA tensors"),
    "kind": ((STATE, CONFIG | {"peft_type": "PREFIX_TUNING"}), LoraToolsError, "PREFIX_TUNING"),
}


@pytest.mark.parametrize("label", WRONG)
def test_errors_name_what_is_wrong(label: str, tmp_path: Path) -> None:
    value, error, text = WRONG[label]
    with pytest.raises(error) as raised:
        dialects.open_adapter(value)
    assert re.search(text, str(raised.value), re.DOTALL), str(raised.value)
    with pytest.raises(error):
        loratools.combine(value, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_a_sound_pair_gives_its_numbers() -> None:
    adapter = dialects.open_adapter((STATE, CONFIG))
    update = adapter.updates["q"]
    assert (update.rank, update.alpha, update.scaling, update.shape) == (2, 4, 2.0, (3, 4))


@pytest.mark.parametrize("which", [None, {"a": 0.5}, {"a": 1, "b": 1}])
def test_a_handle_stands_for_one_adapter_in_use(which: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    lora = live.attach(model, rank=2, targets=["0"], name="a", seed=1)
    live.attach(model, rank=2, targets=["0"], name="b", seed=2)
    lora.use("a")
    assert adapter_digest(dialects.open_adapter(lora)) == adapter_digest(lora.adapter("a"))
    with lora.merged():
        assert adapter_digest(dialects.open_adapter(lora)) == adapter_digest(lora.adapter("a"))
    lora.use(which)
    with pytest.raises(InvalidOption, match=r"in use is (none|a with the weight 0\.5|a, b)\n"):
        dialects.open_adapter(lora)
    with lora.route(["a", None]), pytest.raises(InvalidOption, match=r"in use is a, the base\n"):
        dialects.open_adapter(lora)


def test_peft_is_not_imported() -> None:
    code = (
        "import sys, torch; from loratools import dialects\n"
        "dialects.open_adapter(({'q.lora_A.weight': torch.ones(2, 4), 'q.lora_B.weight': torch.ones(3, 2)},"
        " {'peft_type': 'LORA', 'r': 2, 'lora_alpha': 4, 'target_modules': ['q']}))\n"
        "assert 'peft' not in sys.modules and 'loratools.live' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, env=clean_env())
