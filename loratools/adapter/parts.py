"""The names that PEFT gives the tensors of a module; all kinds and dialects use them; what factors' names end in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

A, B, BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
A_EMBEDDING, B_EMBEDDING = "lora_embedding_A", "lora_embedding_B"
MAGNITUDE = "lora_magnitude_vector"

_FACTOR = (
    r"(?:.*[._])?(?:lora[12]?[._](?:[AaBb]|down|up|mid)|lora_embedding_[AB]|lora_linear_layer[._](?:down|up)"
    r"|hada_(?:w[12](?:_[ab])?|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|oft_(?:blocks|diag|[rR])|boft_[Rs])(?:[._]\w+){0,2}"
)
_BESIDE = r"(?:.*[._])?(?:alpha|dora_scale|(?:lora_magnitude_vector|magnitude)(?:\.\w+)*|diff(?:_b)?|network_\w+)"

_IN_FACTORS = ("lora", "hada_", "lokr_", "oft_")
_IN_BESIDE = ("alpha", "dora_scale", "magnitude", "diff", "network_")
"""One of these is in every name that matches: most names have none, and a look for a text is quick."""

_EMBEDDINGS = frozenset({"emb_params", "clip_l", "clip_g", "t5xxl"})
_WORD = r"<[^<>]+>"


def factors_of(names: Iterable[str]) -> list[str]:
    """Return the names that end as those of an adapter's factors do, where most of these do; else [].

    A model that has factors beside its weights is a model. Parts that are no factors, such as `alpha`, tell nothing.
    """
    beside, factor = _patterns()
    telling = [name for name in names if not (any(part in name for part in _IN_BESIDE) and beside.fullmatch(name))]
    factors = [name for name in telling if any(part in name for part in _IN_FACTORS) and factor.fullmatch(name)]
    return factors if 2 * len(factors) > len(telling) else []


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    return re.compile(_BESIDE), re.compile(_FACTOR)


def is_textual_inversion(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell by the names and shapes of a file's tensors whether they are the vectors of a new word for the prompt.

    `emb_params` of sd-scripts and web UIs, `clip_l` and `clip_g` of those of SDXL and later, `<word>` of diffusers.
    """
    named = bool(shapes) and (
        all(name[:1] == "<" and re.fullmatch(_WORD, name) for name in shapes) or shapes.keys() <= _EMBEDDINGS
    )
    return named and all(len(shape) in (1, 2) for shape in shapes.values())
