"""Write an `Adapter` in our format: one file or a folder, byte for byte the same every time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.adapter.model import Adapter
from loratools.errors import InvalidFormat, LoraToolsError, OutputRefused
from loratools.format import manifest, validate
from loratools.format.canonical import canonical_parts
from loratools.format.clauses import ADAPTER_FILE, CONFIG_FILE, Subject
from loratools.format.peft_config import derive_config
from loratools.storage import atomic, digest, files
from loratools.storage.beside import making
from loratools.storage.lazy import LazyTensor, chunks_of_all
from loratools.storage.save import Appended, header, ordered

_PLAIN = ("alpha_pattern", "rank_pattern", "target_modules")
"""Fields of a config with an entry for each module."""


def write(adapter: Adapter, target: Path, *, tensors: Mapping[str, str] | None = None, force: bool = False) -> str:
    """Write an adapter to `target`, a `.safetensors` file or a folder that PEFT loads too, and return its digest.

    Stored tensors keep their bytes and dtypes. `tensors` maps a module's path, or a replaced parameter's, to the base
    tensor that it changes. The output appears whole or not at all.

    Raises `InvalidFormat` if the adapter cannot be said in the format, naming each clause, and `OutputRefused` if the
    target exists (without `force`) or is also an input.
    """
    document = manifest.of(adapter, tensors)
    lazies = ordered(manifest.tensors_of(adapter))
    text, config = _check(target, document, derive_config(adapter), lazies)
    single = target.suffix == ".safetensors"
    output = target if single else target / ADAPTER_FILE
    if output.resolve() in {file.resolve() for file in {lazy.spec.file for lazy in lazies.values() if lazy.spec}}:
        raise OutputRefused(f"{target} is also an input", hint="Choose another output.")
    with atomic.new_output(target, ADAPTER_FILE, force=force) as path:
        if not single:
            fields = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
            path.with_name(CONFIG_FILE).write_text(f"{fields}\n", encoding="utf-8", newline="\n")
        return _write_file(path, document, text, lazies)


def _check(
    target: Path, document: dict[str, Any], config: dict[str, Any], lazies: Mapping[str, LazyTensor]
) -> tuple[str, dict[str, Any]]:
    """Return the manifest's text and the config as it will be read back, after every clause on headers was checked."""
    config["base_model_name_or_path"] = document.get("base_model", {}).get("id")
    try:
        text, config = manifest.text(document), json.loads(canonical_parts(config, _PLAIN))
    except ValueError:
        raise manifest.unwritable({**config, **document}) from None
    except RecursionError as error:
        raise InvalidFormat(f"{target}: the adapter's manifest cannot be written: {error}") from None
    shapes = {name: (lazy.dtype, lazy.shape) for name, lazy in lazies.items()}
    subject = Subject(target, shapes, json.loads(text), text, config)
    if problems := validate.problems(subject, digest=False):
        raise validate.refusal(target, problems)
    return text, config


def _write_file(path: Path, document: dict[str, Any], text: str, lazies: Mapping[str, LazyTensor]) -> str:
    # The header comes first in the file and holds the digest, which is known last; its length is known at once.
    def encoded(text: str) -> bytes:
        return header(lazies, {"format": "pt", manifest.METADATA_KEY: text, **made})

    made, no_digest = making.entry(), manifest.NO_DIGEST.encode()
    head = encoded(text)
    raw = {}
    with files.descriptor(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as output:
        data = Appended(output, len(head))
        for name, pieces in chunks_of_all(lazies):
            lazy = lazies[name]
            hasher = digest.start_tensor(lazy.dtype, lazy.shape)
            start = data.end
            for piece in pieces:
                hasher.update(piece)
                data.write(piece)
            if data.end - start != lazy.nbytes:
                found = data.end - start
                raise LoraToolsError(f"tensor {name!r} has {found} bytes, its dtype and shape {lazy.nbytes}")
            raw[name] = hasher.digest()
        data.flush()
        root = digest.root_of_raw(raw)
        if head.count(no_digest) == 1:  # nothing else looks like it
            head = head.replace(no_digest, root.encode())
        else:
            head = encoded(manifest.text(document | {"digest": root}))
        files.write_from(output, memoryview(head), 0)
    return root
