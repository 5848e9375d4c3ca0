"""Tinker (Thinking Machines): PEFT's files with names of its own for the head and for experts. Read only.

    ….mlp.experts.w1.lora_A.weight (E or 1, r, in)   ….lora_B.weight (E or 1, out, r)   all experts may share one factor
    model.unembed_tokens                              lm_head

w1, w3, w2 are gate, up, down; where w3 is empty (Nemotron has no gate) w1 is up. The config is PEFT's, and so is its
s = lora_alpha/r (tinker-cookbook 0.6.1, `weights/_adapter.py`).
Tinker serves plain PEFT, which the dialect `peft` writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratools.adapter import factors
from loratools.adapter.model import Adapter
from loratools.adapter.parts import A, B
from loratools.dialects._frame.build import Draft, Groups, check_faults
from loratools.dialects._frame.listing import Evidence, Listing
from loratools.dialects._frame.losses import read_only
from loratools.dialects.peft.config import PeftConfig
from loratools.errors import BadFile
from loratools.format import keys
from loratools.storage.lazy import LazyTensor

SUMMARY = "Tinker: PEFT's files with stacked experts (experts.w1) and unembed_tokens; read only"
EXTRA = None
FILES = ()
CANNOT = ("anything: it is only read; Tinker's services read PEFT",)

_CONFIG, _FILE = "adapter_config.json", "adapter_model.safetensors"
_EXPERTS = r"(.+\.experts)\.(w[123])"
_GATED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_UNGATED = {"w1": "up_proj", "w2": "down_proj"}


def detect(listing: Listing) -> Evidence | None:
    """Look for stacked experts called w1, w2, w3, and for `unembed_tokens`."""
    header = listing.header(_FILE) if _FILE in listing.files else None
    for name in header.tensors if header else ():
        if ".experts.w" not in name and "unembed_tokens" not in name:
            continue
        split = keys.split(name)
        if split and (re.fullmatch(_EXPERTS, split[0]) or split[0].endswith("unembed_tokens")) and split[1] in (A, B):
            return Evidence(95, f"{_FILE} has names of Tinker, such as {name}")
    return None


def read(listing: Listing) -> Adapter:
    """Read an adapter, with each expert of a stack under transformers' name of it.

    The config is PEFT's, whose patterns name modules as transformers does; what is refused in PEFT's is refused here.
    Raises `BadFile` for a config without r and lora_alpha, and for one that the tensors contradict; for names that
    Tinker does not write, for a factor without its partner, and for factors of different numbers of experts.
    """
    document, path = listing.json(_CONFIG) or {}, listing.folder / _CONFIG
    stated = {"lora_alpha": document.get("lora_alpha"), "r": document.get("r")}
    if stated["r"] is None or (stated["lora_alpha"] is None and listing.alpha is None):
        raise BadFile(f"{path}: expected numbers r and lora_alpha, found {stated['r']} and {stated['lora_alpha']}")
    config = PeftConfig.parse(document, path, alpha=listing.alpha)
    draft = Draft(listing.path)
    for tensor, lazy in listing.tensors(_FILE).items():
        split = keys.split(tensor)
        if split is None or split[1] not in (A, B):
            draft.faults.append(f"{tensor}: no factor that Tinker writes")
        else:
            draft.add(*split, lazy, tensor)
    all_of = draft.groups
    draft.convert(lambda module, parts: _modules(module, parts, all_of))
    updates = draft.build(config.rule)
    check_faults(listing.path, config.contradictions(draft.groups))
    return Adapter(updates, base=config.base, dialect="tinker", settings=config.carried)


losses, write = read_only("files of Tinker are only read here; Tinker's services read PEFT (--to peft)")


def _modules(module: str, parts: Mapping[str, LazyTensor], all_of: Groups) -> Groups:
    """Return the modules that one of Tinker's stands for: itself, or each expert of its stack."""
    if parts.keys() != {A, B}:
        raise ValueError("a factor without its partner")
    a, b = parts[A], parts[B]
    match = re.fullmatch(_EXPERTS, module)
    if match is None:
        return {_renamed(module): dict(parts)}
    if 0 in a.shape and 0 in b.shape:
        return {}  # a placeholder for a projection that the model has not
    counts = {a.shape[0], b.shape[0]} - {1}
    if len(a.shape) != 3 or len(b.shape) != 3 or len(counts) != 1:
        raise ValueError(f"A {a.shape} and B {b.shape} are no stacked experts")
    third = all_of.get(f"{match[1]}.w3", {}).get(A)
    name = (_UNGATED if third is not None and 0 in third.shape else _GATED)[match[2]]
    return {
        f"{_renamed(match[1])}.{i}.{name}": {
            part: factors.item(lazy, i if lazy.shape[0] > 1 else 0) for part, lazy in parts.items()
        }
        for i in range(counts.pop())
    }


def _renamed(module: str) -> str:
    """Return transformers' name of a module.

    >>> _renamed("language_model.model.unembed_tokens"), _renamed("model.layers.0.attn.q_proj")
    ('language_model.lm_head', 'model.layers.0.self_attn.q_proj')
    """
    module = re.sub(r"(?:^|(?<=\.))model\.unembed_tokens$", "lm_head", module)
    return re.sub(r"(\.layers\.\d+)\.attn\.", r"\1.self_attn.", module)
