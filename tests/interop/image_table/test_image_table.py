"""Adapters of every family of image and video models, under every naming: read, merged, converted, loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("diffusers")
from tests.interop.image_table.files import namings
from tests.interop.image_table.models import MODELS, PACKED
from tests.interop.image_table.rows import row

FAMILIES = [*MODELS, *PACKED]

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


@pytest.mark.sweep(6)
@pytest.mark.parametrize(("family", "naming"), [(family, naming) for family in FAMILIES for naming in namings(family)])
def test_an_adapter_is_read_merged_and_converted_as_its_family_says(family: str, naming: str, tmp_path: Path) -> None:
    """Merges are numpy's to 1e-5, conversions diffusers' own, and diffusers loads what it is given."""
    assert row(family, naming, tmp_path).faults == {}
