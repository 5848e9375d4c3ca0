"""Extract the difference of a fine-tune and its base as an adapter: near-optimal factors, every tensor accounted for.

ΔW = W' − W is formed in float32 from each operand, one tensor at a time; `linalg/svd/truncated.py` factors it. What has
no low-rank form is saved whole, so that base + adapter is the fine-tune but for the printed error.

    pairs         every tensor of the fine-tune beside its counterpart, and what is to become of its change
    sweep         one pass over all pairs, several at a time
    read          two tensors side by side: ΔW, its norms, both digests
    factor        one ΔW becomes factors
    experts       a stack of experts becomes factors of one rank
    rows          a few changed rows of an embedding as exact factors
    spool         factors on disk while the extraction runs
    updates       from factors to the updates of each kind
    assemble      the adapter, its record and its card
    certificate   what an adapter keeps of a change, in numbers
    certify       the same for any adapter after the fact
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loratools import dialects
from loratools.adapter.naming.selection import Selection
from loratools.errors import IncompatibleAdapter, OutputRefused
from loratools.format import manifest
from loratools.linalg.ranks.allocate import Ranks
from loratools.parallel import Progress, cores
from loratools.storage import atomic
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.extract.assemble import Outcome, assemble, companion_files
from loratools.surgery.extract.certificate import Total, total
from loratools.surgery.extract.factor import Settings
from loratools.surgery.extract.pairs import Pairing, pair
from loratools.surgery.extract.spool import Spool
from loratools.surgery.extract.sweep import Sweep


@dataclass(frozen=True, slots=True)
class Extraction:
    """What was extracted: the account of every tensor, the certificate's total, both models' hashes, and notes.

    `dropped_energy` is the share of the whole change ‖ΔW‖² (over all tensors) that was left out on request.
    """

    output: str
    digest: str
    outcomes: tuple[Outcome, ...]
    missing: tuple[str, ...]
    total: Total
    dropped_energy: float
    base: str
    tuned: str
    dtype: str
    seed: int
    parameters: int
    nbytes: int
    notes: tuple[str, ...]

    def of(self, kind: str) -> list[Outcome]:
        """Return the tensors of one class."""
        return [one for one in self.outcomes if one.outcome == kind]


def extract(
    base: str | Path | Checkpoint,
    tuned: str | Path | Checkpoint,
    output: str | Path,
    ranks: Ranks,
    *,
    selection: Selection | None = None,
    dtype: str = "F32",
    seed: int = 0,
    tolerance: float = 6e-4,
    tight: bool = False,
    base_id: str | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> Extraction:
    """Write the change from `base` to `tuned` as an adapter: B·A near the best of its rank, alpha = r, the rest whole.

    min ‖W' − W − B·A‖_F per layer, within `tolerance` of the optimal error²; ranks as `ranks` says, factors stored in
    `dtype`. `tight` spends about as much again on bounds that are far tighter. The same seed and thread count give the
    same bytes. Raises `IncompatibleAdapter` (the models do not belong together, quantized weights), `BadFile` (NaN),
    `OutputRefused`, and `ValueError` for a budget that is too small.
    """
    from loratools.linalg.svd.truncated import full_float32

    output = Path(output)
    base = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    tuned = tuned if isinstance(tuned, Checkpoint) else Checkpoint.open(tuned)
    pairing = _prepare(base, tuned, output, selection or Selection(), force)
    settings = Settings(ranks, dtype, seed, tolerance, tight)
    with atomic.new_folder(output, force=force) as scratch, full_float32():
        spool = Spool(scratch / ".factors")
        work = Sweep(base, tuned, pairing, settings, spool, progress)
        outcomes, hashes = work.run(threads or cores())
        identity = replace(hashes[0], id=base_id)
        made = assemble(base, tuned, pairing, outcomes, identity, hashes[1], settings)
        _refuse_empty(base, tuned, made.outcomes)
        target = scratch / "adapter"
        dialects.save_adapter(made.adapter, target)
        written = dialects.open_adapter(target).settings[manifest.ORIGIN]["digest"]
        spool.path.unlink()
        for file in sorted(target.iterdir()):
            file.rename(scratch / file.name)
        target.rmdir()
        for source in companion_files(base, tuned, made.outcomes):
            (scratch / source.name).write_bytes(source.read_bytes())
        (scratch / "README.md").write_text(made.card, encoding="utf-8")
    energy = sum(one.norm2 for one in made.outcomes)
    lost = sum(one.norm2 for one in made.outcomes if one.outcome == "dropped")
    tensors = made.adapter.tensors().values()
    return Extraction(
        str(output), written, made.outcomes, pairing.missing,
        total(one.layer for one in made.outcomes if one.layer), lost / energy if energy else 0.0,
        hashes[0].root or "", hashes[1], dtype, seed,
        sum(one.parameters for one in tensors), sum(one.nbytes for one in tensors), (*pairing.notes, *made.notes),
    )  # fmt: skip


def plan(base: str | Path | Checkpoint, tuned: str | Path | Checkpoint, selection: Selection | None = None) -> Pairing:
    """Return what would become of every tensor if it had changed, from headers alone."""
    base = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    tuned = tuned if isinstance(tuned, Checkpoint) else Checkpoint.open(tuned)
    return pair(base, tuned, selection or Selection())


def _prepare(base: Checkpoint, tuned: Checkpoint, output: Path, selection: Selection, force: bool) -> Pairing:
    atomic.check_output(output, force=force)
    target = output.resolve()
    for path in (base.root, tuned.root):
        if target == path.resolve() or target in path.resolve().parents:
            raise OutputRefused(f"{output} is or holds the input {path}", hint="Choose another output.")
    return pair(base, tuned, selection)


def _refuse_empty(base: Checkpoint, tuned: Checkpoint, outcomes: Sequence[Outcome]) -> None:
    """Raise `IncompatibleAdapter` where nothing was factored: without a low-rank module there is no adapter."""
    if any(one.factors for one in outcomes):
        return
    if any(one.outcome == "whole" for one in outcomes):
        names = [one.pair.path for one in outcomes if one.outcome == "whole"]
        raise IncompatibleAdapter(
            f"{tuned.path} differs from {base.path} in {len(names)} tensor(s), and none of them can be factored",
            names[:20],
            hint="An adapter needs a module with factors: see --kind and --save-module.",
        )
    raise IncompatibleAdapter(
        f"{tuned.path} does not differ from {base.path} in any tensor that was to be extracted",
        hint="Check that the two paths are the right ones.",
    )
