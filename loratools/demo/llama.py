"""A Llama forward pass on bytes, in plain torch: enough to measure what an adapter does to a model.

The model is the one of Touvron et al., "LLaMA" (2023): RMSNorm, rotary positions, grouped-query attention
(Ainslie et al., 2023) and SwiGLU. Names and conventions are those of transformers' LlamaForCausalLM, whose
logits it reproduces; an adapter is applied unmerged, as PEFT applies it (Hu et al., 2021).
Token ids are the bytes of the text. All arithmetic is in float32, whatever the weights are stored in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loratools.storage.checkpoint import Checkpoint

Weights = Mapping[str, Tensor]  # tensor name -> W (out, in), as in the checkpoint
Factors = Mapping[str, tuple[Tensor, Tensor, float]]  # module path -> (A (r, in), B (out, r), scaling s)

Linear = Callable[[str, Tensor], Tensor]  # module path, x -> y

CONTEXT = 256  # bytes the demo's model was trained to look back


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The numbers of config.json that the weights alone do not tell."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LlamaShape:
        """Read the shape from a parsed config.json, of transformers 4 or 5; raise KeyError if a field is missing."""
        rope = config.get("rope_parameters") or config  # transformers 5 nests rope_theta, 4 does not
        return cls(
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=rope["rope_theta"],
        )


def forward(weights: Weights, shape: LlamaShape, ids: Tensor, adapter: Factors | None = None) -> Tensor:
    """Compute the logits (batch, time, vocabulary) of token ids (batch, time).

    Every linear layer is `x·Wᵀ`, plus `s·(x·Aᵀ)·Bᵀ` where `adapter` has its module path.
    """
    factors = adapter or {}

    def linear(module: str, x: Tensor) -> Tensor:
        y = x @ weights[f"{module}.weight"].float().T
        if module in factors:
            A, B, scaling = factors[module]
            y = y + scaling * ((x @ A.float().T) @ B.float().T)
        return y

    x = F.embedding(ids, weights["model.embed_tokens.weight"].float())
    # With tied embeddings the checkpoint has no lm_head: the embedding serves twice.
    head = "lm_head" if "lm_head.weight" in weights else "model.embed_tokens"
    return linear(head, _blocks(shape, x, linear, lambda module: weights[f"{module}.weight"].float()))


class Llama(nn.Module):
    """The same model as a module, to train adapters on: its parameters have the checkpoint's names, in float32.

    Example:
        >>> from loratools.demo import data_folder
        >>> Llama.open(data_folder() / "base")(torch.tensor([[65, 66]])).shape
        torch.Size([1, 2, 256])
    """

    def __init__(self, weights: Weights, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.shape, self.config = LlamaShape.from_config(config), dict(config)
        for name, tensor in weights.items():
            *path, last = name.removesuffix(".weight").split(".")
            parent: nn.Module = self
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, _module(last, tensor.float()))

    @classmethod
    def open(cls, folder: Path) -> Llama:
        """Load a checkpoint from a folder."""
        checkpoint = Checkpoint.open(folder)
        return cls({name: checkpoint.read(name) for name in checkpoint.specs}, checkpoint.config)

    def forward(self, ids: Tensor) -> Tensor:
        """Compute the logits (batch, time, vocabulary) of token ids (batch, time)."""

        def linear(module: str, x: Tensor) -> Tensor:
            y: Tensor = self.get_submodule(module)(x)
            return y

        embed = self.get_submodule("model.embed_tokens")
        x = _blocks(self.shape, embed(ids), linear, lambda module: self.get_parameter(f"{module}.weight"))
        return linear("lm_head", x) if "lm_head" in self._modules else F.linear(x, embed.weight)  # type: ignore[arg-type]


def _module(name: str, weight: Tensor) -> nn.Module:
    made: nn.Module
    if weight.dim() == 1:
        made = nn.Module()
        made.weight = nn.Parameter(weight)
    elif name == "embed_tokens":
        made = nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight)
    else:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        made.weight = nn.Parameter(weight)
    return made


def _blocks(shape: LlamaShape, x: Tensor, linear: Linear, gain: Callable[[str], Tensor]) -> Tensor:
    """Return what the head reads, from embedded tokens (batch, time, width)."""

    def norm(module: str, x: Tensor) -> Tensor:
        return gain(module) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + shape.norm_eps))

    cos, sin = _rotations(shape, x.shape[1])
    for layer in range(shape.layers):
        block = f"model.layers.{layer}"
        h = norm(f"{block}.input_layernorm", x)
        q, k, v = (_split(linear(f"{block}.self_attn.{p}_proj", h), shape.head_dim) for p in "qkv")
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        shared = shape.heads // shape.kv_heads  # query heads that share one key and value head
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(f"{block}.self_attn.o_proj", attended.transpose(1, 2).flatten(2))
        h = norm(f"{block}.post_attention_layernorm", x)
        gated = F.silu(linear(f"{block}.mlp.gate_proj", h)) * linear(f"{block}.mlp.up_proj", h)
        x = x + linear(f"{block}.mlp.down_proj", gated)
    return norm("model.norm", x)


class Adam:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) with β = 0.9 and 0.999, for groups of parameters with an `lr` each.

    `torch.optim` would import torch's compiler, which takes seconds and leaves a folder among the temporary files.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.states = [
            (p, float(group["lr"]), torch.zeros_like(p), torch.zeros_like(p))
            for group in groups
            for p in group["params"]
        ]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """Change every parameter by its gradient, and forget the gradient."""
        self.steps += 1
        first, second = (1 - beta**self.steps for beta in (0.9, 0.999))
        for parameter, rate, mean, square in self.states:
            if parameter.grad is None:
                continue
            mean.lerp_(parameter.grad, 0.1)
            square.mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
            parameter.addcdiv_(mean, (square / second).sqrt_().add_(1e-8), value=-rate / first)
            parameter.grad = None


def held_out_loss(weights: Weights, shape: LlamaShape, text: bytes, adapter: Factors | None = None) -> float:
    """Measure the mean cross-entropy of `text` in nats per byte: `−1/n · Σ ln p(byte | the bytes before it)`.

    The text is read in windows of CONTEXT bytes; each byte but the very first is predicted once, from those
    before it in its window. Raises ValueError on a text of fewer than two bytes.
    """
    if len(text) < 2:
        raise ValueError(f"a loss needs a text of at least two bytes, this one has {len(text)}")
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    weights = _once(weights)
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, CONTEXT):
            window = ids[start : start + CONTEXT + 1]
            logits = forward(weights, shape, window[None, :-1], adapter)[0]
            total += F.cross_entropy(logits.double(), window[1:], reduction="sum").item()
    return total / (len(ids) - 1)


def generate(
    weights: Weights, shape: LlamaShape, prompt: bytes, count: int, adapter: Factors | None = None, *,
    temperature: float = 0.0, seed: int = 0,
) -> bytes:  # fmt: skip
    """Continue `prompt` by `count` bytes: the likeliest each time, or drawn from softmax(logits / temperature).

    Raises ValueError on an empty prompt.
    """
    if not prompt:
        raise ValueError("generation needs a prompt of at least one byte")
    generator = torch.Generator().manual_seed(seed)
    text, weights = bytearray(prompt), _once(weights)
    with torch.inference_mode():
        for _ in range(count):
            logits = forward(weights, shape, torch.tensor([list(text[-CONTEXT:])]), adapter)[0, -1]
            if temperature > 0:
                text.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)))
            else:
                text.append(int(logits.argmax()))
    return bytes(text[len(prompt) :])


def _once(weights: Weights) -> Weights:
    """Make float32 of all weights now, for many passes that each would."""
    return {name: weight.float() for name, weight in weights.items()}


def _split(x: Tensor, head_dim: int) -> Tensor:
    """(batch, time, heads·head_dim) -> (batch, heads, time, head_dim)"""
    return x.view(*x.shape[:-1], -1, head_dim).transpose(1, 2)


def _rotations(shape: LlamaShape, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (time, head_dim) of rotary positions: angle `t·θ^(−2i/head_dim)` (Su et al., 2021)."""
    powers = torch.arange(0, shape.head_dim, 2) / shape.head_dim
    angles = torch.arange(length)[:, None] * torch.exp(-math.log(shape.rope_theta) * powers)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim/2), as transformers stores them, not neighbours (2i, 2i + 1)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
