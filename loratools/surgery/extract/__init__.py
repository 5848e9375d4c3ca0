"""Extract the difference of a fine-tune and its base as an adapter: near-optimal factors, every tensor accounted for.

ΔW = W' − W is formed in float32 from each operand, one tensor at a time; `linalg/svd/truncated.py` factors it. What has
no low-rank form is saved whole, so that base + adapter is the fine-tune but for the printed error.

    fused         q, k and v of a fused tensor as three tensors
    pairs         every tensor of the fine-tune beside its counterpart, and what is to become of its change
    sweep         one pass over all pairs, several at a time
    read          two tensors side by side: ΔW, its norms, both digests
    decompose     one ΔW becomes factors, with their certificate
    factor        that for each ΔW by the options, or a stack of experts, or a few changed rows of an embedding
    spool         factors on disk while the extraction runs
    single        the adapter as one file
    updates       from factors to the updates of each kind
    assemble      the adapter, its record and its card
    layers        what an adapter keeps of a change: the certificate of each layer and their total
    certify       the same for any adapter after the fact
    changes       how far each tensor of a model is from the base's, in norms alone
    options       the options, one value that is checked when it is built
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratools import dialects
from loratools.adapter.identity import one_name
from loratools.adapter.naming.selection import Selection
from loratools.adapter.placement.codes import refuse_other_codes
from loratools.decisions import decided, detailed, warned
from loratools.engine.device import check as check_device
from loratools.engine.device import computing
from loratools.errors import IncompatibleAdapter, InvalidFormat, OutputRefused, counted
from loratools.format import manifest
from loratools.linalg.ranks.allocate import Ranks
from loratools.options import Arithmetic, Options
from loratools.parallel import Progress, cores, no_progress
from loratools.parallel.shared import place
from loratools.storage import atomic
from loratools.storage.beside import making
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import logical
from loratools.storage.dtypes import FloatName
from loratools.storage.sources import Location, origin, session
from loratools.surgery.extract.assemble import Outcome, assemble, companion_files, errors
from loratools.surgery.extract.fused import apart
from loratools.surgery.extract.layers import Total, total
from loratools.surgery.extract.options import ExtractOptions
from loratools.surgery.extract.pairs import Pairing, pair
from loratools.surgery.extract.single import write as write_single
from loratools.surgery.extract.spool import Spool
from loratools.surgery.extract.sweep import Sweep
from loratools.surgery.inputs import ModelSource, open_model, places_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Extraction:
    """What was extracted: the account of every tensor, the certificate's total, both models' hashes, and notes.

    `error` = ‖base + adapter − fine-tune‖/‖fine-tune − base‖ over all tensors, with what was left out on request; that
    alone is `dropped`, in the same norm. `total` is of the factored layers alone.
    """

    output: str
    digest: str
    outcomes: tuple[Outcome, ...]
    missing: tuple[str, ...]
    total: Total
    error: float
    dropped: float
    base: str
    tuned: str
    dtype: str
    seed: int
    parameters: int
    nbytes: int
    notes: tuple[str, ...]

    def of(self, outcome: str) -> list[Outcome]:
        """Return the tensors of one class: `factored`, `rows`, `whole`, `unchanged` or `dropped`."""
        return [tensor for tensor in self.outcomes if tensor.outcome == outcome]


@session()
def extract(
    base: ModelSource,
    tuned: ModelSource,
    output: Location,
    ranks: Ranks | int = 32,
    *,
    selection: Selection | None = None,
    dtype: FloatName | torch.dtype = "F32",
    seed: int = 0,
    tolerance: float = 6e-4,
    tight: bool = False,
    arithmetic: Arithmetic = "auto",
    device: str | torch.device = "cpu",
    base_id: str | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Extraction:
    """Write the change from a base model to its fine-tune as an adapter: near-optimal factors, and the rest whole.

    min ‖W' − W − B·A‖_F for each layer, with alpha = r, so that the scaling is 1. ΔW = W' − W is formed in float32 from
    each operand; of a quantized model that is what its codes stand for. What has no low-rank form (norms, biases,
    embeddings) is saved whole, so that base + adapter is the fine-tune but for the error that is told. The adapter is
    sealed with the hash of the base.

    Args:
        base: The base model: a folder, a safetensors file, an index, an `hf://` reference, or an open `Checkpoint`.
        tuned: The fine-tune, likewise. Names may differ by wrappers such as `language_model.`.
        output: What to write: a folder in the loratools format, which PEFT loads, or one file where the name ends so
            (`style.safetensors`): of an image model in the layout of kohya, or of ComfyUI where only that has names for
            all of it, of any other in the loratools format. It must not exist, unless `force`.
        ranks: How ranks are chosen: a number for every layer, or `Ranks`: by a rule (`Energy(0.9)`, …), by what stands
            above the `noise` of the fine-tune's dtype, or by a `budget` of parameters. Default: 32.
        selection: What is factored, saved whole or dropped: patterns for modules, and kinds. Default: linear layers,
            convolutions and stacked experts are factored, the rest is saved whole.
        dtype: The float dtype of the factors: `"f32"`, `"bf16"`, `"f16"`, `"f64"`, or torch's. Default: `"F32"`.
        seed: A whole number that chooses the random sketches. Default: 0.
        tolerance: By which share a layer's squared error may exceed the optimum, about. Default: 6e-4.
        tight: Whether to spend about as much again on bounds that are far tighter. Default: no.
        arithmetic: `"auto"` finds directions by products in bfloat16 where the processor has them and they suffice; σ,
            norms and errors are of products in float32 all the same, and the record says so. `"float32"` does without:
            processors with and without them take the same steps. Default: `"auto"`.
        device: Where changes are decomposed: `"cpu"`, `"cuda"`, `"cuda:1"` (the second GPU), or a device of torch; they
            are read, and their norms taken, on the processor. On a GPU the last digits of factors differ, not the
            accuracy, and the provenance says which GPU it was. Default: `"cpu"`.
        base_id: Name of the base model to record, such as `"org/model"`. Default: its repository and commit where it
            came from the Hub, else the name of its folder, or the one on the Hub that the fine-tune says it had.
        threads: Threads to work with; any number gives the same bytes. Default: one per core.
        force: Whether to replace an output that exists. Default: no.
        progress: Called with the bytes read since the last call, from any thread. Default: nobody is told.

    Returns:
        The account of every tensor, a certificate for every layer and in total, both models' hashes, and notes.

    Raises:
        InvalidOption: A word or a number is wrong; all are listed.
        IncompatibleAdapter: The models do not belong together, or do not differ where anything can be factored.
        BadFile: A tensor has NaN or infinities, is quantized, or cannot be read.
        LoraToolsError: A pattern of `selection` names no module.
        OutputRefused: The output exists, or is an input.
        NoDevice: The machine has no such device, it has no float64, or its memory is full.
        ValueError: A budget is too small for the lowest ranks.

    Example:
        >>> found = extract("base", "tuned", "extracted", 8)
        >>> len(found.of("factored")), found.total.captured > 0.1
        (14, True)
    """
    atomic.sweep(output)
    options = ExtractOptions(ranks, dtype, seed, tolerance, tight, arithmetic, device, threads, force)
    checked = Options().text("base_id", base_id)
    if not isinstance(selection, Selection | None):
        checked.problems.append(f"selection is {selection!r}; it can be a Selection or None")
    checked.done()
    check_device(options.computes_on, wide=True)
    output, base, tuned = Path(output), logical(open_model(base)), logical(open_model(tuned))
    atomic.check_output(output, force=force)
    single = output.suffix == ".safetensors"
    if single:
        atomic.refuse_inputs(output, [*places_of(base), *places_of(tuned)])
    for path in (base.root, tuned.root):
        if path.resolve().is_relative_to(output.resolve()):
            raise OutputRefused(f"{output} is or holds the input {path}", hint="Choose another output.")
    base.tell_unread()
    tuned.tell_unread()
    coded = refuse_other_codes(base, tuned)
    base, tuned, selection = apart(base, tuned, selection or Selection())
    pairing = pair(base, tuned, selection)
    _tell_quantized(base, tuned, pairing)
    planned = Counter(pair.plan for pair in pairing.pairs)
    decided("%s beside %s: %s if they differ; sketches of seed %d, tolerance %g", tuned.path, base.path,
            ", ".join(f"{count} tensors {plan}" for plan, count in planned.items()), seed, tolerance)  # fmt: skip
    opened = atomic.new_files(output, (), force=force) if single else atomic.new_folder(output, force=force)
    on = nullcontext() if options.computes_on == "cpu" else computing(options.computes_on)
    with place(opened) as scratch, on:
        spool = Spool(scratch / ".factors")
        work = Sweep(base, tuned, pairing, options, spool, progress or no_progress, coded)
        outcomes, hashes = work.run(threads or cores())
        for model, root in ((base, hashes[0].root), (tuned, hashes[1])):
            making.note_root(model.path, str(root))
        for outcome in outcomes:
            detailed("%s: %s%s", outcome.pair.path, outcome.outcome, f", {outcome.why}" if outcome.why else "")
        name, commit = (base_id, None) if base_id else _named(base, tuned)
        identity = replace(hashes[0], id=name and manifest.public(name), revision=commit)
        adapter, accounts, card, notes = assemble(base, tuned, pairing, outcomes, identity, hashes[1], options)
        _refuse_empty(base, tuned, accounts)
        target = scratch / (output.name if single else "adapter")
        try:
            if single:
                written, layout = write_single(adapter, accounts, base, tuned, target)
                notes = (*notes, *layout)
            else:
                dialects.save_adapter(adapter, target)
                written = dialects.open_adapter(target).settings[manifest.ORIGIN]["digest"]
        except InvalidFormat as error:  # which speaks of what was asked for, not of where it is made
            error.reword(lambda text: text.replace(str(target), str(output)))
            if alone := [each.path for each in accounts if each.outcome == "whole" and not each.module]:
                error.hint = f"PEFT saves modules, and {alone[0]} is a parameter of none: leave it out (--exclude)."
            raise
        spool.path.unlink()
        if not single:
            for file in sorted(target.iterdir()):
                file.rename(scratch / file.name)
            target.rmdir()
            for source in companion_files(base, tuned, accounts):
                (scratch / source.name).write_bytes(source.read_bytes())
            (scratch / "README.md").write_text(card, encoding="utf-8", newline="\n")
    tensors = adapter.tensors().values()
    return Extraction(
        atomic.spelled(output), written, accounts, pairing.missing,
        total(outcome.layer for outcome in accounts if outcome.layer), *errors(accounts),
        hashes[0].root or "", hashes[1], options.stored, seed,
        sum(lazy.parameters for lazy in tensors), sum(lazy.nbytes for lazy in tensors), (*pairing.notes, *notes),
    )  # fmt: skip


def plan(base: ModelSource, tuned: ModelSource, selection: Selection | None = None) -> Pairing:
    """Return what would become of every tensor if it had changed, from headers alone; parameters as of `extract`."""
    return pair(*apart(logical(open_model(base)), logical(open_model(tuned)), selection or Selection()))


def _named(base: Checkpoint, tuned: Checkpoint) -> tuple[str | None, str | None]:
    """Return the name of the base model, and its commit where it came from the Hub."""
    name, commit = origin(base.path)
    stated = tuned.config.get("_name_or_path")
    if commit or not isinstance(stated, str) or not stated:
        return name, commit
    return one_name([name, stated]) or name, None


def _tell_quantized(base: Checkpoint, tuned: Checkpoint, pairing: Pairing) -> None:
    """Warn where the fine-tune alone is quantized: its rounding is no part of what was trained."""
    pairs = [match for match in pairing.pairs if match.base and tuned.specs[match.name].encoding]
    if noisy := [match.path for match in pairs if not base.specs[str(match.base)].encoding]:
        warned(
            "%s: stored as codes, and in the base not: %s; what quantization did there is part of the change, unless "
            "the base holds the same numbers", tuned.path, counted(len(noisy), "module"),
        )  # fmt: skip


def _refuse_empty(base: Checkpoint, tuned: Checkpoint, outcomes: Sequence[Outcome]) -> None:
    """Raise `IncompatibleAdapter` where nothing was factored: without a low-rank module there is no adapter."""
    if any(tensor.factors for tensor in outcomes):
        return
    if names := [tensor.pair.path for tensor in outcomes if tensor.outcome == "whole"]:
        raise IncompatibleAdapter(
            f"{tuned.path} differs from {base.path} in "
            f"{counted(len(names), 'tensor')}, and none of them can be factored",
            names[:20],
            hint="An adapter needs a module with factors: see --kind and --save-module.",
        )
    raise IncompatibleAdapter(
        f"{tuned.path} does not differ from {base.path} in any tensor that was to be extracted",
        hint="Check that the two paths are the right ones.",
    )
