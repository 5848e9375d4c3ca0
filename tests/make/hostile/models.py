"""Indexes, configs, model cards and tokenizers of a base."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.make.hostile import hostile
from tests.make.hostile.headers import MILLION, entry, pair, peft, write

INDEX = "model.safetensors.index.json"
MERGE = "merge base adapter -o out"
WEIGHT = "q_proj.weight"


def index(folder: Path, weight_map: object) -> None:
    (folder / "base").mkdir()
    (folder / "base" / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def base(folder: Path, **files: str) -> None:
    """Write a base of one weight and an adapter for it; `files` by names with _ for a dot."""
    (folder / "base").mkdir()
    write(folder / "base" / "model.safetensors", {WEIGHT: entry([4, 4], 0, 64)}, bytes(64))
    (folder / "base" / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    for name, text in files.items():
        (folder / "base" / ".".join(name.rsplit("_", 1))).write_text(text)
    peft(folder, pair(), b"\0\0\x80\x3f" * 8)


@hostile("hash base", r"an index of 1000000 files")
def an_index_of_a_million_files(folder: Path) -> None:
    index(folder, {f"t{i}": f"model-{i:07d}.safetensors" for i in range(MILLION)})


@hostile("hash base", r"index and shards do not agree: 999999 problem")
def an_index_of_a_million_names(folder: Path) -> None:
    index(folder, {f"t{i}": "model-00001-of-00001.safetensors" for i in range(MILLION)})
    write(folder / "base" / "model-00001-of-00001.safetensors", {"t0": entry([1], 0, 4)}, bytes(4))


@hostile("hash base", r"must be a plain file name")
def an_index_that_leaves_its_folder(folder: Path) -> None:
    index(folder, {f"t{i}": f"{'../' * i}etc/passwd" for i in range(100)} | {"t": "/etc/passwd", "u": "a\0b"})


@hostile("hash base", r"expected weight_map")
def an_index_of_lists(folder: Path) -> None:
    index(folder, {"t": [["model.safetensors"]]})


@hostile("hash base", r"not a safetensors file|not the JSON")
def an_index_that_lists_itself(folder: Path) -> None:
    index(folder, {"t": INDEX})


@hostile("hash base", r"not a regular file")
def an_index_of_a_pipe(folder: Path) -> None:
    index(folder, {"t": "model-00001-of-00002.safetensors", "u": "model-00002-of-00002.safetensors"})
    for number in (1, 2):
        os.mkfifo(folder / "base" / f"model-0000{number}-of-00002.safetensors")


@hostile("hash base", r"larger than \d+ bytes")
def an_index_of_a_terabyte(folder: Path) -> None:
    index(folder, {})
    os.truncate(folder / "base" / INDEX, 2**40)


@hostile(MERGE, r"larger than \d+ bytes")
def a_config_of_a_terabyte(folder: Path) -> None:
    base(folder)
    os.truncate(folder / "base" / "config.json", 2**40)


@hostile(MERGE, r"larger than \d+ bytes|damaged|nested")
def a_config_of_empty_lists(folder: Path) -> None:
    base(folder, config_json='{"a":[' + "[]," * 30 * MILLION + "[]]}")


@hostile(MERGE, r"leads? out of it")
def a_config_that_is_a_device(folder: Path) -> None:
    base(folder)
    (folder / "base" / "config.json").unlink()
    (folder / "base" / "config.json").symlink_to("/dev/zero")


@hostile(MERGE, r"leads? out of it")
def links_in_a_circle(folder: Path) -> None:
    base(folder)
    (folder / "base" / "config.json").unlink()
    (folder / "base" / "config.json").symlink_to("config.json")


@hostile(MERGE, r"the result takes 4398046511\d\d\d bytes, the disk has|not a|bytes free|disk")
def a_base_of_four_sparse_terabytes(folder: Path) -> None:
    base(folder)
    header = {WEIGHT: entry([4, 4], 0, 64), "x": entry([2**40], 64, 64 + 4 * 2**40)}
    raw = len(json.dumps(header, separators=(",", ":")).encode())
    write(folder / "base" / "model.safetensors", header, size=8 + raw + 64 + 4 * 2**40)


@hostile(MERGE, None)
def a_card_of_a_million_lines(folder: Path) -> None:
    base(folder, README_md="---\nlicense: mit\n---\n" + "a line\n" * MILLION)


@hostile(MERGE, None)
def a_card_of_a_million_line_ends(folder: Path) -> None:
    base(folder, README_md="\n" * MILLION + "x")


@hostile(MERGE, None)
def a_card_of_sections_without_end(folder: Path) -> None:
    base(folder, README_md="<!-- loratools merge -->\n" * 200_000)


@hostile(MERGE, r"a model card of at most")
def a_card_of_a_terabyte(folder: Path) -> None:
    base(folder, README_md="x")
    os.truncate(folder / "base" / "README.md", 2**40)


@hostile(MERGE, None)
def a_tokenizer_nested_deeply(folder: Path) -> None:
    base(folder, tokenizer_json='{"model":' + "[" * MILLION + "]" * MILLION + "}")


@hostile(MERGE, None)
def a_tokenizer_of_a_number(folder: Path) -> None:
    base(folder, vocab_json='{"a":' + "9" * 10 * MILLION + "}")


@hostile(MERGE, None)
def a_tokenizer_whose_varint_never_ends(folder: Path) -> None:
    base(folder)
    (folder / "base" / "tokenizer.model").write_bytes(b"\x0a" + b"\xff" * MILLION)


@hostile(MERGE, None)
def a_tokenizer_of_a_sparse_gigabyte(folder: Path) -> None:
    base(folder, vocab_txt="x")
    os.truncate(folder / "base" / "vocab.txt", 2**30)


@hostile(MERGE, r"a chat template of at most")
def chat_templates_of_a_sparse_gigabyte(folder: Path) -> None:
    base(folder)
    (folder / "adapter" / "chat_template.jinja").write_text("x")
    (folder / "adapter" / "tokenizer_config.json").write_text("{}")
    os.truncate(folder / "adapter" / "chat_template.jinja", 2**30)


@hostile("merge base adapter -o out", r"not in the base; nearest")
def a_wrong_base_of_twenty_thousand_tensors(folder: Path) -> None:
    base(folder)
    names = [f"transformer.h.{i}.attn.c_{j}.weight" for i in range(2_000) for j in range(10)]
    write(folder / "base" / "model.safetensors", {name: entry([4, 4], 64 * i, 64 * i + 64) for i, name in
          enumerate(names)}, bytes(64 * len(names)))  # fmt: skip
    factors = {}
    for i in range(8_000):
        name = f"base_model.model.model.layers.{i // 7}.mlp.proj_{i % 7}.lora_%s.weight"
        factors |= {name % "A": entry([1, 4], 32 * i, 32 * i + 16), name % "B": entry([4, 1], 32 * i + 16, 32 * i + 32)}
    write(folder / "adapter" / "adapter_model.safetensors", factors, bytes(32 * 8_000))
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": "model.*"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
