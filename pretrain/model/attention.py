"""Attention over packed tokens, where every sequence attends to itself only: one signature, several backends.

T tokens, S sequences of L tokens, Q queries, H heads, E width of a head.
"""

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.errors import UserError

from .kernels import Flex, Varlen, Xformers
from .packed import Groups

Backend = Literal["auto", "sdpa", "varlen", "xformers", "flex"]
HALF_ONLY = ("varlen", "xformers")  # run on CUDA in bfloat16 or float16 alone


class Attend(Protocol):
    """Attention over sequences of known lengths, prepared once and used by many blocks."""

    name: str

    def __init__(self, groups: Groups, num_queries: Tensor | None, device: torch.device):
        """groups: of keys and values. num_queries: int64 [S], of each sequence; None: every token asks."""
        ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(E)) v within each sequence: [Q, H, E] of q [Q, H, E] and k, v [T, H, E]."""
        ...


class Sdpa:
    """One batched call per run of equally long sequences, which multi-crop batches always have; runs anywhere.

    Where some sequences of a run have fewer queries than others, these are padded. In bfloat16 on a CPU the products
    are written out: PyTorch's fused backward is about three times slower there (docs/decisions.md).
    """

    name = "sdpa"

    def __init__(self, groups: Groups, num_queries: Tensor | None, device: torch.device):
        self.groups = groups
        self.sizes = [count * length for count, length in groups]
        if num_queries is None:
            self.num_queries, self.padding = self.sizes, [None] * len(groups)
        else:
            counts = num_queries.split([count for count, _ in groups])
            self.num_queries = [int(each.sum()) for each in counts]
            self.padding = [_padding(each, device) for each in counts]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        # split, not slices: the backward of each slice would fill a gradient of full size.
        parts = zip(q.split(self.num_queries), k.split(self.sizes), v.split(self.sizes), strict=True)
        for (qs, ks, vs), group, padding in zip(parts, self.groups, self.padding, strict=True):
            if padding is None:
                outputs.append(_batched(qs, ks, vs, group[0]))
            else:
                rows, real = padding
                outputs.append(_batched(qs.index_select(0, rows), ks, vs, group[0]).index_select(0, real))
        return torch.cat(outputs)


def _batched(q: Tensor, k: Tensor, v: Tensor, num_sequences: int) -> Tensor:
    """Attention within sequences with equally many queries each, and equally many keys each."""
    q, k, v = (x.unflatten(0, (num_sequences, -1)).transpose(1, 2) for x in (q, k, v))  # [S, H, L, E]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        out = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(0, 1)


def _padding(counts: Tensor, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """For sequences with `counts` [S] rows each: the rows that fill [S, longest], flat, and where the real ones stand.

    None where all are equally long.
    """
    longest = int(counts.max())
    if int(counts.min()) == longest:
        return None
    place = torch.arange(longest, device=counts.device)
    starts = counts.cumsum(0) - counts
    rows = starts[:, None] + torch.minimum(place, counts[:, None] - 1)  # the last row again and again
    real = (place < counts[:, None]).flatten().nonzero()[:, 0]
    return rows.flatten().to(device), real.to(device)


def choose_backend(name: Backend, *, device: torch.device | str, dtype: torch.dtype) -> type[Attend]:
    """The backend for queries of that type on that device; `auto`: varlen on CUDA in half precision, else sdpa.

    Raises UserError for one that cannot run there.
    """
    kind = torch.device(device).type
    half = dtype in (torch.bfloat16, torch.float16)
    if name == "auto":
        return Varlen if kind == "cuda" and half else Sdpa
    if name in HALF_ONLY and not (kind == "cuda" and half):
        raise UserError(
            f"model.attention: {name} needs CUDA and bfloat16 or float16; found {kind} and {str(dtype)[6:]}\n"
            f"  leave it at auto, which chooses by device and precision"
        )
    backend: type[Attend] = {"sdpa": Sdpa, "varlen": Varlen, "xformers": Xformers, "flex": Flex}[name]
    if backend is Xformers:
        Xformers.check()
    return backend
