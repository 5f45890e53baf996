"""The copy-detection network: a narrow ResNet, GeM pooling, a linear projection (SSCD, Pizzi et al. 2022, sec. 3-4).

B images of S x S pixels, D numbers per vector.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from runtime.errors import UserError
from runtime.files import read_json, replacing, write_json

KIND = "copy"  # in card.json, beside the "backbone" and "teacher" of pretraining
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
GEM_POWER = 3.0  # SSCD sec. 4.3


class CopyNetwork(nn.Module):
    """float32 [B, 3, S, S], normalised -> [B, D], not yet of unit length."""

    def __init__(self, channels: tuple[int, ...], layers: tuple[int, ...], dim: int):
        from timm.models.resnet import BasicBlock, ResNet  # slow to import, and most runs only ask for a model's hash

        super().__init__()
        block: Any = BasicBlock
        # A stride of 16 instead of 32: small inputs keep a last map of more than 2 x 2 cells to pool from.
        self.trunk = ResNet(block, layers, channels=channels, stem_width=channels[0], output_stride=16, num_classes=0)
        self.project = nn.Linear(channels[-1], dim)

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.trunk.forward_features(pixels.contiguous(memory_format=torch.channels_last))
        return self.project(gem(maps))


def gem(maps: Tensor) -> Tensor:
    """Generalised mean over positions (Radenovic et al. 2018); [B, C, H, W] -> float32 [B, C]."""
    with torch.autocast(maps.device.type, enabled=False):
        powers = maps.float().clamp(min=1e-6).pow(GEM_POWER)
        return powers.mean((2, 3)).pow(1 / GEM_POWER)


def normalised(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] as the network takes it."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def unit_vectors(network: nn.Module, pixels: Tensor) -> Tensor:
    """float32 [B, D] of uint8 [B, 3, S, S], computed in bfloat16."""
    with torch.autocast(pixels.device.type, torch.bfloat16):
        vectors = network(normalised(pixels))
    return F.normalize(vectors.float(), dim=1)


def save_network(network: CopyNetwork, folder: Path, card: dict) -> None:
    """Write model.safetensors (float16) and card.json; the card last, so that a card means a complete model."""
    weights = {
        name: value.half() if value.is_floating_point() else value for name, value in network.state_dict().items()
    }
    weights = {name: value.contiguous() for name, value in weights.items() if "num_batches_tracked" not in name}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(weights, temporary)
    write_json(folder / "card.json", card)


def load_network(folder: Path, *, key: str) -> tuple[CopyNetwork, int]:
    """The network in a folder, in evaluation mode, and its input side in pixels.

    key: the config key that names the model, for messages. Raises UserError when it is damaged.
    """
    shape = read_json(folder / "card.json")["model"]
    network = CopyNetwork(tuple(shape["channels"]), tuple(shape["layers"]), shape["dim"])
    try:
        stored = load_file(folder / "model.safetensors")
        missing, unknown = network.load_state_dict({name: value.float() for name, value in stored.items()}, False)
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{key}: {folder / 'model.safetensors'} is damaged\n  {str(error).splitlines()[0]}") from None
    missing = [name for name in missing if "num_batches_tracked" not in name]
    if missing or unknown:
        raise UserError(f"{key}: the weights in {folder} do not fit its card.json ({(missing + unknown)[0]})")
    network.trunk.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return network.eval(), int(shape["size"])
