"""What lies beside the tensors: files of a right merge, each spoiled in one way, and merges that others wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools.cli._run import run
from loratools.errors import BadFile
from loratools.surgery.merge import merge
from loratools.surgery.unmerge import unmerge
from loratools.surgery.verify import Verification, verify
from tests.surgery.models import lora, random, save_adapter, save_base

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 10000.0, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "rope_scaling": {"factor": 2.0, "type": "linear"}, "transformers_version": "4.40.0",
    "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"},
}  # fmt: skip
MODEL = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
TOKENIZER = {"version": "1.0", "model": MODEL, "added_tokens": []}
FILES = {
    "tokenizer.json": json.dumps(TOKENIZER),
    "tokenizer_config.json": json.dumps({"eos_token": "b", "chat_template": "{{ messages }}", "model_max_length": 64}),
    "generation_config.json": json.dumps({"temperature": 0.6, "eos_token_id": 1}),
    "preprocessor_config.json": json.dumps({"image_mean": [0.5]}),
    "merges.txt": "#version: 0.2\n", "modeling_own.py": "class Own: ...\n", "README.md": "# base\n", "LICENSE": "MIT\n",
}  # fmt: skip
Q = "model.layers.0.self_attn.q_proj"
Edit = Callable[[Path], object]


def write(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def fields(name: str, **changes: object) -> Edit:
    """Return an edit of fields of a JSON file; None takes one out."""

    def edit(model: Path) -> None:
        document = json.loads((model / name).read_text()) | changes
        kept = {key: value for key, value in document.items() if value is not None}
        (model / name).write_text(json.dumps(kept, indent=1))

    return edit


def text(name: str, content: str) -> Edit:
    return lambda model: (model / name).write_text(content)


def without(name: str) -> Edit:
    return lambda model: (model / name).unlink()


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """Save `base`, `adapter`, and `model`, their merge."""
    weights = {"model.embed_tokens.weight": random(16, 24, seed=1, dtype=torch.bfloat16)}
    weights |= {"lm_head.weight": random(16, 24, seed=2, dtype=torch.bfloat16)}
    weights |= {f"{Q}.weight": random(24, 24, seed=3, dtype=torch.bfloat16)}
    base = write(save_base(tmp_path / "base", weights, **CONFIG), FILES)
    merge(base, save_adapter(tmp_path / "adapter", lora({Q: (24, 24)})), tmp_path / "model")
    return tmp_path


def account(folder: Path, model: str = "model") -> Verification:
    return verify(folder / model, folder / "base", folder / "adapter")


def told(found: Verification) -> list[tuple[str, bool]]:
    return [(str(difference), difference.decides) for difference in found.beside.differences]


def test_a_right_merge_agrees_in_every_file(merged: Path) -> None:
    found = account(merged)
    assert (found.ok, found.tensors_ok, told(found)) == (True, True, [])
    assert set(found.beside.agreeing) == {"config.json", *FILES} - {"README.md", "LICENSE"}
    assert found.unchecked[:2] == (
        "what the model says of its own making: metadata in the headers of its weights, loratools.json",
        "files that no loader needs: LICENSE, README.md",
    )
    assert "names, orientation and layouts are read as `merge` reads them" in found.unchecked[-1]


ROPE = "config.json: rope_theta is 1000000.0, should be 10000.0"
SPOILED: dict[str, tuple[Edit, str]] = {
    "field": (fields("config.json", rope_theta=1e6), ROPE),
    "nested field": (
        fields("config.json", rope_scaling={"factor": 4.0, "type": "linear"}),
        "config.json: rope_scaling.factor is 4.0, should be 2.0",
    ),
    "dtype": (fields("config.json", torch_dtype="float16"), 'config.json: dtype is "float16", should be "bfloat16"'),
    "tie": (
        fields("config.json", tie_word_embeddings=True), "config.json: tie_word_embeddings is true, should be false"
    ),
    "code elsewhere": (
        fields("config.json", auto_map={"AutoModelForCausalLM": "who/knows--modeling_own.Own"}),
        'config.json: auto_map.AutoModelForCausalLM is "who/knows--modeling_own.Own", should be "modeling_own.Own"',
    ),
    "new code elsewhere": (
        fields("config.json", auto_map={**CONFIG["auto_map"], "AutoConfig": "who/knows--x.Y"}),  # type: ignore[dict-item]
        'config.json: auto_map.AutoConfig is "who/knows--x.Y", and is new',
    ),
    "other weights": (
        fields("config.json", quantization_config={"quant_method": "fp8"}),
        'config.json: quantization_config.quant_method is "fp8", and is new',
    ),
    "vocabulary": (
        text("tokenizer.json", json.dumps(TOKENIZER | {"model": {**MODEL, "vocab": {"b": 0, "a": 1}}})),
        'tokenizer.json: model is {"type": "BPE", "vocab": {"b": 0, "a": 1}, "merges": []}, should be',
    ),
    "token": (fields("tokenizer_config.json", eos_token="a"), 'tokenizer_config.json: eos_token is "a", should be "b"'),
    "merges": (text("merges.txt", "#version: 0.2\na b\n"), "merges.txt: is not the base's"),
    "inline template": (
        fields("tokenizer_config.json", chat_template="{{ 'no' }}"),
        "chat template: (default) is neither the base's nor an adapter's",
    ),
    "template in a file": (
        text("chat_template.jinja", "{{ 'no' }}"), "chat template: (default) is neither the base's nor an adapter's"
    ),
    "named template": (
        text("additional_chat_templates/tools.jinja", "x"),
        "chat template: (tools) is neither the base's nor an adapter's",
    ),
    "code": (text("modeling_own.py", "class Own: import_me = 1\n"), "modeling_own.py: is not the base's"),
    "new code": (text("configuration_own.py", ""), "configuration_own.py: is code that the base has not"),
    "sampling": (
        fields("generation_config.json", temperature=2), "generation_config.json: temperature is 2, should be 0.6"
    ),
    "pictures": (
        fields("preprocessor_config.json", image_mean=[0.4]),
        "preprocessor_config.json: image_mean is [0.4], should be [0.5]",
    ),
    "no JSON": (text("preprocessor_config.json", "{"), "preprocessor_config.json: is not the base's"),
    "an adapter": (
        text("adapter_config.json", "{}"), "adapter_config.json: is an adapter's: loaders would apply it once more"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_one_spoiled_file_is_told_and_decides(name: str, merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit, sentence = SPOILED[name]
    (merged / "model" / "additional_chat_templates").mkdir()
    edit(merged / "model")
    found = account(merged)
    assert (found.ok, found.tensors_ok) == (False, True)
    deciding = [what for what, decides in told(found) if decides]
    assert [what.startswith(sentence) for what in deciding] == [True]
    command = ["verify", str(merged / "model"), "--base", str(merged / "base"), "--adapter", str(merged / "adapter")]
    assert run(command) == 1
    printed = capsys.readouterr().out
    assert f"{sentence}" in printed
    assert "verified       NO" in printed
    assert run([*command, "--json"]) == 1
    differences = json.loads(capsys.readouterr().out)["beside"]["differences"]
    assert [one["decides"] for one in differences].count(True) == 1


HARMLESS: dict[str, tuple[Edit, list[str]]] = {
    "origin": (
        fields("config.json", transformers_version="5.20.0", _name_or_path="x"),
        ['config.json: transformers_version is "5.20.0", should be "4.40.0"',
         'config.json: _name_or_path is "x", and is new'],
    ),
    "a default": (fields("config.json", head_dim=8), ["config.json: head_dim is 8, and is new"]),
    "a missing field": (
        fields("config.json", rope_theta=None), ["config.json: rope_theta is missing, should be 10000.0"]
    ),
    "newer spelling": (fields("config.json", torch_dtype=None, dtype="bfloat16"), []),
    "other order": (fields("tokenizer.json", version="1.0"), []),
    "missing tokenizer": (without("tokenizer.json"), ["tokenizer.json: is missing; the base has it"]),
    "missing code": (without("modeling_own.py"), ["modeling_own.py: is missing; the base has it"]),
    "missing template": (fields("tokenizer_config.json", chat_template=None), ["chat template: (default) is missing"]),
    "template in a file": (text("chat_template.jinja", "{{ messages }}"), []),
    "another text": (text("notes.json", "{}"), ["notes.json: is in neither the base nor an adapter"]),
    "model card": (text("README.md", "# another\n"), []),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_what_decides_nothing_is_told_too(name: str, merged: Path) -> None:
    edit, sentences = HARMLESS[name]
    edit(merged / "model")
    found = account(merged)
    assert found.ok
    assert told(found) == [(sentence, False) for sentence in sentences]


def test_weights_beside_those_that_were_read_are_named(merged: Path) -> None:
    shutil.copy(merged / "base" / "model.safetensors", merged / "model" / "extra.bin")
    assert account(merged).unchecked[0] == "files that may be weights: extra.bin"


@pytest.mark.parametrize(
    ("brought", "kept", "sentence", "decides"),
    [
        ("adapter", "adapter", None, False),
        ("adapter", "base", "is the base's; the adapter brings its own", False),
        ("adapter", "other", "is {", True),
    ],
)
def test_the_tokenizer_of_an_adapter(
    brought: str, kept: str, sentence: str | None, decides: bool, merged: Path
) -> None:
    own = TOKENIZER | {"added_tokens": [{"id": 2, "content": "c"}]}
    write(merged / brought, {"tokenizer.json": json.dumps(own)})
    kinds = {"base": TOKENIZER, "adapter": own, "other": TOKENIZER | {"added_tokens": [{"id": 2, "content": "d"}]}}
    text("tokenizer.json", json.dumps(kinds[kept]))(merged / "model")
    found = account(merged)
    assert found.ok is not decides
    assert len(told(found)) == (sentence is not None)
    assert all(one.file == "tokenizer.json" and one.decides is decides for one in found.beside.differences)


def test_the_template_of_an_adapter(merged: Path) -> None:
    write(merged / "adapter", {"chat_template.jinja": "{{ 'adapter' }}"})
    found = account(merged)
    assert told(found) == [("chat template: (default) is the base's; the adapter brings its own", False)]
    merge(merged / "base", merged / "adapter", merged / "again")
    assert told(account(merged, "again")) == []


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_config_follows_the_dtype_of_the_tensors(dtype: Any, merged: Path) -> None:
    merge(merged / "base", merged / "adapter", merged / "cast", dtype=dtype)
    found = account(merged, "cast")
    assert (found.ok, told(found)) == (True, [])
    fields("config.json", torch_dtype="bfloat16")(merged / "cast")
    found = account(merged, "cast")
    name = {"f32": "float32", "f16": "float16"}[dtype]
    assert told(found) == [(f'config.json: dtype is "bfloat16", should be "{name}"', True)]


def test_config_follows_a_head_that_was_untied(tmp_path: Path) -> None:
    weights = {"model.embed_tokens.weight": random(16, 24), f"{Q}.weight": random(24, 24, seed=3)}
    save_base(tmp_path / "base", weights, model_type="llama", tie_word_embeddings=True)
    save_adapter(tmp_path / "adapter", lora({"lm_head": (16, 24)}))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "model", tied="untie")
    assert told(account(tmp_path)) == []
    fields("config.json", tie_word_embeddings=True)(tmp_path / "model")
    found = account(tmp_path)
    assert (found.tensors_ok, told(found)) == (
        True, [("config.json: tie_word_embeddings is true, should be false", True)]
    )  # fmt: skip


def test_a_head_that_config_says_is_there_and_is_not(tmp_path: Path) -> None:
    """Of a class that ties by default: without a word in config.json the head is the embedding."""
    weights = {"model.embed_tokens.weight": random(16, 24), f"{Q}.weight": random(24, 24, seed=3)}
    save_base(tmp_path / "base", weights, model_type="gemma")
    save_adapter(tmp_path / "adapter", lora({Q: (24, 24)}))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "model")
    assert account(tmp_path).ok
    fields("config.json", tie_word_embeddings=False)(tmp_path / "model")
    found = account(tmp_path)
    assert not found.ok
    assert ("config.json: tie_word_embeddings is new and false, and no head is among the tensors", True) in told(found)


def test_links_that_lead_elsewhere_are_refused_by_name(merged: Path) -> None:
    secret = merged / "secret.json"
    secret.write_text('{"token": "s3cret"}')
    (merged / "model" / "preprocessor_config.json").unlink()
    (merged / "model" / "preprocessor_config.json").symlink_to(secret)
    with pytest.raises(BadFile, match=r"leads? out of it") as caught:
        account(merged)
    assert "preprocessor_config.json" in str(caught.value.problems)
    assert "s3cret" not in str(caught.value)


def test_names_and_values_of_strangers_make_no_line_of_their_own(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (merged / "model" / "x\nverified       yes\n.py").write_text("")
    fields("config.json", **{"a\nverified       yes": 1})(merged / "model")
    run(["verify", str(merged / "model"), "--base", str(merged / "base"), "--adapter", str(merged / "adapter")])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("verified")] == ["verified       NO"]


@pytest.mark.parametrize(
    ("file", "edit", "decides"),
    [
        ("unet/config.json", fields("unet/config.json", sample_size=8), True),
        ("scheduler/scheduler_config.json", fields("scheduler/scheduler_config.json", beta_end=0.5), True),
        ("tokenizer/merges.txt", text("tokenizer/merges.txt", "other"), True),
        ("model_index.json", fields("model_index.json", _diffusers_version="0.1"), False),
    ],
)
def test_components_of_a_pipeline(file: str, edit: Edit, decides: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    for folder, name in (("unet", "config.json"), ("scheduler", "scheduler_config.json")):
        write(base / folder, {name: json.dumps({"sample_size": 4, "beta_end": 0.1, "_class_name": "X"})})
    write(base / "tokenizer", {"merges.txt": "#"})
    write(base, {"model_index.json": json.dumps({"unet": ["diffusers", "X"], "_diffusers_version": "0.42"})})
    weights = {"mid_block.attentions.0.to_q.weight": random(24, 24, seed=3)}
    save_file(weights, base / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    save_adapter(tmp_path / "adapter", lora({"unet.mid_block.attentions.0.to_q": (24, 24)}))
    merge(base, tmp_path / "adapter", tmp_path / "model")
    assert (account(tmp_path).ok, told(account(tmp_path))) == (True, [])
    edit(tmp_path / "model")
    found = account(tmp_path)
    assert (found.ok, [(one.file, one.decides) for one in found.beside.differences]) == (not decides, [(file, decides)])


def test_models_of_one_file_have_nothing_beside(merged: Path) -> None:
    found = verify(merged / "model" / "model.safetensors", merged / "base", merged / "adapter")
    assert found.ok
    assert "what lies beside the tensors" in found.unchecked[0]


def test_unmerge_asks_for_the_tensors_alone(merged: Path) -> None:
    """A model whose config.json was edited is still unmerged: the base's comes back with the base."""
    fields("config.json", rope_theta=1e6)(merged / "model")
    without("loratools.json")(merged / "model")
    assert not account(merged).ok
    unmerge(merged / "model", merged / "adapter", merged / "out", base=merged / "base")
    assert json.loads((merged / "out" / "config.json").read_text()) == CONFIG


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["Llama", "Gemma", "OPT", "T5"])
def test_merges_that_peft_and_transformers_wrote(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """With a config as transformers 4 wrote it: fields are renamed, moved and filled in, and nothing is against it."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {
        "Llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        "OPT": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        "T5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    }
    sizes["OPT"] |= {"word_embed_proj_dim": 32}
    sizes["Gemma"] = sizes["Llama"] | {"head_dim": 8}
    config = getattr(transformers, f"{name}Config")(**sizes[name], vocab_size=96)
    loads = transformers.AutoModelForSeq2SeqLM if name == "T5" else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = loads.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    wanted = peft.LoraConfig(target_modules=["q" if name == "T5" else "q_proj"], r=4, init_lora_weights=False)
    peft.get_peft_model(model, wanted).save_pretrained(tmp_path / "adapter")
    if name == "Llama":
        old = {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "bfloat16"}
        fields("config.json", **old, dtype=None, rope_parameters=None, transformers_version="4.40.0")(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(loads.from_pretrained(tmp_path / "base", dtype=dtype), tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "model")
    found = account(tmp_path)
    assert (found.ok, [what for what, decides in told(found) if decides]) == (True, [])
    assert bool(told(found)) is (name == "Llama")
