"""loratools inspect"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._group import command as make

if TYPE_CHECKING:
    from loratools.adapter.model import BaseIdentity
    from loratools.surgery.inspect import AdapterSummary, CheckpointSummary


@make(section="Look")
@click.argument("path", type=options.INPUT)
@click.option("--modules", is_flag=True, help="List every module of an adapter, every tensor of a checkpoint.")
@click.option("--spectrum", is_flag=True, help="Singular values of every module of an adapter; this reads the factors.")
@options.dialect_option
def command(path: str, modules: bool, spectrum: bool, dialect: str | None) -> show.Report:
    """Describe an adapter or a model, from headers alone unless --spectrum is given.

    Of an adapter: its dialect, ranks, alpha and scaling, target modules, size, the base model it belongs to and what
    it was made by. Of a model: architecture, parameters, dtypes, shards and the schema tier of its base hash. Layer
    numbers are collapsed: model.layers.[0-29].self_attn.{q,v}_proj means 60 modules. With --spectrum: the singular
    values of each dW = scaling B A, as bars from 1 (the largest) down to 1/1000 on a logarithmic scale, and the rank
    that 99 % and 99.9 % of its energy need.

    \b
    Examples:
      loratools inspect adapter
      loratools inspect adapter --modules
      loratools inspect adapter --spectrum
      loratools inspect base --json
      loratools inspect hf://lab/adapter
    """
    from loratools.surgery.inspect import AdapterSummary, inspect

    summary = inspect(path, dialect)
    if spectrum:
        from loratools.cli._spectrum import report

        return report(path, dialect, summary)
    if isinstance(summary, AdapterSummary):
        return show.Report(show.plain(summary), _adapter(summary, modules))
    return show.Report(show.plain(summary), _checkpoint(summary, modules))


def _adapter(summary: AdapterSummary, modules: bool) -> Iterator[str]:
    yield from show.fields(
        [
            ("adapter", f"{summary.path}"),
            ("dialect", summary.dialect),
            ("base model", _base(summary.base)),
            ("modules", f"{len(summary.modules)}{_replaced(len(summary.replacements))}"),
            ("parameters", show.exact(summary.total.parameters)),
            (
                "size",
                f"{show.size(summary.total.nbytes)} in {summary.total.tensors} tensors, {', '.join(summary.dtypes)}",
            ),
            ("digest", summary.digest or "none stated"),
            (
                "provenance",
                "\n".join(f"{step.operation}, by {step.tool}" for step in summary.provenance) or "none stated",
            ),
        ]
    )
    for group in summary.groups:
        yield ""
        yield f"{group.kind}: rank {group.rank}, alpha {show.number(group.alpha)}, scaling {show.number(group.scaling)}"
        yield from (f"  {target}" for target in group.targets)
    if summary.replacements:
        yield ""
        yield "replaced whole:"
        yield from (f"  {tensor.name}  {tensor.dtype} {list(tensor.shape)}" for tensor in summary.replacements)
    if modules:
        yield ""
        yield from show.table(
            ("module", "kind", "rank", "alpha", "scaling", "weight", "parameters"),
            [
                (
                    module.module, module.kind, str(module.rank), show.number(module.alpha),
                    show.number(module.scaling), " x ".join(map(str, module.shape)), show.exact(module.parameters),
                )
                for module in summary.modules
            ],
            right=(2, 3, 4, 6),
        )  # fmt: skip


def _checkpoint(summary: CheckpointSummary, modules: bool) -> Iterator[str]:
    tied = ", tied embeddings" if summary.tied else ""
    yield from show.fields(
        [
            ("model", f"{summary.path}"),
            ("architecture", f"{summary.architecture or 'not stated'}{tied}"),
            *([("components", ", ".join(summary.components))] if summary.components else []),
            *([("quantization", summary.quantization)] if summary.quantization else []),
            ("parameters", show.exact(summary.total.parameters)),
            ("size", f"{show.size(summary.total.nbytes)} in {summary.total.tensors} tensors"),
            ("schema hash", summary.schema),
            ("provenance", _made(summary.record)),
        ]
    )
    for heading, amounts in (("dtype", summary.dtypes), ("shard", summary.shards)):
        yield ""
        yield from show.table(
            (heading, "tensors", "parameters", "size"),
            [
                (name, str(amount.tensors), show.exact(amount.parameters), show.size(amount.nbytes))
                for name, amount in amounts.items()
            ],
            right=(1, 2, 3),
        )
    if modules:
        yield ""
        yield from show.table(
            ("tensor", "dtype", "shape", "size"),
            [
                (tensor.name, tensor.dtype, str(list(tensor.shape)), show.size(tensor.nbytes))
                for tensor in summary.tensors
            ],
            right=(3,),
        )


def _made(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "none stated"
    adapters = record.get("adapters")
    of = f" of {len(adapters)} adapter(s)" if isinstance(adapters, list) else ""
    return f"{record.get('operation')}{of}, by {record.get('tool')}"


def _base(base: BaseIdentity | None) -> str:
    name = (base.id if base else None) or "not named"
    if base and base.revision:
        name += f" at revision {base.revision}"
    if not base or not base.sealed:
        return f"{name}; no base hash, so a wrong base cannot be told from the right one"
    tiers = [f"schema {base.schema}"] if base.schema else []
    tiers += [f"root   {base.root}"] if base.root else []
    tiers += [f"digests of {len(base.tensors)} tensors"] if base.tensors else []
    return "\n".join([f"{name}; sealed with its hash:", *tiers])


def _replaced(count: int) -> str:
    return f", and {count} tensors replaced whole" if count else ""
