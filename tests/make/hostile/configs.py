"""`adapter_config.json`: names, patterns, numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.make.hostile import hostile
from tests.make.hostile.headers import MILLION, entry, pair, peft, write

INSPECT = "inspect adapter"


def adapter(folder: Path, **config: Any) -> None:
    """Write an adapter of one module under a config."""
    peft(folder, pair(), b"\0\0\x80\x3f" * 8, **config)


def modules(folder: Path, names: list[str], **config: Any) -> None:
    """Write an adapter of many modules."""
    factors = {}
    for i, name in enumerate(names):
        key = f"base_model.model.{name}.lora_%s.weight"
        factors |= {key % "A": entry([1, 4], 32 * i, 32 * i + 16), key % "B": entry([4, 1], 32 * i + 16, 32 * i + 32)}
    peft(folder, factors, bytes(32 * len(names)), **config)


LAYERS = [f"model.layers.{i}.{part}" for i in range(1_143) for part in
          ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")]  # fmt: skip


@hostile(INSPECT, None)
def eight_thousand_full_names(folder: Path) -> None:
    modules(folder, LAYERS, target_modules=LAYERS)


@hostile("convert adapter --to loratools -o sealed", None)
def eight_thousand_full_names_sealed(folder: Path) -> None:
    modules(folder, LAYERS, target_modules=LAYERS)


@hostile("convert adapter --to peft -o other", None)
def eight_thousand_full_names_written(folder: Path) -> None:
    modules(folder, LAYERS, target_modules=LAYERS, rank_pattern=dict.fromkeys(LAYERS[::2], 1))


@hostile(INSPECT, None)
def eight_thousand_names_of_no_order(folder: Path) -> None:
    names = [f"m{i * 7919 % 8009}.n{i * 104_729 % 8011}.o{i * 1_299_709 % 8017}" for i in range(8_000)]
    modules(folder, names, target_modules=names)


@hostile(INSPECT, None)  # with a warning, cut short
def half_a_million_targets_without_tensors(folder: Path) -> None:
    adapter(folder, target_modules=["q_proj", *(f"x.{i}" for i in range(MILLION // 2))])


@hostile(INSPECT, r"takes too long to match|does not target it")
def a_pattern_that_backtracks(folder: Path) -> None:
    modules(folder, [f"model.layers.{i}.q_proj" for i in range(100)], target_modules="(.*){20}!")


@hostile(INSPECT, None)  # the regex package answers them at once; re would take minutes
def patterns_that_each_take_a_second(folder: Path) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(100)]
    slow = r"(\w*[.]?)" * 7
    modules(folder, names, rank_pattern={f"{slow}{i}!": 1 for i in range(500)})


@hostile(INSPECT, r"at most \d+")
def half_a_million_patterns(folder: Path) -> None:
    adapter(folder, rank_pattern={f"q_pro[j{i}]": 1 for i in range(MILLION // 2)})


@hostile(INSPECT, r"at most \d+")
def a_thousand_long_patterns(folder: Path) -> None:
    adapter(folder, alpha_pattern={f"({'|'.join(f'a{j}[b{i}]' for j in range(1_500))})": 1 for i in range(700)})


@hostile(INSPECT, r"not a regular expression|takes too long|does not|config")
def a_pattern_of_nested_repeats(folder: Path) -> None:
    adapter(folder, target_modules="(" * 40 + "a" + "{1,1000})" * 40)


@hostile(INSPECT, r"not a regular expression")
def a_pattern_of_ten_thousand_groups(folder: Path) -> None:
    adapter(folder, target_modules="(" * 9_900 + ")" * 9_900)


@hostile(INSPECT, None)
def half_a_million_patterns_that_are_names(folder: Path) -> None:
    adapter(folder, rank_pattern={f"m.layers.{i}.q_proj": 1 for i in range(MILLION // 2 - 50_000)})


@hostile(INSPECT, None)
def almost_two_million_layers(folder: Path) -> None:
    names = [f"model.layers.{i}.q_proj" for i in range(2_000)]
    modules(folder, names, layers_to_transform=list(range(1_800_000, -1, -1)))


@hostile(INSPECT, r"at most \d+")
def a_hundred_thousand_lists_of_layers(folder: Path) -> None:
    names = [f"model.{'x.' * 80}{i}.q_proj" for i in range(100)]
    modules(folder, names, layers_to_transform=[0], layers_pattern=[f"h{i}" for i in range(100_000)])


@hostile(INSPECT, r"at most \d+")
def a_hundred_thousand_saved_patterns(folder: Path) -> None:
    adapter(folder, modules_to_save=[f"(.*a){{{i}}}" for i in range(100_000)])


@hostile(INSPECT, None)
def half_a_million_saved_names(folder: Path) -> None:
    adapter(folder, modules_to_save=[f"score{i}" for i in range(MILLION // 2)])


@hostile(INSPECT, None)
def half_a_million_excluded_names(folder: Path) -> None:
    adapter(folder, exclude_modules=[f"model.x.{i}" for i in range(MILLION // 2)])


@hostile(INSPECT, None)
def half_a_million_target_parameters(folder: Path) -> None:
    adapter(folder, target_parameters=[f"experts.{i}.gate_up_proj" for i in range(MILLION // 2)])


@hostile(INSPECT, None)  # with a warning, cut short
def half_a_million_unknown_fields(folder: Path) -> None:
    adapter(folder, **{f"field{i}": 1 for i in range(MILLION // 2)})


@hostile(INSPECT, r"larger than 16000000 bytes")
def a_config_beside_an_adapter_of_a_terabyte(folder: Path) -> None:
    adapter(folder)
    os.truncate(folder / "adapter" / "adapter_config.json", 2**40)


@hostile(INSPECT, None)
def five_million_empty_lists(folder: Path) -> None:
    adapter(folder, auto_mapping={"a": [[]] * 3 * MILLION})


@hostile(INSPECT, r"layer_replication: expected")
def a_billion_layers_repeated(folder: Path) -> None:
    adapter(folder, layer_replication=[[0, 2**30]] * 100_000)


@hostile(INSPECT, r"fields? that cannot be used")
def numbers_of_a_million_digits(folder: Path) -> None:
    adapter(folder)
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]})[:-1]
                    + ', "lora_alpha": ' + "9" * MILLION + "}")  # fmt: skip


@hostile(INSPECT, r"fields? that cannot be used")
def a_rank_of_a_billion(folder: Path) -> None:
    adapter(folder, rank_pattern={"q_proj": 10**12}, r=-5, lora_alpha="1e999")


@hostile(INSPECT, None)
def a_base_of_ten_megabytes(folder: Path) -> None:
    adapter(folder, base_model_name_or_path="x/\n\x1b[31m\u202e" * (MILLION // 2))


@hostile(INSPECT, r"only LORA is read")
def a_type_of_ten_megabytes(folder: Path) -> None:
    adapter(folder, peft_type="\x1b[2J" * (MILLION // 2))


@hostile(INSPECT, r"nested too deeply")
def a_config_nested_deeply(folder: Path) -> None:
    adapter(folder)
    (folder / "adapter" / "adapter_config.json").write_text('{"a":' * MILLION + "1" + "}" * MILLION)


@hostile(INSPECT, None)
def half_a_million_trained_tokens(folder: Path) -> None:
    adapter(folder, trainable_token_indices={f"embed{i % 7}": list(range(MILLION // 10)) for i in range(7)})


@hostile(INSPECT, r"shard")
def shards_that_are_missing(folder: Path) -> None:
    adapter(folder)
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    write(folder / "adapter" / "adapter_model-00001-of-99999.safetensors", pair(), bytes(32))
