"""The names of families of image and video models, one file a family, found by its name.

A file is data: it builds one `Family`, called `FAMILY`. Names are patterns of modules: `{}` stands for a block's
number, of which there may be any. Both namings list every module that an adapter can change, also those that are called
alike in both, without which nobody could tell whose names they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from itertools import chain
from typing import Literal, cast

from loratools.adapter.naming.image.components import COMPONENTS
from loratools.adapter.naming.image.patterns import Patterns
from loratools.options import modules_in

Naming = Literal["original", "diffusers"]


@dataclass(frozen=True, slots=True)
class Fused:
    """A weight of one naming that is several of the other, by output features, in this order.

    `parts`  their names
    `sizes`  for each part its output features as a multiple of the input features, None for an equal share of what the
             others leave; () where all parts have equal shares
    """

    parts: tuple[str, ...]
    sizes: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        if len(self.parts) < 2 or len(set(self.parts)) != len(self.parts):
            raise ValueError(f"a fused weight has several parts, each once; these are {self.parts}")
        if self.sizes and len(self.sizes) != len(self.parts):
            raise ValueError(f"{len(self.sizes)} sizes for {len(self.parts)} parts: {self.parts}")

    @property
    def shares(self) -> tuple[float | None, ...]:
        """The sizes, one for each part."""
        return self.sizes or (None,) * len(self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The names of one family; raises `ValueError` with all that contradicts itself.

    `summary`      the models' names, as people call them: "Wan 2.1, 2.2 and VACE"
    `component`    the pipeline's component in diffusers
    `renames`      module of the original, whose names ComfyUI has -> diffusers' module; the same ones too
    `fused`        module of the original -> its parts under diffusers' names
    `split`        module of diffusers -> its parts under the original's names
    `swapped`      modules of the original whose output features' two halves stand the other way round in diffusers
    `swapped_if`   modules of the original that are swapped only where their output : input features are so
    `prefixes`     reader -> what stands before a name in its files: `comfy` before the original's, `kohya` before
                   flattened ones
    `encoders`     component of a text encoder -> (kohya's prefix, ComfyUI's name): ("lora_te3_", "t5xxl")
    `diffusers_in_comfy`  whether ComfyUI reads the family's adapters under diffusers' names only
    `kohya`        whose names kohya's trainers flatten
    `called`       regular expressions that find the family in the lower-case name of a base, or in what a header says
                   of it (`modelspec.architecture`, `ss_base_model_version`)
    `depths`       list of blocks, in either naming -> the numbers of blocks that published models have: they tell
                   families apart that share their names; 0 for a list that many lack. Block weights have the lists'
                   order
    `inputs`       module, in either naming -> its input features in published models, for the same purpose
    `proportions`  module of the original -> output : input features, where families share names and shapes tell
    `like`         the family whose models these are too, in files with other original names; "" in the usual ones
    `rather`       families, by file name, that names, widths and numbers of blocks are taken for where they are those
                   of both alike, with a warning
    `by_heads`     fused modules of the original whose rows lie q, k, v of each head in turn in the publisher's shards;
                   in single files they are stacked
    `beside`       whether a file keeps these modules beside another family's, in the model of the same file
    """

    summary: str
    component: str = "transformer"
    renames: Mapping[str, str]
    fused: Mapping[str, Fused] = field(default_factory=dict)
    split: Mapping[str, Fused] = field(default_factory=dict)
    swapped: frozenset[str] = frozenset()
    swapped_if: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    prefixes: Mapping[str, str] = field(default_factory=lambda: {"comfy": "diffusion_model.", "kohya": "lora_unet_"})
    encoders: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    diffusers_in_comfy: bool = False
    kohya: Naming = "original"
    called: tuple[str, ...] = ()
    depths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    proportions: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    like: str = ""
    rather: tuple[str, ...] = ()
    by_heads: frozenset[str] = frozenset()
    beside: bool = False

    def __post_init__(self) -> None:
        faults = list(self._faults())
        if faults:
            raise ValueError(f"{self.summary}: {'; '.join(faults)}")

    @property
    def original(self) -> tuple[str, ...]:
        """The patterns of all modules of the original."""
        return (*self.renames, *self.fused, *chain.from_iterable(fused.parts for fused in self.split.values()))

    @property
    def diffusers(self) -> tuple[str, ...]:
        """The patterns of all modules of diffusers."""
        parts = chain.from_iterable(fused.parts for fused in self.fused.values())
        return (*self.renames.values(), *parts, *self.split)

    def _faults(self) -> Iterator[str]:
        if self.component not in COMPONENTS:
            yield f"{self.component} is no component of a pipeline"
        for naming, patterns in (("original", self.original), ("diffusers", self.diffusers)):
            yield from (f"{naming} has {name} twice" for name, count in Counter(patterns).items() if count > 1)
            for flat in (False, True):
                known = Patterns(patterns, flat=flat)
                for name in dict.fromkeys(patterns):
                    example = (name.replace(".", "_") if flat else name).replace("{}", "0")
                    first = (known.find(example) or (name,))[0]
                    yield from [f"{naming}'s {example} is {first} and {name}"] if first != name else []
        pairs = [*self.renames.items()]
        pairs += [(one, part) for table in (self.fused, self.split) for one, fused in table.items()
                  for part in fused.parts]  # fmt: skip
        yield from (f"{a} has {a.count('{}')} numbers, {b} has {b.count('{}')}" for a, b in pairs
                    if a.count("{}") != b.count("{}"))  # fmt: skip
        strangers = (self.swapped | self.swapped_if.keys()) - self.renames.keys()
        yield from (f"{name} is swapped and not renamed" for name in sorted(strangers))
        yield from (f"{name} lies by heads and is not fused" for name in sorted(self.by_heads - self.fused.keys()))
        odd = (name for name in sorted(self.by_heads) if "qkv" not in name.rpartition(".")[2])
        yield from (f"{name} lies by heads and is not called qkv, by which such are known" for name in odd)
        yield from (f"{name} has a proportion and no name" for name in self.proportions.keys() - set(self.original))
        known_inputs = set(self.original).union(self.diffusers)
        yield from (f"{name} has inputs and no name" for name in sorted(self.inputs.keys() - known_inputs))
        lists = [name.split(".{}")[0] for name in (*self.original, *self.diffusers) if ".{}" in name]
        yield from (f"{name} has depths and no blocks" for name in sorted(self.depths.keys() - set(lists)))
        yield from (f"{pattern} is no regular expression" for pattern in self.called if not _compiles(pattern))


def same(*patterns: str) -> dict[str, str]:
    """Return the renames of modules that have one name in both namings.

    >>> same("img_in")
    {'img_in': 'img_in'}
    """
    return {pattern: pattern for pattern in patterns}


def within(original: str, diffusers: str, renames: Mapping[str, str]) -> dict[str, str]:
    """Return renames inside a block, with the block's own name before both.

    >>> within("blocks.{}", "transformer_blocks.{}", {"ffn.0": "ff.net.0.proj"})
    {'blocks.{}.ffn.0': 'transformer_blocks.{}.ff.net.0.proj'}
    """
    return {f"{original}.{theirs}": f"{diffusers}.{ours}" for theirs, ours in renames.items()}


@cache
def names() -> tuple[str, ...]:
    """Return the names of all families, sorted."""
    return tuple(modules_in(__path__))


@cache
def get(name: str) -> Family:
    """Return a family by the name of its file; `ValueError` where its data contradict each other."""
    return cast(Family, import_module(f"{__name__}.{name}").FAMILY)


def every() -> Iterable[tuple[str, Family]]:
    """Return all families with their names, sorted."""
    return [(name, get(name)) for name in names()]


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
