"""A small adapter to send to the Hub and back."""

import json
import struct
from pathlib import Path

from huggingface_hub import CommitOperationAdd

REPO = "tester/adapter"
CARD = "---\nbase_model: org/base\nlibrary_name: peft\npipeline_tag: text-generation\ntags: [lora]\n---\n# Adapter\n"
CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base", "r": 4}


def safetensors(tensors: dict[str, int], metadata: dict[str, str] | None = None) -> bytes:
    """Return a safetensors file of F32 vectors, name -> length, whose bytes differ from place to place."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, length in tensors.items():
        header[name] = {"dtype": "F32", "shape": [length], "data_offsets": [at, at + 4 * length]}
        at += 4 * length
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(i * 31 % 251 for i in range(at))


WEIGHTS = safetensors({"layers.0.q_proj.lora_A.weight": 40_000, "layers.0.q_proj.lora_B.weight": 40_000})
FILES = {
    "README.md": CARD.encode(),
    "adapter_config.json": json.dumps(CONFIG).encode(),
    "adapter_model.safetensors": WEIGHTS,
    "extra/notes.txt": b"a nested file\n",
    "empty.txt": b"",
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files under a folder."""
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def add(files: dict[str, bytes]) -> list[CommitOperationAdd]:
    """Return the operations that add files."""
    return [CommitOperationAdd(path, data) for path, data in files.items()]
