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

    found = inspect(path, dialect)
    if spectrum:
        from loratools.cli._spectrum import report

        return report(path, dialect, found)
    if isinstance(found, AdapterSummary):
        return show.Report(show.plain(found), _adapter(found, modules))
    return show.Report(show.plain(found), _checkpoint(found, modules))


def _adapter(found: AdapterSummary, modules: bool) -> Iterator[str]:
    yield from show.fields(
        [
            ("adapter", f"{found.path}"),
            ("dialect", found.dialect),
            ("base model", _base(found.base)),
            ("modules", f"{len(found.modules)}{_replaced(len(found.replacements))}"),
            ("parameters", show.exact(found.total.parameters)),
            ("size", f"{show.size(found.total.nbytes)} in {found.total.tensors} tensors, {', '.join(found.dtypes)}"),
            ("digest", found.digest or "none stated"),
            (
                "provenance",
                "\n".join(f"{step.operation}, by {step.tool}" for step in found.provenance) or "none stated",
            ),
        ]
    )
    for group in found.groups:
        yield ""
        yield f"{group.kind}: rank {group.rank}, alpha {show.number(group.alpha)}, scaling {show.number(group.scaling)}"
        yield from (f"  {target}" for target in group.targets)
    if found.replacements:
        yield ""
        yield "replaced whole:"
        yield from (f"  {one.name}  {one.dtype} {list(one.shape)}" for one in found.replacements)
    if modules:
        yield ""
        yield from show.table(
            ("module", "kind", "rank", "alpha", "scaling", "weight", "parameters"),
            [
                (
                    one.module, one.kind, str(one.rank), show.number(one.alpha), show.number(one.scaling),
                    " x ".join(map(str, one.shape)), show.exact(one.parameters),
                )
                for one in found.modules
            ],
            right=(2, 3, 4, 6),
        )  # fmt: skip


def _checkpoint(found: CheckpointSummary, modules: bool) -> Iterator[str]:
    tied = ", tied embeddings" if found.tied else ""
    yield from show.fields(
        [
            ("model", f"{found.path}"),
            ("architecture", f"{found.architecture or 'not stated'}{tied}"),
            *([("components", ", ".join(found.components))] if found.components else []),
            *([("quantization", found.quantization)] if found.quantization else []),
            ("parameters", show.exact(found.total.parameters)),
            ("size", f"{show.size(found.total.nbytes)} in {found.total.tensors} tensors"),
            ("schema hash", found.schema),
            ("provenance", _made(found.record)),
        ]
    )
    for heading, amounts in (("dtype", found.dtypes), ("shard", found.shards)):
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
            [(one.name, one.dtype, str(list(one.shape)), show.size(one.nbytes)) for one in found.tensors],
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
