"""Models to judge: our exports, untrained twins of them, timm models, and a colour thumbnail.

B images, N patches, D width.
"""

import difflib
import hashlib
import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from pretrain.export import MEAN, STD, load_backbone, random_backbone
from runtime.errors import UserError

COVERAGE = 224 / 256  # share of the short side that models see: resize to 256, crop 224 (DINOv2's evaluation)
THUMBNAIL = (8, 16)  # rows, columns; x 3 colours = 384 numbers, the width of a ViT-S


@dataclass(frozen=True)
class Extractor:
    """A frozen model that turns images [B, 3, size, size], normalised by `mean` and `std`, into features."""

    name: str  # as it was asked for
    size: int  # pixels
    coverage: float  # share of an image's short side that the centre crop keeps
    mean: tuple[float, ...]
    std: tuple[float, ...]
    hash: str  # of everything that decides the features
    device: torch.device
    encode: Callable[[Tensor], tuple[Tensor, Tensor | None]]  # -> global [B, D], patches [B, N, D] row by row
    # images, n -> class tokens [B, D] of the last n blocks (or all there are) after the last norm, oldest first, and
    # the patches of the last; None: a model without
    layers: Callable[[Tensor, int], tuple[list[Tensor], Tensor]] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """One vector per image, [B, D] float32 on the CPU: CLS after the last norm, or the model's own pooling."""
        with torch.inference_mode():
            return self.encode(images.to(self.device))[0].float().cpu()

    def patches(self, images: Tensor) -> Tensor | None:
        """Patch tokens [B, N, D] float32 on the CPU, row by row; None for a model without."""
        with torch.inference_mode():
            tokens = self.encode(images.to(self.device))[1]
            return None if tokens is None else tokens.float().cpu()


def load_model(spec: str, *, device: torch.device | str = "cpu", size: int | None = None, seed: int = 0) -> Extractor:
    """The model that `spec` names. Raises UserError when there is none.

    spec: an export folder; `random:FOLDER`, the export's architecture with fresh weights drawn by `seed`; `pixels`,
        a colour thumbnail; `timm:NAME`, pretrained weights from the network; `timm:NAME@FILE`, weights from a file.
    size: pixels of a side; None: the size the model was made for.
    """
    kind, _, rest = spec.partition(":")
    device = torch.device(device)
    if spec == "pixels":
        return _pixels(size or 224, device)
    if kind == "timm" and rest:
        return _timm(spec, rest, device, size)
    if kind == "random" and rest:
        card = load_backbone(rest)[1]
        return _ours(spec, random_backbone(rest, seed).to(device), card, device, size)
    if not Path(spec).is_dir():
        raise UserError(
            f"model: no folder {spec}\n  expected an export folder (holds card.json), random:FOLDER, pixels, "
            f"timm:NAME or timm:NAME@FILE"
        )
    backbone, card = load_backbone(spec, device)
    return _ours(spec, backbone, card, device, size)


def _ours(spec: str, backbone: nn.Module, card: dict[str, Any], device: torch.device, size: int | None) -> Extractor:
    size = size or int(card["image_size"])
    patch_size = card["model"]["patch_size"]
    if size % patch_size:
        raise UserError(
            f"evaluate.image_size: {size} is not a multiple of the {patch_size} px patches of {spec}; "
            f"try {max(size // patch_size, 1) * patch_size}"
        )

    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        features = backbone.forward_features(images)  # pyright: ignore[reportCallIssue]
        return features.cls, features.patches

    def layers(images: Tensor, num: int) -> tuple[list[Tensor], Tensor]:
        outputs: list[Tensor] = []  # [T, D] of each block
        blocks: Any = backbone.blocks
        hooks = [block.register_forward_hook(lambda _, __, tokens: outputs.append(tokens)) for block in blocks[-num:]]
        try:
            _, patches = encode(images)
        finally:
            for hook in hooks:
                hook.remove()
        norm: Any = backbone.norm
        return [norm(tokens.unflatten(0, (len(images), -1))[:, 0]) for tokens in outputs], patches

    mean, std = tuple(card["mean"]), tuple(card["std"])
    hashed = digest(weights_hash(backbone), card["model"], size, mean, std)
    return Extractor(spec, size, COVERAGE, mean, std, hashed, device, encode, layers)


def _pixels(size: int, device: torch.device) -> Extractor:
    """The baseline that knows colours and layout: the centre square averaged to 8 x 16 pixels, minus its mean value.

    It sees the whole square, where models lose a margin of 1/16 a side: that is worth about three points to it.
    """
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))

    def encode(images: Tensor) -> tuple[Tensor, None]:
        thumbnails = F.adaptive_avg_pool2d(images * std + mean, THUMBNAIL).flatten(1)  # [B, 384]
        return thumbnails - thumbnails.mean(dim=1, keepdim=True), None

    return Extractor("pixels", size, 1.0, MEAN, STD, digest("pixels", THUMBNAIL, size), device, encode)


def _timm(spec: str, rest: str, device: torch.device, size: int | None) -> Extractor:
    import timm
    from timm.data.config import resolve_model_data_config

    name, _, checkpoint = rest.partition("@")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=1, cutoff=0.3)
        raise UserError(f"model: timm knows no model {name}" + (f"; did you mean {near[0]}?" if near else ""))
    if checkpoint and not Path(checkpoint).is_file():
        raise UserError(f"model: no file {checkpoint} (from {spec})")
    try:
        model: Any = timm.create_model(name, pretrained=not checkpoint, num_classes=0)
        if checkpoint:
            _fill(model, timm.models.load_state_dict(checkpoint, device="cpu", weights_only=True))
    except (OSError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        fix = (
            f"the file must hold the weights of {name}"
            if checkpoint
            else f"without network, fetch the file elsewhere and give timm:{name}@FILE"
        )
        raise UserError(f"model: {spec} cannot be loaded: {reason}\n  {fix}") from error
    settings = resolve_model_data_config(model)
    if size and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)
    size = size or settings["input_size"][-1]
    model = model.eval().to(device)

    def encode(images: Tensor) -> tuple[Tensor, Tensor | None]:
        tokens = model.forward_features(images)
        pooled = model.forward_head(tokens, pre_logits=True)
        return pooled, tokens[:, model.num_prefix_tokens :] if hasattr(model, "num_prefix_tokens") else None

    def layers(images: Tensor, num: int) -> tuple[list[Tensor], Tensor]:
        found = model.forward_intermediates(
            images,
            indices=min(num, len(model.blocks)),
            return_prefix_tokens=True,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return [prefix[:, 0] for _, prefix in found], found[-1][0]

    mean, std = tuple(settings["mean"]), tuple(settings["std"])
    hashed = digest(weights_hash(model), name, size, mean, std)
    has_class_tokens = getattr(model, "cls_token", None) is not None and hasattr(model, "forward_intermediates")
    return Extractor(spec, size, COVERAGE, mean, std, hashed, device, encode, layers if has_class_tokens else None)


def _fill(model: Any, weights: dict[str, Tensor]) -> None:
    """Load weights into a timm model without classifier; every name must fit.

    timm itself stops checking names when the classifier is left off, so that a file of another model loads nothing
    and says so only in a log. Its family's own filter translates foreign names (facebook's DINOv2 among them).
    """
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if translate is not None:
        weights = translate(weights, model)
    classifiers = model.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    dropped = tuple(f"{name}." for name in classifiers)
    model.load_state_dict({name: value for name, value in weights.items() if not name.startswith(dropped)})


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names and bytes of all weights and buffers: the same for `backbone` and `teacher` exports."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def digest(*parts: Any) -> str:
    """First 16 hex digits of the SHA-256 of JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
