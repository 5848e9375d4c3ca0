"""PEFT's canonical tensor names, which are also those of the format.

    base_model.model.  model.layers.0.self_attn.q_proj  .  lora_A.weight
    PREFIX             module in the base model            part

A name without an adapter part is a whole tensor that takes the place of one of the base model:
`base_model.model.lm_head.weight`.
The `adapter_config.json` that goes with such a file is derived in one place, `loratools/format/peft_config.py`.
"""

from __future__ import annotations

import re
from functools import lru_cache

PREFIX = "base_model.model."

# part -> what it is, with (out, in) the shape of the weight and r the rank
PARTS: dict[str, str] = {
    "lora_A.weight": "factor A: (r, in), a convolution's (r, in, kh, kw), stacked experts' (E·r, in)",
    "lora_B.weight": "factor B: (out, r), a convolution's (out, r, 1, 1), stacked experts' (out, r·E)",
    "lora_B.bias": "bias of B: (out,), applied as s·b (PEFT's lora_bias)",
    "lora_embedding_A": "factor A of an embedding: (r, vocabulary)",
    "lora_embedding_B": "factor B of an embedding: (dimension, r)",
    "lora_magnitude_vector": "DoRA's magnitude m: (out,), a convolution's (1, out, 1, 1)",
    "lora_diag": "KaSA's diagonal between B and A: (r,)",
    "lora_velora_embed": "VeLoRA's training-time projection",
    "token_adapter.trainable_tokens_delta": "rows that take the place of an embedding's rows: (n, dimension)",
}
"""Every part that PEFT writes for LoRA, in one table."""

_MARKS = "|".join(sorted(re.escape(part.partition(".")[0]) for part in PARTS if not part.startswith("lora_")))
# A part begins with a segment that is one of these, or that begins so.
_BEGINS = rf"lora_|(?:{_MARKS})(?:\.|\Z)"
_PART, _BEHIND_DOT = re.compile(_BEGINS), re.compile(rf"\.(?={_BEGINS})")


@lru_cache(maxsize=1 << 16)  # the next adapter has the same names
def split(name: str) -> tuple[str, str] | None:
    """Return (module, part) of a canonical name, or None if it does not begin with `PREFIX` or names no module.

    A whole tensor gives (its path in the base, ""). A part that is not in `PARTS` (`lora_A.bias`, or with an adapter's
    name left in `lora_A.default.weight`) is returned as it stands, for the caller to refuse by name.

    >>> split("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
    ('model.layers.0.self_attn.q_proj', 'lora_A.weight')
    >>> split("base_model.model.lm_head.weight")
    ('lm_head.weight', '')
    """
    if not name.startswith(PREFIX):
        return None
    path = name[len(PREFIX) :]
    if not path or ".." in path or path[0] == "." or path[-1] == ".":
        return None
    if _PART.match(path):
        return None
    dot = _BEHIND_DOT.search(path)
    return (path[: dot.start()], path[dot.end() :]) if dot else (path, "")


@lru_cache(maxsize=1 << 16)  # ranks, alphas and those who check them ask for the same
def exactly(module: str) -> str:
    r"""Return the key of a rank or alpha pattern that means this module alone: `^` and the escaped name.

    PEFT matches `(.*\.)?(KEY)$`; the anchor keeps `a.b` from matching `x.a.b`.

    >>> exactly("layers.0.q_proj")
    '^layers\\.0\\.q_proj'
    """
    return "^" + re.escape(module)


def join(module: str, part: str = "") -> str:
    """Return the canonical name of a module's part, or of a whole tensor if `part` is empty.

    >>> join("model.layers.0.self_attn.q_proj", "lora_B.weight")
    'base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight'
    """
    return f"{PREFIX}{module}.{part}" if part else f"{PREFIX}{module}"
