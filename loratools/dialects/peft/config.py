"""`adapter_config.json` as PEFT 0.21 reads it: a field is honoured, without effect, refused, or said to be unknown."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapter.model import BaseIdentity
from loratools.adapter.naming.compact import suffixes
from loratools.adapter.parts import BIAS, MAGNITUDE
from loratools.decisions import warned
from loratools.dialects._frame.numbers import tell_alpha
from loratools.dialects.peft import fields as tables
from loratools.dialects.peft.patterns import ConfigFile, NameList, PatternKeys
from loratools.dialects.peft.targets import Targets, several
from loratools.errors import UnsupportedAdapter

if TYPE_CHECKING:
    from loratools.adapter.kinds.experts import Rule

PATTERNS = ("rank_pattern", "alpha_pattern")

# What a writer may want, kept in `Adapter.settings` where it says something.
_SETTINGS = (
    "task_type", "auto_mapping", "fan_in_fan_out", "bias", "lora_dropout", "use_rslora", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices",
    "target_parameters", "ensure_weight_tying", "layer_replication",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PeftConfig:
    """A config without faults: types are right, expressions compile, no field is refused.

    `fields` are those that are not null; `later` tells whether there are any, null or not, that PEFT has written since
    it writes its version. `targets`, `rank_keys` and `alpha_keys` match modules by PEFT's rules.
    """

    fields: Mapping[str, Any]
    targets: Targets
    rank_keys: PatternKeys
    alpha_keys: PatternKeys
    later: bool = False

    @classmethod
    def parse(
        cls, document: Mapping[str, Any], path: Path, *, initial: bool = False, alpha: float | None = None
    ) -> PeftConfig:
        """Check a config, and warn of what it leaves out and of fields that are not known.

        Raises `BadFile` with all fields of a wrong type, or `UnsupportedAdapter` with all reasons.
        `path` is its file, for messages. `initial` lets in an adapter of a changed base (PiSSA, OLoRA, CorDA), for a
        caller that subtracts the initial adapter from it. `alpha` is the user's, for every module; default: the file's.
        """
        fields = {name: value for name, value in document.items() if value is not None}
        tables.check(path, tables.misfits(fields, tables.TYPES))
        if alpha is not None:
            tell_alpha(path, alpha, [fields.get("lora_alpha"), *fields.get("alpha_pattern", {}).values()])
            fields = {**fields, "lora_alpha": alpha, "alpha_pattern": {}}
        file = ConfigFile(path)
        targets = Targets.of(fields, file)
        rank_keys, alpha_keys = (PatternKeys(fields.get(name, ()), name, file) for name in PATTERNS)
        tables.check(path, file.problems)
        init = str(fields.get("init_lora_weights", True)).lower()
        subtracted = initial and init.startswith(tables.SUBTRACTED_INITS)
        refused = [
            f"{name} = {str(fields[name])[:80]}: {reason}"
            for name, refuses, reason in tables.REFUSED
            if name in fields and refuses(fields[name]) and not (subtracted and name == "init_lora_weights")
        ]
        if init not in ("true", "false", *tables.PLAIN_INITS) and not init.startswith(tables.BASE_CHANGING_INITS):
            refused.append(f"init_lora_weights = {init[:80]}: not known here; it may change the base model")
        if refused:
            raise UnsupportedAdapter(f"{path}: loratools does not read this adapter", refused)
        for note in _notes(fields):
            warned("%s: %s", path, note)
        return cls(fields, targets, rank_keys, alpha_keys, not tables.LATER.isdisjoint(document))

    def rank(self, module: str) -> int | None:
        """Return the rank that the config states for a module, by PEFT's first-match rule; None if it states none."""
        key = self.rank_keys.first(module)
        rank: int | None = self.fields.get("r") if key is None else self.fields["rank_pattern"][key]
        return rank

    def alpha(self, module: str) -> float:
        """Return the alpha of a module, by PEFT's first-match rule."""
        key, usual = self.alpha_keys.first(module), self.fields.get("lora_alpha", tables.DEFAULT_ALPHA)
        alpha: float = usual if key is None else self.fields["alpha_pattern"][key]
        return alpha

    def scaling(self, module: str, rank: int) -> float:
        """Return s = α/r, or α/√r with rsLoRA."""
        return self.alpha(module) / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def rule(self, module: str, rank: int) -> tuple[float, float]:
        """Return s and α of a module whose factors have this rank; `ValueError` where the config states another."""
        if self.rank(module) not in (None, rank):
            raise ValueError(f"its tensors have rank {rank}, the config says {self.rank(module)}")
        return self.scaling(module, rank), self.alpha(module)

    def contradictions(self, groups: Mapping[str, Collection[str]]) -> list[str]:
        """List what the config says and the tensors have not, once the rule was asked about every module.

        For dialects with names of their own, in which a pattern that names no module may mean another one.
        `groups` are the parts of each module.
        """
        switches = (("use_dora", MAGNITUDE), ("lora_bias", BIAS))
        lines = [
            f"{module}: no {part}, and the config says {switch}"
            for switch, part in switches
            if self.fields.get(switch)
            for module, parts in groups.items()
            if part not in parts
        ]
        keys = {"rank_pattern": self.rank_keys.unused(), "alpha_pattern": self.alpha_keys.unused()}
        return lines + [
            f"{field}: {key[:80]!r} names no module here" for field, unused in keys.items() for key in unused
        ]

    def applied_twice(self, module: str) -> int:
        """Return how often ΔW is added: 2 for the output projection of an `nn.MultiheadAttention`, else 1.

        PEFT up to 0.21 computes W + 2·s·B·A there, in training too (huggingface/peft#3774), so such an adapter was
        trained for it. A config without a version is from such a PEFT.
        """
        if not module.endswith(".base_layer.out_proj"):
            return 1
        return 1 if self.version is not None and self.version[:2] > (0, 21) else 2

    @property
    def version(self) -> tuple[int, int, int] | None:
        """The version of PEFT that wrote it, by its first three numbers; None where it does not say one."""
        return _numbers(str(self.fields.get("peft_version", "")))

    @property
    def stack_rule(self) -> Rule:
        """How the PEFT that wrote it takes a parameter of three dimensions.

        Up to 0.18 for (E, in, out), whatever its class; 0.19.0 turned round the classes that say `is_transposed`, by
        mistake, and 0.19.1 the others. 0.17 wrote no `peft_version`. Of a version between two releases nothing is known
        here, nor of a config without one that has later fields.
        """
        if self.version is None:
            return "unknown" if "peft_version" in self.fields or self.later else "in_out"
        if self.version < (0, 19, 0):
            return "in_out"
        if self.version > (0, 19, 1):
            return "model"
        released = re.fullmatch(r"0\.19\.[01](?:\.post\d+)?", str(self.fields["peft_version"]))
        return ("inverse" if self.version == (0, 19, 0) else "model") if released else "unknown"

    def token_rows(self, module: str) -> list[int] | None:
        """Return the token indices of an embedding's trained rows; a bare list is that of every such module."""
        indices = self.fields.get("trainable_token_indices")
        if isinstance(indices, Mapping):
            name = NameList(indices).first(module)
            indices = None if name is None else indices[name]
        return indices

    def without_tensors(self, modules: Collection[str], whole: Collection[str]) -> dict[str, list[str]]:
        """Return field -> what it lists and the file has no tensors for, once the modules' ranks and alphas are known.

        `modules` are those with factors, `whole` the paths of tensors that were trained whole.
        """
        places = {suffix for module in modules for suffix in suffixes(module.replace(".base_layer", ""))}
        segments = {segment for path in whole for segment in path.split(".")}
        rows, bias = self.fields.get("trainable_token_indices"), self.fields.get("bias", "none")
        biased = bias == "none" or any(path.endswith("bias") for path in whole)
        missing = {
            "target_modules": self.targets.unused(modules),
            "target_parameters": [
                n for n in several(self.fields, "target_parameters") if "." in n and n.rpartition(".")[0] not in places
            ],
            "modules_to_save": [
                n for n in several(self.fields, "modules_to_save") if n.rpartition(".")[2] not in segments
            ],
            "trainable_token_indices": [n for n in rows if n not in places] if isinstance(rows, Mapping) else [],
            "rank_pattern": self.rank_keys.unused(),
            "alpha_pattern": self.alpha_keys.unused(),
            "bias": [] if biased else [bias],
        }
        return {field: names for field, names in missing.items() if names}

    @property
    def base(self) -> BaseIdentity | None:
        """The base model's name and revision; None where neither is there, or both are empty."""
        return tables.base_of(self.fields)

    @property
    def carried(self) -> dict[str, Any]:
        """What changes where the updates go, of the settings: all that a dialect with names of its own keeps."""
        return {name: value for name, value in self.settings.items() if name in ("layer_replication", "task_type")}

    @property
    def settings(self) -> dict[str, Any]:
        """What a writer may want."""
        return tables.stated(self.fields, _SETTINGS, self.targets.layers)


def _notes(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a user must know of a config: defaults that are taken, and fields that are not known."""
    for name, taken in (
        ("r", f"the rank of each tensor is taken (PEFT takes {tables.DEFAULT_R})"),
        ("lora_alpha", f"{tables.DEFAULT_ALPHA}, PEFT's default, is taken"),
        ("peft_type", "LORA is taken"),
    ):
        if name not in fields:
            yield f"the config does not say {name}; {taken}"
    if fields.get("init_lora_weights") == "lora_ga":
        yield "LoRA-GA training started from a changed base model; PEFT applies it to the unchanged one"
    if names := tables.unknown_to_peft(fields):
        yield f"fields that are not known here, and have no effect: {', '.join(names)[:500]}"


@cache
def _numbers(version: str) -> tuple[int, int, int] | None:
    # Asked about once for every module of every adapter.
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version[:100])
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None
