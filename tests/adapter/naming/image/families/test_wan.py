"""Wan and its relatives: diffusers' converter moves every row where the family's data say."""

from __future__ import annotations

import pytest

from loratools.adapter.naming.image.families.wan import FAMILY
from tests.make.image_families import prove
from tests.make.image_models import build

pytest.importorskip("diffusers")


@pytest.mark.parametrize(
    ("name", "cls", "unknown"),
    [
        ("wan", None, ()),
        ("wan_image", None, ()),
        ("wan_vace", None, ()),
        ("wan_animate", None, ("motion_encoder.",)),
        ("skyreels", None, ("fps_projection.",)),
        ("wan_image", "ChronoEditTransformer3DModel", ()),
    ],
)
def test_diffusers_converter_moves_rows_where_the_family_says(
    name: str, cls: str | None, unknown: tuple[str, ...]
) -> None:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers as convert

    prove(FAMILY, build(name, cls=cls), convert, without=unknown)
