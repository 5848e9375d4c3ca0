"""Which files an adapter or a model is made of."""

import pytest

from loratools.errors import BadFile
from loratools.hub.files import Kind, kind_of, select, stale, under

INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
SHARDS = sorted(set(INDEX["weight_map"].values()))


@pytest.mark.parametrize(
    ("paths", "kind"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "adapter"),
        (["adapter_config.json", "config.json", "model.safetensors"], "adapter"),
        (["pytorch_lora_weights.safetensors"], "adapter"),
        (["style.safetensors", "README.md"], "adapter"),
        (["config.json", "model.safetensors"], "checkpoint"),
        (["config.json", *SHARDS], "checkpoint"),
        (["pytorch_model.bin", "sub/adapter_config.json"], "checkpoint"),
        (["model_index.json", "unet/config.json"], "checkpoint"),
    ],
)
def test_kind(paths: list[str], kind: Kind) -> None:
    assert kind_of(paths) == kind


@pytest.mark.parametrize(
    ("kind", "paths", "weights"),
    [
        ("adapter", ["adapter_model.safetensors", "adapter_model.bin", "b.safetensors"], ["adapter_model.safetensors"]),
        ("adapter", ["adapter_model.bin", "adapter_config.json"], ["adapter_model.bin"]),
        ("adapter", ["a.safetensors", "b.safetensors", "optimizer.bin"], ["a.safetensors", "b.safetensors"]),
        ("adapter", ["adapters.safetensors", "0000100_adapters.safetensors"], ["adapters.safetensors"]),
        ("checkpoint", [*SHARDS, "model.safetensors.index.json"], ["model.safetensors.index.json", *SHARDS]),
        ("checkpoint", [*SHARDS, "model.safetensors.index.json", "model.safetensors", "original/x.pth"],
         ["model.safetensors"]),
        ("checkpoint", ["model.safetensors", "pytorch_model.bin", "model.fp16.safetensors"], ["model.safetensors"]),
        ("checkpoint", ["pytorch_model.bin", "training_args.bin", "tf_model.h5"], ["pytorch_model.bin"]),
        ("checkpoint", ["weights.safetensors", "adapter_model.safetensors"], ["weights.safetensors"]),
    ],
)  # fmt: skip
def test_one_set_of_weights(kind: Kind, paths: list[str], weights: list[str]) -> None:
    assert list(select(paths, kind, lambda name: INDEX).weights) == sorted(weights)


def test_companions() -> None:
    kept = ["LICENSE", "README.md", "chat_template.jinja", "config.json", "tokenizer.model", "vocab.txt"]
    left = [".gitattributes", ".env", "all_results.json", "trainer_state.json", "a/b.json", "picture.png", "run.log"]
    selection = select(["model.safetensors", *kept, *left], "checkpoint", lambda name: {})
    assert list(selection.others) == kept


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["config.json"], "no weights of a model among its files: config.json"),
        (["model.safetensors.index.json", SHARDS[0]], "do not belong together"),
    ],
)
def test_what_cannot_be_read(paths: list[str], message: str) -> None:
    with pytest.raises(BadFile, match=message):
        select(paths, "checkpoint", lambda name: INDEX)


def test_what_lies_under_a_path() -> None:
    paths = ["a/x.json", "a/adapter_config.json", "a/w.safetensors", "a/b/y", "z"]
    assert under(paths, None) == {path: path for path in paths}
    assert under(paths, "a/b") == {"y": "a/b/y"}
    assert under(paths, "a/w.safetensors") == {
        "adapter_config.json": "a/adapter_config.json", "w.safetensors": "a/w.safetensors",
    }  # fmt: skip
    assert under(paths, "z") == {"z": "z"}


def test_stale_shards() -> None:
    there = [
        *SHARDS,
        "model.safetensors.index.json",
        "adapter_model.safetensors",
        "model.bin.txt",
        "unet/model.safetensors",
    ]
    assert stale(there, ["model.safetensors", "config.json"]) == (*SHARDS, "model.safetensors.index.json")
    assert stale(there, ["adapter_model.safetensors"]) == ()
    assert stale(["model.safetensors"], [*SHARDS, "model.safetensors.index.json"]) == ("model.safetensors",)
