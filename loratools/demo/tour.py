"""The guided tour: every capability once, on a real trained model that ships inside the package."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools import dialects
from loratools.demo import data_folder
from loratools.demo.quantized import quantized
from loratools.demo.recorded import by_hand, recorded
from loratools.demo.stop import Stop
from loratools.demo.trained import trained
from loratools.errors import WrongBase
from loratools.linalg.ranks.allocate import Ranks
from loratools.parallel import cores, one_torch_thread
from loratools.storage.atomic import new_folder, temporary
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.sources import Location
from loratools.storage.strict_json import read_json
from loratools.surgery.combine import combine
from loratools.surgery.convert import convert
from loratools.surgery.extract import extract
from loratools.surgery.inspect import AdapterSummary, inspect
from loratools.surgery.merge import merge
from loratools.surgery.resize import resize
from loratools.surgery.unmerge import unmerge
from loratools.surgery.verify import verify

PROMPT = b"FIRST LORD.\n"


@dataclass(frozen=True, slots=True)
class Tour:
    """The stops of a tour, and the seconds that they took."""

    stops: tuple[Stop, ...]
    seconds: float


def run_demo(folder: Location | None = None) -> Tour:
    """Take the guided tour on the small trained model of this package: inspect, seal, merge, verify, measure, refuse.

    Args:
        folder: A new folder for base, adapter and everything that is made from them. Default: one that goes away.

    Returns:
        The stops, each with what was measured on this machine.

    Raises:
        RuntimeError: A stop did not find what it expects.
        OutputRefused: The folder exists already.

    Example:
        >>> len(run_demo().stops)
        11
    """
    place = temporary("demo") if folder is None else new_folder(Path(folder))
    began = time.monotonic()
    with place as root, by_hand():
        for name in ("base", "adapter"):
            shutil.copytree(data_folder() / name, Path(root) / name)
        return Tour(tuple(stop(Path(root)) for stop in STOPS), time.monotonic() - began)


def _inspect(folder: Path) -> Stop:
    model, adapter = inspect(folder / "base"), inspect(folder / "adapter")
    assert isinstance(adapter, AdapterSummary)
    group = adapter.groups[0]
    return Stop(
        "What is in the files? Headers only, nothing is loaded.",
        "loratools inspect adapter",
        (
            f"the model: {model.total.parameters:,} parameters in {model.total.tensors} tensors, trained on the Bible",
            f"the adapter: rank {group.rank}, alpha {group.alpha:g}, scaling {group.scaling:g} on "
            f"{len(adapter.modules)} modules, trained on Shakespeare's plays with PEFT",
        ),
        {"parameters": model.total.parameters, "modules": len(adapter.modules), "rank": group.rank},
    )


def _seal(folder: Path) -> Stop:
    with recorded("convert", adapter=folder / "adapter", base=folder / "base"):
        made = convert(folder / "adapter", folder / "sealed", base=folder / "base")
    root = made.base.root if made.base else None
    return Stop(
        "Seal the adapter: write down, in its own file, which base model it belongs to.",
        "loratools convert adapter -o sealed --base base",
        (f"base hash {root}", "it is still a PEFT adapter, with the same factors byte for byte"),
        {"root": root, "digest": made.digest},
    )


def _merge(folder: Path) -> Stop:
    with recorded("merge", base=folder / "base", adapters=[folder / "sealed"]):
        report = merge(folder / "base", [folder / "sealed"], folder / "merged")
    return Stop(
        "Merge it: W' = W + s·B·A in float32, rounded once; the base is checked against its hash as it is read.",
        "loratools merge base sealed -o merged",
        (
            f"{report.changed} of {report.tensors} tensors changed, {report.verified} verified to be the base's",
            f"{report.retention or 0:.2%} of the change survives rounding to bf16",
        ),
        {"changed": report.changed, "verified": report.verified, "retention": report.retention},
    )


def _verify(folder: Path) -> Stop:
    proof = verify(folder / "merged", folder / "base", [folder / "adapter"], exact=True)
    wrong = sum(check.mismatched or 0 for check in proof.checked)
    if not proof.ok:
        raise RuntimeError("the merged model is not base + adapter")
    return Stop(
        "Prove it: recompute every changed tensor in float64, compare every other byte by byte.",
        "loratools verify merged --base base --adapter adapter --exact",
        (
            f"{len(proof.checked)} changed tensors are base + adapter; all elements but {wrong} are the float64 ones",
            f"{proof.identical} untouched tensors are equal byte by byte",
        ),
        {"checked": len(proof.checked), "identical": proof.identical, "mismatched": wrong},
    )


def _unmerge(folder: Path) -> Stop:
    with recorded("merge", {"keep-residual": True}, base=folder / "base", adapters=[folder / "sealed"]):
        made = merge(folder / "base", [folder / "sealed"], folder / "kept", keep_residual=True)
    unmerged = unmerge(folder / "kept", [folder / "adapter"], folder / "unmerged")
    if unmerged.proved != "root hash" or made.residual is None:
        raise RuntimeError("the base model did not come back")
    return Stop(
        "Take it out again, without the base: what rounding destroyed was kept beside the merged model.",
        "loratools merge base sealed -o kept --keep-residual && loratools unmerge kept adapter -o unmerged",
        (
            f"the residual takes {made.residual.nbytes:,} bytes, {made.residual.share:.2%} of what the merge touched",
            f"every bit is the base's: root hash {unmerged.root}",
        ),
        {"residual": made.residual.nbytes, "share": made.residual.share, "root": unmerged.root},
    )


def _combine(folder: Path) -> Stop:
    from loratools.linalg.ranks.rules import Fixed

    half = sum(lazy.parameters for lazy in dialects.open_adapter(folder / "adapter").tensors().values()) // 2
    with recorded("resize", {"budget": str(half)}, adapter=folder / "adapter"):
        small = resize(folder / "adapter", folder / "small", Ranks(budget=half))
    with recorded("resize", {"rank": 4}, adapter=folder / "adapter"):
        even = resize(folder / "adapter", folder / "even", Ranks(Fixed(4)))
    with recorded("combine", {"weight": ["0.7", "-0.3"]}, adapters=[folder / "sealed", folder / "small"]):
        both = combine([folder / "sealed", folder / "small"], folder / "both", weights=[0.7, -0.3])
    if not small.error < even.error or both.error > 1e-6:
        raise RuntimeError("a combination is further from the sum than it may be")
    return Stop(
        "Make it half as large, and add adapters up: in factor space, without the model.",
        f"loratools resize adapter --budget {half} -o small",
        (
            f"{small.parameters:,} parameters where they matter most: {small.error:.3f} of the change is lost,",
            f"where rank 4 everywhere, {even.parameters:,} parameters, would lose {even.error:.3f}",
            f"0.7 of the one less 0.3 of the other: exact to {both.error:.0e}, in one adapter of rank "
            f"{max(share.rank for share in both.shares)}",
        ),
        {"error": small.error, "even_error": even.error, "combined_error": both.error},
    )


def _extract(folder: Path) -> Stop:
    with recorded("extract-svd", {"noise": True, "threads": cores()}, base=folder / "base", tuned=folder / "merged"):
        made = extract(folder / "base", folder / "merged", folder / "extracted", Ranks(noise=True))
    ranks = sorted({outcome.rank for outcome in made.of("factored")})
    if ranks != [8] or made.total.error > 0.01:
        raise RuntimeError("extraction did not find the adapter in the merged model")
    return Stop(
        "And with only the two models at hand? Extract the change again, as far as it stands above the rounding.",
        "loratools extract-svd base merged -o extracted --noise",
        (
            f"rank {ranks[0]} in all {made.total.layers} layers, which is the adapter's: it was found again",
            f"{made.total.captured:.4%} of the change; the rest, an error of {made.total.error:.4f}, is rounding",
        ),
        {"rank": ranks[0], "error": made.total.error, "captured": made.total.captured},
    )


@one_torch_thread()  # of small matrices
def _losses(folder: Path) -> Stop:
    from loratools.demo.llama import LlamaShape, generate, held_out_loss

    base, merged = Checkpoint.open(folder / "base"), Checkpoint.open(folder / "merged")
    shape = LlamaShape.from_config(read_json(folder / "base" / "config.json"))
    updates: Any = dialects.open_adapter(folder / "adapter").updates
    factors = {module: (u.A.load(), u.B.load(), u.scaling) for module, u in updates.items()}
    before = {name: base.read(name) for name in base.specs}
    after = {name: merged.read(name) for name in merged.specs}
    text = (data_folder() / "plays.txt").read_bytes()
    losses = {
        "base": held_out_loss(before, shape, text),
        "base + adapter": held_out_loss(before, shape, text, factors),
        "merged": held_out_loss(after, shape, text),
    }
    if abs(losses["merged"] - losses["base + adapter"]) > 0.01:
        raise RuntimeError("the merged model does not behave as base + adapter does")
    texts = [generate(w, shape, PROMPT, 60, temperature=0.6)[len(PROMPT) :] for w in (before, after)]
    words = [" / ".join(filter(None, part.decode("ascii", "replace").strip().splitlines())) for part in texts]
    return Stop(
        "Did it help? Loss on a play that neither has seen (Macbeth), in nats per byte; less is better.",
        "",
        (
            *(f"{name:<15} {loss:.4f}" for name, loss in losses.items()),
            f"after {PROMPT.decode().strip()!r} base says    … {words[0]}",
            f"after {PROMPT.decode().strip()!r} merged says  … {words[1]}",
        ),
        {"held_out_loss": losses},
    )


def _wrong_base(folder: Path) -> Stop:
    touched = next(iter(dialects.open_adapter(folder / "adapter").updates)) + ".weight"
    wrong = Path(shutil.copytree(folder / "base", folder / "wrong-base"))
    spec = Checkpoint.open(wrong).specs[touched]
    damaged = bytearray(spec.file.read_bytes())
    damaged[spec.start] ^= 1
    spec.file.write_bytes(damaged)
    try:
        merge(wrong, [folder / "sealed"], folder / "refused")
    except WrongBase as error:
        refusal = error.message.replace(f"{folder}/", "")
    else:
        raise RuntimeError("a wrong base was not refused")
    if (folder / "refused").exists():
        raise RuntimeError("a refused merge left an output behind")
    return Stop(
        f"Now the wrong base: the same model, but for one flipped bit in {touched}.",
        "loratools merge wrong-base sealed -o refused",
        (f"refused: {refusal.partition(': its digest')[0]}", "nothing was written"),
        {"refused": True},
    )


STOPS: tuple[Callable[[Path], Stop], ...] = (
    _inspect, _seal, _merge, _verify, _unmerge, _combine, _extract, _losses, trained, quantized, _wrong_base,
)  # fmt: skip
"""The stops, in order; a later capability adds its own."""
