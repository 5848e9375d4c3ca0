"""The names in a PEFT file: without the wrappers and adapter names that trainers leave in, grouped by module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loratools.format import keys
from loratools.storage.lazy import LazyTensor

# Segments that FSDP, gradient checkpointing and torch.compile put into module paths.
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})

_ROWS_OF_COPY = "token_adapter.base_layer."


@dataclass(slots=True)
class Groups:
    """The tensors of a file, sorted.

    `modules`   module -> part -> tensor
    `whole`     parameter path -> the tensor that takes its place
    `copies`    parameter path -> the copy of the base's own tensor that PEFT saves where embeddings are targeted
    `originals` parameter paths of the base's tensors in a raw dump, which PEFT does not load
    `adapters`  adapter names in the tensor names of a raw dump
    `faults`    a line for each name that has no place
    """

    modules: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    whole: dict[str, LazyTensor] = field(default_factory=dict)
    copies: dict[str, LazyTensor] = field(default_factory=dict)
    originals: list[str] = field(default_factory=list)
    adapters: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)


def group(tensors: Mapping[str, LazyTensor], *, biases: bool) -> Groups:
    """Sort tensors by module; `biases` says whether biases of the base were trained, or else are copies."""
    groups = Groups()
    strangers = []
    for name, lazy in tensors.items():
        split = keys.split(unwrap(name))
        if split is None:
            strangers.append(name)
            continue
        place, part = split
        if part.startswith(_ROWS_OF_COPY):  # the embedding under trained rows, saved after a resize
            place, part = f"{place}.base_layer.{part.removeprefix(_ROWS_OF_COPY)}", ""
        if part:
            part, adapter = _without_adapter(part)
            home = groups.modules.setdefault(place, {})
        else:
            place, adapter, role = whole_name(place, biases)
            if role == "original":
                groups.originals.append(place)
                continue
            part, home = place, groups.copies if role == "copy" else groups.whole
        if adapter:
            groups.adapters.add(adapter)
        if part in home:
            groups.faults.append(f"{name}: a second tensor for {keys.join(place, part if part != place else '')}")
        home[part] = lazy
    if broken := [name for name in tensors if "\n" in name]:
        groups.faults.append(f"{len(broken)} tensor(s) with a line break in the name: {broken[0]!r}")
    if len(groups.adapters) > 1:
        several = ", ".join(sorted(groups.adapters))
        groups.faults.append(f"several adapters in one file: {several}; save them one by one")
    if strangers:
        names = f"names do not begin with {keys.PREFIX}: {', '.join(strangers[:5])}"
        groups.faults.append(f"{len(strangers)} tensor(s) whose {names}")
    return groups


def unwrap(name: str) -> str:
    """Return a tensor name without the segments of wrappers, and without a leading `module.` (DDP, DeepSpeed).

    >>> unwrap("module._orig_mod.base_model.model.layers.0._fsdp_wrapped_module.q_proj.lora_A.weight")
    'base_model.model.layers.0.q_proj.lora_A.weight'
    """
    stripped = name
    if any(wrapper in name for wrapper in _WRAPPERS):
        stripped = ".".join(segment for segment in name.split(".") if segment not in _WRAPPERS)
    while stripped.startswith("module."):
        stripped = stripped.removeprefix("module.")
    return stripped


def _without_adapter(part: str) -> tuple[str, str | None]:
    """Return a part without the adapter's name, and the name: `lora_A.default.weight` -> (`lora_A.weight`, `default`).

    A part that PEFT does not have, with or without an adapter's name, comes back unchanged.
    """
    segments = part.split(".")
    if part in keys.PARTS:
        return part, None
    if segments[-1] == "weight" and ".".join(segments[:-1]) in keys.PARTS:
        return ".".join(segments[:-1]), None  # a parameter that is wrapped in a module, as DoRA's magnitude is
    for i in range(1, len(segments)):
        without = ".".join(segments[:i] + segments[i + 1 :])
        for candidate in (without, without.removesuffix(".weight")):
            if candidate in keys.PARTS:
                return candidate, segments[i]
    return part, None


def whole_name(path: str, biases: bool) -> tuple[str, str | None, str]:
    """Return a whole tensor's path in the base, the adapter's name in it, and its role: trained, copy or original."""
    segments = path.split(".")
    if "modules_to_save" in segments:
        at = segments.index("modules_to_save")
        rest = segments[at + 1 :]
        adapter = rest.pop(0) if len(rest) > 1 else None
        return ".".join(segments[:at] + rest), adapter, "trained"
    for wrapper, role in (("original_module", "original"), ("base_layer", "copy")):
        if wrapper in segments:
            place = ".".join(segment for segment in segments if segment != wrapper)
            trained = biases and role == "copy" and segments[-1].endswith("bias")
            return place, None, "trained" if trained else role
    return path, None, "trained"
