"""What a training batch is made of: data, crops and masks (DINOv2 recipe; reference repository, `vitl16_short`)."""

from dataclasses import dataclass
from typing import Literal

from runtime.errors import UserError

SMALLEST_CROP = 8  # pixels; the blur kernel reaches 4 pixels to each side


@dataclass(frozen=True)
class SetConfig:
    name: str  # of this part of the data, in metrics and messages
    shards: tuple[str, ...]  # as `data.shards`
    weight: float = 1.0  # share of the images of mixed batches, relative to other sets; 0: in own batches only
    batches: float = 0.0  # share of the steps whose whole batch is of this set (0.1 for ImageNet-1k in DINOv3 sec. 3.1)


@dataclass(frozen=True)
class DataConfig:
    shards: tuple[str, ...] = ()  # WebDataset folders, tars, globs or URLs (http, s3); ours or anyone's
    sets: tuple[SetConfig, ...] = ()  # several sets mixed by weight, in place of `shards`
    shuffle_buffer: int = 4096  # images of remote shards that are held to be shuffled; local shards are shuffled whole


@dataclass(frozen=True)
class SizesConfig:
    global_size: int  # pixels, as in `CropsConfig`
    local_size: int  # pixels
    gram_size: int = 0  # pixels
    probability: float = 1.0  # of a step to have these sizes, relative to the others


@dataclass(frozen=True)
class CropsConfig:
    global_size: int = 224  # pixels, side of the two global crops
    local_size: int = 96  # pixels, side of the local crops; 98 with patch size 14
    num_local: int = 8  # local crops of an image; 0: global crops only
    global_scale: tuple[float, float] = (0.32, 1.0)  # share of the image's area
    local_scale: tuple[float, float] = (0.05, 0.32)  # share of the image's area
    gram_size: int = 0  # pixels of the global crops as the Gram teacher sees them (2x in DINOv3); 0: the same crops
    mixed: tuple[SizesConfig, ...] = ()  # sizes drawn anew for every step, in place of the three above (DINOv3 app. C)
    flip: float = 0.5  # probability of mirroring a crop; 0 in DINOv3
    compat: Literal["none", "reference_blur"] = "none"  # blur as the released DINOv2 models had it: 0 / 0.9 / 0.5


@dataclass(frozen=True)
class MaskConfig:
    probability: float = 0.5  # share of the global crops that are masked (iBOT, Zhou et al. 2022)
    ratio_min: float = 0.1  # smallest share of masked patches in a masked crop
    ratio_max: float = 0.5  # largest


def check(crops: CropsConfig, mask: MaskConfig, *, patch_size: int) -> None:
    """Raise UserError for values that no schema can refuse, naming the key."""
    if patch_size < 1:
        raise UserError(f"model.patch_size: found {patch_size}; expected 1 or more")
    if crops.num_local < 0:
        raise UserError(f"crops.num_local: found {crops.num_local}; expected 0 or more")
    _check_sizes("crops", crops, num_local=crops.num_local, patch_size=patch_size)
    for number, sizes in enumerate(crops.mixed):
        _check_sizes(f"crops.mixed[{number}]", sizes, num_local=crops.num_local, patch_size=patch_size)
    probabilities = [sizes.probability for sizes in crops.mixed]
    if crops.mixed and (min(probabilities) < 0 or not sum(probabilities)):
        raise UserError(f"crops.mixed: found probabilities {probabilities}; expected 0 or more, and one above 0")
    if not 0 <= crops.flip <= 1:
        raise UserError(f"crops.flip: found {crops.flip}; expected 0 to 1")
    for name, (low, high) in (("global_scale", crops.global_scale), ("local_scale", crops.local_scale)):
        if not 0 < low <= high <= 1:
            raise UserError(f"crops.{name}: found [{low}, {high}]; expected 0 < first <= second <= 1")
    if not 0 <= mask.probability <= 1:
        raise UserError(f"mask.probability: found {mask.probability}; expected 0 to 1")
    if not 0 <= mask.ratio_min <= mask.ratio_max <= 1:
        raise UserError(
            f"mask: found ratios {mask.ratio_min} to {mask.ratio_max}; expected 0 <= ratio_min <= ratio_max <= 1"
        )


def _check_sizes(where: str, sizes: CropsConfig | SizesConfig, *, num_local: int, patch_size: int) -> None:
    named = {"global_size": sizes.global_size}
    if num_local:
        named["local_size"] = sizes.local_size
    if sizes.gram_size:
        named["gram_size"] = sizes.gram_size
    for name, size in named.items():
        if size < SMALLEST_CROP:
            raise UserError(f"{where}.{name}: found {size}; expected at least {SMALLEST_CROP} pixels")
        if size % patch_size:
            below = max(size // patch_size, 1) * patch_size
            raise UserError(
                f"{where}.{name}: {size} is not a multiple of model.patch_size {patch_size}\n"
                f"  try {below} or {below + patch_size}"
            )
