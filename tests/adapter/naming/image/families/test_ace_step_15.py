"""ACE-Step 1.5: diffusers names its modules as the family's data say."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from torch import Tensor

from loratools.adapter.naming.image.families.ace_step_15 import FAMILY
from tests.make.image_families import prove
from tests.make.image_models import build

pytest.importorskip("diffusers")


def test_diffusers_names_the_modules_of_a_lora_as_the_family_does() -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_ace_step_lora_to_diffusers as convert

    def renamed(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        conv = {  # the decoder's convolutions stand in a Sequential, which the script that converts a checkpoint undoes
            name.replace("proj_in.1.", "proj_in_conv.").replace("proj_out.1.", "proj_out_conv."): tensor
            for name, tensor in tensors.items()
        }
        return {name.removeprefix("transformer."): tensor for name, tensor in convert(conv).items()}

    norms = [f"layers.{layer}.{attention}_attn.norm_" for layer in (0, 1) for attention in ("self", "cross")]
    prove(FAMILY, build("ace_step_15"), renamed, without=norms)
