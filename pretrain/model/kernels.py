"""Backends of attention over packed tokens beside PyTorch's batched SDPA: one call for all sequences.

T tokens, S sequences, Q queries, H heads, E width of a head.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from runtime.errors import UserError

from .packed import Groups, lengths_of, starts_of


class Varlen:
    """PyTorch's variable-length attention: flash kernels, CUDA and half precision only."""

    name = "varlen"

    def __init__(self, groups: Groups, num_queries: Tensor | None, device: torch.device):
        lengths = lengths_of(groups)
        self.key_starts = starts_of(lengths, device)
        self.query_starts = self.key_starts if num_queries is None else starts_of(num_queries, device)
        self.longest = max(length for _, length in groups)  # of the queries an upper bound, so that nothing waits

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        # Only what PyTorch 2.11 and 2.15 have in common: the arguments that follow differ.
        return varlen_attn(q, k, v, self.query_starts, self.key_starts, self.longest, self.longest)  # pyright: ignore[reportReturnType]


class Xformers:
    """xFormers' block-diagonal attention, the reference's backend; an optional extra, CUDA and half precision only."""

    name = "xformers"

    @staticmethod
    def check() -> None:
        """Raise UserError where xFormers is absent or has no kernel that loads."""
        try:
            from xformers.ops import fmha  # pyright: ignore[reportMissingImports]

            usable = any(operator.is_available() for operator in fmha.ALL_FW_OPS)
        except (ImportError, OSError, AttributeError) as error:
            usable, reason = False, " ".join(str(error).split())[:120]
        else:
            reason = "none of its kernels loads; its wheels fit one version of PyTorch each"
        if not usable:
            raise UserError(
                f"model.attention: xformers cannot be used: {reason}\n"
                f"  install the extra troodon[xformers] for your PyTorch, or leave model.attention at auto"
            )

    def __init__(self, groups: Groups, num_queries: Tensor | None, device: torch.device):
        from xformers.ops.fmha import attn_bias  # pyright: ignore[reportMissingImports]

        keys = lengths_of(groups).tolist()
        queries = keys if num_queries is None else num_queries.tolist()
        self.mask = attn_bias.BlockDiagonalMask.from_seqlens(queries, keys, device=device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

        return memory_efficient_attention(q[None], k[None], v[None], attn_bias=self.mask)[0]


class Flex:
    """FlexAttention with a mask that joins tokens of one sequence; compiled on CUDA, forward only on a CPU."""

    name = "flex"

    def __init__(self, groups: Groups, num_queries: Tensor | None, device: torch.device):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        lengths = lengths_of(groups)
        sequences = torch.arange(len(lengths))
        of_key = sequences.repeat_interleave(lengths).to(device)
        of_query = of_key if num_queries is None else sequences.repeat_interleave(num_queries.cpu()).to(device)

        def same_sequence(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return of_query[query] == of_key[key]

        compiled = _compiled if device.type == "cuda" else lambda function: function
        self.flex = compiled(flex_attention)
        make = compiled(create_block_mask)  # uncompiled, it and attention itself hold a matrix of Q x T
        self.mask = make(same_sequence, None, None, len(of_query), len(of_key), device=device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
            raise UserError("model.attention: flex has no backward pass on a CPU; use auto or sdpa")
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, T, E]
        return self.flex(q, k, v, block_mask=self.mask)[0].transpose(0, 1)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
