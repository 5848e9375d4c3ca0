"""Adapters on a GGUF base: its tensors under the adapters' names, experts of a stack, and the order of rows.

llama.cpp's converter keeps every number of a weight, and puts the rows of some in another order
(`naming/llama_cpp.py`): an update is placed on those rows. What the converter does more to is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from loratools.adapter.model import Adapter
from loratools.adapter.placement.resolve import Placement, resolve
from loratools.adapter.placement.stacks import path_of
from loratools.adapter.placement.weight import over_weights
from loratools.adapter.placement.whole import resolve_replacements
from loratools.errors import IncompatibleAdapter, UnsupportedAdapter, counted
from loratools.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from loratools.adapter.naming.llama_cpp import Layout
    from loratools.adapter.site import Site
    from loratools.storage.codecs import Encoding
    from loratools.storage.header import TensorSpec

STATED = "gguf"
"""Field of a GGUF base's config: its architecture and heads, as its own fields say."""

_SQUEEZED = "ffn_gate_inp_shexp.weight"
"""Ends the name of a tensor of one row that the file has as a vector."""

Shapes = Mapping[str, tuple[int, ...]]


def is_gguf(base: Checkpoint) -> bool:
    """Tell whether a base is a GGUF file."""
    return STATED in base.config


def under_adapters_names(base: Checkpoint, adapters: Sequence[Adapter]) -> Checkpoint:
    """Return a GGUF base with the tensors that adapters change under their names; any other base as it is.

    Raises `UnsupportedAdapter` for an architecture whose tensors are not known.
    """
    if not is_gguf(base):
        return base
    from loratools.adapter.naming.llama_cpp import model_type, module_of, place  # for a GGUF base alone
    from loratools.adapter.naming.llama_cpp_table import TABLE

    architecture = _layout(base.config).architecture
    if architecture not in TABLE:
        raise UnsupportedAdapter(
            f"{base.path}: what llama.cpp's converter does to the weights of {architecture!r} is not known here",
            hint=f"Known are {', '.join(sorted(TABLE))}.",
        )
    names: dict[str, str] = {}
    for adapter in adapters:
        whole = (path.rpartition(".")[0] for path in [*adapter.replacements, *adapter.copies])
        for module in [*map(path_of, adapter.updates), *whole]:
            at = place(module, architecture)
            if at is not None and at.expert is None:
                names.setdefault(at.tensor, module)
    for tensor in ("token_embd", "output") if adapters else ():  # by which ties and vocabularies are known
        if f"{tensor}.weight" in base.specs and (usual := module_of(tensor, architecture)):
            names.setdefault(tensor, usual)
    config = dict(base.config)
    if "output.weight" not in base.specs and "token_embd.weight" in base.specs:
        config |= {"model_type": model_type(architecture, experts=False), "tie_word_embeddings": True}
    origins: dict[str, str] = {}
    for name in base.specs:
        module, _, parameter = name.rpartition(".")
        origins[f"{names[module]}.{parameter}" if module in names else name] = name
    specs = {new: _named(base.specs[old], new) for new, old in origins.items()}
    return replace(
        base, specs=specs, origins=origins, config=config,
        shards=tuple(replace(shard, tensors=specs) for shard in base.shards),
        stored=base.stored or base,
    )  # fmt: skip


def _named(spec: TensorSpec, name: str) -> TensorSpec:
    """Return a tensor whose codes, if it is stored as codes, go by this name."""
    if spec.encoding is None:
        return spec
    encoding = cast("Encoding", spec.encoding)
    module = replace(encoding.module, path=name.rpartition(".")[0], names={"weight": name})
    return spec._replace(encoding=replace(encoding, module=module))


def stored_name(name: str, base: Checkpoint) -> str:
    """Return what a tensor is called in the file: also one that is new, a head of its own.

    Raises `IncompatibleAdapter` for one that the architecture has no tensor for.
    """
    if name in base.origins:
        return base.origins[name]
    from loratools.adapter.naming.llama_cpp import place

    module, _, parameter = name.rpartition(".")
    architecture = _layout(base.config).architecture
    if (at := place(module, architecture)) is None:
        raise IncompatibleAdapter(f"{base.path}: {name}: llama.cpp's {architecture} has no tensor for it")
    return f"{at.tensor}.{parameter}"


def resolve_on(base: Checkpoint, adapter: Adapter, shapes: Shapes) -> list[Placement]:
    """Return where each update of an adapter lands in a base: `resolve`, and in a GGUF file the rows that it has there.

    Raises `IncompatibleAdapter` as `resolve` does, and for q and k whose heads the file does not state.
    """
    if not is_gguf(base):
        return over_weights(base, resolve(adapter, shapes, base.config))
    from loratools.adapter.naming.llama_cpp import model_type, module_of

    layout = _layout(base.config)
    _refuse(base, adapter, shapes, layout)
    stacks: dict[str, tuple[str, int]] = {}
    seen: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) == 3 and module_of(module, layout.architecture, 0):
            for expert in range(shape[0]):
                alone = f"{module_of(module, layout.architecture, expert)}.weight"
                stacks[alone], seen[alone] = (name, expert), shape[1:]
        else:
            seen[name] = (1, *shape) if stored_name(name, base).endswith(_SQUEEZED) else shape
    # Every weight lies (out, in) in the file, also those of GPT-2.
    adapter = replace(adapter, orientation=dict.fromkeys(adapter.updates, False))
    config = {**base.config, "model_type": model_type(layout.architecture, experts=bool(stacks))}
    placements = []
    for placement in resolve(adapter, seen, config):
        for site in _in_file(placement.site, stacks, shapes, base, layout):
            placements.append(replace(placement, site=site))
    return placements


def _refuse(base: Checkpoint, adapter: Adapter, shapes: Shapes, layout: Layout) -> None:
    """Raise `IncompatibleAdapter` with all that the converter changes further than an update can follow."""
    from loratools.adapter.naming.llama_cpp import refusal, whole_refusal

    problems = [
        f"{module}: {why}" for module in adapter.updates if (why := refusal(path_of(module), layout.architecture))
    ]
    for name in resolve_replacements(adapter, shapes):
        tensor, _, parameter = stored_name(name, base).rpartition(".")
        if why := whole_refusal(tensor, parameter, layout.architecture):
            problems.append(f"{name}, trained whole: {why}")
    if base.config[STATED].get("sections") and layout.architecture == "glm4":
        of_q_and_k = ("self_attn.q_proj", "self_attn.k_proj")
        problems += [
            f"{module}: the converter puts its rows in another order for M-RoPE"
            for module in adapter.updates
            if module.endswith(of_q_and_k)
        ]
    if problems:
        raise IncompatibleAdapter(
            "llama.cpp's converter changed further what the adapter is for, in "
            f"{counted(len(problems), 'tensor')}: merge into the model that the file was made from",
            problems,
        )


def _in_file(
    site: Site, stacks: Mapping[str, tuple[str, int]], shapes: Shapes, base: Checkpoint, layout: Layout
) -> list[Site]:
    if site.tensor in stacks:
        name, expert = stacks[site.tensor]
        count, rows, columns = shapes[name]
        start, stop, step = site.rows
        shifted = (start + expert * rows, stop + expert * rows, step)
        return [replace(site, tensor=name, matrix=(count * rows, columns), rows=shifted)]
    rows = site.matrix[0]
    if base.origins.get(site.tensor) == site.tensor:
        return [site]  # the adapter has the file's own names, and so its rows
    try:
        order = layout.order_of(stored_name(site.tensor, base).rpartition(".")[0])
        if order is None:
            return [site]
        if site.rows != (0, rows, 1) or site.part != (0, rows) or site.transposed:
            raise ValueError(f"an update of rows {site.rows[:2]} alone has no place among the rows of its heads")
        return [replace(site, rows=there, part=part) for part, there in order.pieces(rows)]
    except ValueError as error:
        raise IncompatibleAdapter(f"{site.tensor}: {error}") from None


def _layout(config: Mapping[str, Any]) -> Layout:
    from loratools.adapter.naming.llama_cpp import Layout

    stated: Mapping[str, Any] = config[STATED]
    return Layout(str(stated.get("architecture")), stated.get("heads"), stated.get("kv_heads"))
