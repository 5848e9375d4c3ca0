"""Merge adapters into a base model: W' = W + Σ wᵢ·sᵢ·Bᵢ·Aᵢ in float32, rounded once, streamed shard by shard.

options   the options, one value that is checked when it is built
quantized what becomes of the codes of a quantized base
planned   a plan that travels, for processes that share a merge, and what each of them writes
parts     a merge that several processes share, each a part of the tensors
shared    the same on workers: processes of this machine, or a cluster
siblings  modules that are plain together, for a runtime stores them in one weight
original  the unquantized model that a base was made from
gguf      a GGUF base becomes a GGUF file
single    a model in one safetensors file, with its record in the header
loss      what codes lose, kept as a small adapter
sealed    which digests of the base adapters recorded
plan      what becomes of every tensor, from headers alone
prepare   open, check and plan: all that is decided before a byte is written
run       write the tensors, and everything beside them
measured  what was measured on the way, and what is to be said of it
resume    what an interrupted merge has finished
folder    the files beside the weights
components the config.json of each component of a pipeline
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratools.options import CheckBase, Quantized, Retention, Rounding, Tied, TrainedOn
from loratools.parallel import Progress
from loratools.storage import atomic
from loratools.storage.dtypes import FloatName
from loratools.storage.sources import Location, session
from loratools.surgery.inputs import AdapterSource, ModelSource, Weights, as_asked
from loratools.surgery.merge.options import MergeOptions
from loratools.surgery.merge.prepare import Merge, decide, prepare
from loratools.surgery.merge.run import MergeReport, Sink, execute

if TYPE_CHECKING:
    import torch

__all__ = ["Merge", "MergeOptions", "MergeReport", "Sink", "decide", "execute", "merge", "prepare"]


@session()
def merge(
    base: ModelSource,
    adapters: AdapterSource | Sequence[AdapterSource],
    output: Location,
    *,
    weights: Weights = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    dtype: FloatName | torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    tied: Tied = "error",
    model_type: str | None = None,
    check_base: CheckBase = "strict",
    retention: Retention = "sample",
    rounding: Rounding = "nearest",
    seed: int = 0,
    quantized: Quantized = "dequantize",
    original: Location | None = None,
    trained_on: TrainedOn | None = None,
    keep_loss: int | None = None,
    keep_residual: bool = False,
    resume: bool = False,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    force: bool = False,
    durable: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge adapters into a base model and write the result as a new folder, or as one file.

    W' = W + Σ wᵢ·sᵢ·Bᵢ·Aᵢ, accumulated in float32 (float64 for a float64 base) and rounded once. Tensors that no
    adapter touches are copied byte for byte; the output appears only when it is complete.

    Args:
        base: The base model: a folder, a safetensors file, an index, an `hf://` reference, or an open `Checkpoint`.
        adapters: One adapter or several, each a path, an `hf://` reference, an `Adapter`, or one held in memory. Where
            several change a tensor and not all of them only add, they act in this order.
        output: What to write: a folder, or one file where the name ends so (`out.safetensors`), whatever the base is;
            its header has the record then, and nothing but a residual (`out.residual`) lies beside it. It must not
            exist, unless `force`.
        weights: wᵢ, a number for each adapter, which may be negative; one number for one adapter; or a text with a
            number for each module pattern or block, as `combine` takes it (`"0.7,*.mlp.*=0"`, `"lbw:1,0,…"`): modules
            with 0 are left out. Default: 1 for each.
        include: Patterns of the modules that count: a name (`"q_proj"`), a glob (`"layers.*.mlp.*"`), or `"re:…"`.
            Default: all.
        exclude: Patterns of modules that are left out. Default: none.
        dialect: The dialect to read paths as, one of `list_dialects()`. Default: what is found in each file.
        alpha: The alpha that the adapters were trained with, for files that do not record it; it wins over one that
            they record. Default: the file's.
        dtype: The float dtype of the output: `"bf16"`, `"f16"`, `"f32"`, `"f64"`, or torch's. Default: each tensor
            keeps the base's.
        max_shard_size: Most bytes of tensor data in one file: a number, or a text such as `"5GB"`. Default: the output
            has the files of the base; a base that is no safetensors is written in files of 5 GB.
        tied: What a change of an embedding does to a head that is the same tensor: `"error"` refuses, `"untie"` gives
            the head a weight of its own, `"both"` changes both. Default: `"error"`.
        model_type: What the base is (`"gpt2"`, `"gpt_oss"`, …), for a base whose config.json does not say it and whose
            shapes leave open how a weight lies. Default: what config.json says.
        check_base: What happens where the base is not the one that an adapter was sealed with: `"strict"` raises,
            `"warn"` reports, `"off"` compares nothing. Default: `"strict"`.
        retention: On which tiles to measure ⟨W' − W, ΔW⟩/‖ΔW‖², the part of the change that survives rounding: a
            `"sample"`, `"full"` for all, or `"off"`. Default: `"sample"`.
        rounding: `"nearest"` rounds ties to even; `"stochastic"` rounds BF16 and F16 up or down at random, so that
            small changes survive on average. Default: `"nearest"`.
        seed: A whole number that chooses the sampled tiles, and the random numbers of stochastic rounding. Default: 0.
        quantized: What becomes of a base whose weights are codes (bitsandbytes, FP8, …): `"dequantize"` writes all of
            it in 16 bit, `"partial"` the modules that an adapter changes and leaves the rest byte for byte,
            `"requantize"` makes codes of the changed modules again, which erases most of a small change, `"refuse"`
            raises. Default: `"dequantize"`, by which nothing of the adapter is lost.
        original: The unquantized model that a quantized base was made from, for `"requantize"`: the changed modules are
            quantized anew from its weights plus the change, which keeps all of it. For a base that is folded, as AWQ
            and SmoothQuant do it, with every policy: an adapter that was trained on the original is carried into the
            base's basis, by scales that are read from the norms of both. Default: none.
        trained_on: Which model the adapters saw, where the base is folded: its `"original"`, which has to be given, or
            the `"folded"` base itself. Default: the one that an adapter is sealed with, else the original where that is
            given; without it a folded base is warned about.
        keep_loss: With `"requantize"`: a rank; what the codes lose of each changed weight, W' − W'', is written beside
            the model as an adapter of that rank, the folder `loss`, which gives it back. Default: it is not kept.
        keep_residual: Whether to write what rounding destroys beside the model, and the root hash of the base into its
            record, so that `unmerge` restores every bit. Default: no.
        resume: Whether an interruption leaves the files that are complete, and the same call goes on from them.
            Default: no, an interruption leaves nothing.
        device: Where the arithmetic is done: `"cpu"`, `"cuda"`, `"cuda:1"` (the second GPU) or `"mps"`, or a device of
            torch; on a GPU one BF16 element in some ten thousand may be rounded to its other neighbour, and the record
            says which GPU it was. Default: `"cpu"`.
        threads: Threads to work with; no byte depends on it. Default: one per core, at most 8.
        force: Whether to replace an output that exists. Default: no.
        durable: Whether the output is on the disk itself before it has its name, so that a power cut leaves it whole or
            absent; it takes as long as the disk needs to write it. Default: no, the system writes it when it likes.
        progress: Called with the bytes written since the last call, from any thread. Default: nobody is told.

    Returns:
        What the merge did: tensors changed, bytes written, retention, notes and warnings, and what became of every
        tensor of every adapter.

    Raises:
        InvalidOption: A word, a number or the count of weights is wrong; every one is listed.
        IncompatibleAdapter: An adapter does not fit the base, changes nothing, or cannot be merged with the others.
        WrongBase: The base is not the recorded one, and `check_base` is `"strict"`.
        BadFile, UnsupportedAdapter: An input cannot be read, or holds what loratools does not do.
        OutputRefused: The output exists, is an input, or the base already holds this adapter.
        NoSpace, NoDevice: The disk is too small, or the machine has no such device, or its memory is full.

    Example:
        >>> report = merge("base", "adapter", "merged", dtype="bf16")
        >>> report.changed, report.tensors
        (4, 21)
    """
    atomic.sweep(output)
    options = MergeOptions(
        dtype=dtype, max_shard_size=max_shard_size, tied=tied, model_type=model_type, check_base=check_base,
        retention=retention, rounding=rounding, seed=seed, quantized=quantized, original=original,
        trained_on=trained_on, keep_loss=keep_loss, keep_residual=keep_residual, resume=resume, device=device,
        threads=threads, force=force, durable=durable,
    )  # fmt: skip
    adapters, weights = as_asked(adapters, weights, include, exclude, dialect, alpha)
    return execute(prepare(base, adapters, output, weights=weights, options=options), progress=progress)
