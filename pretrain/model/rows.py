"""Which rows of the packed tokens each block computes: stochastic depth, and a last block that is read in part only.

T tokens, S sequences of L tokens, M tokens that are read of the last block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Attend
from .noise import Noise, draw_kept
from .packed import Groups, lengths_of


@dataclass(frozen=True)
class Branch:
    """Rows of a residual branch. None stands for all."""

    read: Tensor | None = None  # int64: rows of its input that it reads
    add: Tensor | None = None  # int64: rows of the sum that its result is added to, one by one
    scale: float | Tensor = 1.0  # factor on its result, or float32 [rows, 1]; keeps the expected sum unchanged


@dataclass(frozen=True)
class BlockRows:
    """Rows that one block computes. A plain dataclass: FSDP2's casts of what goes into a module leave it alone."""

    attend: Attend  # over the sequences whose rows `attention` reads
    attention: Branch = Branch()
    ask: Tensor | None = None  # rows, among those that attention reads, whose result is needed
    live: Tensor | None = None  # [M] rows that go on to the sum after attention, and out of the block
    feed_forward: Branch = Branch()
    angles: tuple[Tensor, Tensor] | None = None  # of RoPE: cos and sin, each float32 [T, E], of all packed tokens


def block_rows(
    groups: Groups,
    attend: type[Attend],
    *,
    depth: int,
    device: torch.device,
    drop: float = 0.0,
    noise: Noise | None = None,
    live: Tensor | None = None,
    angles: tuple[Tensor, Tensor] | None = None,
) -> list[BlockRows]:
    """The rows of each of `depth` blocks. live: int64 [M], the rows that are read of the last one; None: all.

    With `noise`, attention and feed-forward part of each block compute a share 1 - drop of the sequences of each group.
    Indices are computed where `live` is: on the CPU nothing waits for the device.
    """
    if noise is None or drop == 0:
        kept_groups, scale = groups, 1.0
        blocks = [BlockRows(attend(groups, None, device), angles=angles)] * depth
        attended = fed = torch.arange(sum(count * length for count, length in groups))
    else:
        rows, kept_groups, scale = _kept_rows(groups, noise, drop=drop, draws=2 * depth)
        shared, factor = attend(kept_groups, None, device), _on(device, scale, rows[0])
        branches = [Branch(read, read, factor) for read in rows.to(device)]
        blocks = [
            BlockRows(shared, attention=attention, feed_forward=feed_forward, angles=angles)
            for attention, feed_forward in zip(branches[::2], branches[1::2], strict=True)
        ]
        attended, fed = rows[-2:]
    if live is None:
        return blocks
    home = live.device
    order = live.argsort()  # queries stand in the order of their sequences
    add = order[torch.isin(live[order], attended.to(home))]
    ask = torch.searchsorted(attended.to(home), live[add])  # where a row stands among those that attention reads
    feed = torch.isin(live, fed.to(home)).nonzero()[:, 0]
    last = BlockRows(
        attend(kept_groups, _queries(ask, kept_groups), device),
        attention=Branch(blocks[-1].attention.read, add.to(device), _on(device, scale, live[add])),
        ask=ask.to(device),
        live=live.to(device),
        feed_forward=Branch(feed.to(device), feed.to(device), _on(device, scale, live[feed])),
        angles=angles,
    )
    return [*blocks[:-1], last]


def _kept_rows(groups: Groups, noise: Noise, *, drop: float, draws: int) -> tuple[Tensor, Groups, float | Tensor]:
    """Rows of the kept sequences [draws, T'], their groups, and the factor S / kept sequences, of each of T rows."""
    rows, kept_groups, start = [], [], 0
    for group, (count, length) in enumerate(groups):
        kept = draw_kept(noise, group=group, num_sequences=count, drop=drop, draws=draws)
        rows.append((start + kept[:, :, None] * length + torch.arange(length)).flatten(1))
        kept_groups.append((kept.shape[1], length))
        start += count * length
    scales = [count / kept for (count, _), (kept, _) in zip(groups, kept_groups, strict=True)]
    if len(set(scales)) == 1:
        scale = scales[0]
    else:
        scale = torch.tensor(scales).repeat_interleave(torch.tensor([count * length for count, length in groups]))
    return torch.cat(rows, dim=1), tuple(kept_groups), scale


def _on(device: torch.device, scale: float | Tensor, rows: Tensor) -> float | Tensor:
    """The factors of `rows`, as a column on the device; one number where all are equal."""
    return scale[rows.cpu(), None].to(device) if isinstance(scale, Tensor) else scale


def _queries(ask: Tensor, groups: Groups) -> Tensor:
    """How many of the rows `ask` lie in each sequence: int64 [S]."""
    ends = lengths_of(groups).cumsum(0).to(ask.device)
    return torch.bincount(torch.searchsorted(ends, ask, right=True), minlength=len(ends))


def live_rows(groups: Groups, wanted: Sequence[Tensor | None], *, first_patch: int) -> tuple[Tensor, list[int]]:
    """Rows of all class tokens, then of the wanted patches group by group; and how many patches each group has.

    wanted: per group bool [S, N] over its patches, which start at token `first_patch`; None: none of them.
    """
    cls, patches, start = [], [], 0
    home = next((mask.device for mask in wanted if mask is not None), None)
    for (count, length), mask in zip(groups, wanted, strict=True):
        firsts = start + torch.arange(count, device=home) * length
        cls.append(firsts)
        if mask is None:
            patches.append(firsts[:0])
        else:
            sequence, patch = mask.nonzero().unbind(1)
            patches.append(firsts[sequence] + first_patch + patch)
        start += count * length
    return torch.cat(cls + patches), [len(each) for each in patches]
