"""Chat templates in all their forms, against what transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loratools.errors import BadFile
from loratools.storage.beside import templates

# form -> the files of a tokenizer's folder, and the templates that it has
FORMS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "inline": ({"tokenizer_config.json": json.dumps({"chat_template": "T"})}, {"default": "T"}),
    "inline, named": (
        {"tokenizer_config.json": json.dumps({"chat_template": [{"name": "default", "template": "T"},
                                                                {"name": "tool_use", "template": "U"}]})},
        {"default": "T", "tool_use": "U"},
    ),
    "file": ({"chat_template.jinja": "T\r\n"}, {"default": "T\r\n"}),
    "file and inline": (
        {"chat_template.jinja": "T", "tokenizer_config.json": json.dumps({"chat_template": "not this"})},
        {"default": "T"},
    ),
    "files": ({"chat_template.jinja": "T", "additional_chat_templates/rag.jinja": "R"}, {"default": "T", "rag": "R"}),
    "older folder": ({"chat_template.jinja": "T", "chat_templates/rag.jinja": "R"}, {"default": "T", "rag": "R"}),
    "processor": ({"chat_template.json": json.dumps({"chat_template": "P"})}, {"default": "P"}),
    "none": ({"tokenizer_config.json": "{}"}, {}),
}  # fmt: skip


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(form: str, tmp_path: Path) -> None:
    files, wanted = FORMS[form]
    assert templates.read(write(tmp_path, files)) == wanted
    assert templates.read(write(tmp_path / "written", templates.files_of(wanted) | {"x": ""})) == wanted


def test_names_that_are_no_file_names(tmp_path: Path) -> None:
    for name in ("../../x", "a/b", "", ".hidden", "a\nb"):
        with pytest.raises(BadFile, match="no name that a chat template can have"):
            templates.files_of({"default": "T", name: "U"})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(BadFile, match="no UTF-8"):
        templates.read(tmp_path)


def test_what_is_a_template() -> None:
    assert all(templates.is_template(name) for files, _ in FORMS.values() for name in files if name != templates.CONFIG)
    assert not any(map(templates.is_template, ("tokenizer_config.json", "a/chat_template.jinja", "x.jinja")))
