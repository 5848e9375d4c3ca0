"""What becomes of a quantized base: which of its weights are written in 16 bit, and which stay codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from loratools.adapter.placement.gguf import is_gguf
from loratools.decisions import warned
from loratools.engine.plan import Change, MergePlan, Recoded
from loratools.errors import IncompatibleAdapter, InvalidOption, WrongBase, counted
from loratools.options import Quantized
from loratools.storage import codecs, dtypes
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import encodings, logical, restated
from loratools.storage.codecs import schemes
from loratools.storage.codecs.folded import folded
from loratools.storage.codecs.state import KEYS, statement, with_statement
from loratools.storage.header import TensorSpec

if TYPE_CHECKING:
    from loratools.storage.codecs import Encoding, Grid


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """The base as the output has it: `base` shows as weights what is written in 16 bit, and as stored what stays codes.

    `recoded` are the changed weights that become codes again, by name: `base` shows them as weights too. `config` holds
    the fields of config.json that change, `dropped` those that go, `notes` what is to be said.
    """

    base: Checkpoint
    recoded: Mapping[str, Recoded]
    config: Mapping[str, Any]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def parts(self) -> dict[str, TensorSpec]:
        """The stored parts of what becomes codes again, by name."""
        return {name: spec for recoded in self.recoded.values() for name, spec in recoded.parts.items()}

    @property
    def layout(self) -> Checkpoint:
        """The model whose files the output has: that on disk where weights become codes again."""
        return replace(self.base.stored or self.base, config=self.base.config) if self.recoded else self.base


def as_written(
    base: Checkpoint, touched: Collection[str], policy: Quantized, original: Checkpoint | None = None,
    dtype: str | None = None,
) -> Written:  # fmt: skip
    """Decide what becomes of the codes of a base, of which adapters change the tensors `touched`.

    What is no code any more is written in `dtype`, by default in the dtype that each module of codes stands for.

    With the `original`, which the base was quantized from, weights that become codes again begin as the original's: of
    a folded base it is the original in that basis (`surgery/folding`).

    Raises `IncompatibleAdapter` where the policy is to refuse, and changed modules are codes.
    """
    every = encodings(base)
    if original is not None and (policy != "requantize" or not every):
        which = "this base is not quantized" if not every else "it is used where codes are made again"
        raise InvalidOption(f"original: {which} (--quantized requantize)")
    if not every:
        return Written(base, {}, {}, (), ())
    changed = {name: encoding for name, encoding in every.items() if name in touched}
    if policy == "refuse" and changed:
        raise IncompatibleAdapter(
            f"{counted(len(changed), 'target tensor')} of {base.path} {'is' if len(changed) == 1 else 'are'} quantized",
            [f"{name}: {encoding.module.scheme}, {encoding.label}" for name, encoding in sorted(changed.items())[:20]],
            hint="--quantized dequantize writes the merged model in 16 bit, --quantized partial only what changes.",
        )
    if policy == "dequantize":
        _refuse_scaled_activations(base)
        after: dict[str, Any] | None = None
        notes = [_note(_in_bits(dtype), every, dtype)]
        if left := _left_as_codes(base):
            after = _with_plain(base, every, base) if statement(base.config) else None
            shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
            kept = counted(len(left), "module stays as it is", "modules stay as they are")
            notes.append(f"{kept} stored, for no codec reads what is there: {shown}")
        fields, dropped = with_statement(base.config, after)
        return Written(restated(base, fields, dropped), {}, fields, dropped, tuple(notes))
    if is_gguf(base) and changed:
        return _of_gguf(base, changed, policy, original, dtype)
    if is_gguf(base):
        return Written(_as_stored(base, ()), {}, {}, (), ())
    if base.origins:
        raise IncompatibleAdapter(
            "the adapter repeats layers of a quantized base, of which only the whole can be written in 16 bit",
            hint="Use --quantized dequantize.",
        )
    stored = base.stored or base
    before = statement(base.config)
    if policy == "partial" and before.get("quant_method"):
        changed = _with_siblings(changed, every)
    partly = replace(logical(stored, changed), config=base.config)
    if not changed:
        return Written(replace(stored, config=base.config), {}, {}, (), ())
    if policy == "requantize":
        sources = _weights_of(original, changed)
        grid: Grid = "own" if original is None else "fresh"
        recoded = {name: Recoded(encoding, grid, sources.get(name)) for name, encoding in changed.items()}
        how = "by their own scales" if original is None else f"from the weights of {original.path}, with fresh scales"
        return Written(partly, recoded, {}, (), (_note(f"become codes again, {how}", changed),))
    fields, dropped = with_statement(base.config, _with_plain(stored, changed, partly))
    partly = restated(partly, fields, dropped)
    return Written(partly, {}, fields, dropped, (_note(_partly(touched, changed, dtype), changed, dtype),))


def _weights_of(original: Checkpoint | None, encodings: Mapping[str, Encoding]) -> dict[str, TensorSpec]:
    """Return the original's tensor for each weight that a base stores as codes; none where no original is given."""
    if original is None:
        return {}
    from loratools.surgery.merge.original import weights_of

    return weights_of(original, encodings)


def _of_gguf(
    base: Checkpoint, changed: Mapping[str, Encoding], policy: Quantized, original: Checkpoint | None,
    dtype: str | None,
) -> Written:  # fmt: skip
    """Return a GGUF base of which only the changed tensors get another type; each tensor of a file has its own.

    An original is a GGUF file too, which has names, and the rows of q and k, as the base has them.
    """
    if original is not None and not is_gguf(original):
        raise WrongBase(
            f"{original.path} is no GGUF file, and the original of a GGUF base has to be one",
            hint="Give what llama.cpp's converter made of the unquantized model, in BF16, F16 or F32.",
        )
    partly = _as_stored(base, changed)
    if policy == "partial":
        return Written(partly, {}, {}, (), (_note(_partly(changed, changed, dtype), changed, dtype),))
    origins = {base.origin(name): encoding for name, encoding in changed.items()}
    sources = _weights_of(original, origins)
    recoded = {
        name: Recoded(encoding.written(), "fresh", sources.get(base.origin(name))) for name, encoding in changed.items()
    }
    how = "" if original is None else f", from the weights of {original.path}"
    notes = [_note(f"become codes again{how}", changed)]
    if other := sorted(name for name, each in recoded.items() if each.encoding.label != changed[name].label):
        kinds = sorted({changed[name].label for name in other})
        tensors = counted(len(other), "tensor")
        notes.append(f"Q8_0 takes the place of {', '.join(kinds)} in {tensors}: ggml alone makes their types")
    return Written(partly, recoded, {}, (), tuple(notes))


def _as_stored(base: Checkpoint, shown: Collection[str]) -> Checkpoint:
    """Return a GGUF base with these tensors as weights, and all others as the file has them."""
    stored = (base.stored or base).specs
    specs = {name: spec if name in shown else stored[base.origin(name)] for name, spec in base.specs.items()}
    return replace(base, specs=specs)


def _refuse_scaled_activations(base: Checkpoint) -> None:
    """Raise `IncompatibleAdapter` for a base whose activations divide by scales: a model in 16 bit has none that do."""
    from loratools.surgery.folding.table import SCALED_ACTIVATIONS

    if scales := sorted(name for name in base.specs if name.endswith(SCALED_ACTIVATIONS)):
        raise IncompatibleAdapter(
            f"{base.path}: outputs are divided by scales of their own in {counted(len(scales), 'activation')} "
            f"({scales[0]}), which AWQ's runtime applies, and no class of a model in 16 bit",
            hint="Use --quantized partial or requantize, which leave them where that runtime looks for them.",
        )


def warn_of_folded(base: Checkpoint, touched: Collection[str]) -> None:
    """Warn where weights of a base are changed that may lie in another basis than those of the model itself."""
    if touched and (why := folded(statement(base.config), base.root)):
        warned(
            "%s may be another basis of the model that the adapter was trained on: %s. Up to half of the effect of an "
            "adapter of the unquantized model is lost on it; one that was trained on this very base is right. Give "
            "--original, the unquantized model, and the adapter is carried over, or say --trained-on folded",
            base.path, why,
        )  # fmt: skip


def as_it_was_written(plan: MergePlan, merged: Checkpoint) -> MergePlan:
    """Return a plan that writes all in 16 bit, with what config.json should say of a `merged` model as it is stored.

    Which of the policies made that model is told by its tensors.
    """
    coded, touched = encodings(merged), plan.touched().keys()
    if not coded and (not statement(merged.config) or _left_as_codes(plan.base)):
        return plan
    policy: Quantized = "requantize" if coded.keys() & touched else "partial"
    written = as_written(plan.base, touched, policy)
    config = {key: value for key, value in plan.config.items() if key not in KEYS}
    shared = written.base.specs.keys() & merged.specs.keys() - plan.changes.keys()  # scales of a cache
    stray = {name: Change(written.base.specs[name]) for name in sorted(shared)}
    changes = {**plan.changes, **stray}
    return replace(plan, changes=changes, config=config | dict(written.config), dropped=written.dropped)


def _with_siblings(changed: Mapping[str, Encoding], every: Mapping[str, Encoding]) -> dict[str, Encoding]:
    """Return the weights that have to be plain where those that change are: a runtime stores them in one."""
    from loratools.surgery.merge.siblings import with_siblings

    paths = with_siblings(
        {encoding.module.path for encoding in changed.values()}, (encoding.module.path for encoding in every.values())
    )
    return {name: encoding for name, encoding in every.items() if encoding.module.path in paths}


def _with_begun_lists(before: Mapping[str, Any], after: dict[str, Any], base: Checkpoint) -> dict[str, Any]:
    """Return the new statement, whose lists of plain modules name all of them where the old one had no list.

    Without a list, transformers leaves the head as it is, and what is tied to it; with one, it goes by that alone.
    """
    begun = [key for key, value in after.items() if isinstance(value, list) and before.get(key) is None]
    if not begun:
        return after
    from loratools.adapter.placement.classes import model_class

    kind = model_class(base.config)
    tensors = [name for name, spec in base.specs.items() if len(spec.shape) == 2 and spec.dtype in dtypes.FLOATS]
    names = [*tensors, *([kind.head] if kind and kind.head else [])]
    codes = schemes.find(base.specs, base.config).tensors
    weights = {name.removesuffix(".weight") for name in names if name.endswith(".weight") and name not in codes}
    return {**after, **{key: [*after[key], *sorted(weights - set(after[key]))] for key in begun}}


def _with_plain(model: Checkpoint, plain: Mapping[str, Encoding], written: Checkpoint) -> dict[str, Any]:
    """Return the statement of a model in which these modules are plain, each said as its codec says it."""
    stored = model.stored or model
    before = statement(model.config)
    named = schemes.find(stored.specs, stored.config).codecs
    paths: dict[str, list[str]] = {}
    for path in sorted(encoding.module.path for encoding in plain.values()):
        paths.setdefault(str(named[path]), []).append(path)
    after = dict(before)
    for codec, modules in paths.items():
        after = codecs.get(codec).plain(after, modules)
    return _with_begun_lists(before, after, written)


def _left_as_codes(base: Checkpoint) -> list[str]:
    stored = base.stored or base
    found = schemes.find(stored.specs, stored.config)
    return sorted(path for path, codec in found.codecs.items() if codec is None)


def _in_bits(dtype: str | None) -> str:
    return f"written in {dtypes.bits(dtype or 'BF16')} bit"


def _partly(touched: Collection[str], written: Mapping[str, Encoding], dtype: str | None) -> str:
    with_them = len(written.keys() - set(touched))
    why = f" ({with_them} unchanged, for a runtime stores them in one weight with changed ones)" if with_them else ""
    return f"{_in_bits(dtype)}{why}, the others stay as they are"


def _note(what: str, every: Mapping[str, Encoding], dtype: str | None = None) -> str:
    """Return a sentence on modules, with their scheme and the bytes that they take as codes and in a dtype."""
    labels = Counter(f"{encoding.module.scheme}, {encoding.label}" for encoding in every.values())
    counts = [f"{count} of {label}" for label, count in labels.most_common()]
    more = [f"and {len(counts) - 3} more kinds"] if counts[3:] else []
    kinds = "; ".join([*counts[:3], *more]) if len(counts) > 1 else next(iter(labels))
    plain = dtype or " and ".join(sorted({encoding.dtype for encoding in every.values()}))
    before = sum(encoding.nbytes for encoding in every.values())
    after = sum(prod(encoding.shape) * dtypes.bits(dtype or encoding.dtype) // 8 for encoding in every.values())
    return f"{counted(len(every), 'quantized module')} ({kinds}) {what}: {_size(before)}, {_size(after)} in {plain}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
