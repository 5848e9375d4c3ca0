"""What files say is changed, in every layout, and nothing else: tensors, seals and results stay."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from loratools import convert, dialects, edit
from loratools.cli._run import run
from loratools.decisions import warnings_to
from loratools.errors import BadFile, InvalidOption, LoraToolsError, OutputRefused
from loratools.format.validate import validate
from loratools.storage.beside.front import data_of, parted
from loratools.surgery.edit.pictures import MOST, data_uri, without_texts
from tests.dialects.adapters import peft_folder, samples
from tests.hub.fixtures import hub, hub_home
from tests.hub.server import LocalHub

__all__ = ["hub", "hub_home"]

CARD = """---
base_model: org/base
tags:
- base_model:adapter:org/base
- lora
- mine
license: mit
---
# Hello

Read /home/johndoe/notes/a.txt first.
"""
UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
PRIVATE = {
    "ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "2", "ss_session_id": "1234",
    "ss_sd_model_name": "/home/johndoe/models/sd-v1-5.safetensors", "ss_vae_name": "C:\\Users\\johndoe\\vae\\kl-f8.pt",
    "ss_dataset_dirs": json.dumps({"10_ann smith": {"img_count": 5}}), "ss_output_name": "dog by johndoe",
    "ss_tag_frequency": json.dumps({"10_ann smith": {"ann smith": 10}}), "ss_training_comment": "for ann@doe.org",
    "ss_steps": "1500", "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))",
    "modelspec.author": "Jane Roe", "modelspec.description": "See https://hub.org/a/b/c or mail jane.roe@example.com",
    "modelspec.trigger_phrase": "sks dog", "modelspec.thumbnail": "data:image/jpeg;base64,/9j/4AAQ/SkZ/JRg",
    "ot_config": json.dumps({"concepts": [{"path": "/data/ann"}]}), "prompt": "a photo of ann smith",
    "extra": json.dumps({"run": {"host_name": "ann-pc", "steps": 5, "dir": "/mnt/x/y", "key": "v"}}),
}  # fmt: skip
GONE = ("johndoe", "ann", "Jane", "jane.roe", "1234", "/home", "Users", "/mnt", "/data")


def kohya(path: Path, metadata: dict[str, str] | None = None) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{UNET}.lora_down.weight": torch.randn(4, 16, generator=generator),
        f"{UNET}.lora_up.weight": torch.randn(16, 4, generator=generator),
        f"{UNET}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, path, metadata=PRIVATE if metadata is None else metadata)
    return path


def said(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def numbers(path: Path) -> dict[str, Any]:
    adapter = dialects.open_adapter(path)
    return {module: (update.scaling, update.delta_weight().tolist()) for module, update in adapter.updates.items()}


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "loratools", "mlx", "peft"])
def test_a_base_is_written_where_the_dialect_reads_it(tmp_path: Path, dialect: str) -> None:
    adapter = samples()["plain"]
    path = tmp_path / "a"
    dialects.save_adapter(adapter, path, dialect=dialect, allow_loss=True)
    before = numbers(path)
    edit(path, base="else/where", title="T")
    assert numbers(path) == before
    opened = dialects.open_adapter(path)
    assert opened.dialect == dialect
    assert opened.base is not None
    assert opened.base.id == "else/where"
    assert edit(path).facts.title == "T"
    if dialect == "loratools":
        assert validate(path) == []


def test_a_base_of_comfys_file(tmp_path: Path) -> None:
    names = [f"diffusion_model.double_blocks.0.img_attn.proj.lora_{part}.weight" for part in "AB"]
    save_file({names[0]: torch.ones(4, 16), names[1]: torch.ones(16, 4)}, tmp_path / "a.safetensors")
    edit(tmp_path / "a.safetensors", base="else/where")
    opened = dialects.open_adapter(tmp_path / "a.safetensors")
    assert opened.dialect == "comfy"
    assert opened.base is not None
    assert opened.base.id == "else/where"


def test_config_header_and_card_agree(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", revision="abc")
    (folder / "README.md").write_text(CARD)
    done = edit(folder, base="else/where", tags="pirate, mine", license="apache-2.0", trigger=["arr", "ahoy"])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"], config["r"]) == ("else/where", None, 4)
    front = data_of(parted((folder / "README.md").read_text())[0])
    assert front == {
        "base_model": "else/where", "tags": ["base_model:adapter:else/where", "lora", "pirate", "mine"],
        "license": "apache-2.0", "instance_prompt": "arr, ahoy",
    }  # fmt: skip
    assert "# Hello" in (folder / "README.md").read_text()
    entries = said(folder / "adapter_model.safetensors")
    assert entries["modelspec.license"] == "apache-2.0"
    assert (done.facts.base, done.facts.trigger) == ("else/where", ("arr", "ahoy"))
    assert edit(folder, trigger="").facts.trigger == ()
    assert "instance_prompt" not in (folder / "README.md").read_text()


def test_a_seal_holds_and_converting_keeps_what_was_written(tmp_path: Path) -> None:
    sealed, back = tmp_path / "sealed", tmp_path / "back.safetensors"
    dialects.save_adapter(dialects.open_adapter(kohya(tmp_path / "a.safetensors")), sealed)
    digest = dialects.open_adapter(sealed).settings["loratools"]["digest"]
    edit(sealed, trigger="arr", base="else/where", entries={"k": "v"}, strip=True)
    assert validate(sealed) == []
    assert dialects.open_adapter(sealed).settings["loratools"]["digest"] == digest
    # The path that told the name was cut short as it was sealed: what is left of the name nobody can know for one.
    assert not [
        word for word in GONE[1:] if word in (sealed / "adapter_model.safetensors").read_bytes().decode("latin-1")
    ]
    dialects.save_adapter(sealed, back, dialect="kohya")
    assert said(back).items() >= {"k": "v", "modelspec.trigger_phrase": "arr", "ss_sd_model_name": "else/where"}.items()


def test_a_sealed_adapter_names_no_path(tmp_path: Path) -> None:
    dialects.save_adapter(samples()["plain"], tmp_path / "a")
    with pytest.raises(InvalidOption) as refused:
        edit(tmp_path / "a", base="/models/x")
    assert "by no path" in refused.value.problems[0]


def test_strip_takes_out_what_is_private_and_says_what(tmp_path: Path) -> None:
    path = kohya(tmp_path / "a.safetensors")
    before = numbers(path)
    done = edit(path, strip=True)
    entries = said(path)
    assert not [word for word in GONE if word in json.dumps(entries)]
    assert numbers(path) == before
    assert {key: entries[key] for key in ("ss_network_dim", "ss_network_alpha", "ss_steps", "ss_optimizer")} == {
        key: PRIVATE[key] for key in ("ss_network_dim", "ss_network_alpha", "ss_steps", "ss_optimizer")
    }
    assert entries["modelspec.description"] == "See https://hub.org/a/b/c or mail "
    assert (entries["ss_sd_model_name"], entries["ss_vae_name"]) == ("sd-v1-5.safetensors", "kl-f8.pt")
    assert (entries["modelspec.trigger_phrase"], entries["modelspec.thumbnail"]) == (
        "sks dog", PRIVATE["modelspec.thumbnail"],
    )  # fmt: skip
    assert json.loads(entries["extra"]) == {"run": {"steps": 5, "dir": "y", "key": "v"}}
    told = {change.key.partition(".dir")[0]: (change.new, change.why) for change in done.changes}
    assert {key for key in told if key.startswith("extra")} == {"extra.run.host_name", "extra.run"}
    told = {key.partition(".run")[0]: value for key, value in told.items()}
    assert told.keys() == {key for key in PRIVATE if PRIVATE[key] != entries.get(key)}
    assert all(why for _, why in told.values())
    assert edit(path, strip=True).changes == ()


def test_strip_cleans_config_and_card(tmp_path: Path) -> None:
    pattern = ".*\\.self_attn\\.(q|v)_proj"
    base = "/home/johndoe/models/org-base"
    folder = peft_folder(tmp_path / "a", base_model_name_or_path=base, target_modules=pattern)
    (folder / "README.md").write_text(CARD.replace("org/base", base))
    before = numbers(folder)
    done = edit(folder, strip=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["target_modules"]) == ("org-base", pattern)
    card = (folder / "README.md").read_text()
    assert "johndoe" not in card
    assert "base_model:adapter:org-base" in card
    assert "Read a.txt first." in card
    assert numbers(folder) == before
    assert {(change.where, change.key) for change in done.changes} == {
        ("adapter_config.json", "base_model_name_or_path"), ("README.md", "base_model"), ("README.md", "tags"),
        ("README.md", "text"),
    }  # fmt: skip


def test_strip_leaves_out_what_a_run_left(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", base_model_name_or_path="org/base")
    (folder / "checkpoint-7").mkdir()
    left = ("training_args.bin", "trainer_state.json", "checkpoint-7/model.safetensors")
    for name in left:
        (folder / name).write_bytes(b"/home/johndoe")
    told: list[str] = []
    with warnings_to(told.append):
        edit(folder, strip=True)
    assert all(name in told[0] for name in left)
    assert all((folder / name).is_file() for name in left)
    done = edit(folder, tmp_path / "public", strip=True)
    assert {change.where for change in done.changes} == set(left)
    edit(folder, tmp_path / "whole", title="T")
    for name in left:
        assert (tmp_path / "whole" / name).is_file()
        assert not (tmp_path / "public" / name).exists()


def test_strip_takes_out_where_a_store_is(tmp_path: Path) -> None:
    path = kohya(tmp_path / "a.safetensors", {"ss_base": "s3://johns-bucket/run/sd.safetensors, https://hub.org/a"})
    edit(path, strip=True)
    assert said(path)["ss_base"] == "sd.safetensors, https://hub.org/a"


def test_a_field_of_the_manifest_is_told_alone(tmp_path: Path) -> None:
    edit(peft_folder(tmp_path / "a", base_model_name_or_path="org/base"), tmp_path / "b", title="T")
    convert(tmp_path / "b", tmp_path / "sealed")
    told = {(each.where, each.key): (each.old, each.new) for each in edit(tmp_path / "sealed", base="org/b").changes}
    assert told["manifest", "base_model.id"] == ("org/base", "org/b")


def test_what_lies_in_memory_has_no_files_to_edit() -> None:
    with pytest.raises(InvalidOption, match="expected a path"):
        edit({"a": torch.zeros(1)}, title="T")  # type: ignore[arg-type]


def test_what_decides_the_result_stays(tmp_path: Path) -> None:
    path = kohya(tmp_path / "a.safetensors")
    with pytest.raises(InvalidOption) as refused:
        edit(path, entries={"ss_network_alpha": "8", "sshs_model_hash": "0"}, unset=["ss_network_dim", "format"])
    assert len(refused.value.problems) == 4
    told: list[str] = []
    with warnings_to(told.append):
        edit(path, unset=["*", "nothing"])
    assert said(path).keys() == {"ss_network_module", "ss_network_dim", "ss_network_alpha"}
    assert "stay, for they decide" in told[0]
    assert "no entry nothing" in told[1]
    dialects.save_adapter(samples()["plain"], tmp_path / "s")
    with pytest.raises(InvalidOption, match="nothing was changed") as refused:
        edit(tmp_path / "s", unset=["loratools"])
    assert "the seal" in refused.value.problems[0]


def test_hashes_stay_true(tmp_path: Path) -> None:
    """As sd-scripts computes them (library/model_util.py, precalculate_safetensors_hashes)."""
    tensors = {f"{UNET}.lora_down.weight": torch.randn(4, 90_000), f"{UNET}.lora_up.weight": torch.randn(16, 4)}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"ss_steps": "1", "sshs_legacy_hash": "0", "sshs_model_hash": "m"})
    edit(path, entries={"ss_steps": "1000", "modelspec.title": "t"})
    file = io.BytesIO(save(tensors, {"ss_steps": "1000"}))
    file.seek(0x100000)
    assert said(path)["sshs_legacy_hash"] == hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
    assert said(path)["sshs_model_hash"] == "m"


def test_other_entries_of_a_fact_follow(tmp_path: Path) -> None:
    path = kohya(tmp_path / "a.safetensors", {"ss_trigger_words": '["old", "older"]', "ss_network_dim": "4"})
    edit(path, trigger="new, newer")
    assert said(path)["ss_trigger_words"] == '["new", "newer"]'
    assert said(path)["modelspec.trigger_phrase"] == "new, newer"


@pytest.mark.parametrize("single", [True, False])
def test_a_new_output_leaves_the_input(tmp_path: Path, single: bool) -> None:
    source = kohya(tmp_path / "a.safetensors") if single else peft_folder(tmp_path / "a")
    if not single:
        (source / "sub").mkdir()
        (source / "sub" / "more.txt").write_text("x")
    target = tmp_path / ("b.safetensors" if single else "b")
    before = {str(p): p.read_bytes() for p in [source, *source.rglob("*")] if p.is_file()}
    edit(source, target, title="T")
    assert {str(p): p.read_bytes() for p in [source, *source.rglob("*")] if p.is_file()} == before
    assert edit(target).facts.title == "T"
    assert numbers(target) == numbers(source)
    assert single or (target / "sub" / "more.txt").read_text() == "x"
    with pytest.raises(OutputRefused, match="exists already"):
        edit(source, target, title="T")
    edit(source, target, title="U", force=True)
    assert edit(target).facts.title == "U"
    with pytest.raises(OutputRefused):
        edit(source, tmp_path / ("c" if single else "c.safetensors"), title="T")


def test_nothing_is_written_without_need(tmp_path: Path) -> None:
    path = kohya(tmp_path / "a.safetensors")
    stamp = path.stat()
    assert edit(path).changes == ()
    assert [change.key for change in edit(path, title="T", dry_run=True).changes] == ["modelspec.title"]
    assert edit(path, unset=["zzz*"], entries={"ss_steps": "1500"}).files == {}
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (stamp.st_ino, stamp.st_mtime_ns)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_names_that_no_base_explains_do_not_matter(tmp_path: Path) -> None:
    names = [f"lora_unet_unheard_of_{i}_thing.lora_{part}.weight" for i in (0, 1) for part in ("down", "up")]
    path = tmp_path / "a.safetensors"
    save_file({name: torch.ones(4, 4) for name in names}, path, metadata={"ss_network_module": "networks.lora"})
    with pytest.raises(BadFile):
        dialects.open_adapter(path)
    assert edit(path, base="x/y", trigger="sks").dialect == "kohya"
    assert said(path).items() >= {"ss_sd_model_name": "x/y", "modelspec.trigger_phrase": "sks"}.items()


def test_a_models_file_is_taken_too(tmp_path: Path) -> None:
    save_file({"model.embed.weight": torch.ones(4, 4)}, tmp_path / "m.safetensors", metadata={"format": "pt"})
    assert edit(tmp_path / "m.safetensors", title="M").dialect == "model"
    assert said(tmp_path / "m.safetensors")["modelspec.title"] == "M"
    assert load_file(tmp_path / "m.safetensors")["model.embed.weight"].sum() == 16
    with pytest.raises(InvalidOption) as refused:
        edit(tmp_path / "m.safetensors", base="x/y")
    assert "no place" in refused.value.problems[0]


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0\0"))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*each) for each in chunks) + data + chunk(b"IEND", b"")


def jpeg(*segments: tuple[int, bytes]) -> bytes:
    parts = [b"\xff" + bytes([mark]) + struct.pack(">H", len(data) + 2) + data for mark, data in segments]
    return b"\xff\xd8" + b"".join(parts) + b"\xff\xda\x00\x02picture\xff\xd9"


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(n + struct.pack("<I", len(d)) + d + b"\0" * (len(d) % 2) for n, d in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    ("with_texts", "bare"),
    [
        (png((b"tEXt", b"parameters\0a photo of ann")), png()),
        (png((b"iTXt", b"x"), (b"gAMA", b"1234"), (b"eXIf", b"x")), png((b"gAMA", b"1234"))),
        (jpeg((0xE0, b"JFIF"), (0xE1, b"Exif\0GPS"), (0xFE, b"by ann")), jpeg((0xE0, b"JFIF"))),
        (
            webp((b"VP8X", b"\x0c" + b"\0" * 9), (b"VP8 ", b"abc"), (b"EXIF", b"x"), (b"XMP ", b"yy")),
            webp((b"VP8X", b"\x00" + b"\0" * 9), (b"VP8 ", b"abc")),
        ),
    ],
)
def test_pictures_keep_nothing_but_the_picture(tmp_path: Path, with_texts: bytes, bare: bytes) -> None:
    assert without_texts(with_texts) == bare == without_texts(bare)
    (tmp_path / "p").write_bytes(with_texts)
    path = kohya(tmp_path / "a.safetensors", {"ss_network_dim": "4"})
    edit(path, thumbnail=tmp_path / "p")
    kind, _, data = said(path)["modelspec.thumbnail"].partition(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg", "data:image/webp")
    assert base64.b64decode(data) == bare
    private = f"{kind};base64,{base64.b64encode(with_texts).decode()}"
    edit(path, entries={"modelspec.thumbnail": private})
    done = edit(path, strip=True)
    assert [change.why for change in done.changes] == ["what a picture says of its making"]
    assert said(path)["modelspec.thumbnail"].endswith(base64.b64encode(bare).decode())


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"<svg/>", "expected a picture"), (b"", "expected a picture"), (png()[:40], "damaged"),
        (jpeg((0xE0, b"JFIF"))[:8], "damaged"), (png() + b"\0" * MOST, "of more than"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(BadFile, match=match):
        data_uri(tmp_path / "p")


@pytest.mark.parametrize("reference", ["hf://org/name"])
def test_what_lies_on_the_hub_is_not_changed_in_place(reference: str) -> None:
    with pytest.raises(LoraToolsError, match="lies on the Hub"):
        edit(reference, title="T")


def test_what_lies_on_the_hub_becomes_a_folder_here(hub: LocalHub, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a")
    (folder / "README.md").write_text(CARD)
    hub.seed("lab/adapter", {path.name: path.read_bytes() for path in folder.iterdir()})
    done = edit("hf://lab/adapter", tmp_path / "b", title="T", base="lab/base")
    assert done.path == "hf://lab/adapter"
    assert numbers(tmp_path / "b") == numbers(folder)
    assert not [path for path in (tmp_path / "b").iterdir() if path.is_symlink()]
    assert data_of(parted((tmp_path / "b" / "README.md").read_text())[0])["base_model"] == "lab/base"


def test_the_command_shows_facts_entries_and_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = kohya(tmp_path / "a.safetensors")
    assert run(["edit", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "trigger words  sks dog" in shown
    assert "ss_session_id = 1234" in shown
    assert run(["edit", str(path), "--strip", "--set", "note=a=b\nc", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "- header: ss_session_id = 1234 (a session id)" in shown
    assert "+ header: note = a=b\\nc" in shown
    assert "nothing was written" in shown
    assert run(["edit", str(path), "--set", "nothing"]) == 2
    assert "give a key and a value" in capsys.readouterr().err
    assert run(["inspect", str(path), "--metadata"]) == 0
    shown = capsys.readouterr().out
    assert "frequent tags" in shown
    assert "ss_optimizer = torch" in shown
    assert run(["inspect", str(path), "--metadata", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["metadata"] == PRIVATE
    assert document["facts"]["steps"] == 1500


@pytest.mark.parametrize("layout", ["kohya", "loratools"])
@pytest.mark.parametrize("in_place", [True, False])
def test_strip_takes_out_how_the_file_was_made(layout: str, in_place: bool, tmp_path: Path) -> None:
    kohya(tmp_path / "k.safetensors", {"ss_network_module": "networks.lora"})
    source, edited = tmp_path / "k.safetensors", tmp_path / "e.safetensors"
    if layout == "loratools":
        source = tmp_path / "s.safetensors"
        assert run(["convert", str(tmp_path / "k.safetensors"), "--to", layout, "-o", str(source), "-q"]) == 0
    private = ["--author", "Jane Doe", "--set", "note=/home/jane.doe/secret"]
    assert run(["edit", str(source), *private, "-o", str(edited), "-q"]) == 0
    converted, public = tmp_path / "c.safetensors", tmp_path / "p.safetensors"
    assert run(["convert", str(edited), "--to", layout, "-o", str(converted), "-q"]) == 0
    for path in (edited, converted):
        assert b"Jane Doe" in path.read_bytes()
        keys = [change.key for change in edit(path, strip=True, dry_run=True).changes]
        assert "loratools.recipe" in keys
        assert run(["edit", str(path), "--strip", "-q", *([] if in_place else ["-o", str(public), "--force"])]) == 0
        stripped = path if in_place else public
        assert not [word for word in (b"Jane", b"jane.doe", b"loratools.recipe") if word in stripped.read_bytes()]
        assert edit(stripped, strip=True, dry_run=True).changes == ()
        assert load_file(stripped).keys() == load_file(converted).keys()
    assert layout == "kohya" or validate(stripped) == []


def test_unset_takes_out_how_the_file_was_made(tmp_path: Path) -> None:
    source, edited, bare = kohya(tmp_path / "k.safetensors"), tmp_path / "e.safetensors", tmp_path / "b.safetensors"
    assert run(["edit", str(source), "--author", "Jane Doe", "-o", str(edited), "-q"]) == 0
    assert run(["edit", str(edited), "--unset", "loratools.recipe", "-o", str(bare), "-q"]) == 0
    assert said(bare).keys() == said(edited).keys() - {"loratools.recipe"}
    assert run(["edit", str(edited), "--unset", "loratools.*", "-q"]) == 0
    assert said(edited) == said(bare)
    with pytest.raises(InvalidOption, match="nothing was changed"):
        edit(bare, entries={"loratools.recipe": "{}"})


@pytest.mark.parametrize(
    ("title", "left"),
    [
        ("ohwx_woman by Jane", "ohwx_woman"), ("ohwx by jane.doe + ink by Jane Doe", "ohwx + ink"), ("Jane", None),
        ("dog (Jane Doe)", "dog"), ("jane.doe - dog", "dog"), ("dog_by_Jane", "dog"), ("standby", "standby"),
    ],
)  # fmt: skip
def test_titles_lose_names_cleanly(title: str, left: str | None, tmp_path: Path) -> None:
    of_people = {"a": "/home/jane.doe/x", "b": "D:\\Users\\Jane\\x", "modelspec.author": "Jane Doe"}
    path = kohya(tmp_path / "k.safetensors", of_people | {"modelspec.title": title})
    edit(path, strip=True)
    assert said(path).get("modelspec.title") == left


def test_a_picture_is_told_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = kohya(tmp_path / "k.safetensors"), tmp_path / "p.png"
    picture.write_bytes(png((b"IDAT", zlib.compress(bytes(range(256)) * 4))))
    assert run(["edit", str(path), "--thumbnail", str(picture)]) == 0
    assert run(["edit", str(path)]) == 0
    assert run(["inspect", str(path), "--metadata"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("a picture, ") == 4
    assert "base64" not in shown


def test_what_goes_from_a_record_is_told_by_field(tmp_path: Path) -> None:
    entry = {"digest": "blake3:0", "header": {"modelspec.author": "Jane Doe", "modelspec.title": "dog"}}
    record = {"operation": "merge", "adapters": [entry], "recipe": {"command": "merge", "options": {"note": "x"}}}
    path = kohya(tmp_path / "k.safetensors", {"loratools.record": json.dumps(record)})
    keys = {change.key for change in edit(path, strip=True).changes}
    assert keys == {"loratools.record.adapters.1.header.modelspec.author", "loratools.record.recipe"}
    left = json.loads(said(path)["loratools.record"])
    assert left == {"operation": "merge", "adapters": [entry | {"header": {"modelspec.title": "dog"}}]}
