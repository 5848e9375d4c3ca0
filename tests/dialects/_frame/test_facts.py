"""What metadata say, of entries as trainers write them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loratools import dialects
from loratools.cli._facts import fact_lines
from loratools.dialects._frame.facts import Facts, facts_of, words
from loratools.dialects._frame.places import MODELSPEC, TABLES, table_of

KOHYA = {
    "ss_sd_model_name": "v1-5.safetensors", "ss_base_model_version": "sd_v1", "ss_resolution": "(512, 768)",
    "ss_steps": "1500", "ss_epoch": "10", "ss_num_train_images": "30", "ss_learning_rate": "0.0001",
    "ss_unet_lr": "0.0001", "ss_text_encoder_lr": "5e-05", "ss_training_finished_at": "1700000000.75",
    "ss_output_name": "dog", "ss_network_module": "networks.lora", "ss_training_comment": "None",
    "ss_tag_frequency": json.dumps({"10_sks dog": {"sks dog": 10, " park": 7}, "5_dog": {"dog": 3, "park": 4}}),
}  # fmt: skip


def test_kohya() -> None:
    told = facts_of(KOHYA)
    assert told == Facts(
        title="dog", frequent_tags=(("park", 11), ("sks dog", 10), ("dog", 3)), tags_in_all=3, base="v1-5.safetensors",
        family="sd_v1", resolution="512x768", steps=1500, epochs=10, images=30,
        learning_rate="0.0001, text encoder 5e-05", date="2023-11-14T22:13:20Z", trained_with="networks.lora",
        base_version="sd_v1",
    )  # fmt: skip


def test_what_the_file_says_of_its_base() -> None:
    assert facts_of(KOHYA | {"ss_sd_model_hash": "be9edd61"}).base_hash == "be9edd61"
    told = facts_of(KOHYA | {"ss_sd_model_hash": "be9edd61", "ss_new_sd_model_hash": "31e3" * 16})
    assert told.base_hash == "31e3" * 16
    assert ("base as stated", f"a file with the hash {'31e3' * 16}, which is not compared") in list(fact_lines(told))
    named = told._replace(family="stable-diffusion-v1/lora", base_hash=None)
    assert ("base as stated", "sd_v1") in list(fact_lines(named))


def test_only_a_training_is_told_as_one() -> None:
    code = {"modelspec.implementation": "https://github.com/Stability-AI/generative-models"}
    assert facts_of(KOHYA | code).trained_with == "networks.lora"
    extracted = {"ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "4"}
    assert facts_of(extracted | code).trained_with is None


def test_ai_toolkit() -> None:
    told = facts_of({
        "software": json.dumps({"name": "ai-toolkit", "repo": "https://x.org/ai-toolkit", "version": "0.7"}),
        "training_info": json.dumps({"step": 2000, "epoch": 3}), "ss_base_model_version": "flux1", "name": "x",
        "ss_tag_frequency": json.dumps({"1_p3rson": {"p3rson": 1}}),
    })  # fmt: skip
    assert (told.trigger, told.steps, told.epochs, told.title) == (("p3rson",), 2000, 3, "x")
    assert (told.trained_with, told.family) == ("ai-toolkit 0.7", "flux1")


def test_onetrainer() -> None:
    config = {"base_model_name": "org/base", "learning_rate": 0.0003, "resolution": "1024", "epochs": 100}
    told = facts_of({"ot_branch": "master", "ot_config": json.dumps(config)})
    assert (told.base, told.learning_rate, told.resolution, told.epochs) == ("org/base", "0.0003", "1024", 100)
    assert told.trained_with == "OneTrainer"


def test_the_standard() -> None:
    told = facts_of({
        "modelspec.title": "A dog", "modelspec.trigger_phrase": "sks dog, sks", "modelspec.tags": "dog, animal",
        "modelspec.date": "2024-01-02T03:04:05", "modelspec.resolution": "1024x1024", "modelspec.author": "me",
        "modelspec.license": "mit", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.thumbnail": "data:image/jpeg;base64," + "A" * 400, "modelspec.description": "d",
    }, "org/base")  # fmt: skip
    assert told == Facts(
        trigger=("sks dog", "sks"), title="A dog", tags=("dog", "animal"), base="org/base", description="d",
        family="stable-diffusion-xl-v1-base/lora", resolution="1024x1024", date="2024-01-02T03:04:05", author="me",
        license="mit", thumbnail=("image/jpeg", 300),
    )  # fmt: skip


@pytest.mark.parametrize("prompt", ["a photo of sks dog", '"a photo of sks dog"'])
def test_the_card_of_diffusers(prompt: str) -> None:
    assert facts_of({}, card=f"---\nlicense: mit\ninstance_prompt: {prompt}\n---\ntext").trigger == (
        "a photo of sks dog",
    )


HOSTILE: list[Any] = [
    "", "null", "[", "{", "[]", "{}", "1", "1e999", "nan", "{" * 5000, '{"a": 1}', '{"a": {"b": "c"}}', "[[1]]",
    '{"a": {"b": true}}', "\x00", "9" * 400, "-1e308",
    '{"a": {"b": 1.5}}', "\ud800".encode("utf-8", "replace").decode(),
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:20])
def test_what_is_no_metadata_says_nothing_and_raises_nothing(value: str) -> None:
    names = [*KOHYA, "software", "training_info", "ot_config", "modelspec.thumbnail", "modelspec.date", "trigger_words"]
    assert isinstance(facts_of(dict.fromkeys(names, value), card=f"---\ninstance_prompt: {value}\n---"), Facts)


def test_words() -> None:
    assert words(None) == words(" , ") == ()
    assert words("a, b,a") == ("a", "b")
    assert words('["a, b", "c"]') == ("a, b", "c")


def test_every_table_is_a_dialects_and_has_the_standard() -> None:
    assert TABLES.keys() <= set(dialects.names())
    for name in dialects.names():
        assert MODELSPEC.items() <= table_of(name).items()
