"""Adapters of attentions whose rows transformers permutes as it loads, merged into files of the published names.

PEFT merges in memory, where the rows are permuted and q, k and v are modules of their own; transformers turns that back
as it saves. What has a number for each output (a magnitude, a bias) must follow its row.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import merge, unmerge, verify
from tests.interop import every

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

MODELS = {
    "kimi_k25": ("Kimi_K25ForConditionalGeneration", r".*vision_tower\..*\.[qkv]_proj", r"\.wqkv\.(weight|bias)$"),
    "mistral_large4": (
        "MistralLarge4ForConditionalGeneration", r".*vision_tower\..*\.[qkv]_proj", r"attention\.w[qkv]\.weight$"
    ),
    "gradium_phonon_tts": (
        "GradiumPhononTTSForConditionalGeneration", r".*self_attn\.[qkv]_proj", r"\.in_proj\.weight$"
    ),
}  # fmt: skip
"""Model type -> its class, the modules to train, and what their weights are called in its files."""

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("LORA", {}),
    "dora": ("LORA", {"use_dora": True}),
    "rslora": ("LORA", {"use_rslora": True}),
    "both": (
        "LORA",
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"k_proj": 3}, "alpha_pattern": {"q_proj": 9}},
    ),
    "ia3": ("IA3", {"feedforward_modules": []}),
    "loha": ("LOHA", {"r": 2}),
    "hira": ("HIRA", {"r": 2}),
    "vera": ("VERA", {"r": 2}),
    "delora": ("DELORA", {"r": 2}),
    "hra": ("HRA", {"r": 2}),
    "oft": ("OFT", {"oft_block_size": 4}),
    "boft": ("BOFT", {"boft_block_size": 4}),
}
CASES = [
    (each, name) for each in MODELS for name, (kind, _) in SETTINGS.items() if kind == "LORA" or each == "kimi_k25"
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """Return what loads a small model of a type, with the folder that it was loaded from; each is made once."""

    @cache
    def model(model_type: str) -> tuple[Any, Path]:
        from tests.make.small import built, model_class

        folder = tmp_path_factory.mktemp(model_type)
        made = built(model_class([MODELS[model_type][0]]))
        made.save_pretrained(folder)
        return type(made).from_pretrained(folder), folder

    return model


def trained(model: Any, config: Any) -> Any:
    """Return a PEFT model around a copy of `model`, in which everything that would be trained has moved."""
    from peft import get_peft_model

    peft = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(7)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return peft


@pytest.mark.sweep(8)
@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_a_merge_into_permuted_rows_is_pefts(model_type: str, name: str, models: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    _, targets, stored = MODELS[model_type]
    kind, settings = SETTINGS[name]
    model, folder = models(model_type)
    before = every.load(folder)
    if kind == "LORA":
        settings = {"r": 2, "lora_alpha": 5, **settings}
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]](target_modules=targets, **settings)
    with_adapter = trained(model, config)
    with_adapter.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged = with_adapter.merge_and_unload()
    merged._weight_conversions = getattr(model, "_weight_conversions", None)
    merged.save_pretrained(tmp_path / "theirs")
    merge(folder, [tmp_path / "adapter"], tmp_path / "ours", keep_residual=True)
    ours, theirs = every.load(tmp_path / "ours"), every.load(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    moved = [name for name, W in theirs.items() if not torch.equal(W, before[name])]
    assert moved
    assert [name for name in moved if not re.search(stored, name)] == []
    assert [name for name, W in ours.items() if not every.near(W, theirs[name])] == []
    assert verify(tmp_path / "ours", folder, [tmp_path / "adapter"]).ok
    unmerge(tmp_path / "ours", [tmp_path / "adapter"], tmp_path / "back")
    back = every.load(tmp_path / "back")
    assert all(torch.equal(W, back[name]) for name, W in before.items())
