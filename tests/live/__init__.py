"""Models for the tests of the live half, without transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loratools.live import Lora


class Net(nn.Module):
    """An embedding, linear layers in blocks, a convolution, a norm, and a head: (rows, tokens) -> (rows, tokens, 5)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width, bias=False)})
            for _ in range(2)
        )
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        x = self.norm(x + self.conv(x.transpose(1, 2)).transpose(1, 2))
        return self.head(x)


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> Net:
    """Return a net of random weights, in evaluation."""
    torch.manual_seed(seed)
    return Net().to(dtype).eval()


def ids(rows: int = 3, tokens: int = 6) -> Tensor:
    """Return token numbers."""
    return torch.randint(0, 11, (rows, tokens), generator=torch.Generator().manual_seed(1))


def trained(lora: Lora, seed: int = 5) -> Lora:
    """Let every factor of every adapter be random, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, child, _, _ in lora.children():
            for tensor in (*child.parameters(), *child.buffers()):
                if not tensor.is_floating_point():
                    continue
                if tensor.dim() > 1 or tensor.numel() > 20:
                    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.3)
                else:
                    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                    tensor.mul_((1 + 0.2 * noise).to(tensor.dtype))
    return lora
