"""A transformer block over packed tokens; parameter names as in the public DINOv2 checkpoints.

T packed tokens, M of them that go on, D width, H heads, E width of a head, D = H * E.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rope import rotate
from .rows import BlockRows


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rows: BlockRows) -> Tensor:
        """For the tokens that attention reads [T, D]: its result for those that ask, [M, D]."""
        if rows.ask is None:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # each [T, H, E]
        else:
            dim, weight, bias = x.shape[-1], self.qkv.weight, self.qkv.bias
            q = F.linear(take(x, rows.ask), weight[:dim], bias[:dim]).unflatten(-1, (self.num_heads, -1))
            k, v = F.linear(x, weight[dim:], bias[dim:]).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        if rows.angles is not None:
            cos, sin = (take(table, rows.attention.read).to(k.dtype) for table in rows.angles)
            k = rotate(k, cos, sin)
            q = rotate(q, take(cos, rows.ask), take(sin, rows.ask))
        return self.proj(rows.attend(q, k, v).flatten(1))


class LayerScale(nn.Module):
    """x * gamma (Touvron et al. 2021, "Going deeper with image transformers", sec. 2)."""

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def start(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        value.fill_(self.init)

    def forward(self, x: Tensor, scale: float | Tensor) -> Tensor:
        # Not times 1.0: inductor takes that out, and then cannot find what to recompute (torch 2.15).
        return x * (self.gamma if isinstance(scale, float) and scale == 1 else self.gamma * scale)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    """w3(silu(gate) * value) (Shazeer 2020)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale, which computes the rows that it is told to."""

    def __init__(self, dim: int, *, num_heads: int, ffn: Literal["mlp", "swiglu"], hidden: int, layerscale: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim, layerscale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = (SwiGlu if ffn == "swiglu" else Mlp)(dim, hidden)
        self.ls2 = LayerScale(dim, layerscale)

    def forward(self, x: Tensor, rows: BlockRows) -> Tensor:
        """The live tokens [M, D] after this block, of all tokens [T, D] before it."""
        branch = rows.attention
        update = self.ls1(self.attn(self.norm1(take(x, branch.read)), rows), branch.scale)
        x = add(take(x, rows.live), update, branch.add)
        branch = rows.feed_forward
        update = self.ls2(self.mlp(self.norm2(take(x, branch.read))), branch.scale)
        return add(x, update, branch.add)


def take(x: Tensor, rows: Tensor | None) -> Tensor:
    """Some rows of x; None: all. Not x[rows], whose backward sorts the rows and is much slower."""
    return x if rows is None else x.index_select(0, rows)


def add(x: Tensor, update: Tensor, rows: Tensor | None) -> Tensor:
    """x with `update` added to some of its rows, each named once; None: to all."""
    return x + update if rows is None else x.index_add(0, rows, update.to(x.dtype))
