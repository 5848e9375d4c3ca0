"""loratools inspect"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._facts import bounded, entry_lines, fact_lines
from loratools.cli._group import command as make
from loratools.errors import counted

if TYPE_CHECKING:
    from loratools.adapter.model import BaseIdentity
    from loratools.surgery.inspect import AdapterSummary, CheckpointSummary
    from loratools.surgery.quantization import Quantization
    from loratools.surgery.spectrum import AdapterSpectrum

_BARS = " ▁▂▃▄▅▆▇█"
_DECADES = 3  # a bar is full at σ₁ and empty at σ₁/1000
_WIDTH = 32


@make(section="Look", each="path")
@click.argument("path", type=options.INPUT)
@options.modules_option
@options.option("--spectrum", is_flag=True)
@options.option(
    "--base", type=options.INPUT,
    more="For a --spectrum of changes that depend on it: DoRA, (IA)3, OFT, GLoRA, tensors trained whole.",
)  # fmt: skip
@options.option("--metadata", is_flag=True)
@options.module_options
@options.adapter_options
@options.model_type_option
def command(
    path: str, modules: bool, spectrum: bool, base: str | None, metadata: bool, include: tuple[str, ...],
    exclude: tuple[str, ...],
    dialect: str | None, alpha: float | None, model_type: str | None,
) -> show.Report:  # fmt: skip
    """Describe an adapter or a model, from headers alone unless --spectrum is given.

    Of an adapter: its dialect, ranks, alpha and scaling, target modules, size, the base model it belongs to and what
    it was made by; and what its metadata have: trigger words, the most frequent tags, resolution, steps, learning rate,
    date. Of a model: architecture, parameters, dtypes, shards and the schema tier of its base hash. Layer
    numbers are collapsed: model.layers.[0-29].self_attn.{q,v}_proj means 60 modules. With --spectrum: the singular
    values of each dW = scaling B A, as bars from 1 (the largest) down to 1/1000 on a logarithmic scale, and the rank
    that 99 % and 99.9 % of its energy need. What a change of DoRA is depends on the base: with --base it is W' - W.

    \b
    Examples:
      loratools inspect adapter
      loratools inspect adapter --modules
      loratools inspect adapter --metadata
      loratools inspect adapter --spectrum
      loratools inspect adapter --spectrum --base base
      loratools inspect base --json
      loratools inspect hf://lab/adapter
      loratools inspect --each .
    """
    from loratools.surgery.inspect import AdapterSummary, inspect

    if base is not None and not spectrum:
        raise click.UsageError("--base goes with --spectrum; the rest of what inspect tells needs no base")
    if model_type is not None and base is None:
        raise click.UsageError("--model-type says what a base is; give --spectrum --base")
    chosen: dict[str, Any] = {"include": include or None, "exclude": exclude or None}
    if base is not None:  # which also tells names that some dialects leave out
        return _measured(path, base, dialect, alpha, model_type, chosen)
    summary = inspect(path, dialect, alpha=alpha, **chosen)
    if spectrum:
        from loratools.surgery.spectrum import spectrum as measure

        if summary.type != "adapter":
            raise click.UsageError(f"--spectrum: {path} is a model; it describes adapters")
        measured = measure(path, dialect, alpha=alpha, **chosen)
        return show.Report(_document(summary, False) | {"spectrum": show.Fields(measured)}, _spectrum(measured))
    if isinstance(summary, AdapterSummary):
        line = None if modules or metadata else _adapter_in_a_line(summary)
        return show.Report(_document(summary, metadata), _adapter(summary, modules, metadata), line=line)
    document = _document(summary, metadata)
    document["schema_hash"] = document.pop("schema")  # for `schema` is the version of every document
    line = None if modules or metadata else _checkpoint_in_a_line(summary)
    return show.Report(document, _checkpoint(summary, modules, metadata), line=line)


def _measured(
    path: str, base: str, dialect: str | None, alpha: float | None, model_type: str | None, chosen: dict[str, Any]
) -> show.Report:
    """Return the report of a spectrum that is measured on the base."""
    from loratools import dialects
    from loratools.surgery.inputs import kept, typed_model
    from loratools.surgery.inspect import describe_adapter
    from loratools.surgery.spectrum import spectrum

    model = typed_model(base, model_type)
    adapter = kept(dialects.open_adapter(path, dialect=dialect, alpha=alpha, base=model), **chosen)
    measured = spectrum(adapter, base=model)
    summary = describe_adapter(adapter, path, adapter.dialect, "read with its base model")
    return show.Report(_document(summary, False) | {"spectrum": show.Fields(measured)}, _spectrum(measured))


def _document(summary: AdapterSummary | CheckpointSummary, metadata: bool) -> dict[str, Any]:
    """Return the document of a summary, with the entries of its header only where they were asked for."""
    document = {field.name: getattr(summary, field.name) for field in fields(summary)}
    entries = document.pop("entries", {})
    return document | ({"metadata": bounded(entries)} if metadata else {})


def _adapter_in_a_line(summary: AdapterSummary) -> str:
    kinds = " and ".join(sorted({group.kind for group in summary.groups}))
    ranks = sorted({group.rank for group in summary.groups} - {0})  # LoKr of two whole factors has none
    of_rank = f" of rank {ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''}" if ranks else ""
    base = summary.base
    parts = [
        summary.dialect,
        f"{kinds}{of_rank}, {counted(len(summary.modules), 'module')}" if kinds else "no modules",
        f"{counted(len(summary.replacements), 'tensor')} replaced whole" if summary.replacements else "",
        f"{show.size(summary.total.nbytes)} {' and '.join(summary.dtypes)}",
        f"base {(base.id if base else None) or 'not named'}{', sealed' if base and base.sealed else ''}",
    ]
    return ", ".join(filter(None, parts))


def _checkpoint_in_a_line(summary: CheckpointSummary) -> str:
    what = summary.quantization or " and ".join(summary.dtypes)
    parameters = summary.codes.parameters if summary.codes else summary.total.parameters
    return (
        f"model, {summary.architecture or 'architecture not stated'}, {show.exact(parameters)} parameters, "
        f"{show.size(summary.total.nbytes)} {what}"
    )


def _adapter(summary: AdapterSummary, modules: bool, metadata: bool) -> Iterator[str]:
    total = summary.total
    whole = f", and {counted(len(summary.replacements), 'tensor')} replaced whole" if summary.replacements else ""
    yield from show.fields(
        ("adapter", f"{summary.path}"),
        ("dialect", summary.dialect),
        ("peft_type", summary.peft_type),
        ("base model", _base(summary.base)),
        ("modules", f"{len(summary.modules)}{whole}"),
        ("parameters", show.exact(total.parameters)),
        ("size", f"{show.size(total.nbytes)} in {counted(total.tensors, 'tensor')}, {', '.join(summary.dtypes)}"),
        ("digest", summary.digest or "none stated"),
        ("provenance", [f"{step.operation}, by {step.tool}" for step in summary.provenance] or "none stated"),
        *fact_lines(summary.facts, base=not summary.base),
    )
    for group in summary.groups:
        rank = f"rank {group.rank}" if group.rank else "no rank"
        yield from ("", f"{group.kind}: {rank}, alpha {show.number(group.alpha)}, scaling {show.number(group.scaling)}")
        yield from (f"  {target}" for target in group.targets)
    if summary.replacements:
        yield ""
        yield "replaced whole:"
        yield from (f"  {tensor.name}  {tensor.dtype} {list(tensor.shape)}" for tensor in summary.replacements)
    if metadata:
        yield ""
        yield from entry_lines(summary.entries)
    if modules:
        yield ""
        yield from show.table(
            ("module", "kind", "rank", "alpha", "scaling", "weight", "parameters"),
            [
                (
                    module.module, module.kind, str(module.rank or "none"), show.number(module.alpha),
                    show.number(module.scaling), " x ".join(map(str, module.shape)), show.exact(module.parameters),
                )
                for module in summary.modules
            ],
            right=(2, 3, 4, 6),
        )  # fmt: skip


def _checkpoint(summary: CheckpointSummary, modules: bool, metadata: bool) -> Iterator[str]:
    tied = ", tied embeddings" if summary.tied else ""
    parts = [f"{name} ({summary.classes[name]})" if name in summary.classes else name for name in summary.components]
    yield from show.fields(
        ("model", f"{summary.path}"),
        ("architecture", f"{summary.architecture or 'not stated'}{tied}"),
        ("components", ", ".join(parts) or None),
        ("quantization", summary.quantization or None),
        *_codes(summary.codes),
        ("made from", summary.parent or (summary.codes.parent or "not stated" if summary.codes else None)),
        ("parameters", show.exact(summary.codes.parameters if summary.codes else summary.total.parameters)),
        ("size", f"{show.size(summary.total.nbytes)} in {counted(summary.total.tensors, 'tensor')}"),
        ("schema hash", summary.schema),
        ("provenance", _made(summary.record)),
    )
    for heading, amounts in (("dtype", summary.dtypes), ("shard", summary.shards)):
        yield ""
        yield from show.table(
            (heading, "tensors", "parameters", "size"),
            [(name, str(of.tensors), show.exact(of.parameters), show.size(of.nbytes)) for name, of in amounts.items()],
            right=(1, 2, 3),
        )
    if metadata:
        yield ""
        yield from entry_lines(summary.entries)
    if modules:
        yield ""
        yield from show.table(
            ("tensor", "dtype", "shape", "size"),
            [(each.name, each.dtype, str(list(each.shape)), show.size(each.nbytes)) for each in summary.tensors],
            right=(3,),
        )
        if summary.codes and summary.codes.weights:
            yield ""
            weights = summary.codes.weights
            yield from show.table(
                ("weight of codes", "shape", "scheme"),
                [(each.name, str(list(each.shape)), each.scheme) for each in weights],
            )


def _codes(codes: Quantization | None) -> Iterator[tuple[str, str | list[str] | None]]:
    """Yield the fields that say how a model is quantized."""
    if codes is None:
        return
    yield (
        "codes",
        [
            f"{counted(each.modules, 'module')}: {each.scheme}, {each.label}: {_few(each.targets)}"
            for each in codes.schemes
        ],
    )
    yield "plain", _few(codes.plain) or "none"


def _few(targets: Sequence[str]) -> str:
    return ", ".join(targets[:6]) + (f" and {len(targets) - 6} more" if len(targets) > 6 else "")


def _made(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "none stated"
    from loratools.format.record import made_by

    return made_by(record)


def _base(base: BaseIdentity | None) -> list[str]:
    name = (base.id if base else None) or "not named"
    if base and base.revision:
        name += f" at revision {base.revision}"
    if not base or not base.sealed:
        return [f"{name}; no base hash, so a wrong base cannot be told from the right one"]
    tiers = [f"schema {base.schema}"] if base.schema else []
    tiers += [f"root   {base.root}"] if base.root else []
    tiers += [f"logical {base.logical}"] if base.logical else []
    tiers += [f"digests of {counted(len(base.tensors), 'tensor')}"] if base.tensors else []
    return [f"{name}; sealed with its hash:", *tiers]


def _spectrum(measured: AdapterSpectrum) -> Iterator[str]:
    """Yield a line for each module, and what the adapter could be shrunk to."""
    yield from show.table(
        ("module", "rank", "|dW|", "stable", "effective", "99%", "99.9%", "singular values"),
        [
            (
                module.module, str(module.rank), show.number(module.norm), f"{module.stable_rank:.2f}",
                f"{module.effective_rank:.2f}", *map(str, module.needed), bars(module.sigma),
            )
            for module in measured.modules
        ],
        right=range(1, 7),
    )  # fmt: skip
    yield ""
    needs = []
    for parameters, rank in zip(measured.needed_parameters, measured.uniform_rank, strict=True):
        part = f"{parameters / measured.parameters:.0%} of them" if measured.parameters else "none"
        needs.append(f"of the energy needs {show.exact(parameters)} parameters, {part}; at most rank {rank}")
    yield from show.fields(
        ("norm", show.number(measured.norm)),
        ("parameters", show.exact(measured.parameters)),
        *zip(("99 %", "99.9 %"), needs, strict=True),
        ("measured in part", ", ".join(measured.in_part) or None),
        ("left out", ", ".join(measured.left_out) or None),
    )


def bars(sigma: Sequence[float]) -> str:
    """Return one bar for each singular value, or for each of at most 32 groups of them (the first of a group).

    Logarithmic: full at the largest, empty at a thousandth of it.

    >>> bars([1.0, 0.1, 0.01, 0.0])
    '█▆▃ '
    """
    if not sigma or sigma[0] <= 0:
        return ""
    step = math.ceil(len(sigma) / _WIDTH)
    heights = (1 + math.log10(value / sigma[0]) / _DECADES if value > 0 else 0.0 for value in sigma[::step])
    return "".join(_BARS[math.ceil(max(0.0, height) * (len(_BARS) - 1) - 1e-9)] for height in heights)
