"""mergekit itself on tests/recipe/configurations.py, where it is installed: no extra brings it.

In float32 what leaves nothing to chance is equal to it but for the last bits of float32; of what is drawn the L1 norm
of each change is. In bfloat16 mergekit's has the rounding of base + adapter in it for each adapter, ours rounds once.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import loratools
from tests.recipe.configurations import CONFIGURATIONS
from tests.recipe.test_mergekit import weights_of

mergekit = pytest.importorskip("mergekit")
pytestmark = pytest.mark.interop
DRAWN = {"dare_linear", "dare_ties", "della", "della_linear"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.filterwarnings("ignore")
def test_both_make_the_same_model(name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    monkeypatch.chdir(workplace)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("m.yaml").write_text(CONFIGURATIONS[name])
    options = MergeOptions(
        lora_merge_cache="cache", lora_merge_dtype="float32", copy_tokenizer=False, write_model_card=False, quiet=True,
        random_seed=1,
    )  # fmt: skip
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(CONFIGURATIONS[name])), "theirs", options)
    assert loratools.run_recipe("m.yaml", folder="ours").ok
    base, theirs, ours = weights_of("base"), weights_of("theirs"), weights_of("ours/merged")
    assert theirs.keys() == ours.keys()
    change, difference = (
        float(torch.stack([(a[key] - b[key]).square().sum() for key in base]).sum().sqrt())
        for a, b in ((theirs, base), (theirs, ours))
    )
    if name in DRAWN:
        norm = float(torch.stack([(ours[key] - base[key]).square().sum() for key in base]).sum().sqrt())
        assert norm == pytest.approx(change, rel=0.05)
        assert difference > 0.1 * change
    else:
        assert difference < 2e-6 * change
