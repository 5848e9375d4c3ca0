"""The names in a PEFT file: without the wrappers and adapter names that trainers leave in, grouped by module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from loratools.dialects._frame.build import some
from loratools.errors import counted
from loratools.format import keys
from loratools.storage.lazy import LazyTensor

# Segments that FSDP, gradient checkpointing and torch.compile put into module paths.
_WRAPPED, _COMPILED = "_wrapped_module", "_orig_mod"
_WRAPPERS = frozenset({f"_fsdp{_WRAPPED}", f"_checkpoint{_WRAPPED}", _COMPILED})

_ROWS_OF_COPY = "token_adapter.base_layer."


@dataclass(slots=True, eq=False, repr=False)
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

    def add(self, name: str, place: str, part: str, adapter: str | None, lazy: LazyTensor) -> None:
        """Take in a part of a module, whose name in the file has an adapter's name in it, or None."""
        self._put(self.modules.setdefault(place, {}), name, place, part, adapter, lazy)

    def add_whole(self, name: str, path: str, lazy: LazyTensor, *, biases: bool) -> None:
        """Take in a whole tensor by the path in its name; `biases` as in `group`."""
        place, adapter, role = _whole_name(path, biases)
        if role == "original":
            self.originals.append(place)
        else:
            self._put(self.copies if role == "copy" else self.whole, name, place, "", adapter, lazy)

    def _put(
        self, home: dict[str, LazyTensor], name: str, place: str, part: str, adapter: str | None, lazy: LazyTensor
    ) -> None:
        if adapter:
            self.adapters.add(adapter)
        if (key := part or place) in home:
            self.faults.append(f"{name}: a second tensor for {keys.join(place, part)}")
        home[key] = lazy

    def check_names(self, names: Iterable[str], strangers: Sequence[str]) -> None:
        """Add the faults that the names in a file have together; `strangers` do not begin as PEFT's do."""
        if broken := [name for name in names if "\n" in name]:
            self.faults.append(f"{counted(len(broken), 'tensor')} with a line break in the name: {broken[0]!r}")
        if len(self.adapters) > 1:
            several = ", ".join(sorted(self.adapters))
            self.faults.append(f"several adapters in one file: {several}; save them one by one")
        if strangers:
            begin = f"names do not begin with {keys.PREFIX}: {', '.join(strangers[:5])}"
            self.faults.append(f"{counted(len(strangers), 'tensor')} whose {begin}")

    def notes(self) -> Iterator[str]:
        """Yield what a user must know of the names: what PEFT does not load, and what was left in them."""
        if self.originals:
            yield f"{some(self.originals)}: copies of the base model's, which PEFT does not load"
        for name in sorted(self.adapters):
            yield f"the adapter's name {name!r} was left in the names of the tensors"


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
            groups.add(name, place, *_without_adapter(part), lazy)
        else:
            groups.add_whole(name, place, lazy, biases=biases)
    groups.check_names(tensors, strangers)
    return groups


def unwrap(name: str) -> str:
    """Return a tensor name without the segments of wrappers, and without a leading `module.` (DDP, DeepSpeed).

    >>> unwrap("module._orig_mod.base_model.model.layers.0._fsdp_wrapped_module.q_proj.lora_A.weight")
    'base_model.model.layers.0.q_proj.lora_A.weight'
    """
    stripped = name
    if _WRAPPED in name or _COMPILED in name:
        stripped = ".".join(segment for segment in name.split(".") if segment not in _WRAPPERS)
    while stripped.startswith("module."):
        stripped = stripped.removeprefix("module.")
    return stripped


def _without_adapter(part: str) -> tuple[str, str | None]:
    """Return a part without the adapter's name, and the name: `lora_A.default.weight` -> (`lora_A.weight`, `default`).

    A part that PEFT does not have, with or without an adapter's name, comes back unchanged.
    """
    if part in keys.PARTS:
        return part, None
    segments = part.split(".")
    if segments[-1] == "weight" and ".".join(segments[:-1]) in keys.PARTS:
        return ".".join(segments[:-1]), None  # a parameter that is wrapped in a module, as DoRA's magnitude is
    for i in range(1, len(segments)):
        without = ".".join(segments[:i] + segments[i + 1 :])
        for candidate in (without, without.removesuffix(".weight")):
            if candidate in keys.PARTS:
                return candidate, segments[i]
    return part, None


def _whole_name(path: str, biases: bool) -> tuple[str, str | None, str]:
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
