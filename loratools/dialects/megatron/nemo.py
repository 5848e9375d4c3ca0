"""Where NeMo and Megatron leave an adapter: a `.nemo` archive, the same unpacked, or a bare state dict.

    x.nemo      an uncompressed tar of model_config.yaml and model_weights.ckpt, a file of torch.save (NeMo 1.x)
    folder      the same two; or one file of tensors, beside Megatron-Bridge's run_config.yaml

Tensors are read where they lie: nothing is unpacked, and no code that a file names is run. Distributed checkpoints
(`.distcp`) are refused, since a pickle of classes describes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loratools.dialects._frame.listing import Listing, check_pointer
from loratools.errors import BadFile, UnsupportedAdapter, counted
from loratools.storage.beside.plain_yaml import parse_yaml
from loratools.storage.lazy import LazyTensor
from loratools.storage.pickles import SUFFIXES, tar
from loratools.storage.pickles.archive import read_pickled
from loratools.storage.sources import open_file

ENDING = ".nemo"
WEIGHTS, CONFIG = "model_weights.ckpt", "model_config.yaml"
TENSORS = (".safetensors", *SUFFIXES)
_CONFIGS = (CONFIG, "run_config.yaml")

MAX_YAML = 200_000
"""Bytes of a configuration; NeMo's have about twenty thousand."""


def shards_of(listing: Listing) -> int:
    """Count the shards of a distributed checkpoint, in the folder or in its `weights`, where NeMo 2 puts them."""
    if listing.single:
        return int(listing.path.suffix == ".distcp")
    inside = listing.folder / "weights"
    below = [path.name for path in inside.iterdir()] if inside.is_dir() else []
    return sum(name.endswith(".distcp") for name in (*listing.files, *below))


def read(listing: Listing) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """Return the tensors by name, and the configuration, {} where there is none.

    Raises `UnsupportedAdapter` for distributed checkpoints and those of several ranks, `BadFile` for what is damaged.
    """
    if shards := shards_of(listing):
        raise UnsupportedAdapter(
            f"{listing.path}: a distributed checkpoint ({counted(shards, '.distcp file')}), which cannot be read "
            "without running what its pickled description names",
            hint="Export it where it was trained: Megatron-Bridge and NeMo 2 write Hugging Face PEFT adapters.",
        )
    if archive := listing.only(ENDING):
        path = listing.folder / archive
        inside = members(path)
        return _weights(path, inside), _document(path, inside)
    name = listing.only(*TENSORS)
    if name is None:
        raise BadFile(f"{listing.path}: expected one {ENDING} archive, or one file of tensors")
    beside = [config for config in _CONFIGS if (listing.folder / config).is_file()]
    if not beside:
        return listing.tensors(name), {}
    with open_file(listing.folder / beside[0]) as file:
        return listing.tensors(name), parse(file.read(MAX_YAML + 1), listing.folder / beside[0])


def members(path: Path) -> tar.Members:
    """Return the files in an uncompressed tar; raise `BadFile` where it is compressed, damaged or has too many."""
    with open_file(path) as file:
        begin = file.read(32)
        check_pointer(begin, path)
        if begin.startswith(b"\x1f\x8b"):
            raise BadFile(
                f"{path}: a compressed archive, whose tensors cannot be read in place",
                hint=f"Unpack it with `tar xzf {path.name}` into a folder of its own, and give the folder.",
            )
        return tar.members(file, path)


def _weights(path: Path, inside: tar.Members) -> dict[str, LazyTensor]:
    if WEIGHTS in inside:
        return {name: LazyTensor.stored(spec) for name, spec in read_pickled(path, inside[WEIGHTS]).items()}
    if ranks := sorted(name for name in inside if name.endswith(f"/{WEIGHTS}")):
        raise UnsupportedAdapter(
            f"{path}: saved in {len(ranks)} parts by tensor- or pipeline-parallel rank, such as {ranks[0]}",
            hint="Join them with NeMo's scripts/checkpoint_converters/lora_converters/to_tp1.py.",
        )
    raise UnsupportedAdapter(f"{path}: no {WEIGHTS} in it; it holds {', '.join(sorted(inside)[:8]) or 'no files'}")


def _document(path: Path, inside: tar.Members) -> dict[str, Any]:
    if CONFIG not in inside:
        return {}
    start, stop = inside[CONFIG]
    with open_file(path) as file:
        file.seek(start)
        return parse(file.read(min(stop - start, MAX_YAML + 1)), path)


def parse(raw: bytes, path: Path) -> dict[str, Any]:
    """Return a YAML document of names and plain values.

    Raises `BadFile` for tags, and for aliases and depth by which a short document becomes an endless one.
    """
    if len(raw) > MAX_YAML:
        raise BadFile(f"{path}: its configuration is larger than {MAX_YAML} bytes")
    try:
        document = parse_yaml(raw.decode(), f"{path}: its configuration")
    except UnicodeDecodeError as error:
        raise BadFile(f"{path}: its configuration is not plain YAML: {error}") from None
    if document is None:
        raise BadFile(f"{path}: its configuration is not names and values")
    return document
