"""Pictures of what a model sees. B images, N patches of an h x w grid, D width."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from runtime.errors import UserError

from .data import Images
from .features import decoded
from .models import Extractor

CELL = 160  # least side of one picture in pixels; small views are enlarged by a whole number
GAP = 6  # pixels


def patch_pca(
    extractor: Extractor,
    images: Images,
    *,
    foreground: bool = False,
    columns: int = 4,
    batch_size: int = 16,
    workers: int = 2,
) -> Image.Image:
    """Images beside the first three principal components of their patch tokens as red, green and blue (RGBA picture).

    One basis for all images, so that one colour means one thing. `foreground` first drops the patches on the side of
    the first component that touches the border most and takes the basis of the rest (DINOv2 fig. 1). Images that do
    not decode are left out. Raises UserError for a model without patch tokens, and when no image decodes.
    """
    views, tokens = [], []
    for batch in decoded(extractor, images, batch_size=batch_size, workers=workers):
        good = [view for _, view in batch if isinstance(view, Tensor)]
        if good:
            found = extractor.patches(torch.stack(good))
            if found is None:
                raise UserError(f"pca: {extractor.name} has no patch tokens; give a vision transformer")
            views += good
            tokens.append(found)
    if not views:
        raise UserError(f"pca: none of {len(images)} images decodes")
    maps = pca_colours(torch.cat(tokens), foreground=foreground)  # [B, h, w, 3]
    return _sheet([_photo(view, extractor) for view in views], [Image.fromarray(colours) for colours in maps], columns)


def pca_colours(tokens: Tensor, *, foreground: bool = False) -> np.ndarray:
    """Patch tokens [B, N, D] of square grids -> uint8 [B, h, w, 3]; dropped patches are black."""
    num, num_patches, dim = tokens.shape
    side = round(num_patches**0.5)
    flat = tokens.reshape(-1, dim).double()
    kept = torch.ones(len(flat), dtype=torch.bool)
    if foreground:
        kept = foreground_mask(principal_components(flat, 1).reshape(num, side, side)).flatten()
    colours = torch.zeros(len(flat), 3, dtype=torch.float64)
    if kept.any():
        colours[kept] = _to_unit(principal_components(flat[kept], 3))
    return (colours * 255).round().to(torch.uint8).reshape(num, side, side, 3).numpy()


def principal_components(rows: Tensor, count: int) -> Tensor:
    """The first `count` principal components [M, count] of rows [M, D]; zero where D is smaller.

    The sign of a component is free: here its loading of largest size is positive, so that pictures repeat.
    """
    centred = rows - rows.mean(dim=0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :count]  # [D, count], largest first
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    components = centred @ (axes * largest.sign())
    return torch.nn.functional.pad(components, (0, count - components.shape[1]))


def foreground_mask(component: Tensor) -> Tensor:
    """Which patches lie on the side of the first component [B, h, w] that has the smaller share of the border: bool.

    DINOv2 keeps the positive side by hand; its sign is free, and objects tend to stand away from the border.
    """
    border = torch.ones_like(component, dtype=torch.bool)
    border[:, 1:-1, 1:-1] = False
    positive = component > 0
    return positive if positive[border].double().mean() <= 0.5 else ~positive


def _to_unit(components: Tensor) -> Tensor:
    """Each column scaled from its 2nd..98th percentile to 0..1."""
    low, high = np.quantile(components.numpy(), [0.02, 0.98], axis=0)
    spread = np.maximum(high - low, np.finfo(np.float64).tiny)
    return torch.from_numpy((components.numpy() - low) / spread).clamp(0, 1)


def _photo(view: Tensor, extractor: Extractor) -> Image.Image:
    """A normalised view [3, H, W] as the picture it was."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (extractor.mean, extractor.std))
    pixels = ((view * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _sheet(photos: Sequence[Image.Image], maps: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pairs (photo, map) in rows of `columns` pairs on a transparent ground."""
    side = photos[0].width * -(-CELL // photos[0].width)
    columns = min(columns, len(photos))
    rows = -(-len(photos) // columns)
    pair = 2 * side + 2 * GAP
    sheet = Image.new("RGBA", (columns * pair - GAP, rows * (side + GAP) - GAP))
    for i, (photo, colours) in enumerate(zip(photos, maps, strict=True)):
        left, top = (i % columns) * pair, (i // columns) * (side + GAP)
        sheet.paste(photo.resize((side, side), Image.Resampling.BICUBIC), (left, top))
        sheet.paste(colours.resize((side, side), Image.Resampling.NEAREST), (left + side + GAP // 2, top))
    return sheet
