"""Configuration of a training run; presets in `configs/` state only what differs from these defaults.

Defaults are DINOv2's `vitl16_short` recipe (reference repository, ViT-L/16 on ImageNet-1k) where it has one.
"""

from dataclasses import dataclass, field
from typing import Literal

from .data.config import CropsConfig, MaskConfig
from .model.init import Init

Arch = Literal["vit_pico", "vit_nano", "vit_micro", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_giant2"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class DataConfig:
    shards: tuple[str, ...] = ()  # WebDataset folders, tars or globs; ours or anyone's


@dataclass(frozen=True)
class ModelConfig:
    arch: Arch = "vit_small"  # width, depth and heads; table in pretrain/build.py
    patch_size: int = 16  # pixels; 14 in the published models
    num_registers: int = 0  # 4 in the released `_reg` models (Darcet et al. 2023)
    drop_path: float = 0.0  # share of sequences that skip a residual branch; 0.3 (L), 0.4 (L and g from scratch)
    init: Init = "reference"  # linear layers: 0.02 as in DINOv2, or 1/sqrt(inputs) for narrow models (model/init.py)
    layerscale: float = 1e-5  # start value of LayerScale (DINOv2 app. B); larger for runs of a few hundred steps


@dataclass(frozen=True)
class HeadsConfig:
    num_prototypes: int = 65536  # of each head; 131072 for L and g
    hidden: int = 2048  # width of the heads' hidden layers
    bottleneck: int = 256  # width before the prototypes; 384 for the DINO head of L and g
    num_layers: int = 3  # linear layers before the prototypes


@dataclass(frozen=True)
class LossConfig:
    dino: float = 1.0  # weight of the image-level loss
    ibot: float = 1.0  # weight of the patch-level loss
    koleo: float = 0.1  # weight of KoLeo, summed over the two global crops (DINOv2 app. B)


@dataclass(frozen=True)
class TeacherConfig:
    momentum: float = 0.992  # EMA momentum at the first step, cosine to 1 at the last; 0.994 for L and g
    temperature: float = 0.07  # of the teacher's softmax, after its warm-up
    warmup_temperature: float = 0.04  # at the first step
    warmup: float = 0.3  # share of the steps over which the temperature rises linearly (30 of 100 epochs)


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-3  # peak AdamW rate at `reference_batch`; scaled by sqrt(batch_size / reference_batch)
    reference_batch: int = 1024  # global batch that `lr` is stated for (DINOv2's sqrt_wrt_1024 rule)
    min_lr: float = 1e-6  # at the last step, not scaled
    warmup: float = 0.1  # share of the steps with linearly rising rate (10 of 100 epochs)
    weight_decay: float = 0.04  # at the first step; cosine to `weight_decay_end`; none on biases, norms and gammas
    weight_decay_end: float = 0.4  # 0.2 for L and g
    beta2: float = 0.999  # second moment of AdamW (beta1 is 0.9)
    clip: float = 3.0  # largest gradient norm, for the backbone and each head apart; 0: no clipping
    layer_decay: float = 1.0  # factor on the rate per block below the top; 0.9 in `vitl16_short`
    patch_embed_lr: float = 0.2  # factor on the patch embedding's rate
    freeze_last_layer: float = 0.01  # share of the steps in which the prototypes stand still (1 of 100 epochs)


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 125_000  # optimizer steps
    batch_size: int = 1024  # images per step over all processes (global)
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 where the device multiplies it faster
    log_every: int = 10  # steps between rows of metrics.jsonl


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000  # steps between checkpoints
    keep: int = 3  # checkpoints that stay


@dataclass(frozen=True)
class PretrainConfig:
    out: str = "runs/pretrain"  # folder of the run
    seed: int = 0  # of weights, order, crops, masks and drop path
    device: Device = "auto"
    workers: int = 4  # loader processes of each training process; 0: load in the training process
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
