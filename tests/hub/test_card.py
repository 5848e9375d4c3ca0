"""The card keeps what a person wrote, byte for byte, and says what the Hub takes."""

from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from loratools.errors import BadFile, HubError
from loratools.hub.card import merged, parse, public
from tests.hub.server import LocalHub
from tests.hub.server import card as the_hubs
from tests.hub.trips import REPO, send

FACTS = {"base_model": "org/base", "library_name": "peft", "license": "mit", "tags": ["lora", "loratools"]}


def front(text: str) -> dict[str, object]:
    """Return the front matter as the Hub reads it."""
    fields = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(fields, dict)
    return fields


def person(text: str) -> str:
    """Return what stands between the front matter and our section."""
    return text.split("---\n", 2)[2].split("<!-- loratools")[0].strip("\n")


def merge(local: str | None, remote: str | None, section: str = "the section", **more: object) -> str:
    """Merge two cards."""
    return merged(local, remote, FACTS, section, force=more.pop("force", {}), **more)  # type: ignore[arg-type]


def test_a_new_card() -> None:
    text = merge(None, None)
    assert front(text) == FACTS
    assert the_hubs.check(text) == ([], [])
    assert "the section\n<!-- /loratools card -->\n" in text


HUMAN = """---
# my remark
license: apache-2.0   # kept
language:
- en
tags:
- mine
- lora
# about the data
datasets: [a, b]
extra: {x: 1}
---

# My adapter

It *does* things.

---

<!-- a remark -->
| a | b |
"""


def test_every_line_of_a_person_stays() -> None:
    text = merge(HUMAN, None)
    assert person(text) == HUMAN.split("---\n", 2)[2].strip("\n")
    lines = text.split("---\n")[1].splitlines()
    kept = [line for line in HUMAN.split("---\n")[1].splitlines() if line not in ("tags:", "- mine", "- lora")]
    assert [line for line in lines if line in kept] == kept
    assert front(text) == {
        **front(HUMAN), "tags": ["mine", "lora", "loratools"], "base_model": "org/base", "library_name": "peft",
    }  # fmt: skip
    assert merge(HUMAN, text) == text


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_card_without_front_matter(ending: str) -> None:
    text = merge(f"# Title{ending}{ending}Text{ending}", None)
    assert person(text) == "# Title\n\nText"
    assert front(text) == FACTS


def test_forced_fields_replace_and_others_do_not() -> None:
    text = merge("---\nlicense: gemma\nbase_model: other/base\n---\n", None, force={"license": "apache-2.0"})
    assert front(text)["license"] == "apache-2.0"
    assert front(text)["base_model"] == "other/base"
    assert text.index("license") < text.index("base_model")


def test_the_section_is_replaced_and_the_text_around_it_stays() -> None:
    first = merge("# Mine\n", None)
    edited = first.replace("# Mine", "# Mine\n\nMore.") + "\nBelow the section.\n"
    text = merge(None, edited, "a new section")
    assert person(text) == "# Mine\n\nMore.\n\nBelow the section."
    assert text.count("<!-- loratools card") == 1
    assert "the section\n" not in text.replace("a new section", "")
    assert merge(None, text, "a new section") == text


def test_which_side_changed_is_known() -> None:
    local = "# Mine\n"
    pushed = merge(local, None)
    on_the_hub = pushed.replace("# Mine", "# Edited on the Hub")
    kept = merge(local, on_the_hub)  # the folder's is as it was
    assert person(kept) == "# Edited on the Hub"
    assert person(merge(local, kept)) == "# Edited on the Hub"  # and stays so the next time
    assert person(merge("# Edited here\n", pushed)) == "# Edited here"
    both = "# Edited here\n", on_the_hub
    with pytest.raises(HubError, match="two different texts") as caught:
        merge(*both)
    assert "--card local" in str(caught.value.hint)
    assert person(merge(*both, keep="local")) == "# Edited here"
    assert person(merge(*both, keep="hub")) == "# Edited on the Hub"
    merged_card = merge(*both, keep="local")
    assert merge("# Edited here\n", merged_card) == merged_card


def test_a_card_on_the_hub_that_loratools_never_saw() -> None:
    only_licence = "---\nlicense: mit\n---\n"
    assert person(merge("---\nlicense: mit\n---\n# Mine\n", only_licence)) == "# Mine"
    assert person(merge("# Same\n", "---\nlicense: mit\n---\n# Same\n")) == "# Same"
    with pytest.raises(HubError, match="two different texts"):
        merge("# Mine\n", "# Theirs\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---\na: 1\n# never closed", "not closed"),
        ("---\na: [1\n---\n", "not plain YAML"),
        ("---\n- a\n---\n", "names and values"),
    ],
)
def test_front_matter_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(BadFile, match=message):
        merge(text, None)


def test_parse_takes_nothing_for_a_section_that_is_none() -> None:
    text = "a\n<!-- loratools merge -->\nb\n<!-- /loratools merge -->\n---\nc"
    assert parse(text).text == text


# On the Hub


def test_the_licence_of_the_base_is_taken_over_with_its_name(hub: LocalHub, workplace: Path) -> None:
    card = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\npipeline_tag: text-classification\n---\n"
    hub.seed("lab/base", {"README.md": card.encode()})
    send(workplace / "adapter", base_model="lab/base")
    data = front(hub.files(REPO)["README.md"].decode())
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "own", "LICENSE")
    assert data["pipeline_tag"] == "text-generation"  # what the adapter says of itself


def test_a_licence_is_never_guessed(hub: LocalHub, workplace: Path) -> None:
    from loratools.hub import push

    prepared = push.prepare(workplace / "adapter", REPO, base_model="lab/none")
    assert "license" not in front(prepared.card)
    assert any("states no licence" in note for note in prepared.notes)
    assert any("lab/none" in note for note in prepared.notes)
    asked = push.prepare(workplace / "adapter", REPO, license="mit")
    assert front(asked.card)["license"] == "mit"
    assert not any("licence" in note for note in asked.notes)


def test_a_persons_text_on_the_hub_outlives_pushes(hub: LocalHub, workplace: Path) -> None:
    (workplace / "adapter" / "README.md").write_text("# As trained\n")
    send(workplace / "adapter")
    text = hub.files(REPO)["README.md"].decode()
    hub.seed(REPO, {"README.md": text.replace("# As trained", "# As I say it\n\nCare.").encode()})
    (workplace / "adapter" / "tokenizer.json").write_text("{}")
    for _ in range(2):
        send(workplace / "adapter")
        assert person(hub.files(REPO)["README.md"].decode()) == "# As I say it\n\nCare."
    assert len(hub.commits(REPO)) == 4


def test_no_path_of_this_machine_is_sent(hub: LocalHub, workplace: Path) -> None:
    from tests.make import tiny

    path = "/home/somebody/models/llama"
    tiny.save_peft(workplace / "local", tiny.lora_factors(), base=path)
    (workplace / "local" / "README.md").write_text(
        f"---\nbase_model: {path}\ntags:\n- base_model:adapter:{path}\n- lora\n---\nTuned from [{path}]({path}).\n"
    )
    with pytest.raises(BadFile, match=r"adapter_config\.json names the base model by a path of this machine") as caught:
        send(workplace / "local")
    assert "--base-model" in str(caught.value.hint)
    hub.seed("lab/base", {})
    send(workplace / "local", base_model="lab/base")
    assert not [name for name, data in hub.files(REPO).items() if b"somebody" in data]
    data = front(hub.files(REPO)["README.md"].decode())
    assert data["base_model"] == "lab/base"
    assert data["tags"] == ["base_model:adapter:lab/base", "lora", "loratools", "transformers"]
    assert b'"base_model_name_or_path": "lab/base"' in hub.files(REPO)["adapter_config.json"]
    with pytest.raises(BadFile, match="not the name of a model"):
        send(workplace / "adapter", base_model="../x")


def test_a_path_is_said_to_stand_where_it_stands(workplace: Path, tmp_path: Path) -> None:
    from loratools.adapter.model import Adapter, BaseIdentity
    from loratools.dialects import save_adapter
    from tests.dialects.adapters import lora

    base = BaseIdentity("C:\\Users\\anna\\models\\sd_xl_base_1.0.safetensors")
    module = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    file = tmp_path / "char.safetensors"
    save_adapter(Adapter({module: lora(1)}, base=base), file, dialect="kohya")
    with pytest.raises(BadFile, match=r"char\.safetensors: ss_sd_model_name names the base model by a path"):
        send(file)


def test_text_of_a_file_cannot_break_out_of_its_cell(hub: LocalHub, workplace: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from loratools.adapter.model import Step
    from loratools.dialects import open_adapter, save_adapter

    step = Step("a|b`c\n<!-- /loratools card -->", "<script>alert(1)</script>")
    adapter = replace(open_adapter(workplace / "sealed"), provenance=(step,))
    save_adapter(adapter, tmp_path / "odd")
    send(tmp_path / "odd")
    text = hub.files(REPO)["README.md"].decode()
    assert text.count("<!--") == 2
    assert "<script" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| made by")]
    assert row.count("|") == 3
    assert row.count("`") == 2


def test_a_merged_model(hub: LocalHub, workplace: Path) -> None:
    from loratools.surgery.merge import merge as merge_models

    (workplace / "base" / "README.md").write_text("# The base\n")
    merge_models(workplace / "base", [workplace / "adapter"], workplace / "new")
    hub.seed("lab/base", {"README.md": b"---\nlicense: mit\n---\n"})
    send(workplace / "new", base_model="lab/base")
    text = hub.files(REPO)["README.md"].decode()
    data = front(text)
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("lab/base", "finetune", "mit")
    assert {"merge", "loratools"} <= set(data["tags"])  # type: ignore[call-overload]
    assert "## How this model was made" in text
    assert the_hubs.check(text) == ([], [])


def test_paths_are_cut_to_the_names_that_they_end_with() -> None:
    text = "Run `/usr/bin/env x`, see /home/ann/notes/a.txt.\n"
    readme = f"---\nbase_model: /srv/models/x\ndatasets: [C:\\data\\y]\n---\n{text}"
    assert public(readme) == "---\nbase_model: x\ndatasets: [y]\n---\nRun `/usr/bin/env x`, see a.txt.\n"
    assert public("text https://a.org/b/c\n") == "text https://a.org/b/c\n"


def test_one_base_model_and_it_is_that_of_the_config(hub: LocalHub, workplace: Path) -> None:
    from tests.make import tiny

    tiny.save_peft(workplace / "own", tiny.lora_factors(), base="lab/base")
    (workplace / "own" / "README.md").write_text(
        "---\nbase_model: other/base\ntags: ['base_model:adapter:other/base', mine]\n---\nSee /home/ann/x/notes.txt\n"
    )
    hub.seed("lab/base", {})
    notes = send(workplace / "own").notes
    text = hub.files(REPO)["README.md"].decode()
    data = front(text)
    assert data["base_model"] == "lab/base"
    assert data["tags"] == ["mine", "base_model:adapter:lab/base", "lora", "loratools", "transformers"]
    assert "other" not in text
    assert "ann" not in text
    assert any("names the base model other/base" in note for note in notes)
    assert any("paths of a machine" in note for note in notes)


def test_an_approximate_unmerge_is_called_that(hub: LocalHub, workplace: Path) -> None:
    from loratools import inspect, merge, unmerge

    merge(workplace / "base", workplace / "adapter", workplace / "m")
    unmerge(workplace / "m", workplace / "adapter", workplace / "u")
    card = (workplace / "u" / "README.md").read_text()
    assert "An approximate unmerge with loratools" in card
    assert front(card)["tags"] == ["loratools", "unmerge"]
    assert "base_model_relation" not in front(card)
    summary = inspect(workplace / "u")
    assert summary.type == "checkpoint"
    send(workplace / "u")
    text = hub.files(REPO)["README.md"].decode()
    assert "| made by | `approximate unmerge, 1 taken out, by loratools" in text
    assert "merge" not in front(text)["tags"]  # type: ignore[operator]
