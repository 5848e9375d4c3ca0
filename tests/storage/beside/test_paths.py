"""Local paths in texts are known for what they are, and addresses, fractions and patterns for what those are."""

from __future__ import annotations

import pytest

from loratools.storage.beside.paths import last_part, paths_in, without_homes, without_paths


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/ann/models/sd.safetensors", "sd.safetensors"),
        ("/home/ann lee/my models/sd 1.5.safetensors", "sd 1.5.safetensors"),
        ("C:\\Users\\ann\\x.pt", "x.pt"),
        ("D:/models/x/", "x"),
        ("\\\\server\\share\\x.pt", "x.pt"),
        ("file:///home/ann/x", "x"),
        ("~/models/x", "x"),
        ("./out/x", "x"),
        ("../x", "x"),
        ("base_model:adapter:/home/ann/x", "base_model:adapter:x"),
        ("from /mnt/a/b, to (/data/c/d)", "from b, to (d)"),
        ('{"dir": "/mnt/a/b", "n": 1}', '{"dir": "b", "n": 1}'),
        ("a file at C:\\a\\b and more", "a file at b and more"),
    ],
)
def test_paths(text: str, public: str) -> None:
    assert without_paths(text) == public
    assert paths_in(text)
    assert paths_in(without_paths(text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "org/name", "https://huggingface.co/org/name", "hf://org/name@main/file", "and/or", "1/2", "w/o", "/", "",
        "torch.optim.adamw.AdamW(betas=(0.9, 0.999))", "data:image/png;base64,/9j/4AAQ/xx", "a photo of sks dog",
        "10_dog", "s/it", "(512, 512)", "text: hello", "model.layers.0.self_attn.q_proj", "e.g. x", "\\d+\\.q_proj",
    ],
)  # fmt: skip
def test_what_is_no_path(text: str) -> None:
    assert without_paths(text) == text
    assert paths_in(text) == []


def test_homes_and_last_parts() -> None:
    assert without_homes("#!/usr/bin/env x\n/Users/ann/a/b /root/c/d") == "#!/usr/bin/env x\nb d"
    assert last_part("/a/b/") == "b"
