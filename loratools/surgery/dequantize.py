"""Write a quantized model in 16 bit: every code becomes the number that it stands for, streamed shard by shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapter.placement.codes import refuse_all_codes
from loratools.decisions import detailed
from loratools.errors import BadFile, LoraToolsError, counted
from loratools.options import Options
from loratools.parallel import Progress, cores
from loratools.storage import atomic, digest
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import encodings, logical
from loratools.storage.codecs import Encoding
from loratools.storage.dtypes import FloatName
from loratools.storage.sources import Location, session
from loratools.surgery.hash import hash_tensors
from loratools.surgery.inputs import ModelSource, open_model, places_of, planned
from loratools.surgery.merge import Merge, MergeOptions, MergeReport, decide, execute
from loratools.surgery.verify.tensors import same

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DequantizeReport:
    """What became numbers: `schemes` counts modules by scheme, bits and group; bytes before and after, of all tensors.

    `root` is the root hash of the output and `verified` the number of tensors that were read again and are the codes'
    numbers or the model's own bytes; None where that was not asked for.
    """

    output: str
    modules: int
    schemes: Mapping[str, int]
    bytes_before: int
    bytes_written: int
    root: str | None
    verified: int | None
    notes: tuple[str, ...]


@session()
def dequantize(
    model: ModelSource,
    output: Location,
    *,
    dtype: FloatName | torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    verify: bool = False,
    threads: int | None = None,
    force: bool = False,
    durable: bool = False,
    progress: Progress | None = None,
) -> DequantizeReport:
    """Write a quantized model in 16 bit: W = the scheme's own formula in float32, rounded once.

    Tensors that are no codes are copied byte for byte, scales and maps go, config.json no longer says that the model is
    quantized. The output appears only when it is complete.

    Args:
        model: The model: a folder, a safetensors file, an index, an `hf://` reference, or an open `Checkpoint`.
        output: The folder to write, or one file (`out.safetensors`), as for `merge`; it must not exist, unless `force`.
        dtype: The float dtype of every float tensor. Default: codes become what the model computes in (bf16 or f16),
            all others keep their dtype.
        max_shard_size: Most bytes of tensor data in one file. Default: 5 GB.
        verify: Whether to read the output again, decode once more, compare every tensor, and return the root hash.
            Default: no.
        threads: Threads to work with; no byte depends on it. Default: one per core, at most 8.
        force: Whether to replace an output that exists. Default: no.
        durable: Whether the output is on the disk itself before it has its name. Default: no.
        progress: Called with the bytes written since the last call, from any thread. Default: nobody is told.

    Returns:
        What became numbers, and the bytes before and after.

    Raises:
        LoraToolsError: The model is not quantized; or the output is not what was decoded (`verify`).
        IncompatibleAdapter, UnsupportedAdapter: A module's scheme is one that loratools does not read; it is named.
        InvalidOption, BadFile, OutputRefused, NoSpace: As `merge` raises them.

    Example:
        >>> dequantize("quantized", "plain").modules
        168
    """
    Options().flag("verify", verify).done()
    atomic.sweep(output)
    options = MergeOptions(
        dtype=dtype, max_shard_size=max_shard_size, retention="off", threads=threads, force=force, durable=durable
    )
    prepared, every = _decided(model, Path(output), options)
    for name, encoding in every.items():
        detailed("%s: %s, %s", name, encoding.module.scheme, encoding.label)
    sizes = prepared.to_json()
    planned("dequantize", prepared.output, [prepared.plan.base.path], nbytes=sizes["bytes"]["written"],
            modules=len(every), files=len(sizes["files"]), schemes=_schemes(every))  # fmt: skip
    return _reported(model, execute(prepared, progress=progress), verify=verify, threads=threads)


PLACES = ("model", "output")
"""Arguments that are paths or references."""


def decided(arguments: Mapping[str, Any]) -> Merge:
    """Decide what `dequantize` writes, of its arguments but `progress`, for processes that share its files."""
    given = {name: value for name, value in arguments.items() if name not in ("model", "output", "verify")}
    return _decided(arguments["model"], Path(arguments["output"]), MergeOptions(retention="off", **given))[0]


def finished(arguments: Mapping[str, Any], report: MergeReport) -> DequantizeReport:
    """Return what `dequantize` returns, when all files are written."""
    verify, threads = bool(arguments.get("verify")), arguments.get("threads")
    return _reported(arguments["model"], report, verify=verify, threads=threads)


def _decided(model: ModelSource, output: Path, options: MergeOptions) -> tuple[Merge, Mapping[str, Encoding]]:
    """Return what is to be written, and what is stored as codes."""
    atomic.check_output(output, force=options.force)
    base = logical(open_model(model))
    atomic.refuse_inputs(output, places_of(base))
    refuse_all_codes(base)
    every = encodings(base)
    if not every:
        raise LoraToolsError(f"{base.path} is not quantized: none of its modules is stored as codes")
    prepared = decide(base, (), output, options)
    return replace(prepared, record=prepared.record | {"operation": "dequantize"}), every


def _reported(model: ModelSource, report: MergeReport, *, verify: bool, threads: int | None) -> DequantizeReport:
    """Return the report, with the output read again where that is asked for."""
    base = logical(open_model(model))
    every = encodings(base)
    root = checked = None
    if verify:
        root, checked = _check(base, Checkpoint.open(report.output), threads or cores())
    return DequantizeReport(
        output=report.output, modules=len(every),
        schemes=_schemes(every),
        bytes_before=(base.stored or base).nbytes, bytes_written=report.bytes_written, root=root, verified=checked,
        notes=report.notes,
    )  # fmt: skip


def _schemes(every: Mapping[str, Any]) -> dict[str, int]:
    return dict(Counter(f"{encoding.module.scheme}, {encoding.label}" for encoding in every.values()))


def _check(base: Checkpoint, written: Checkpoint, threads: int) -> tuple[str, int]:
    """Return the root hash of the output, and the number of its tensors; raise `BadFile` where one is another."""
    if base.specs.keys() != written.specs.keys():
        names = sorted(base.specs.keys() ^ written.specs.keys())
        raise BadFile(f"{written.path}: tensors are missing or too many", names[:20])
    wrong = [name for name, spec in base.specs.items() if not same(spec, written.specs[name], False, lambda _: None)]
    if wrong:
        raise BadFile(
            f"{written.path}: {counted(len(wrong), 'tensor is', 'tensors are')} not what {base.path} stands for",
            wrong[:20],
        )
    return digest.root(hash_tensors(dict(written.specs), digest.DEFAULT, threads)), len(written.specs)
