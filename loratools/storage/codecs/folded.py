"""Quantized models whose weights are those of the model in another basis: scales are folded into the op before.

AWQ and SmoothQuant divide a norm by scales s and multiply the columns of the weights behind it by them; between two
linear layers they divide rows of the first. The model computes the same, and no weight is what it was: to an adapter
that was trained on the model itself, this is another one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.errors import BadFile

_RECIPE, _LONGEST = "recipe.yaml", 1 << 20
_MODIFIERS = r"\b(AWQ|SmoothQuant|AutoSmoothQuant|LogarithmicEqualization)Modifier\b"
_ALGORITHMS = r"AWQ|(?:^|_)SQ(?:_|$)|SMOOTHQUANT"


def folded(statement: Mapping[str, Any], root: Path) -> str | None:
    """Return why scales may be folded into a model's norms, as half a sentence; None where nothing says so.

    `statement` is what config.json says of the quantization, `root` the model's folder. Raises `BadFile` for a
    recipe.yaml that is too large to be one.
    """
    if str(statement.get("quant_method") or "").lower() == "awq" and not statement.get("autoround_version"):
        return "AWQ divides norms by scales, and multiplies the weights behind them (config.json: quant_method awq)"
    algorithm = str(statement.get("quant_algo") or "").upper()
    if algorithm and re.search(_ALGORITHMS, algorithm):
        return f"{algorithm} moves scales between norms and the weights behind them (config.json: quant_algo)"
    if modifier := _of_recipe(root / _RECIPE):
        return f"{modifier} moves scales between norms and the weights behind them ({_RECIPE})"
    return None


def _of_recipe(path: Path) -> str | None:
    """Return what a recipe of llm-compressor has that folds scales; its config.json says nothing of it."""
    try:
        with path.open("rb") as file:
            raw = file.read(_LONGEST + 1)
    except OSError:  # no recipe
        return None
    if len(raw) > _LONGEST:
        raise BadFile(f"{path}: larger than {_LONGEST} bytes, and no recipe of llm-compressor")
    lines = (line.partition("#")[0] for line in raw.decode(errors="replace").splitlines())
    found = next((match for line in lines if (match := re.search(_MODIFIERS, line))), None)
    return found and found.group(1)
