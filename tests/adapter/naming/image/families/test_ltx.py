"""LTX-Video: diffusers' converter moves every row where the family's data say."""

from __future__ import annotations

import pytest

from loratools.adapter.naming.image.families.ltx import FAMILY
from tests.make.image_families import prove
from tests.make.image_models import build

pytest.importorskip("diffusers")


def test_diffusers_converter_moves_rows_where_the_family_says() -> None:
    from diffusers.loaders.single_file_utils import convert_ltx_transformer_checkpoint_to_diffusers as convert

    prove(FAMILY, build("ltx"), convert, prefix="model.diffusion_model.")
