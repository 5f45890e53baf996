"""Self-attention over packed tokens: every sequence attends to itself only.

T tokens, S sequences of L tokens, H heads, E width of a head, D = H * E.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .packed import PackedTokens

Groups = tuple[tuple[int, int], ...]


def attend(q: Tensor, k: Tensor, v: Tensor, groups: Groups) -> Tensor:
    """softmax(q k^T / sqrt(E)) v within each sequence; q, k, v and the result are [T, H, E].

    One batched call per run of equally long sequences, which multi-crop batches always have. In bfloat16 on a CPU
    the products are written out: PyTorch's fused backward is about three times slower there (docs/decisions.md).
    """
    sizes = [count * length for count, length in groups]
    fused = not (q.device.type == "cpu" and q.dtype == torch.bfloat16)
    outputs = []
    # split, not slices: the backward of each slice would fill a gradient of full size.
    for qs, ks, vs, group in zip(q.split(sizes), k.split(sizes), v.split(sizes), groups, strict=True):
        qh, kh, vh = (x.unflatten(0, group).transpose(1, 2) for x in (qs, ks, vs))  # [S, H, L, E]
        if fused:
            out = F.scaled_dot_product_attention(qh, kh, vh)
        else:
            out = ((qh * qh.shape[-1] ** -0.5) @ kh.transpose(-2, -1)).softmax(dim=-1) @ vh
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [S * L, H, E]
    return torch.cat(outputs)


class Attention(nn.Module):
    """Multi-head self-attention; parameter names as in the public DINOv2 checkpoints."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: PackedTokens) -> Tensor:
        """[T, D] from tokens [T, D]."""
        qkv = self.qkv(tokens.values).unflatten(-1, (3, self.num_heads, -1))  # [T, 3, H, E]
        q, k, v = qkv.unbind(1)
        return self.proj(attend(q, k, v, tokens.groups).flatten(1))
