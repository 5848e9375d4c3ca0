"""Kandinsky 5: the names are the model's own, in both namings."""

from __future__ import annotations

import pytest

from loratools.adapter.naming.image.families.kandinsky5 import FAMILY
from tests.make.image_families import prove
from tests.make.image_models import build

pytest.importorskip("diffusers")


def test_all_modules_keep_their_names() -> None:
    prove(FAMILY, build("kandinsky5"), dict)
