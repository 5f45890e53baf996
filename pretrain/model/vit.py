"""Vision transformer with the parameter names and numerics of the public DINOv2 checkpoints.

B images, N patches, R registers, D width, T packed tokens, S sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention
from .init import init_linear
from .packed import PackedTokens, pack, unpack


@dataclass(frozen=True)
class Shape:
    """Everything that decides the parameters of a `VisionTransformer`; written into the card of an export."""

    dim: int  # width of a token
    depth: int  # number of blocks
    num_heads: int
    patch_size: int  # pixels
    image_size: int  # pixels; the position table has (image_size / patch_size)^2 entries
    num_registers: int  # register tokens (Darcet et al. 2023)
    ffn: Literal["mlp", "swiglu"]
    mlp_ratio: float  # hidden width of the MLP / D


class Features(NamedTuple):
    """What the model says of B images, after the last norm."""

    cls: Tensor  # [B, D]
    registers: Tensor  # [B, R, D]
    patches: Tensor  # [B, N, D], row by row


class LayerScale(nn.Module):
    """x * gamma (Touvron et al. 2021, "Going deeper with image transformers", sec. 2)."""

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    """w3(silu(gate) * value) (Shazeer 2020); hidden width 2/3 of the MLP's, rounded up to a multiple of 8."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale and stochastic depth over packed tokens."""

    def __init__(self, shape: Shape, *, drop_path: float, layerscale: float):
        super().__init__()
        hidden = int(shape.dim * shape.mlp_ratio)
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(shape.dim, eps=1e-6)
        self.attn = Attention(shape.dim, shape.num_heads)
        self.ls1 = LayerScale(shape.dim, layerscale)
        self.norm2 = nn.LayerNorm(shape.dim, eps=1e-6)
        self.mlp = (SwiGlu if shape.ffn == "swiglu" else Mlp)(shape.dim, hidden)
        self.ls2 = LayerScale(shape.dim, layerscale)

    def forward(self, tokens: PackedTokens) -> PackedTokens:
        tokens = self._residual(tokens, self._attention)
        return self._residual(tokens, self._feed_forward)

    def _attention(self, tokens: PackedTokens) -> Tensor:
        return self.ls1(self.attn(tokens._replace(values=self.norm1(tokens.values))))

    def _feed_forward(self, tokens: PackedTokens) -> Tensor:
        return self.ls2(self.mlp(self.norm2(tokens.values)))

    def _residual(self, tokens: PackedTokens, branch) -> PackedTokens:
        if not (self.training and self.drop_path):
            return tokens._replace(values=tokens.values + branch(tokens))
        kept, rows, scale = keep_sequences(tokens, self.drop_path)
        update = branch(kept) * scale[:, None]
        return tokens._replace(values=tokens.values.index_add(0, rows, update.to(tokens.values.dtype)))


def keep_sequences(tokens: PackedTokens, drop: float) -> tuple[PackedTokens, Tensor, Tensor]:
    """A random (1 - drop) share of the sequences of each group, for stochastic depth that computes only those.

    Returns the kept tokens [T', D], their rows in `tokens` [T'], and the factor [T'] that keeps the expected
    residual unchanged: sequences / kept sequences of the group (DINOv2 sec. 5, "Efficient stochastic depth").
    """
    rows, scales, groups, start = [], [], [], 0
    device = tokens.values.device
    for count, length in tokens.groups:
        num_kept = max(1, round(count * (1 - drop)))
        chosen = torch.randperm(count)[:num_kept].sort().values.to(device)
        rows.append((start + chosen[:, None] * length + torch.arange(length, device=device)).flatten())
        scales.append(torch.full((num_kept * length,), count / num_kept, device=device))
        groups.append((num_kept, length))
        start += count * length
    index = torch.cat(rows)
    return PackedTokens(tokens.values[index], tuple(groups)), index, torch.cat(scales)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, N, D]


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al. 2021) with registers; takes images of several sizes in one packed pass."""

    def __init__(self, shape: Shape, *, drop_path: float = 0.0, layerscale: float = 1e-5):
        super().__init__()
        self.shape = shape
        side = shape.image_size // shape.patch_size
        self.patch_embed = PatchEmbed(shape.patch_size, shape.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, shape.dim))
        registers = torch.zeros(1, shape.num_registers, shape.dim)
        self.register_tokens = nn.Parameter(registers) if shape.num_registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, shape.dim))
        self.blocks = nn.ModuleList(
            Block(shape, drop_path=drop_path, layerscale=layerscale) for _ in range(shape.depth)
        )
        self.norm = nn.LayerNorm(shape.dim, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        init_linear(self, "reference")

    def forward(self, images: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> list[Features]:
        """One `Features` per batch of images [B_i, 3, H_i, W_i], all computed in one packed pass.

        A mask is bool [B_i, N_i]; masked patches are replaced by the mask token before the positions are added.
        """
        masks = masks or [None] * len(images)
        tokens = pack([self._tokens(x, mask) for x, mask in zip(images, masks, strict=True)])
        for block in self.blocks:
            tokens = block(tokens)
        first_patch = 1 + self.shape.num_registers
        return [
            Features(x[:, 0], x[:, 1:first_patch], x[:, first_patch:])
            for x in unpack(tokens._replace(values=self.norm(tokens.values)))
        ]

    def forward_features(self, images: Tensor) -> Features:
        """Features of one batch of images [B, 3, H, W]; H and W are multiples of the patch size."""
        return self([images])[0]

    def _tokens(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """[B, 1 + R + N, D]: class token, registers, patches; positions go to class token and patches."""
        num, size = images.shape[0], self.shape.patch_size
        height, width = images.shape[-2] // size, images.shape[-1] // size
        if images.shape[-2] % size or images.shape[-1] % size:
            raise ValueError(f"images of {images.shape[-2]}x{images.shape[-1]} do not divide into patches of {size}")
        x = self.patch_embed(images)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        cls_position, positions = self.positions(height, width)
        cls = (self.cls_token + cls_position).expand(num, -1, -1).to(x.dtype)
        registers = [] if self.register_tokens is None else [self.register_tokens.expand(num, -1, -1).to(x.dtype)]
        return torch.cat([cls, *registers, x + positions.to(x.dtype)], dim=1)

    def positions(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Positions of the class token [1, 1, D] and of a grid of patches [1, height * width, D].

        Resized by size with antialiasing, not by a scale factor with an offset as DINOv2's models without registers
        do: so timm and Hugging Face give the same features at every size (docs/paper.md).
        """
        cls, table = self.pos_embed.split([1, self.pos_embed.shape[1] - 1], dim=1)
        side = self.shape.image_size // self.shape.patch_size
        if (height, width) == (side, side):
            return cls, table
        grid = table.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", antialias=True)
        return cls, grid.flatten(2).transpose(1, 2).to(table.dtype)
