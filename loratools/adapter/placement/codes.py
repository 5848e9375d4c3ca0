"""Adapters whose target modules a base stores as codes: refused by the scheme's name, before names are resolved.

A quantized module often has no tensor of the name that an adapter looks for, and would only be reported as missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from loratools.adapter.model import Adapter
from loratools.adapter.naming.wrappers import FUSIONS, Names, normalized
from loratools.adapter.placement.stacks import spellings
from loratools.errors import IncompatibleAdapter, counted
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.codecs import schemes
from loratools.storage.codecs.state import statement
from loratools.storage.codecs.unread import rotated

HINT = "Merge into the unquantized model that it was made from (bf16, f16 or f32), then quantize the result again."


def refuse_codes(adapter: Adapter, base: Checkpoint, who: str = "the adapter") -> None:
    """Raise `IncompatibleAdapter`, with the scheme's name, where an adapter changes modules that are stored as codes.

    Modules are compared by name alone, past wrappers, fused projections and stacks of experts. `who` is what the
    sentence calls the adapter.
    """
    _refuse_rotated(base)
    if targets := stored_as_codes(adapter, base):
        named = schemes.find(base.specs, base.config).named(targets.values())
        raise IncompatibleAdapter(
            f"{base.path} is quantized with {named}, and {counted(len(targets), 'module')} that {who} "
            "changes are stored as codes, to which nothing can be added",
            [f"{module}: {scheme}" for module, scheme in sorted(targets.items())[:20]],
            hint=HINT,
        )


def stored_as_codes(adapter: Adapter, base: Checkpoint) -> dict[str, str]:
    """Return the modules that an adapter changes and a base stores as codes, each with the name of its scheme."""
    modules = schemes.find(base.specs, base.config).modules
    paths = [*adapter.updates, *(path.removesuffix(".weight") for path in adapter.replacements)]
    return _quantized(paths, modules, adapter) if modules else {}


def refuse_all_codes(base: Checkpoint) -> None:
    """Raise `IncompatibleAdapter`, with the scheme's name, where a logical view still has modules stored as codes."""
    codes = schemes.find(base.specs, base.config)
    if codes.modules:
        raise IncompatibleAdapter(
            f"{base.path} is quantized with {codes.named()}, which loratools does not read",
            [f"{module}: {scheme}" for module, scheme in sorted(codes.modules.items())[:20]],
            hint="Dequantize it with the tool that made it, or take the model that it was made from.",
        )


def refuse_other_codes(base: Checkpoint, tuned: Checkpoint) -> dict[str, str]:
    """Return the tensors of a fine-tune that belong to its quantization, which must be the base's own; and its scheme.

    Raises `IncompatibleAdapter`, with the scheme's name, where a module is stored as codes in one of the two models, or
    otherwise than in the other: the difference of codes is no change of a weight.
    """
    _refuse_rotated(base)
    _refuse_rotated(tuned)
    of_base, of_tuned = (schemes.find(model.specs, model.config) for model in (base, tuned))
    both = {**of_base.modules, **of_tuned.modules}
    if other := [module for module in both if of_base.modules.get(module) != of_tuned.modules.get(module)]:
        path, codes = (base.path, of_base) if of_base.modules else (tuned.path, of_tuned)
        raise IncompatibleAdapter(
            f"{path} is quantized with {codes.named()}, and codes cannot be subtracted from weights or other codes",
            [f"{module}: {both[module]}" for module in sorted(other)[:20]],
            hint="Extract from the unquantized models (bf16, f16 or f32) of both.",
        )
    return {name: of_tuned.of_tensor(name) for name in of_tuned.tensors}


def _refuse_rotated(model: Checkpoint) -> None:
    if rotated(statement(model.config)):
        raise IncompatibleAdapter(
            f"{model.path} has rotated weights (config.json: transform_config), into which no adapter fits that was "
            "trained on the model itself",
            hint=HINT,
        )


def _quantized(paths: Iterable[str], modules: Mapping[str, str], adapter: Adapter) -> dict[str, str]:
    """Return the paths of an adapter that are stored as codes, or made of what is, each with its scheme."""
    names = Names(f"{module}.weight" for module in modules)
    bare = {normalized(module): scheme for module, scheme in modules.items()}
    each = ((module.partition("experts."), scheme) for module, scheme in bare.items())
    experts = {before: scheme for (before, dot, _), scheme in each if dot}
    targets: dict[str, str] = {}
    for path in paths:
        inner = ".".join(segment for segment in path.split(".") if segment != "base_layer")
        for spelled in spellings(inner):
            if tensors := [tensor for name in _whole_and_parts(spelled) for tensor in names.find(name)]:
                targets[path] = modules[tensors[0].removesuffix(".weight")]
            update = adapter.updates.get(path)
            if update is not None and update.members:
                parameter = update.layout["parameter"]
                stack, before = f"{normalized(spelled)}.{parameter}", normalized(spelled).removesuffix("experts")
                if scheme := bare.get(stack) or (None if _has_stack(bare, spelled) else experts.get(before)):
                    targets[path] = scheme
    return targets


def _has_stack(bare: Mapping[str, str], path: str) -> bool:
    """Tell whether some stack of these experts is quantized: then the one in question may be another, and plain."""
    start = f"{normalized(path)}."
    return any(module.startswith(start) and not module.removeprefix(start)[0].isdigit() for module in bare)


def _whole_and_parts(path: str) -> Iterable[str]:
    """Yield a module, the fused projection that it may be part of, and the parts that it may be fused from."""
    parent, dot, last = path.rpartition(".")
    yield path
    for fusion in FUSIONS:
        if fusion.position(last) is not None:
            yield f"{parent}{dot}{fusion.fused}"
        if fusion.fused == last:
            yield from (f"{parent}{dot}{part}" for parts in fusion.parts for part in parts)
