"""What people do to pictures before they put them on the web again, made at random and in batches.

Crop, mirror, slight rotation and perspective, other aspect, border, inset into another picture, colour changes, grey,
captions, bars, stickers, watermarks, blur, sharpening, noise, JPEG; several at once (the edits of SSCD, Pizzi et al.
2022, sec. 4.1, in own form). Every draw is named by (seed, step, sample), so any batch can be made again at any time.

B images, M pixels per side of the sources, S per side of the results.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from runtime.seeding import generator, torch_generator

NUM_DRAWS = 80  # uniform numbers that the edits of one picture use at most
NUM_OVERLAYS = 1024
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Strength:
    """How far edits go. Two views of one picture must keep something in common, so only one of them is strong."""

    crop: float  # smallest side of a crop, as a share of the picture's
    inset: float  # chance to become a part of another picture
    chance: float  # factor on the chances of all other edits


STRONG = Strength(crop=0.5, inset=0.12, chance=1.0)
MILD = Strength(crop=0.75, inset=0.0, chance=0.6)


class Draws:
    """Uniform numbers of B pictures, handed out column by column."""

    def __init__(self, seed: int, purpose: str, step: int, count: int):
        rows = [generator(seed, purpose, step, sample).random(NUM_DRAWS) for sample in range(count)]
        self.columns = iter(torch.from_numpy(np.array(rows, dtype=np.float32)).T)

    def between(self, low: float, high: float) -> Tensor:
        """[B], uniform."""
        return low + (high - low) * next(self.columns)

    def chance(self, probability: float) -> Tensor:
        """[B], bool."""
        return next(self.columns) < probability

    def maybe(self, probability: float, low: float, high: float, otherwise: float) -> Tensor:
        """[B]: uniform between low and high with that probability, else `otherwise`."""
        return torch.where(self.chance(probability), self.between(low, high), torch.tensor(otherwise))


def edit(
    images: Tensor, others: Tensor, overlays: Tensor, strength: Strength, *, seed: int, purpose: str, step: int
) -> Tensor:
    """Edited pictures, uint8 [B, 3, S, S].

    images: uint8 [B, 3, M, M], M >= S; others: uint8 [B, 3, S, S], pictures to be inset into or to take stickers from;
    overlays: uint8 [V, 4, S, S] from `render_overlays`.
    """
    draws = Draws(seed, purpose, step, len(images))
    other = others.float() / 255
    result = warp(images.float() / 255, other, strength, draws)
    result = paste_patch(result, other, strength, draws)
    result = recolour(result, strength, draws)
    result = lay_over(result, overlays, strength, draws)
    result = refocus(result, strength, draws)
    sigma = draws.maybe(0.2 * strength.chance, 0.01, 0.06, 0.0)[:, None, None, None]
    noise = torch.randn(result.shape, generator=torch_generator(seed, f"{purpose} noise", step))
    pixels = ((result + sigma * noise).clamp(0, 1) * 255).round().to(torch.uint8)
    compress(pixels, draws.maybe(0.8 * strength.chance, 15, 95, 0.0))
    return pixels


def warp(images: Tensor, others: Tensor, strength: Strength, draws: Draws) -> Tensor:
    """Place a crop of each picture into a rectangle of the canvas; [B, 3, M, M] -> [B, 3, S, S].

    The rest of the canvas is one colour (a border, letter boxes, room for a caption) or another picture.
    """
    count, side = len(images), others.shape[-1]
    chance = strength.chance
    # The rectangle on the canvas, in coordinates from -1 to 1.
    edges = torch.zeros(4, count)  # left, right, top, bottom: shares of the canvas
    width, pattern = draws.maybe(0.25 * chance, 0.03, 0.16, 0.0), draws.between(0, 1)
    edges[:2] = torch.where(pattern < 0.65, width, 0.0)
    edges[2:] = torch.where((pattern < 0.45) | ((pattern > 0.65) & (pattern < 0.8)), width, 0.0)
    edges[2] = torch.where((pattern >= 0.8) & (pattern < 0.88), 1.6 * width, edges[2])
    edges[3] = torch.where(pattern >= 0.88, 1.6 * width, edges[3])
    inset = draws.chance(strength.inset)
    across, down = draws.between(0.45, 0.92), draws.between(0.45, 0.92)
    left, top = draws.between(0, 1) * (1 - across), draws.between(0, 1) * (1 - down)
    edges = torch.where(inset, torch.stack([left, 1 - left - across, top, 1 - top - down]), edges)
    middle = torch.stack([edges[0] - edges[1], edges[2] - edges[3]], 1)
    half = torch.stack([1 - edges[0] - edges[1], 1 - edges[2] - edges[3]], 1)
    # The crop of the picture, in the same coordinates.
    crop_x = draws.maybe(0.6 * (1 + chance) / 2, strength.crop, 0.98, 1.0)
    stretch = draws.maybe(0.5, -0.3, 0.3, 0.0).exp()
    crop_y = torch.where(crop_x < 1, (crop_x * stretch).clamp(strength.crop, 1.0), crop_x)
    size = torch.stack([crop_x, crop_y], 1)
    centre = torch.stack([draws.between(-1, 1), draws.between(-1, 1)], 1) * (1 - size)
    sign = torch.where(draws.chance(0.35 * (1 + chance) / 2), -1.0, 1.0)
    angle = draws.maybe(0.2 * chance, -0.25, 0.25, 0.0)
    tilt = torch.stack([draws.maybe(0.12 * chance, -0.2, 0.2, 0.0), draws.between(-0.2, 0.2)], 1)
    tilt[:, 1] = torch.where(tilt[:, 0] == 0, 0.0, tilt[:, 1])

    line = (torch.arange(side) * 2 + 1) / side - 1
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)  # [S, S, 2], x then y
    inner = (grid - middle[:, None, None]) / half[:, None, None]  # [B, S, S, 2]
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    turned = torch.stack(
        [cosine * inner[..., 0] - sine * inner[..., 1], sine * inner[..., 0] + cosine * inner[..., 1]], -1
    )
    turned = turned / (1 + (turned * tilt[:, None, None]).sum(-1, keepdim=True))
    turned[..., 0] *= sign[:, None, None]
    place = centre[:, None, None] + turned * size[:, None, None]
    inside = ((inner.abs() <= 1).all(-1) & (place.abs() <= 1).all(-1))[:, None]

    shrink = size.amax(1) / half.amin(1) * images.shape[-1] / side  # source pixels per canvas pixel
    sampled = torch.empty(count, 3, side, side)
    for chosen, level in ((shrink < 1.7, images), (shrink >= 1.7, None)):
        if chosen.any():
            source = images[chosen] if level is not None else F.avg_pool2d(images[chosen], 2)
            sampled[chosen] = F.grid_sample(
                source, place[chosen], mode="bilinear", padding_mode="border", align_corners=False
            )
    kind = draws.between(0, 1)
    colour = torch.stack([draws.between(0, 1) for _ in range(3)], 1)
    colour = torch.where((kind < 0.3)[:, None], 0.0, torch.where((kind < 0.65)[:, None], 1.0, colour))
    rest = torch.where(inset[:, None, None, None], others, colour[:, :, None, None])
    return torch.where(inside, sampled, rest)


def paste_patch(images: Tensor, others: Tensor, strength: Strength, draws: Draws) -> Tensor:
    """A rectangle of another picture pasted somewhere, up to 40 % of the side; [B, 3, S, S]."""
    chosen = draws.chance(0.1 * strength.chance)
    size = torch.stack([draws.between(0.15, 0.4), draws.between(0.15, 0.4)])
    start = torch.stack([draws.between(0, 1), draws.between(0, 1)]) * (1 - size)
    line = (torch.arange(images.shape[-1]) + 0.5) / images.shape[-1]
    within = (line >= start[..., None]) & (line < (start + size)[..., None])  # [2, B, S]
    mask = within[1][:, None, :, None] & within[0][:, None, None, :] & chosen[:, None, None, None]
    return torch.where(mask, others, images)


def recolour(images: Tensor, strength: Strength, draws: Draws) -> Tensor:
    """Brightness, contrast, saturation, hue, gains per channel and gamma, each at times; [B, 3, S, S]."""
    chance = strength.chance
    luma = torch.tensor(LUMA).expand(3, 3)
    saturation = draws.maybe(0.4 * chance, 0.0, 2.0, 1.0)
    saturation = torch.where(draws.chance(0.2 * chance), 0.0, saturation)[:, None, None]
    matrix = saturation * torch.eye(3) + (1 - saturation) * luma
    hue = draws.maybe(0.3 * chance, -0.5, 0.5, 0.0)
    matrix = matrix @ _rotation_about_grey(hue)
    gains = torch.stack([draws.maybe(0.25 * chance, 0.75, 1.25, 1.0) for _ in range(3)], 1)
    contrast = draws.maybe(0.5 * chance, 0.5, 1.6, 1.0)[:, None, None]
    matrix = contrast * gains[:, :, None] * matrix
    mean = images.mean((1, 2, 3))[:, None]
    shift = (1 - contrast[:, 0]) * mean + draws.maybe(0.5 * chance, -0.25, 0.25, 0.0)[:, None]
    coloured = (matrix @ images.flatten(2)).view_as(images) + shift[:, :, None, None]
    gamma = draws.maybe(0.25 * chance, -0.5, 0.5, 0.0).exp()[:, None, None, None]
    return coloured.clamp(1e-4, 1).pow(gamma)


def _rotation_about_grey(angle: Tensor) -> Tensor:
    """Rotations of RGB space that keep grey; [B] radians -> [B, 3, 3] (Rodrigues' formula)."""
    third = 1 / math.sqrt(3)
    cross = torch.tensor([[0.0, -third, third], [third, 0.0, -third], [-third, third, 0.0]])
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return cosine * torch.eye(3) + sine * cross + (1 - cosine) / 3


def lay_over(images: Tensor, overlays: Tensor, strength: Strength, draws: Draws) -> Tensor:
    """A caption, bar, sticker or watermark on some pictures; [B, 3, S, S]."""
    chosen = draws.chance(0.4 * strength.chance)
    index = draws.between(0, len(overlays)).long().clamp(max=len(overlays) - 1)
    layer = overlays[index].float() / 255
    alpha = layer[:, 3:] * chosen[:, None, None, None]
    return images * (1 - alpha) + layer[:, :3] * alpha


def refocus(images: Tensor, strength: Strength, draws: Draws) -> Tensor:
    """Some pictures blurred by a smaller size in between, some sharpened; [B, 3, S, S]."""
    side = images.shape[-1]
    blurred, smaller = draws.chance(0.2 * strength.chance), draws.between(0, 4).long()
    for level, share in enumerate((0.4, 0.5, 0.62, 0.75)):
        chosen = blurred & (smaller == level)
        if chosen.any():
            small = F.interpolate(images[chosen], size=round(side * share), mode="bilinear", antialias=True)
            images[chosen] = F.interpolate(small, size=side, mode="bicubic").clamp(0, 1)
    sharper = draws.chance(0.1 * strength.chance) & ~blurred
    if sharper.any():
        sharp = images[sharper]
        images[sharper] = (2 * sharp - F.avg_pool2d(sharp, 3, 1, 1, count_include_pad=False)).clamp(0, 1)
    return images


def compress(pixels: Tensor, quality: Tensor) -> None:
    """JPEG at a quality (0: not at all), in place; uint8 [B, 3, S, S], [B]."""
    for index, value in enumerate(quality.round().int().tolist()):
        if value:
            stream = io.BytesIO()
            Image.fromarray(pixels[index].permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=value)
            pixels[index] = torch.from_numpy(np.array(Image.open(stream))).permute(2, 0, 1)


def render_overlays(seed: int, side: int, count: int = NUM_OVERLAYS) -> Tensor:
    """Layers with captions, bars, stickers and watermarks on nothing; uint8 [count, 4, side, side]."""
    layers = np.empty((count, side, side, 4), dtype=np.uint8)
    for index in range(count):
        layer = _overlay(generator(seed, "overlay", index), 2 * side)
        layers[index] = np.asarray(layer.resize((side, side), Image.Resampling.BOX))
    return torch.from_numpy(layers).permute(0, 3, 1, 2).contiguous()


def _overlay(rng: np.random.Generator, side: int) -> Image.Image:
    layer = Image.new("RGBA", (side, side))
    pen = ImageDraw.Draw(layer)
    for _ in range(int(rng.integers(1, 3))):
        kind = rng.random()
        if kind < 0.35:
            _bar(pen, rng, side)
        elif kind < 0.65:
            _text(pen, rng, side, y=rng.uniform(0.02, 0.85) * side, size=rng.uniform(0.08, 0.22) * side)
        elif kind < 0.9:
            _sticker(pen, rng, side)
        else:
            _watermark(pen, rng, side)
    return layer


def _colour(rng: np.random.Generator, alpha: int = 255) -> tuple[int, int, int, int]:
    kind = rng.random()
    if kind < 0.6:
        gray = 255 if kind < 0.35 else 0
        return gray, gray, gray, alpha
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue, alpha


def _words(rng: np.random.Generator, length: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789     .,!?@#"
    return "".join(letters[i] for i in rng.integers(0, len(letters), length))


def _text(pen: ImageDraw.ImageDraw, rng: np.random.Generator, side: int, *, y: float, size: float) -> None:
    fill = _colour(rng)
    outline = (255 - fill[0], 255 - fill[1], 255 - fill[2], 255)
    text = _words(rng, int(rng.integers(3, 16)))
    stroke = 1 if rng.random() < 0.5 else 0
    at = (rng.uniform(0.0, 0.3) * side, y)
    pen.text(at, text, fill=fill, font=ImageFont.load_default(size), stroke_width=stroke, stroke_fill=outline)


def _bar(pen: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    height = rng.uniform(0.08, 0.26) * side
    top = rng.choice([0.0, side - height]) if rng.random() < 0.85 else rng.uniform(0, side - height)
    pen.rectangle((0, top, side, top + height), fill=_colour(rng, int(rng.integers(150, 256))))
    _text(pen, rng, side, y=top + rng.uniform(0, 0.2) * height, size=max(6.0, rng.uniform(0.4, 0.7) * height))


def _sticker(pen: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    """A round face, a star or a plate."""
    size = rng.uniform(0.15, 0.42) * side
    x, y = rng.uniform(-0.05 * side, side - 0.8 * size, 2)
    box, fill = (x, y, x + size, y + size), _colour(rng)
    kind = rng.random()
    if kind < 0.5:
        pen.ellipse(box, fill=fill)
        dark = _colour(rng)
        for eye in (0.3, 0.6):
            pen.ellipse((x + eye * size, y + 0.3 * size, x + (eye + 0.13) * size, y + 0.45 * size), fill=dark)
        pen.arc((x + 0.25 * size, y + 0.3 * size, x + 0.75 * size, y + 0.8 * size), 20, 160, fill=dark, width=3)
    elif kind < 0.75:
        points = int(rng.integers(4, 9))
        turns = np.arange(2 * points) * math.pi / points + rng.uniform(0, 1)
        radius = size / 2 * np.where(np.arange(2 * points) % 2, rng.uniform(0.3, 0.7), 1.0)
        corners = np.stack([x + size / 2 + radius * np.cos(turns), y + size / 2 + radius * np.sin(turns)], 1)
        pen.polygon([tuple(corner) for corner in corners.tolist()], fill=fill)
    else:
        pen.rounded_rectangle(box, radius=size * 0.2, fill=fill)
        _text(pen, rng, side, y=y + 0.2 * size, size=max(6.0, 0.4 * size))


def _watermark(pen: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    text, fill = _words(rng, 6), _colour(rng, int(rng.integers(50, 130)))
    font = ImageFont.load_default(rng.uniform(0.08, 0.16) * side)
    for row in range(int(rng.integers(2, 5))):
        for column in range(3):
            pen.text((column * 0.4 * side + row * 5, row * 0.3 * side), text, fill=fill, font=font)
