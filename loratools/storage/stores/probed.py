"""What lies beside a file, and in the folders of servers that list nothing: asked for by the names that are usual."""

from __future__ import annotations

from pathlib import Path

from loratools.parallel import each
from loratools.storage.beside import along
from loratools.storage.stores.address import Address
from loratools.storage.stores.client import Entry, Store
from loratools.storage.strict_json import MAX_INDEX, parse_json_object

_CONFIGS = ("config.json", "adapter_config.json", "params.json", "quantize_config.json", "quant_config.json")
_INDEX = "model.safetensors.index.json"
_USUAL = (
    *_CONFIGS, _INDEX, "model.safetensors", "adapter_model.safetensors", "adapters.safetensors",
    "pytorch_lora_weights.safetensors", "generation_config.json", "loratools.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
)  # fmt: skip


def folder(store: Store, address: Address) -> dict[str, Entry]:
    """Return what a server has of the files that a folder of an adapter or a model usually holds, by their names."""
    found = _those(store, address, _USUAL)
    return found | _shards(store, address, found.get(_INDEX))


def beside(store: Store, parent: Address, name: str) -> dict[str, Entry]:
    """Return what lies beside a file that was asked for and says what it is: configs, and of an index its shards."""
    if store.address.lists and (along.is_index(name) or "-of-" in name):
        start = f"{parent.key}/" if parent.key else ""
        listed = {entry.key.removeprefix(start): entry for entry in store.list(parent.key, below=False)}
        return {other: entry for other, entry in listed.items() if other in _CONFIGS or _belongs(other, name)}
    found = _those(store, parent, _CONFIGS)
    index = store.head(f"{parent.key}/{name}".lstrip("/")) if along.is_index(name) else None
    return found | _shards(store, parent, index)


def _belongs(other: str, name: str) -> bool:
    return along.is_index(other) or (along.is_index(name) and other.endswith((".safetensors", ".bin")))


def _shards(store: Store, address: Address, index: Entry | None) -> dict[str, Entry]:
    """Return the shards that an index lists, as far as they are there."""
    if index is None or index.size > MAX_INDEX:
        return {}
    weight_map = parse_json_object(bytes(store.part(index, 0, index.size)).strip(), Path(index.key)).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    return _those(store, address, [name for name in names if "/" not in name and name not in ("", ".", "..")])


def _those(store: Store, address: Address, names: tuple[str, ...] | list[str]) -> dict[str, Entry]:
    asked = each(lambda name, key: store.head(key), {name: f"{address.key}/{name}".lstrip("/") for name in names}, 16)
    return {name: entry for name, entry in asked.items() if entry is not None}
