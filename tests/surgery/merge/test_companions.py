"""What lies beside the weights of a merged model, as the loaders of transformers read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loratools.decisions import warnings_to
from loratools.errors import BadFile, IncompatibleAdapter
from loratools.hub import subject
from loratools.storage.beside import templates
from loratools.surgery.merge import merge
from tests.storage.beside.test_templates import FORMS, write
from tests.surgery.models import lora, random, save_adapter, save_base

NAME = "model.layers.0.q_proj"
WEIGHTS = {f"{NAME}.weight": random(8, 8), "model.embed_tokens.weight": random(3, 8), "lm_head.weight": random(3, 8)}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_base(tmp_path / "base", WEIGHTS, model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=3)
    save_adapter(tmp_path / "adapter", lora({NAME: (8, 8)}))
    return tmp_path


def save_tokenizer(folder: Path, *added: str, **config: object) -> None:
    """Write a tokenizer of three words and some more, as transformers 4 does, without any chat template."""
    words = {"a": 0, "b": 1, "<unk>": 2}
    tokens = [{"id": 3 + i, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
               "normalized": False} for i, token in enumerate(added)]  # fmt: skip
    document = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens, "normalizer": None,
                "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
                "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(document))
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))


def add_template(folder: Path, files: dict[str, str], mark: str) -> None:
    """Write the files of a form of template, each text with a mark, into a tokenizer's folder."""
    for name, text in files.items():
        if name == "tokenizer_config.json":
            stored = json.loads(text.replace('"T"', f'"T{mark}"').replace('"U"', f'"U{mark}"'))
            own = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(own | stored))
        else:
            write(folder, {name: text.replace('"P"', f'"P{mark}"') if name.endswith(".json") else text.strip() + mark})


def run(place: Path, *adapters: str, **options: Any) -> list[str]:
    warnings: list[str] = []
    with warnings_to(warnings.append):
        merge(place / "base", [place / name for name in adapters or ("adapter",)], place / "out", **options)
    return warnings


@pytest.mark.parametrize("of_base", FORMS)
@pytest.mark.parametrize("of_adapter", FORMS)
def test_the_adapter_s_chat_template_wins_in_every_form(of_base: str, of_adapter: str, place: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for folder, form, mark in (("base", of_base, " of the base"), ("adapter", of_adapter, " of the adapter")):
        save_tokenizer(place / folder)
        add_template(place / folder, FORMS[form][0], mark)
    run(place)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "out")
    winner, mark = (of_base, " of the base") if of_adapter == "none" else (of_adapter, " of the adapter")
    wanted = {name: text.strip() + mark for name, text in FORMS[winner][1].items()}
    stored = tokenizer.chat_template or {}
    assert ({"default": stored} if isinstance(stored, str) else stored) == (
        {} if winner == "processor" and of_adapter == "none" and not stored else wanted
    )


def test_two_adapters_with_one_template_in_two_forms(place: Path) -> None:
    save_adapter(place / "other", lora({NAME: (8, 8)}, seed=5))
    (place / "other" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "T"}))
    (place / "adapter" / "chat_template.jinja").write_text("T")
    run(place, "adapter", "other")
    assert templates.read(place / "out") == {"default": "T"}
    (place / "adapter" / "chat_template.jinja").write_text("another")
    with pytest.raises(IncompatibleAdapter, match="different tokenizers") as refusal:
        run(place, "adapter", "other", force=True)
    assert refusal.value.problems == (f"{place / 'other'}: its chat template differs from that of another adapter",)


def test_a_tokenizer_with_more_tokens_than_rows(place: Path) -> None:
    save_tokenizer(place / "base")
    assert run(place) == []
    save_tokenizer(place / "adapter", "<|im_start|>", "<|im_end|>")
    assert run(place, force=True) == [
        "the tokenizer has 5 tokens, and model.embed_tokens.weight has 3 rows: ids from 3 on are beyond the model"
    ]
    (place / "adapter" / "tokenizer.json").unlink()
    (place / "base" / "added_tokens.json").write_text('{"<x>": 3}')
    assert "the tokenizer has 4 tokens" in run(place, force=True)[0]


def test_other_vocabularies_leave_the_base_s_added_tokens_behind(place: Path) -> None:
    for folder in ("base", "adapter"):
        save_tokenizer(place / folder)
    (place / "base" / "added_tokens.json").write_text('{"<old>": 2}')
    assert "added_tokens.json" in run(place)[0]
    assert not (place / "out" / "added_tokens.json").exists()


def test_unmerged_weights_stay_behind_and_are_named(place: Path) -> None:
    kept = {"tekken.json": "{}", "modeling_x.py": "", "assets/a.png": "", "LICENSE": "MIT"}
    left = {"pytorch_model.bin": "", "rust_model.ot": "", "onnx/model.onnx_data": "", "adapter_config.json": "{}",
            "model.safetensors.index.fp16.json": "{}", "model.fp16.safetensors": "", "new.format": ""}  # fmt: skip
    write(place / "base", kept | left)
    warnings = run(place)
    assert warnings[0].startswith(f"{place / 'base' / 'adapter_config.json'}: the base's folder holds an adapter too")
    assert f"{place / 'base'}: 7 files stay behind" in warnings[1]
    assert all(name in warnings[1] for name in left)
    written = {str(path.relative_to(place / "out")) for path in (place / "out").rglob("*") if path.is_file()}
    assert written == {*kept, "config.json", "model.safetensors", "loratools.json", "README.md"}


@pytest.mark.parametrize(
    "where",
    [
        "base/notes.txt", "base/sub", "adapter/tokenizer.json", "adapter/chat_template.jinja", "adapter/config.json",
        "adapter/additional_chat_templates/x.jinja",
    ],
)  # fmt: skip
def test_links_that_lead_elsewhere(where: str, place: Path) -> None:
    (place / "secret").mkdir()
    (place / "secret" / "key").write_text("secret")
    link = place / where
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(place / "secret" / ("" if where == "base/sub" else "key"))
    with pytest.raises(BadFile, match=r"leads? out of it") as refusal:
        run(place)
    assert refusal.value.problems[0].startswith(f"{link}: leads to {place / 'secret'}")
    assert not (place / "out").exists()


def test_links_are_not_pushed(place: Path) -> None:
    (place / "key").write_text("secret")
    (place / "adapter" / "notes.txt").symlink_to(place / "key")
    with pytest.raises(BadFile, match=r"leads? out of it"):
        subject.read(place / "adapter", "org/base")
