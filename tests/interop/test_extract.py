"""An extracted adapter in PEFT: the base plus the adapter is the fine-tune, in every parameter, for every family."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.adapter.naming.selection import Selection
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Fixed
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.extract import extract
from loratools.surgery.merge import merge
from tests.interop.models import FAMILIES

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

RANK = 3
REFUSED = {
    **dict.fromkeys(("beit", "deit", "dinov2", "vit"), "transformers 5 renames their modules as it loads the files"),
    "deberta": "attention.self has parameters of its own, and factored modules inside",
    "gemma3-vl": "its files keep the names of older transformers, which PEFT does not translate for whole modules",
    "llava": "as gemma3-vl",
    "qwen2_vl": "as gemma3-vl",
}
"""Families whose whole tensors PEFT refuses to load, with a KeyError that names one; `merge` takes them all."""
UNSEEN = ("segformer", "swin")
"""Families whose factors PEFT passes over without a word, as transformers 5 renames their modules; `merge` does not."""


def fine_tune(model: Any) -> Any:
    """Return a copy in which every parameter is another: matrices by a change of rank 3."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.ndim < 2:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            else:
                flat = parameter.view(len(parameter), -1)
                left = torch.randn(len(flat), RANK, generator=generator)
                flat += 0.05 * left @ torch.randn(RANK, flat.shape[1], generator=generator)
    return tuned


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any, Path]:
    """A family's name, a base and a fine-tune of it, in memory and in base/ and tuned/ of a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    base = FAMILIES[request.param].build()
    tuned = fine_tune(base)
    base.save_pretrained(folder / "base")
    tuned.save_pretrained(folder / "tuned")
    return request.param, base, tuned, folder


def differing(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return name -> largest difference, of the tensors that are not equal to a hundred-thousandth."""
    far = {name: float((ours[name].double() - W.double()).abs().max()) for name, W in wanted.items()}
    return {name: value for name, value in far.items() if not value <= 1e-5 * max(1.0, float(wanted[name].abs().max()))}


def effective(loaded: Any) -> dict[str, torch.Tensor]:
    """Return every parameter as PEFT's forward pass uses it: `merge_and_unload` would add a tied change twice."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    model, parameters = loaded.base_model.model, {}
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            parameters[f"{path}.weight"] = module.get_base_layer().weight + module.get_delta_weight("default")
            parameters |= {f"{path}.{n}": p for n, p in module.get_base_layer().named_parameters() if n != "weight"}
        elif isinstance(module, ModulesToSaveWrapper):
            parameters |= {f"{path}.{n}": p for n, p in module.modules_to_save["default"].named_parameters()}
    return dict(model.named_parameters(remove_duplicate=False)) | parameters


@pytest.mark.parametrize("kinds", [("linear", "conv"), ("linear", "conv", "embedding")], ids=["whole", "factored"])
def test_peft_makes_the_fine_tune_of_base_and_adapter(
    models: tuple[str, Any, Any, Path], tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    from peft import PeftModel

    family, base, tuned, folder = models
    selection = Selection(kinds=frozenset(kinds))
    extract(folder / "base", folder / "tuned", tmp_path / "out", Ranks(Fixed(RANK)), selection=selection)
    if family in REFUSED:
        with pytest.raises(KeyError):
            PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out"))
        return
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out"))
    far = differing(effective(loaded), dict(tuned.named_parameters(remove_duplicate=False)))
    assert bool(far) == (family in UNSEEN), far


def test_merge_makes_the_fine_tune_of_base_and_adapter(models: tuple[str, Any, Any, Path], tmp_path: Path) -> None:
    *_, folder = models
    extract(folder / "base", folder / "tuned", tmp_path / "out", Ranks(Fixed(RANK)))
    merge(folder / "base", [tmp_path / "out"], tmp_path / "merged", retention="off")
    merged, tuned = Checkpoint.open(tmp_path / "merged"), Checkpoint.open(folder / "tuned")
    assert merged.specs.keys() == tuned.specs.keys()
    ours, wanted = ({name: model.read(name) for name in model.specs} for model in (merged, tuned))
    assert differing(ours, wanted) == {}
