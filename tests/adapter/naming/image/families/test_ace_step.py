"""ACE-Step 1: the modules that its own training configurations name are the family's."""

from __future__ import annotations

import pytest

from loratools.adapter.naming.image.families.ace_step import FAMILY
from tests.make.image_families import rows

TARGETS = {
    "speaker_embedder", "genre_embedder", "lyric_proj", "t_block.1", "timestep_embedder.linear_1",
    *(f"lyric_encoder.encoders.0.self_attn.linear_{x}" for x in ("q", "k", "v", "out")),
    "lyric_encoder.encoders.0.feed_forward.w_1", "lyric_encoder.encoders.5.feed_forward.w_2",
    *(f"transformer_blocks.23.attn.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"transformer_blocks.23.cross_attn.{x}" for x in ("to_q", "to_k", "to_v", "add_q_proj", "add_v_proj")),
}  # fmt: skip
"""Modules of public training configurations of ACE-Step 1."""


@pytest.mark.parametrize("module", sorted(TARGETS))
def test_it_keeps_the_names_that_trainers_target(module: str) -> None:
    assert rows(FAMILY, {module: (2, 2)}) == {module: (module, [0, 1])}
