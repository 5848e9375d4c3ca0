"""LTX-2: diffusers' converters move every row where the family's data say."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from torch import Tensor

from loratools.adapter.naming.image.families.ltx2 import FAMILY
from tests.make.image_families import prove
from tests.make.image_models import build

pytest.importorskip("diffusers")


def test_diffusers_converter_moves_rows_where_the_family_says() -> None:
    from diffusers.loaders.single_file_utils import convert_ltx2_transformer_to_diffusers as convert

    prove(FAMILY, build("ltx2"), convert, prefix="model.diffusion_model.")


def test_the_modules_of_2_3_are_called_as_diffusers_calls_them_in_a_lora() -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_ltx2_lora_to_diffusers as convert

    def renamed(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return {name.removeprefix("transformer."): tensor for name, tensor in convert(tensors).items()}

    prove(FAMILY, build("ltx2_3"), renamed, prefix="diffusion_model.")
