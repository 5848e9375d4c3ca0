"""The options of a merge, one frozen value that is valid once built; library and command line share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.options import CheckBase, Device, Options, Retention, Rounding, Tied
from loratools.storage import dtypes
from loratools.storage.sizes import parse_size

if TYPE_CHECKING:
    import torch

__all__ = ["Device", "MergeOptions", "Retention", "Rounding", "Tied"]


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """Every option of a merge that is not an input. Building one raises `InvalidOption` with all that is wrong.

    `dtype`           float dtype of the output, in any spelling (`bf16`, `BF16`, `bfloat16`, `torch.bfloat16`); held as
                      the name in a safetensors header, `BF16`. None: each tensor keeps the base's dtype
    `max_shard_size`  most bytes of tensor data in a file, as a number or a text such as `5GB`; held as a number. None:
                      the output has the base's files
    `tied`            what a change of a tied embedding or head does: `error`, `untie` the head, or change `both`
    `model_type`      what the base is (`gpt2`, `gpt_oss`, …), for a base whose config.json does not say it. None: what
                      config.json says
    `check_base`      what happens where the base is not the recorded one: `strict` raises `WrongBase`, `warn` reports
                      it, `off` compares nothing
    `retention`       on which tiles the surviving part of the change is measured: a `sample`, `full`, or `off`
    `rounding`        `nearest`, ties to even; or `stochastic`, which rounds BF16 and F16 up or down at random
    `seed`            a whole number: it chooses the sampled tiles, and the random numbers of stochastic rounding
    `keep_residual`   whether to write what rounding destroys beside the model, so that `unmerge` restores every bit
    `resume`          whether an interruption leaves the complete files, and the same call goes on from them
    `device`          where the arithmetic is done, `cpu` or `cuda`
    `threads`         threads to work with, at least 1; no byte depends on it. None: one per core, at most 8
    `force`           whether to replace an output that exists
    """

    dtype: dtypes.FloatName | torch.dtype | None = None
    max_shard_size: int | str | None = None
    tied: Tied = "error"
    model_type: str | None = None
    check_base: CheckBase = "strict"
    retention: Retention = "sample"
    rounding: Rounding = "nearest"
    seed: int = 0
    keep_residual: bool = False
    resume: bool = False
    device: Device = "cpu"
    threads: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        checked = Options()
        object.__setattr__(self, "dtype", checked.parsed("dtype", dtypes.parse_float, self.dtype))
        object.__setattr__(self, "max_shard_size", checked.parsed("max_shard_size", parse_size, self.max_shard_size))
        checked.word("tied", self.tied, Tied)
        if not isinstance(self.model_type, str | None):
            checked.problems.append(f"model_type is {self.model_type!r}; it can be a name such as 'gpt2', or None")
        checked.word("check_base", self.check_base, CheckBase)
        checked.word("retention", self.retention, Retention)
        checked.word("rounding", self.rounding, Rounding)
        checked.number("seed", self.seed)
        checked.flag("keep_residual", self.keep_residual)
        checked.flag("resume", self.resume)
        checked.word("device", self.device, Device)
        checked.number("threads", self.threads, least=1, optional=True)
        checked.flag("force", self.force)
        checked.done()

    @property
    def output_dtype(self) -> str | None:
        """The safetensors name of `dtype`; None where each tensor keeps its own."""
        return None if self.dtype is None else str(self.dtype)

    @property
    def shard_bytes(self) -> int | None:
        """`max_shard_size` as a number of bytes."""
        return None if self.max_shard_size is None else int(self.max_shard_size)
