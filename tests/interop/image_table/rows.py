"""One row of the table: what becomes of an adapter of one family under one naming."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from loratools.adapter.naming.image import families
from loratools.dialects import open_adapter
from loratools.errors import LoraToolsError
from loratools.surgery.convert import convert
from loratools.surgery.merge import merge
from tests.interop.image_table import files
from tests.interop.image_table.files import NAMINGS, Deltas
from tests.interop.image_table.models import PACKED, Modules, model_of_family, modules

YES, NONE, BASE = "yes", "-", "by base"
COLUMNS = ("read", "accounted", "own", "other", "comfy", "diffusers", "kohya", "loaded", "as diffusers")
TOLERANCE = 1e-5
_ODD = re.compile(r"norm|mod|adaln|refiner|embed|proj_(in|out)$|^caption|^context", re.IGNORECASE)
"""Modules that the trainers of a family may leave alone."""
_WRONG_IN_DIFFUSERS = {"flux2": ("norm_out.linear",)}
"""Modules whose adapters diffusers converts otherwise than their weights: it forgets to swap their halves."""


@dataclass(frozen=True)
class Row:
    """One row: an outcome for each column, `yes`, `by base` where a base must tell whose names
    they are, `-` where it does not apply, or what went wrong."""

    family: str
    naming: str
    outcomes: Mapping[str, str]

    @property
    def faults(self) -> dict[str, str]:
        """The columns that are neither right nor out of place."""
        return {column: outcome for column, outcome in self.outcomes.items() if outcome not in (YES, NONE, BASE)}


def row(family: str, naming: str, folder: Path) -> Row:
    """Make an adapter and bases, and try everything."""
    changed = modules(family)
    adapter = folder / f"{naming}.safetensors"
    deltas = files.write_adapter(changed, NAMINGS[naming], adapter)
    bases = files.write_bases(family, changed, folder)
    of = NAMINGS[naming].of
    other = "diffusers" if of == "original" else "original"
    checks: dict[str, Callable[[], str]] = {
        "read": lambda: _read(adapter),
        "accounted": lambda: _accounted(changed, of, adapter),
        "own": lambda: _merged(changed, deltas, of, *bases[of], adapter, folder / "own"),
        "other": lambda: _merged(changed, deltas, other, *bases[other], adapter, folder / "other"),
        **{
            to: _converting(family, deltas, naming, to, adapter, {n: where for n, (where, _) in bases.items()})
            for to in ("comfy", "diffusers", "kohya")
        },
        "loaded": lambda: _loaded(family, naming, deltas, folder / "to-diffusers.safetensors"),
        "as diffusers": lambda: _as_diffusers(family, naming, folder),
    }
    return Row(family, naming, {column: _tried(checks[column]) for column in COLUMNS})


def _tried(check: Callable[[], str]) -> str:
    try:
        return check()
    except (LoraToolsError, AssertionError) as error:
        return (str(error) or type(error).__name__).splitlines()[0]


def _read(path: Path) -> str:
    open_adapter(path)
    return YES


def _accounted(changed: Modules, of: str, path: Path) -> str:
    """Hold the modules of what was read against those that were written."""
    component = changed.family.component
    found = {name.removeprefix("diffusion_model.").removeprefix(f"{component}.") for name in open_adapter(path).updates}
    wanted = set(changed.shapes if of == "diffusers" else changed.originals)
    assert found == wanted, f"{len(found - wanted)} more, {len(wanted - found)} less: {sorted(found ^ wanted)[:3]}"
    return YES


def _merged(
    changed: Modules, deltas: Deltas, of: str, base: Path, before: Mapping[str, Tensor], adapter: Path, output: Path
) -> str:
    merge(base, [adapter], output)
    expected = deltas if of == "diffusers" else files.in_original(changed, deltas)
    after = files.read_model(output)
    assert after.keys() == before.keys(), "other tensors"
    wanted = {name: before[name].double().flatten(1) + expected[name] for name in before}
    _equal({name: tensor.double().flatten(1) for name, tensor in after.items()}, wanted)
    return YES


def _packing(name: str, reader: str) -> str:
    """Return the family whose names a reader has: a model's own, else one that packs the same modules otherwise."""
    model = PACKED.get(name, name)
    same = (name, model, *(packed for packed, of in PACKED.items() if of == model))
    return next((each for each in same if reader in families.get(each).prefixes), name)


def _converting(
    name: str, deltas: Deltas, naming: str, to: str, adapter: Path, bases: Mapping[str, Path]
) -> Callable[[], str]:
    changed = modules(name if to == "diffusers" else _packing(name, to))
    family, output = changed.family, adapter.parent / f"to-{to}.safetensors"
    of: str = "diffusers" if to == "diffusers" or (to == "comfy" and family.diffusers_in_comfy) else "original"
    if to == "kohya":
        of = family.kohya

    def check() -> str:
        outcome = YES
        try:
            convert(adapter, output, to=to)
        except LoraToolsError:  # names that several families have: a base tells whose they are
            convert(adapter, output, to=to, base=bases[of])
            outcome = BASE
        form = NAMINGS[{"comfy": "ai-toolkit", "diffusers": _level(naming), "kohya": "kohya"}[to]]
        names = changed.shapes if of == "diffusers" else changed.originals
        known = {files.called(changed, form, module): module for module in names}
        keys = load_file(output)
        strange = sorted({key.partition(".lora_")[0] for key in keys if ".lora_" in key} - known.keys())
        assert not strange, f"called {strange[0]} and {len(strange) - 1} more"
        found = files.read_adapter(output, known)
        _equal(found, deltas if of == "diffusers" else files.in_original(changed, deltas))
        return outcome

    return check


def _level(naming: str) -> str:
    """Return what diffusers' names are in a file that was converted to diffusers: the level of a model stays."""
    return "bare" if naming == "bare" else "diffusers"


def _loaded(family: str, naming: str, deltas: Deltas, path: Path) -> str:
    """Let diffusers' class load what was converted, and hold its layers against the numbers."""
    import diffusers

    cls = getattr(diffusers, model_of_family(family).cls)
    if not hasattr(cls, "load_lora_adapter"):
        return NONE
    assert path.exists(), "not converted"
    model: Any = cls(**model_of_family(family).config)
    prefix = None if _level(naming) == "bare" else families.get(family).component
    model.load_lora_adapter(path.parent, weight_name=path.name, prefix=prefix)
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    _equal({
        name: files.product(layer.lora_A["default_0"].weight, layer.lora_B["default_0"].weight).detach()
        * layer.scaling["default_0"]
        for name, layer in layers.items()
    }, deltas)  # fmt: skip
    return YES


def _as_diffusers(family: str, naming: str, folder: Path) -> str:
    """Let the pipeline's loader read the trainer's own file; `-` where it does not know that naming.

    Some converters refuse what their trainer leaves alone: then only the blocks' attentions and MLPs are asked for.
    """
    model = model_of_family(family)
    if not model.pipeline:
        return NONE
    every = modules(family, wide=bool(model.wide))
    for changed in (every, every.only(lambda module: any(c.isdigit() for c in module) and not _ODD.search(module))):
        deltas = files.write_adapter(changed, NAMINGS[naming], folder / "wide.safetensors", probe=True)
        factors = _by_diffusers(model.pipeline, changed, folder / "wide.safetensors")
        if factors is not None and factors.keys() == deltas.keys():
            wrong = _WRONG_IN_DIFFUSERS.get(family, ())
            theirs = {module: files.product(*pair, probe=True) for module, pair in factors.items()}
            _equal(*({m: d for m, d in every.items() if m not in wrong} for every in (theirs, deltas)))
            return YES
    return NONE


def _by_diffusers(pipeline: str, changed: Modules, path: Path) -> dict[str, tuple[Tensor, Tensor]] | None:
    """Return (A, B) of each module as a pipeline's loader reads a file; None where it does not know the naming."""
    import diffusers

    try:
        read = getattr(diffusers, pipeline).lora_state_dict(load_file(path))
    except (ValueError, KeyError, IndexError, AttributeError, RuntimeError, TypeError):
        return None
    read = read[0] if isinstance(read, tuple) else read
    known = {f"{changed.family.component}.{module}": module for module in changed.shapes}
    names = {key.partition(".lora_")[0] for key in read}
    if not names or not names <= known.keys() or any(".lora_" not in key for key in read):
        return None
    return {known[name]: (read[f"{name}.lora_A.weight"], read[f"{name}.lora_B.weight"]) for name in names}


def _equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Hold tensors against others, by their names; a difference counts as a part of the largest number."""
    odd = sorted(found.keys() ^ wanted.keys())
    assert not odd, f"{len(found.keys() - wanted.keys())} more, {len(wanted.keys() - found.keys())} less: {odd[:3]}"
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape, f"{name}: {tuple(found[name].shape)} for {tuple(tensor.shape)}"
        largest = max(float(tensor.abs().max()), 1e-30)
        distance = float((found[name].double() - tensor).abs().max()) / largest
        assert distance <= TOLERANCE, f"{name}: {distance:.0e} off"
