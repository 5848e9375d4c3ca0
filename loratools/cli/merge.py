"""loratools merge"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._group import command as make
from loratools.cli._shares import files_of, files_shared
from loratools.cli._talk import Talk, pass_talk
from loratools.errors import counted

if TYPE_CHECKING:
    from loratools.hub.stream import Stream
    from loratools.surgery.inputs import AdapterSource
    from loratools.surgery.merge import Merge, MergeReport

_SHOWN = 3


@make(section="Change")
@click.argument("base", type=options.INPUT)
@click.argument("adapters", type=options.INPUT, nargs=-1, required=True, metavar="ADAPTER...")
@options.option(
    "-o", "--output", type=options.PATH, is_eager=True, callback=options.swept, more="Needed unless --no-local."
)
@options.weight_option
@options.module_options
@options.adapter_options
@options.option(
    "--dtype", type=options.Words("loratools.storage.dtypes", "SPELLINGS"),
    more="Every float tensor has it.  [default: as the base has it]",
)  # fmt: skip
@options.option("--max-shard-size", type=str, more="[default: the base's files]")
@options.word_option("--tied", "Tied", "error")
@options.model_type_option
@options.check_base_option
@options.word_option("--retention", "Retention", "sample")
@options.word_option(
    "--rounding", "Rounding", "nearest",
    "Stochastic rounding keeps, on average, changes that are too small for bf16 or f16.",
)  # fmt: skip
@options.option("--seed", type=int, default=0, show_default=True, more="For the sampled tiles and stochastic rounding.")
@options.word_option(
    "--quantized", "Quantized", "dequantize",
    "Write it in 16 bit, only the changed modules, make codes of those again, or refuse.",
)  # fmt: skip
@options.option(
    "--original", type=options.INPUT,
    more="--quantized requantize quantizes its weights anew; an adapter of it is carried into a folded base (AWQ, "
    "SmoothQuant).",
)  # fmt: skip
@options.trained_on_option
@options.option("--keep-loss", type=int)
@options.option("--keep-residual", is_flag=True, more="`loratools unmerge` does it.")
@options.option("--push", type=str)
@options.option("--no-local", is_flag=True)
@options.option("--private", is_flag=True, more="With --push.")
@options.option("--base-model", type=str, more="With --push.")
@options.option("--license", type=str, more="With --push.")
@options.option("--resume", is_flag=True)
@options.device_option
@options.threads_option
@options.workers_option
@options.part_option
@options.dry_run_option
@options.option("--verify", is_flag=True, more="As `loratools verify` does.")
@options.force_option
@options.durable_option
@pass_talk
def command(
    talk: Talk, /, base: str, adapters: tuple[str, ...], output: Path | None, weights: tuple[float | str, ...],
    include: tuple[str, ...], exclude: tuple[str, ...], dialect: str | None, alpha: float | None,
    dry_run: bool, verify: bool, push: str | None, no_local: bool, private: bool, base_model: str | None,
    license: str | None, workers: str | None, part: str | None, **choices: Any,
) -> show.Report:  # fmt: skip
    """Merge adapters into a base model: W' = W + sum of weight x scaling x B A.

    The sum is made in float32 and rounded once; it depends neither on the order of adapters that only add, as LoRA
    does, nor on threads. Tensors that no adapter touches are copied byte for byte, and every other file of the base
    comes along. An adapter that was sealed with a base hash is checked against the base while it is read; a wrong base
    leaves no output. An output whose name ends in .safetensors is one file, with the record of the merge in its header;
    any other is a folder.

    \b
    Examples:
      loratools merge base adapter -o merged
      loratools merge hf://lab/base hf://lab/adapter -o merged
      loratools merge base adapter other -w 0.7 -w -0.3 -o merged
      loratools merge base adapter -o merged --dry-run
      loratools merge base adapter -o merged.safetensors --keep-residual
      loratools merge quantized adapter -o merged --quantized partial
      loratools merge base adapter -o merged --dtype f32 --max-shard-size 2GB --verify
      loratools merge base adapter -o merged --part 1/2
      loratools merge base adapter --push lab/merged --no-local --license mit --base-model lab/base
    """
    from contextlib import ExitStack

    from loratools.storage import atomic, sources
    from loratools.storage.checkpoint import Checkpoint
    from loratools.surgery.inputs import chosen_weights, read_as
    from loratools.surgery.merge import execute, prepare
    from loratools.surgery.merge.options import MergeOptions

    if output is None and not no_local:
        raise click.UsageError("missing option '-o' / '--output'")
    options.require_one_each(weights, adapters)
    if choices["resume"] and push:
        raise click.UsageError("--resume does not go with --push: what was sent is not sent again anyway")
    if no_local and (not push or choices["keep_residual"] or verify):
        raise click.UsageError("--no-local needs --push, and leaves nothing for --keep-residual or --verify")
    if (workers or part) and (push or choices["resume"]):
        raise click.UsageError("--workers and --part go with neither --push nor --resume")
    if part and (workers or verify or dry_run):
        raise click.UsageError("--part writes one part of the output: without --workers, --verify and --dry-run")
    if (workers or part) and output is not None:
        atomic.afar.refuse_afar(output, "work that is shared out")
    call = None
    if (workers or part) and output is not None:
        from loratools.surgery.merge.parts import call_of

        call = call_of(
            base, adapters, output, weights=weights or None, include=include or None, exclude=exclude or None,
            dialect=dialect, alpha=alpha, **choices,
        )  # fmt: skip
    if part and call:
        return files_of(call, part)
    read: Sequence[AdapterSource] = read_as(adapters, dialect, alpha)
    weighed = chosen_weights(len(read), weights or None, include, exclude)
    model = Checkpoint.open(sources.local(base, "header" if dry_run else "checkpoint"))
    with ExitStack() as stack:
        if no_local or output is None:
            output = stack.enter_context(atomic.temporary("merge")) / "merged"
        prepared = prepare(model, read, output, weights=weighed, options=MergeOptions(**choices))
        talk.note(*prepared.plan.notes)
        plan = prepared.to_json()
        if dry_run:
            return show.Report({"dry_run": True, **plan}, _plan(prepared, plan))
        sent: list[Stream] = []
        sink = _sink(push, sent, private=private, keep=not no_local, base_model=base_model, license=license)
        total = plan["bytes"]["written"] + choices["keep_residual"] * plan["bytes"]["changed"]
        with talk.progress("merging", total) as advance:
            if workers and call:
                report = files_shared(call, workers, advance)
            else:
                report = execute(prepared, progress=advance, sink=sink)
    document = show.plain(report)
    text = list(lines(report))
    for committed, notes in (stream.done for stream in sent if stream.done):
        talk.warn(*notes)
        document |= {"output": None if no_local else document["output"], "pushed": show.plain(committed)}
        text = [*(text[1:] if no_local else text), f"pushed     {committed.url}"]
    if not verify:
        return show.Report(document, text)
    from loratools.cli.verify import lines as proof_lines
    from loratools.surgery.verify import verify as prove

    with talk.progress("verifying", 2 * plan["bytes"]["written"]) as advance:
        carried = [each.adapter for each in prepared.plan.inputs] if choices["original"] else read
        known = [each.weight for each in prepared.plan.inputs] if choices["original"] else weighed
        proof = prove(output, model, carried, weights=known, progress=advance)
    document["verification"] = show.plain(proof)
    return show.Report(document, [*text, *proof_lines(proof, every=False)], proof.ok)


def gathered(report: MergeReport) -> show.Report:
    """Return the report of a merge, of its parts."""
    return show.Report(show.plain(report), list(lines(report)))


def _sink(repo: str | None, sent: list[Stream], **choices: Any) -> Callable[[Path], Stream] | None:
    """Return what opens a stream to the Hub when the folder that is written is known, and keeps it in `sent`."""
    if repo is None:
        return None
    from loratools.hub.client import Hub
    from loratools.hub.refs import parse
    from loratools.hub.stream import Stream

    ref = parse(repo)
    if ref.path:
        raise click.UsageError(f"expected org/name, found {repo!r}")

    def open_stream(folder: Path) -> Stream:
        sent.append(Stream(Hub(), ref, folder, **choices))
        return sent[-1]

    return open_stream


def _plan(prepared: Merge, plan: dict[str, Any]) -> Iterator[str]:
    tensors, sizes = plan["tensors"], plan["bytes"]
    yield from show.fields(
        ("base", plan["base"]),
        ("output", plan["output"]),
        ("change", f"{tensors['changed']} of {counted(tensors['total'], 'tensor')}, {show.size(sizes['changed'])}"),
        ("copy", show.size(sizes["copied"])),
        (
            "write",
            f"{show.size(sizes['written'])} in {counted(len(plan['files']), 'file')}, {plan['other_files']} others",
        ),
        ("check", f"{plan['verified_tensors']} tensors against the recorded base hash"),
        ("peak memory", f"about {show.size(plan['peak_memory'])} with {plan['threads']} threads"),
        ("free disk", show.size(plan["free_disk"])),
    )


def lines(report: MergeReport) -> Iterator[str]:
    """Yield the lines that tell of a merge."""
    through = "as codes" if report.recoded else "rounding"
    kept = (
        "not measured" if report.retention is None else f"about {report.retention:.2%} of the change survives {through}"
    )
    those = counted(report.verified, "tensor is that", "tensors are those")
    base = f"{those} of the recorded base" if report.verified else "not verified"
    left = report.residual
    lost = f"{report.loss_share:.1%} of what codes lose is in {report.output}/loss" if report.loss_share else None
    yield from show.fields(
        ("merged", report.output),
        ("changed", f"{report.changed} of {counted(report.tensors, 'tensor')}"),
        ("wrote", show.size(report.bytes_written)),
        ("base", base),
        ("retention", kept),
        ("resumed", f"{counted(len(report.reused), 'file')} already complete, by digest" if report.reused else None),
        ("as codes", "; ".join(_lowest(report.recoded)) or None),
        ("loss", lost),
        ("residual", f"{show.size(left.nbytes)}, {left.share:.2%} of the bytes that were touched" if left else None),
    )


def _lowest(recoded: dict[str, float]) -> Iterator[str]:
    """Yield what survives in each module that became codes again, the least first, and how many are not shown."""
    for name in sorted(recoded, key=lambda name: recoded[name])[:_SHOWN]:
        yield f"{name.removesuffix('.weight')} {recoded[name]:.1%}"
    if len(recoded) > _SHOWN:
        yield f"and {len(recoded) - _SHOWN} more (--json has all)"
