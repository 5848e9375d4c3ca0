"""The options of a merge, one frozen value that is valid once built; library and command line share it."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

from loratools.options import CheckBase, Options, Quantized, Retention, Rounding, Tied, TrainedOn
from loratools.storage import dtypes
from loratools.storage.sizes import parse_size
from loratools.storage.sources import Location

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """Every option of a merge that is not an input: each field is the parameter of `merge` of that name.

    Building one raises `InvalidOption` with all that is wrong. Then `dtype` is the name in a safetensors header
    (`BF16`), in whatever spelling it came, and `max_shard_size` is a number.
    """

    dtype: dtypes.FloatName | torch.dtype | None = None
    max_shard_size: int | str | None = None
    tied: Tied = "error"
    model_type: str | None = None
    check_base: CheckBase = "strict"
    retention: Retention = "sample"
    rounding: Rounding = "nearest"
    seed: int = 0
    quantized: Quantized = "dequantize"
    original: Location | None = None
    trained_on: TrainedOn | None = None
    keep_loss: int | None = None
    keep_residual: bool = False
    resume: bool = False
    device: str | torch.device = "cpu"
    threads: int | None = None
    force: bool = False
    durable: bool = False

    def __post_init__(self) -> None:
        checked = Options()
        object.__setattr__(self, "dtype", checked.parsed("dtype", dtypes.parse_float, self.dtype))
        object.__setattr__(self, "max_shard_size", checked.parsed("max_shard_size", parse_size, self.max_shard_size))
        checked.word("tied", self.tied, Tied)
        if not isinstance(self.model_type, str | None):
            checked.problems.append(f"model_type is {self.model_type!r}; it can be a name such as 'gpt2', or None")
        checked.word("check_base", self.check_base, CheckBase).word("retention", self.retention, Retention)
        checked.word("rounding", self.rounding, Rounding).number("seed", self.seed)
        checked.word("quantized", self.quantized, Quantized)
        if not isinstance(self.original, str | PathLike | None) or self.original == "":
            checked.problems.append(f"original is {self.original!r}; it can be a path, a reference, or None")
        if self.trained_on is not None:
            checked.word("trained_on", self.trained_on, TrainedOn)
        checked.number("keep_loss", self.keep_loss, least=1, optional=True)
        if self.keep_loss and (self.quantized != "requantize" or self.resume):
            why = "resume does not keep it" if self.resume else "only what becomes codes again loses (requantize)"
            checked.problems.append(f"keep_loss is {self.keep_loss!r}; {why}")
        checked.flag("keep_residual", self.keep_residual).flag("resume", self.resume)
        object.__setattr__(self, "device", checked.device(self.device))
        checked.threads(self.threads).flag("force", self.force)
        checked.flag("durable", self.durable).done()

    @property
    def computes_on(self) -> str:
        """`device` by its name."""
        return str(self.device)

    @property
    def output_dtype(self) -> str | None:
        """The safetensors name of `dtype`; None where each tensor keeps its own."""
        return None if self.dtype is None else str(self.dtype)

    @property
    def shard_bytes(self) -> int | None:
        """`max_shard_size` as a number of bytes."""
        return None if self.max_shard_size is None else int(self.max_shard_size)
