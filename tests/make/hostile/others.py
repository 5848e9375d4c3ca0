"""Our own format, kohya's names and metadata, other layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.make.hostile import hostile
from tests.make.hostile.headers import MILLION, entry, write

VALIDATE = "validate x.safetensors"
FILE = "x.safetensors"


def sealed(folder: Path, manifest: Any, tensors: dict[str, Any] | None = None, data: bytes = b"") -> None:
    """Write a file of our format with a manifest."""
    text = manifest if isinstance(manifest, str) else json.dumps(manifest, separators=(",", ":"), sort_keys=True)
    header = {"__metadata__": {"format": "pt", "loratools": text}} | (tensors or {"x": entry([1], 0, 4)})
    write(folder / FILE, header, data or bytes(4))


def manifest(modules: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "format_version": "1.1",
        "rank": 1,
        "alpha": 1,
        "target_modules": sorted(modules),
        "modules": modules,
    } | more


def module(number: int) -> dict[str, Any]:
    return {"kind": "lora", "rank": 1, "alpha": 1, "scaling": 1, "tensor": f"m.{number}.weight"}


@hostile(VALIDATE, r"problem|M-\d\d|T-\d\d")
def a_manifest_of_ten_thousand_modules(folder: Path) -> None:
    sealed(folder, manifest({f"m.{i}": module(i) for i in range(10_000)}))


@hostile(VALIDATE, r"M-\d\d")
def a_manifest_of_one_target_for_all(folder: Path) -> None:
    sealed(folder, manifest({f"m.{i}": module(7) for i in range(5_000)}, target_modules=["m"] * 100_000))


@hostile(VALIDATE, r"nested|canonical")
def a_manifest_nested_deeply(folder: Path) -> None:
    sealed(folder, '{"a":' * 900 + "1" + "}" * 900)


@hostile(VALIDATE, r"nested too deeply|M-01")
def a_manifest_nested_a_million_times(folder: Path) -> None:
    sealed(folder, '{"a":' * MILLION + "1" + "}" * MILLION)


@hostile(VALIDATE, r"T-\d\d")
def a_manifest_of_a_million_settings(folder: Path) -> None:
    sealed(folder, manifest({"m.0": module(0)}, settings={f"s{i}": [i, i] for i in range(MILLION)}))


@hostile(VALIDATE, r"M-\d\d")
def a_manifest_of_numbers_without_end(folder: Path) -> None:
    sealed(folder, '{"alpha":' + "9" * 5 * MILLION + ',"format_version":"1.1"}')


@hostile(VALIDATE, r"a name of \d+ characters")
def a_module_of_ten_thousand_dots(folder: Path) -> None:
    sealed(folder, manifest({"a." * 10_000 + str(i): module(i) for i in range(200)}))


@hostile(VALIDATE, r"T-\d\d")
def layers_repeated_a_billion_times(folder: Path) -> None:
    layers = {"name": "layer_replication", "must_understand": True, "configuration": {"layers": [[0, 2**31]] * 100_000}}
    sealed(folder, manifest({"m.0": module(0)}, extensions=[layers]))


@hostile(VALIDATE, r"T-\d\d")
def half_a_million_digests(folder: Path) -> None:
    hashes = {f"t{i}": "blake3:" + "0" * 64 for i in range(MILLION // 5)}
    sealed(folder, manifest({"m.0": module(0)}, base_model={"id": "x", "hash": {"tensors": hashes}}))


@hostile(VALIDATE, r"T-\d\d")
def half_a_million_steps(folder: Path) -> None:
    step = {"operation": "merge", "tool": "x" * 20, "inputs": []}
    sealed(folder, manifest({"m.0": module(0)}, provenance=[step] * (MILLION // 5)))


def kohya(folder: Path, names: list[str], metadata: dict[str, str] | None = None) -> None:
    """Write an adapter of kohya's, rank one."""
    tensors: dict[str, Any] = {"__metadata__": {"ss_network_module": "networks.lora"} | (metadata or {})}
    for i, name in enumerate(names):
        tensors[f"{name}.lora_down.weight"] = entry([1, 4], 32 * i, 32 * i + 16)
        tensors[f"{name}.lora_up.weight"] = entry([4, 1], 32 * i + 16, 32 * i + 32)
    write(folder / FILE, tensors, bytes(32 * len(names)))


@hostile(f"inspect {FILE}", r"of no known architecture")
def two_hundred_thousand_flattened_names(folder: Path) -> None:
    kohya(folder, [f"lora_unet_down_blocks_0_x_{i}" for i in range(MILLION // 5)])


@hostile(f"inspect {FILE}", r"of no known architecture|characters")
def a_flattened_name_of_many_underscores(folder: Path) -> None:
    kohya(folder, ["lora_unet_" + "a_" * 450 + str(i) for i in range(2_000)])


@hostile(f"inspect {FILE}", r"of no known architecture|nested")
def kohya_names_nested_deeply(folder: Path) -> None:
    kohya(folder, ["lora_unet_x"], {"loratools.modules": "[" * MILLION, "loratools_modules": "[" * MILLION})


@hostile(f"inspect {FILE}", r"of no known architecture")
def kohya_metadata_of_twenty_megabytes(folder: Path) -> None:
    tags = json.dumps({f"folder{i}": {f"tag{j}": 1 for j in range(100)} for i in range(10_000)})
    kohya(folder, ["lora_unet_x"], {"ss_tag_frequency": tags, "ss_training_comment": "\x1b[2J\u202e" * MILLION})


@hostile("inspect adapters.npz", r"no dialect|not the JSON object")
def an_npz_of_zeros(folder: Path) -> None:
    with (folder / "adapters.npz").open("wb") as file:
        file.truncate(2**40)


@hostile(f"inspect {FILE}", None)
def half_a_million_names_of_mlx(folder: Path) -> None:
    tensors = {f"model.layers.{i}.q_proj.lora_{side}": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 0]}
               for i in range(100_000) for side in "ab"}  # fmt: skip
    for i, value in enumerate(tensors.values()):
        value["data_offsets"] = [4 * i, 4 * i + 4]
    write(folder / FILE, tensors, bytes(4 * len(tensors)))
    (folder / "adapter_config.json").write_text('{"num_layers": 1, "lora_parameters": {"rank": 1, "scale": 1.0}}')


@hostile("hash folder", r"no model weights|found")
def a_folder_of_fifty_thousand_files(folder: Path) -> None:
    (folder / "folder").mkdir()
    for i in range(50_000):
        (folder / "folder" / f"{i}.txt").touch()
