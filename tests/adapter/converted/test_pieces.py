"""What operations do with tensors, as pieces: the numbers are those of transformers' own operations."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from loratools.adapter.converted.pieces import Block, blocks_of
from loratools.adapter.naming.conversions import Made, Rule
from loratools.adapter.site import NoPlace

Array = np.ndarray[Any, np.dtype[np.float64]]
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = {**HEADS, "vision_config": {"num_attention_heads": 2}}


def filled(block: Block, files: Mapping[str, Array]) -> Array:
    """Return a block's numbers, put together of its pieces."""
    made = np.full(block.shape, np.nan)
    for piece in block.pieces:
        stored = files[piece.tensor]
        index: list[Any] = [slice(None)] * stored.ndim
        order = []
        for span in piece.spans:
            if span.axis is not None:
                index[span.axis] = slice(
                    span.start, span.start + (span.end - span.begin - 1) * span.step + 1, span.step
                )
                order.append(span.axis)
        shape = [span.end - span.begin for span in piece.spans]
        place = tuple(slice(span.begin, span.end) for span in piece.spans)
        assert np.isnan(made[place]).all()
        made[place] = stored[tuple(index)].transpose(order).reshape(shape)
    assert not np.isnan(made).any()
    return made


def rule(sources: tuple[str, ...], targets: tuple[str, ...], *operations: tuple[str, Mapping[str, Any]]) -> Rule:
    return Rule(sources, targets, operations=operations)


def test_gate_and_up_of_experts_are_stacked_and_put_side_by_side() -> None:
    files = {f"{w}.{i}": np.random.default_rng(i).normal(size=(3, 2)) for w in ("a", "b") for i in range(4)}
    how = rule(("a", "b"), ("c",), ("stack", {"dim": 0}), ("concatenate", {"dim": 1}))
    made = Made(how, tuple(tuple(f"{w}.{i}" for i in range(4)) for w in ("a", "b")), ("model.c",))
    block = blocks_of(made, {name: each.shape for name, each in files.items()}, {})["model.c"]
    expected = np.stack([np.concatenate([files[f"a.{i}"], files[f"b.{i}"]]) for i in range(4)])
    np.testing.assert_array_equal(filled(block, files), expected)


def test_rows_of_rope_are_told_apart_head_by_head() -> None:
    files = {"q": np.arange(24.0).reshape(8, 3)}
    how = rule(("q",), ("q_proj",), ("permute_for_rope", {}))
    block = blocks_of(Made(how, (("q",),), ("q_proj",)), {"q": (8, 3)}, {"num_attention_heads": 2})["q_proj"]
    np.testing.assert_array_equal(filled(block, files), files["q"][[0, 2, 1, 3, 4, 6, 5, 7]])
    assert len(block.pieces) == 4


@pytest.mark.parametrize(
    ("operation", "settings", "shape", "config", "says"),
    [
        ("permute_for_rope", {}, (8, 3), {}, "by permute_for_rope of q: no num_attention_heads in config.json"),
        ("permute_for_rope", {}, (9, 3), {"num_attention_heads": 2}, "9 rows are no multiple of 2 heads"),
        ("interleave", {"dim": 1}, (8, 3), {}, "by interleave of q: 3 along axis 1"),
        ("LinearToConv3d", {}, (8, 3), {}, "by LinearToConv3d, which is not known"),
        ("split", {}, (8, 3), {}, "by split of q"),
    ],
)
def test_what_cannot_be_applied_is_refused_by_its_name(
    operation: str, settings: Mapping[str, Any], shape: tuple[int, ...], config: Mapping[str, Any], says: str
) -> None:
    with pytest.raises(NoPlace, match=says):
        blocks_of(Made(rule(("q",), ("p",), (operation, settings)), (("q",),), ("p",)), {"q": shape}, config)


def test_a_source_that_the_files_lack_is_named() -> None:
    how = rule(("a", "b"), ("c",), ("concatenate", {"dim": 0}))
    with pytest.raises(NoPlace, match="transformers makes it of a and b; the base has no b"):
        blocks_of(Made(how, (("x.a",), ()), ("c",)), {"x.a": (2, 2)}, {})


@pytest.mark.interop
def test_every_chain_of_operations_gives_the_numbers_of_transformers() -> None:
    """The rules of all models, each with random tensors, through transformers' own code and through ours."""
    pytest.importorskip("transformers")
    import torch
    from transformers import conversion_mapping

    from tests.make.conversion_table import rules

    told, seen = rules(), set()
    for key, transforms in conversion_mapping._build_checkpoint_conversion_mapping().items():
        for transform, description in zip(transforms, told[key], strict=True):
            operations = description.get("operations")
            if not operations or any(name == "split" or s.get("check_dims") for name, s in operations):
                continue  # these ask the model for its shapes
            chain = json.dumps([len(description["from"]), len(description["to"]), operations])
            if chain in seen:
                continue
            seen.add(chain)
            _compare(transform, description, torch)
    assert len(seen) >= 15


def _compare(transform: Any, description: Mapping[str, Any], torch: Any) -> None:
    operations = tuple((name, settings) for name, settings in description["operations"])
    how = Rule(tuple(description["from"]), tuple(description["to"]), operations=operations)
    stacked = any(name in ("stack", "fuse_and_split_experts") for name, _ in operations)
    three = any(3 > settings.get("dim", settings.get("dim1", 0)) > 0 for _, settings in operations) and not stacked
    generator = np.random.default_rng(len(operations))
    count = 4 if stacked or "shard" in how.sources[0] else 1
    shape = (2, 16, 24) if three else (48, 6)
    listed = tuple(tuple(f"{i}.{j}" for j in range(count)) for i in range(len(how.sources)))
    files = {name: generator.normal(size=shape) for names in listed for name in names}
    converter = copy.deepcopy(transform)
    from types import SimpleNamespace

    config = SimpleNamespace(**HEADS, vision_config=SimpleNamespace(num_attention_heads=2))
    tensors: Any = {
        pattern: [torch.from_numpy(files[name]) for name in names]
        for pattern, names in zip(how.sources, listed, strict=True)
    }
    for operation in converter.operations:
        tensors = operation.convert(
            tensors, source_patterns=converter.source_patterns, target_patterns=converter.target_patterns, config=config
        )
    blocks = blocks_of(Made(how, listed, how.targets), {name: each.shape for name, each in files.items()}, CONFIG)
    assert blocks.keys() == tensors.keys()
    for target, block in blocks.items():
        expected = tensors[target][0] if isinstance(tensors[target], list) else tensors[target]
        np.testing.assert_array_equal(filled(block, files), expected.numpy(), err_msg=f"{how.targets} {operations}")
