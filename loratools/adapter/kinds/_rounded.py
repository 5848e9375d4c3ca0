"""Numbers in the dtype of a base that other numbers in a file show, for PEFT widens them all to float32."""

from __future__ import annotations

from loratools.adapter.kinds import Tensor


def as_in(sample: Tensor, numbers: Tensor) -> Tensor:
    """Return numbers rounded to bfloat16 or float16, where all of the sample are numbers of it, in their own dtype.

    The sample is what PEFT rounded to the base's dtype, as it did with these numbers.
    """
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(sample.to(dtype).to(sample.dtype), sample):
            return numbers.to(dtype).to(numbers.dtype)
    return numbers
