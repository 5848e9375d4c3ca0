"""Which verbs share their work by their items, and what has to be known of each to call it somewhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from loratools.errors import InvalidOption
from loratools.options import either
from loratools.parallel.call import Call
from loratools.parallel.plain import from_plain
from loratools.surgery.merge import parts
from loratools.surgery.merge.planned import VERBS as OF_FILES


@dataclass(frozen=True, slots=True)
class Verb:
    """Where a verb's function is, and which of its arguments are `places`: paths or references.

    `by` names what computes what it makes, of `ARITHMETIC`, so that all must have the same; `output` says that it
    writes one.
    """

    module: str
    function: str
    places: tuple[str, ...]
    by: tuple[str, ...] = ()
    output: bool = False

    def load(self) -> Callable[..., Any]:
        """Return the function."""
        function: Callable[..., Any] = getattr(import_module(self.module), self.function)
        return function

    def arithmetic(self) -> str:
        """Return what computes its numbers here, as far as that decides the last bit."""
        return "; ".join(ARITHMETIC[name]() for name in self.by) or "any"


def _torch() -> str:
    import torch

    return f"torch {torch.__version__.partition('+')[0]}, {torch.backends.cpu.get_cpu_capability()}"


def _numpy() -> str:
    """Return NumPy's version and its BLAS, with the kernels that it has chosen for this processor."""
    import numpy as np
    from threadpoolctl import threadpool_info

    known = [each for each in threadpool_info() if each.get("user_api") == "blas"]
    # Torch may bring a BLAS of its own, once it is imported: NumPy's lies in its own folder.
    own = [each for each in known if "numpy" in str(each.get("filepath"))] or known
    blas = {" ".join(str(each.get(key)) for key in ("internal_api", "version", "architecture")) for each in own}
    return ", ".join([f"numpy {np.__version__}", *sorted(blas)])


ARITHMETIC: Mapping[str, Callable[[], str]] = {"torch": _torch, "numpy": _numpy}
"""What computes -> what of it decides the last bit."""

_BOTH = ("numpy", "torch")


VERBS: Mapping[str, Verb] = {
    "extract-svd": Verb(
        "loratools.surgery.extract", "extract", ("base", "tuned", "output"), by=("torch",), output=True
    ),
    "combine": Verb(
        "loratools.surgery.combine", "combine", ("adapters", "output", "initial"), by=_BOTH, output=True
    ),
    "resize": Verb("loratools.surgery.resize", "resize", ("adapter", "output"), by=_BOTH, output=True),
    "hash": Verb("loratools.surgery.hash", "hash_checkpoint", ("checkpoint",)),
    "verify": Verb("loratools.surgery.verify", "verify", ("model", "base", "adapters")),
}  # fmt: skip


FILES: Mapping[str, str] = dict.fromkeys(OF_FILES, parts.__name__)
"""Verbs that share their files: the module whose `gather` makes the output of the parts."""


def verb(name: str) -> Verb:
    """Return a verb by its name; raise `InvalidOption` for one whose work is not shared so.

    Example:
        >>> verb("hash").places
        ('checkpoint',)
    """
    if name not in VERBS:
        raise InvalidOption(f"{name!r} is no verb whose items are shared; expected {either(list(VERBS))}")
    return VERBS[name]


def call_of(name: str, arguments: Mapping[str, Any]) -> Call:
    """Return a call of a verb as a value that travels; raise `InvalidOption` for what is held in memory."""
    return Call.of(name, arguments, verb(name).places)


def run(call: Call, **more: Any) -> Any:
    """Call the verb of a call, with `more` arguments."""
    return verb(call.verb).load()(**{name: from_plain(value) for name, value in call.arguments.items()}, **more)
