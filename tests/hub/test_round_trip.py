"""Push and pull against the local Hub: byte for byte, and never more than is needed."""

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from loratools import dialects
from loratools.errors import BadFile, OutputRefused
from loratools.hub.client import Hub
from loratools.hub.pull import RECORD, plan
from loratools.hub.pull import fetch as write
from loratools.hub.refs import Ref
from loratools.hub.subject import read
from loratools.surgery.inspect import AdapterSummary, inspect
from tests.hub.server import LocalHub
from tests.hub.server.client import api
from tests.hub.trips import REPO, contents, fetch, send, shelf, stored


@pytest.mark.parametrize("name", ["adapter", "sealed", "base"])
def test_what_was_pushed_comes_back_byte_for_byte(hub: LocalHub, workplace: Path, tmp_path: Path, name: str) -> None:
    done = send(workplace / name)
    got = fetch(tmp_path / "down")
    down = contents(tmp_path / "down")
    card = down.pop("README.md")
    assert down == contents(workplace / name)
    assert hub.files(REPO) == {**down, "README.md": card}
    assert done.new
    assert got.commit == done.commit == hub.commits(REPO)[0].oid
    assert len(hub.commits(REPO)) == 2  # the Hub's own first, and ours
    assert hub.log.leaks() == []


def test_a_second_push_makes_no_commit(hub: LocalHub, workplace: Path, tmp_path: Path) -> None:
    (workplace / "adapter" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nText.\n")
    first = send(workplace / "adapter")
    fetch(tmp_path / "down")
    hub.log.clear()
    for folder in (workplace / "adapter", tmp_path / "down"):
        again = send(folder)
        assert not again.new
        assert again.commit == first.commit
    assert [entry.target for entry in hub.log.select("POST|PUT")] == []
    assert len(hub.commits(REPO)) == 2


def test_only_what_changed_is_sent(hub: LocalHub, workplace: Path) -> None:
    send(workplace / "base")
    hub.log.clear()
    (workplace / "base" / "config.json").write_text('{"model_type": "llama"}')
    send(workplace / "base")
    assert hub.log.select("PUT") == []
    assert hub.files(REPO)["config.json"] == b'{"model_type": "llama"}'


def test_where_it_came_from_is_noted_and_not_pushed_again(hub: LocalHub, workplace: Path, tmp_path: Path) -> None:
    done = send(workplace / "adapter", revision="trial")
    fetch(tmp_path / "down", revision="trial")
    record = json.loads((tmp_path / "down" / RECORD).read_text())
    assert record == {"schema": 1, "repo": REPO, "commit": done.commit, "revision": "trial", "path": None}
    send(tmp_path / "down", "tester/other")
    assert hub.files("tester/other").keys() == hub.files(REPO, "trial").keys()
    assert hub.files(REPO) == {}  # main


def test_a_private_repository_with_a_message(hub: LocalHub, workplace: Path) -> None:
    send(workplace / "adapter", private=True, message="The first one")
    assert hub.store.repos[REPO].private
    assert hub.commits(REPO)[0].title == "The first one"


def test_a_pull_request(hub: LocalHub, workplace: Path, tmp_path: Path) -> None:
    hub.seed(REPO, {"notes.txt": b"x"})
    done = send(workplace / "adapter", create_pr=True)
    assert done.pull_request == f"{hub.endpoint}/{REPO}/discussions/1"
    assert hub.files(REPO) == {"notes.txt": b"x"}
    fetch(tmp_path / "down", revision="refs/pr/1")
    assert contents(workplace / "adapter").items() <= contents(tmp_path / "down").items()


def test_what_training_left_stays_here(hub: LocalHub, workplace: Path) -> None:
    folder = workplace / "adapter"
    own = contents(folder)
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", "rng_state.pth", ".env", "events.out.1"):
        (folder / name).write_bytes(b"hf_secret")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "adapter_model.safetensors").write_bytes(b"x")
    (folder / "picture.png").write_bytes(b"png")
    (folder / "LICENSE").write_text("MIT")
    send(folder)
    assert hub.files(REPO).keys() == own.keys() | {"README.md", "picture.png", "LICENSE"}


def test_shards_of_an_earlier_version_go(hub: LocalHub, workplace: Path, tmp_path: Path) -> None:
    from tests.make import tiny

    send(workplace / "base")
    hub.seed(REPO, {"model-notes.safetensors": b"another's"})
    single = tiny.save_llama(tmp_path / "one", tiny.llama_weights(seed=3), shards=1)
    send(single)
    assert hub.files(REPO).keys() == {"config.json", "model.safetensors", "model-notes.safetensors", "README.md"}
    fetch(tmp_path / "down")
    assert (tmp_path / "down" / "model.safetensors").read_bytes() == (single / "model.safetensors").read_bytes()


def test_a_sealed_file_becomes_a_folder_that_peft_finds(hub: LocalHub, workplace: Path, tmp_path: Path) -> None:
    single = tmp_path / "mine.safetensors"
    single.write_bytes((workplace / "sealed" / "adapter_model.safetensors").read_bytes())
    send(single)
    sent = hub.files(REPO)
    sent.pop("README.md")
    assert sent == contents(workplace / "sealed")


def test_a_damaged_adapter_is_not_pushed(hub: LocalHub, workplace: Path) -> None:
    weights = workplace / "sealed" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0xFF
    weights.write_bytes(data)
    with pytest.raises(BadFile, match="I-02"):
        send(workplace / "sealed")
    assert hub.log.select() == []


def test_pull_takes_one_set_of_weights_and_no_training_state(hub: LocalHub, workplace: Path, tmp_path: Path) -> None:
    stored(hub, workplace / "adapter", REPO)
    names = ("adapter_model.bin", "optimizer.pt", "runs/events.out.1", "checkpoint-9/adapter_model.safetensors")
    more = dict.fromkeys(names, b"x" * 1000)
    hub.seed(REPO, {**more, "sample.png": b"png", "tokenizer.json": b"{}", "README.md": b"# Mine"})
    fetch(tmp_path / "down")
    assert contents(tmp_path / "down") == {
        **contents(workplace / "adapter"), "tokenizer.json": b"{}", "README.md": b"# Mine",
    }  # fmt: skip
    assert hub.log.select("GET", "optimizer|events|adapter_model.bin|checkpoint-9|sample") == []


def test_a_folder_and_a_file_of_a_repository(hub: LocalHub, workplace: Path, tmp_path: Path) -> None:
    own = contents(workplace / "adapter")
    hub.seed(REPO, {**{f"run/best/{name}": data for name, data in own.items()}, "README.md": b"top"})
    fetch(tmp_path / "folder", path="run/best")
    assert contents(tmp_path / "folder") == own
    fetch(tmp_path / "file", path="run/best/adapter_model.safetensors")
    assert contents(tmp_path / "file") == own  # the file, and the config without which it says little
    with pytest.raises(BadFile, match="no file or folder run/worst"):
        fetch(tmp_path / "none", path="run/worst")
    assert "none" not in shelf(tmp_path)


def test_an_existing_output_is_refused_before_anything_is_fetched(
    hub: LocalHub, workplace: Path, tmp_path: Path
) -> None:
    stored(hub, workplace / "adapter", REPO)
    prepared = plan(Hub(), Ref(REPO))
    hub.log.clear()
    with pytest.raises(OutputRefused, match="exists already"):
        write(prepared, workplace)
    assert hub.log.select() == []


def test_the_base_that_an_adapter_names_is_looked_up(hub: LocalHub, workplace: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from loratools.dialects import open_adapter, save_adapter
    from tests.make import tiny

    adapter = open_adapter(workplace / "sealed")
    assert adapter.base is not None
    with_id = replace(adapter, base=replace(adapter.base, id="lab/base"))
    save_adapter(with_id, tmp_path / "named")
    send(tmp_path / "named")
    missing = fetch(tmp_path / "1").base
    assert missing is not None
    assert missing.same is None
    assert "no such repository" in missing.reason
    stored(hub, workplace / "base", "lab/base")
    hub.log.clear()
    right = fetch(tmp_path / "2").base
    assert right is not None
    assert right.same is True
    ranges = [entry.range for entry in hub.log.select("GET", r"lab/base/resolve.*safetensors$")]
    assert ranges == ["bytes=0-65535"] * 2
    tiny.save_llama(tmp_path / "other", tiny.llama_weights(layers=3))
    stored(hub, tmp_path / "other", "lab/base")
    wrong = fetch(tmp_path / "3").base
    assert wrong is not None
    assert wrong.same is False


def test_what_no_dialect_knows_is_pulled_with_a_note(hub: LocalHub, tmp_path: Path) -> None:
    import torch

    save_file({"something": torch.zeros(3)}, tmp_path / "odd.safetensors")
    hub.seed(REPO, {"odd.safetensors": (tmp_path / "odd.safetensors").read_bytes()})
    done = fetch(tmp_path / "down")
    assert len(done.notes) == 1
    assert "no dialect knows" in done.notes[0]


def test_the_hub_finds_what_its_snippet_needs(hub: LocalHub, workplace: Path) -> None:
    hub.seed("lab/base", {"README.md": b"---\nlicense: apache-2.0\n---\n"})
    send(workplace / "adapter", base_model="lab/base")
    info = api(hub).model_info(REPO)
    assert info.config is not None
    assert info.config["peft"] == {"base_model_name_or_path": "tiny-llama", "task_type": "CAUSAL_LM"}
    assert info.card_data is not None
    assert info.card_data.to_dict() == {
        "base_model": "lab/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:lab/base", "lora", "loratools", "transformers"],
    }


def test_a_repository_of_one_checkpoint_is_that_adapter(hub: LocalHub, workplace: Path, tmp_path: Path) -> None:
    own = contents(workplace / "adapter")
    hub.seed(REPO, {**{f"checkpoint-9/{name}": data for name, data in own.items()}, "README.md": b"top"})
    opened = dialects.open_adapter(f"hf://{REPO}")
    assert opened.updates.keys() == dialects.open_adapter(workplace / "adapter").updates.keys()
    summary = inspect(f"hf://{REPO}")
    assert isinstance(summary, AdapterSummary)
    assert {module.module for module in summary.modules} == opened.updates.keys()
    hub.seed(REPO, {f"checkpoint-10/{name}": data for name, data in own.items()})
    with pytest.raises(BadFile, match="several in its folders"):
        fetch(tmp_path / "none")


def test_a_folder_above_an_adapter_is_not_pushed(workplace: Path) -> None:
    (workplace / "run").mkdir()
    (workplace / "adapter").rename(workplace / "run" / "checkpoint-9")
    with pytest.raises(BadFile, match="no adapter at the top") as refusal:
        read(workplace / "run", None)
    assert refusal.value.hint == f"Push {workplace / 'run' / 'checkpoint-9'}."
