"""GGUF files of adapters: read into an `Adapter`, and written from one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from loratools.adapter import factors
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter, BaseIdentity, Loss
from loratools.adapter.naming.llama_cpp import ARCHITECTURES, Layout, Order, Place, module_of, permuted, place, refusal
from loratools.adapter.naming.llama_cpp_table import TABLE
from loratools.adapter.parts import A_EMBEDDING, B_EMBEDDING, A, B
from loratools.decisions import warned
from loratools.dialects._frame.build import Draft, check_read, factors_of
from loratools.dialects._frame.listing import Listing, by_convert
from loratools.dialects._frame.losses import common_losses, identity_losses, left, update_losses, without
from loratools.dialects._frame.metadata import tell_lost
from loratools.dialects._frame.numbers import is_float32, is_number, most_common, tell_alpha
from loratools.errors import BadFile, UnsupportedAdapter
from loratools.storage import gguf
from loratools.storage.beside import making
from loratools.storage.gguf.container import read_container
from loratools.storage.lazy import LazyTensor

_FILE = "adapter.gguf"
_ALPHA = "adapter.lora.alpha"
_KNOWN = (
    "adapter.type", _ALPHA, "adapter.lora.task_name", "adapter.lora.prompt_prefix", "adapter.alora.invocation_tokens",
)  # fmt: skip
"""Fields of an adapter: its kind, its scale, what it was trained for, and that it is activated by tokens."""
_KEY = "gguf"  # of settings: the architecture and the heads that the file states


def read(listing: Listing) -> Adapter:
    """Read an adapter; alpha is the file's, heads are the base's or else the file's.

    Raises `BadFile` for a file that is no LoRA adapter, `UnsupportedAdapter` for an unknown architecture, for names of
    no known tensor and for a number of heads that is needed and not known, `MissingExtra` without the `gguf` package.
    """
    name = listing.only(".gguf")
    if name is None:
        raise BadFile(f"{listing.path}: expected one .gguf file in this folder")
    path = listing.folder / name
    gguf.check_counts(path)
    with suppress(UnsupportedAdapter):  # big-endian numbers, which the package reads
        read_container(path)
    fields, tensors = gguf.read(path)
    kind = (fields.get("general.type"), fields.get("adapter.type"))
    if kind != ("adapter", "lora"):
        raise BadFile(f"{path}: general.type is {kind[0]!r} and adapter.type {kind[1]!r}, expected a LoRA adapter")
    layout = _layout(fields, listing, path)
    recorded = fields.get(_ALPHA, 0.0)
    if type(recorded) is not float or not is_number(recorded):
        raise BadFile(f"{path}: {_ALPHA}: expected a number, found {recorded!r}")
    tell_alpha(path, listing.alpha, [recorded])
    alpha = recorded if listing.alpha is None else listing.alpha
    if listing.alpha is None and not recorded:
        warned("%s: %s is %s; a scale of 1 is applied, as llama.cpp does", path, _ALPHA, fields.get(_ALPHA, "missing"))
    if names := sorted(name for name in fields if name.startswith("adapter.") and name not in _KNOWN):
        warned("%s: fields that are not known here, and have no effect: %s", path, ", ".join(names)[:500])
    if "adapter.alora.invocation_tokens" in fields:
        raise UnsupportedAdapter(
            f"{path}: an activated LoRA acts only after its invocation tokens; it cannot be merged"
        )
    modules = _modules_of(listing, layout.architecture)
    draft, unknown = Draft(listing.path), []
    for tensor, lazy in sorted(tensors.items()):
        target, _, part = tensor.rpartition(".")
        if part not in ("lora_a", "lora_b") or not target.endswith(".weight"):
            draft.faults.append(f"{tensor}: expected a name that ends in .weight.lora_a or .weight.lora_b")
            continue
        try:
            parts = _to_peft(target.removesuffix(".weight"), part, lazy, layout, modules)
        except ValueError as error:
            unknown.append(str(error))
            continue
        for module, peft_part, expert in parts:
            draft.add(module, peft_part, expert, tensor)
    draft.check()
    check_read(listing.path, unknown, hint=by_convert(listing, "--base BASE", "Give the base model"))
    scaled = alpha or listing.alpha is not None  # the call's 0 is a 0
    updates = draft.build(lambda _, rank: (alpha / rank, alpha) if scaled else (1.0, float(rank)))
    stated = {"architecture": layout.architecture, "heads": layout.heads, "kv_heads": layout.kv_heads}
    settings = {_KEY: {key: value for key, value in stated.items() if value is not None}}
    base = BaseIdentity.of_name(fields.get("general.base_model.0.name"))
    return Adapter(updates, base=base, dialect="gguf", settings=settings)


def losses(adapter: Adapter) -> list[Loss]:
    """List what llama.cpp has no tensor for; scalings that differ go into lora_b without changing any ΔW."""
    layout = layout_of(adapter)
    if layout is None:
        known = ", ".join(sorted(ARCHITECTURES))
        why = f"not known without the base model (--base); known are {known}"
        return [Loss("architecture", why), *identity_losses(adapter)]
    lost = update_losses(adapter, "llama.cpp", ("lora", "embedding"), (A, B, A_EMBEDDING, B_EMBEDDING))
    sayable = without(adapter, lost).updates
    stacks = _stacks(sayable, layout)
    complete = {tensor for tensor, experts in stacks.items() if sorted(map(_order, experts)) == [*range(len(experts))]}
    for module in sorted(sayable):
        at = place(module, layout.architecture)
        if at is None:
            unknown = f"no tensor of the architecture {layout.architecture} is known for it"
            lost.append(Loss(module, refusal(module, layout.architecture) or unknown))
        elif at.expert is not None and at.tensor not in complete:
            lost.append(Loss(module, f"not all experts of {at.tensor} have an update"))
        elif (A_EMBEDDING in sayable[module].parts) != (at.tensor == "token_embd"):
            lost.append(Loss(module, "llama.cpp reads token_embd, and nothing else, as an embedding"))
        else:
            try:
                layout.order_of(at.tensor)
            except ValueError as error:
                lost.append(Loss(module, f"{error} without the base model (--base)"))
    return lost + common_losses(adapter, "llama.cpp")


def write(adapter: Adapter, target: Path, *, force: bool = False) -> Adapter:
    """Write one GGUF file. Its alpha is the most common s·r that float32 has exactly; lora_b takes the ratio to it."""
    layout = layout_of(adapter)
    if layout is None:
        raise UnsupportedAdapter(f"{target}: {losses(adapter)[0]}")
    kept = left(adapter, losses(adapter), target)
    updates = kept.updates
    alpha = float(most_common(s for u in updates.values() if is_float32(s := u.scaling * u.rank)))
    tensors: dict[str, LazyTensor] = {}
    for tensor, numbered in sorted(_stacks(updates, layout).items()):
        ranks = max(update.rank for update in numbered.values())
        pairs = [_of_peft(numbered[i], ranks, alpha, layout.order_of(tensor)) for i in sorted(numbered, key=_order)]
        a, b = pairs[0] if None in numbered else (factors.stacked([pair[i] for pair in pairs]) for i in (0, 1))
        tensors |= {f"{tensor}.weight.lora_a": a, f"{tensor}.weight.lora_b": b}
    fields: dict[str, Any] = {"general.type": "adapter", "adapter.type": "lora", _ALPHA: alpha}
    if layout.heads and layout.kv_heads:
        fields[f"{layout.architecture}.attention.head_count"] = layout.heads
        fields[f"{layout.architecture}.attention.head_count_kv"] = layout.kv_heads
    if adapter.base and adapter.base.id:
        fields |= {"general.base_model.count": 1, "general.base_model.0.name": adapter.base.id}
    fields |= making.entry()
    tell_lost(adapter, target, "GGUF")
    gguf.save(target, _FILE, layout.architecture, fields, tensors, force=force)
    return kept


def layout_of(adapter: Adapter) -> Layout | None:
    """Return the architecture that the adapter's own GGUF file states, or else the config of the base."""
    fields = adapter.settings.get(_KEY)
    if isinstance(fields, Mapping):
        return Layout(str(fields.get("architecture")), fields.get("heads"), fields.get("kv_heads"))
    config = adapter.settings.get("base_config")
    return Layout.of_config(config) if isinstance(config, Mapping) else None


def _layout(fields: Mapping[str, Any], listing: Listing, path: Path) -> Layout:
    architecture = fields.get("general.architecture")
    if architecture not in TABLE:
        raise UnsupportedAdapter(
            f"{path}: whether llama.cpp permutes rows of the architecture {architecture!r} is not known here;"
            f" known are {', '.join(sorted(TABLE))}"
        )
    of_base = Layout.of_config(listing.base.config) if listing.base else None
    if of_base and of_base.architecture == architecture:
        return of_base
    if of_base:
        raise BadFile(f"{path}: its architecture is {architecture!r}, that of the base {of_base.architecture!r}")
    heads, kv_heads = (fields.get(f"{architecture}.attention.{key}") for key in ("head_count", "head_count_kv"))
    heads, kv_heads = (count if isinstance(count, int) else None for count in (heads, kv_heads))
    return Layout(str(architecture), heads, kv_heads)


def _modules_of(listing: Listing, architecture: str) -> dict[Place, str]:
    """Return the tensor in a GGUF file -> the module of the base that lands there."""
    modules: dict[Place, str] = {}
    for name in listing.base.specs if listing.base else ():
        if at := place(module := name.removesuffix(".weight"), architecture):
            modules.setdefault(at, module)
    return modules


def _to_peft(
    tensor: str, part: str, lazy: LazyTensor, layout: Layout, modules: Mapping[Place, str]
) -> list[tuple[str, str, LazyTensor]]:
    """Return (module, PEFT's part, tensor) for one tensor; for stacked experts, one of each."""
    stacked = len(lazy.shape) == 3
    parts = []
    for i in range(lazy.shape[0]) if stacked else [None]:
        module = modules.get(Place(tensor, i)) or module_of(tensor, layout.architecture, i)
        if module is None:
            raise ValueError(f"{tensor}: no module of the architecture {layout.architecture} is known for it")
        factor = lazy if i is None else factors.item(lazy, i)
        if tensor == "token_embd":
            named = (A_EMBEDDING, factors.turned(factor)) if part == "lora_a" else (B_EMBEDDING, factor)
        elif part == "lora_a":
            named = A, factor
        else:
            named = B, permuted(factor, layout.order_of(tensor), back=True)
        parts.append((module, *named))
    return parts


def _of_peft(update: Update, rank: int, alpha: float, order: Order | None) -> tuple[LazyTensor, LazyTensor]:
    a, b = factors_of(update)
    a = factors.padded(a, 0, rank)
    b = permuted(factors.padded(factors.scaled(b, update.scaling * rank / alpha), 1, rank), order)
    return (factors.turned(a) if A_EMBEDDING in update.parts else a), b


def _stacks(updates: Mapping[str, Update], layout: Layout) -> dict[str, dict[int | None, Update]]:
    """Return the tensor that each update lands on -> the number of the expert, or None -> the update."""
    stacks: dict[str, dict[int | None, Update]] = defaultdict(dict)
    for module, update in updates.items():
        if at := place(module, layout.architecture):
            stacks[at.tensor][at.expert] = update
    return stacks


def _order(expert: int | None) -> int:
    return -1 if expert is None else expert
