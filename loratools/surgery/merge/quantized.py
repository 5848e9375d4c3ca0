"""What becomes of a quantized base: which of its weights are written in 16 bit, and which stay codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from loratools.adapter.placement.classes import model_class
from loratools.errors import IncompatibleAdapter, InvalidOption
from loratools.options import Quantized
from loratools.storage import codecs, dtypes
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import encodings, logical
from loratools.storage.codecs import Encoding, schemes
from loratools.storage.codecs.state import statement, with_statement


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """The base as the output has it: `base` shows as weights what is written in 16 bit, and as stored what stays codes.

    `config` holds the fields of config.json that change, `dropped` those that go, `notes` what is to be said.
    """

    base: Checkpoint
    config: Mapping[str, Any]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


def as_written(base: Checkpoint, touched: Collection[str], policy: Quantized) -> Written:
    """Decide what becomes of the codes of a base, of which adapters change the tensors `touched`.

    Raises `IncompatibleAdapter` where the policy is to refuse, and changed modules are codes.
    """
    every = encodings(base)
    if not every:
        return Written(base, {}, (), ())
    changed = {name: encoding for name, encoding in every.items() if name in touched}
    if policy == "refuse" and changed:
        raise IncompatibleAdapter(
            f"{len(changed)} target tensor(s) of {base.path} are quantized",
            [f"{name}: {encoding.module.scheme}, {encoding.label}" for name, encoding in sorted(changed.items())[:20]],
            hint="--quantized dequantize writes the merged model in 16 bit, --quantized partial only what changes.",
        )
    if policy == "requantize":
        raise InvalidOption("quantized is 'requantize', which is not there yet")
    if policy == "dequantize":
        fields, dropped = with_statement(base.config, None)
        left = _left_as_codes(base)
        notes = [_note("written in 16 bit", every)]
        if left:
            fields, dropped = {}, ()
            notes.append(
                f"{len(left)} module(s) stay as they are stored, for no codec reads them: {', '.join(left[:5])}"
            )
        return Written(base, fields, dropped, tuple(notes))
    if base.origins:
        raise IncompatibleAdapter(
            "the adapter repeats layers of a quantized base, of which only the whole can be written in 16 bit",
            hint="Use --quantized dequantize.",
        )
    stored = base.stored or base
    partly = replace(logical(stored, changed), config=base.config)
    if not changed:
        return Written(replace(stored, config=base.config), {}, (), ())
    codec = _codec(stored, changed)
    modules = sorted(encoding.module.path for encoding in changed.values())
    before = statement(base.config)
    after = _with_begun_lists(before, codecs.get(codec).plain(before, modules), partly)
    fields, dropped = with_statement(base.config, after)
    return Written(partly, fields, dropped, (_note("written in 16 bit, the others stay as they are", changed),))


def _with_begun_lists(before: Mapping[str, Any], after: dict[str, Any], base: Checkpoint) -> dict[str, Any]:
    """Return the new statement, whose lists of plain modules name all of them where the old one had no list.

    Without a list, transformers leaves the head as it is, and what is tied to it; with one, it goes by that alone.
    """
    begun = [key for key, value in after.items() if isinstance(value, list) and before.get(key) is None]
    if not begun:
        return after
    kind = model_class(base.config)
    tensors = [name for name, spec in base.specs.items() if len(spec.shape) == 2 and spec.dtype in dtypes.FLOATS]
    names = [*tensors, *([kind.head] if kind and kind.head else [])]
    codes = schemes.find(base.specs, base.config).tensors
    weights = {name.removesuffix(".weight") for name in names if name.endswith(".weight") and name not in codes}
    return {**after, **{key: [*after[key], *sorted(weights - set(after[key]))] for key in begun}}


def _codec(stored: Checkpoint, changed: Mapping[str, Encoding]) -> str:
    """Return the codec of the changed modules; a model has one, whose words config.json uses."""
    found = schemes.find(stored.specs, stored.config)
    names = Counter(found.codecs[encoding.module.path] for encoding in changed.values())
    return str(names.most_common(1)[0][0])


def _left_as_codes(base: Checkpoint) -> list[str]:
    stored = base.stored or base
    found = schemes.find(stored.specs, stored.config)
    return sorted(path for path, codec in found.codecs.items() if codec is None)


def _note(what: str, every: Mapping[str, Encoding]) -> str:
    labels = Counter(f"{encoding.module.scheme}, {encoding.label}" for encoding in every.values())
    before = sum(encoding.nbytes for encoding in every.values())
    after = sum(prod(encoding.shape) * dtypes.bits(encoding.dtype) // 8 for encoding in every.values())
    label, _ = labels.most_common(1)[0]
    return f"{len(every)} quantized module(s) ({label}) {what}: {_size(before)} become {_size(after)}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
