"""An adapter of tensors under PEFT's names and the document of a config: LoRA here, every other type by `typed`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.decisions import warned
from loratools.dialects._frame.build import build_all, check_faults, check_read, some
from loratools.dialects.peft import checks
from loratools.dialects.peft.config import PeftConfig
from loratools.dialects.peft.experts import holders, layouts, outer, reordered
from loratools.dialects.peft.fields import is_typed
from loratools.dialects.peft.names import Groups, group
from loratools.errors import BadFile
from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    from loratools.storage.checkpoint import Checkpoint

_TRAINING_ONLY = frozenset({"lora_velora_embed"})  # only VeLoRA's backward pass uses it


def assemble(
    path: Path, tensors: Mapping[str, LazyTensor], document: Mapping[str, Any], config_path: Path, *,
    initial: bool = False, alpha: float | None = None, base: Checkpoint | None = None,
) -> Adapter:  # fmt: skip
    """Return the adapter that tensors under PEFT's names are with the document of a config, of any type.

    `path` and `config_path` are what messages call the two; `initial` and `alpha` are as in `PeftConfig.parse`, `base`
    as in `typed.assemble`. Raises as `read`.
    """
    if is_typed(document):
        from loratools.dialects.peft import typed

        return typed.assemble(path, tensors, document, config_path, alpha, base)
    config = PeftConfig.parse(document, config_path, initial=initial, alpha=alpha)
    groups = group(tensors, biases=config.fields.get("bias", "none") != "none")
    held = holders(groups, config)
    updates, unsupported, faults = _build(groups, config, held)
    check_faults(path, [*groups.faults, *checks.faults(groups, config, held), *faults])
    check_read(path, unsupported)
    if not updates and not groups.whole:
        raise BadFile(f"{path}: no LoRA tensors in it")
    for note in (*_notes(groups, config), *checks.lacking(updates, config.targets, base)):
        warned("%s: %s", path, note)
    return Adapter(updates, groups.whole, config.base, dialect="peft", settings=config.settings, copies=groups.copies)


def _build(
    groups: Groups, config: PeftConfig, held: Mapping[str, set[str]]
) -> tuple[dict[str, Update], list[str], list[str]]:
    """Return the updates, a line for each set of parts that no kind claims, and a line for each contradiction.

    `held` are the parameters of modules that the config targets, as `holders` tells.
    """
    stacks, faults = layouts(groups, config, held)

    def choose(module: str, parts: Mapping[str, LazyTensor]) -> str | None:
        kind = kinds.claim(parts) if checks.is_plain(module, groups) else None
        return "experts" if module in stacks and kind in ("lora", None) else kind

    def layout(module: str, kind: str) -> dict[str, Any]:
        rows = config.token_rows(module) if kind == "tokens" else None
        return {"layout": {"rows": rows}} if rows else {"layout": stacks[module]} if module in stacks else {}

    def rule(module: str, rank: int) -> tuple[float, float]:
        path = module.partition(".base_layer.")[0]  # patterns know the outer module
        if module in stacks:
            path = f"{outer(module)}.{stacks[module]['parameter']}"
            return config.scaling(path, rank), config.alpha(path)
        if rank and config.rank(path) not in (None, rank):
            raise ValueError(f"its tensors have rank {rank}, the config says {config.rank(path)}")
        twice = config.applied_twice(module)
        return twice * (config.scaling(path, rank) if rank else 1.0), twice * config.alpha(path)

    modules = {
        module: {part: lazy for part, lazy in parts.items() if part not in _TRAINING_ONLY}
        for module, parts in groups.modules.items()
    }
    modules |= {module: reordered(modules[module], stack, config.fields) for module, stack in stacks.items()}
    updates, unsupported, contradictions = build_all(modules, rule, choose, layout)
    return updates, unsupported, faults + contradictions


def _notes(groups: Groups, config: PeftConfig) -> Iterator[str]:
    """Yield what a user must know of the tensors beside their config: what is applied otherwise, or not at all."""
    if doubled := [module for module in groups.modules if config.applied_twice(module) == 2]:
        yield f"{some(doubled)}: applied twice, as PEFT up to 0.21 does when it trains and when it merges"
    yield from groups.notes()
    for field, names in config.without_tensors(groups.modules, groups.whole).items():
        yield f"no tensors for these {field}: {', '.join(names[:20])}"
