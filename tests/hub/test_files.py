"""Which files an adapter or a model is made of."""

import pytest

from loratools.decisions import warnings_to
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


def test_the_only_adapter_below_the_top_is_taken_and_said() -> None:
    paths = ["README.md", "checkpoint-500/adapter_config.json", "checkpoint-500/adapter_model.safetensors"]
    paths += ["checkpoint-500/optimizer.pt", "checkpoint-500/global_step500/mp_rank_00_model_states.pt"]
    said: list[str] = []
    with warnings_to(said.append):
        selection = select(paths, "adapter", lambda name: {})
    assert selection.weights == ("checkpoint-500/adapter_model.safetensors",)
    assert selection.others == ("checkpoint-500/adapter_config.json",)
    assert said == ["no adapter at the top of the repository; the only one below is taken, checkpoint-500"]


def test_of_several_below_the_top_none_is_taken() -> None:
    paths = [f"checkpoint-{step}/adapter_model.safetensors" for step in (500, 1500, 900)]
    with pytest.raises(BadFile, match="several in its folders") as refusal:
        select(paths, "adapter", lambda name: {})
    assert sorted(refusal.value.problems) == ["checkpoint-1500", "checkpoint-500", "checkpoint-900"]
    assert "checkpoint-1500." in str(refusal.value.hint)


def test_a_single_file_comes_with_the_config_that_says_its_scaling() -> None:
    paths = ["run/lora.safetensors", "run/params.json", "run/tekken.json"]
    assert set(under(paths, "run/lora.safetensors")) == {"lora.safetensors", "params.json"}
