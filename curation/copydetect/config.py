"""Configuration of training a copy-detection network; the preset is `configs/copy.yaml`.

The recipe is SSCD's (Pizzi et al. 2022, arXiv 2202.10261, section 4) cut to a narrow network and small pictures.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class CopySourceConfig:
    paths: tuple[str, ...] = ()  # folders, tars or globs of them with the training images
    about: str = ""  # what these images are and their licences; goes into the model card as it stands
    max_pixels: int = 100_000_000  # larger pictures are refused from their header
    phash_distance: int = 4  # bits of 64 up to which two training images count as one: copies must not be negatives
    held_out: int = 256  # images kept out of training, with whose edits the network is measured


@dataclass(frozen=True)
class CopyNetworkConfig:
    channels: tuple[int, int, int, int] = (32, 64, 128, 256)  # of the ResNet's four stages
    layers: tuple[int, int, int, int] = (1, 2, 2, 1)  # basic blocks of each stage
    dim: int = 192  # numbers per vector
    size: int = 64  # pixels per side of the input, aspect ignored


@dataclass(frozen=True)
class CopyLossConfig:
    temperature: float = 0.05  # of InfoNCE (SSCD sec. 4.1)
    entropy_weight: float = 3.0  # of the differential-entropy regulariser (lambda in SSCD sec. 4.2: 30, at batch 4096)


@dataclass(frozen=True)
class CopyOptimConfig:
    steps: int = 4000
    batch_size: int = 256  # images per step; the network sees two views of each
    lr: float = 2.0e-3  # peak rate of AdamW, after warmup_steps, then along a cosine to zero
    warmup_steps: int = 200
    weight_decay: float = 0.05
    ema: float = 0.998  # of the weights that are exported


@dataclass(frozen=True)
class CopyTrainConfig:
    out: str = "runs/copy"  # folder of the result
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = 1  # processes that make edits; 0: this process
    source: CopySourceConfig = field(default_factory=CopySourceConfig)
    network: CopyNetworkConfig = field(default_factory=CopyNetworkConfig)
    loss: CopyLossConfig = field(default_factory=CopyLossConfig)
    optim: CopyOptimConfig = field(default_factory=CopyOptimConfig)
    checkpoint_minutes: float = 4.0  # between checkpoints, each with a usable model and its card
