"""Modules from a configuration."""

from typing import Literal, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from runtime.errors import UserError
from runtime.seeding import torch_generator

from .config import HeadsConfig, ModelConfig
from .model.head import Head
from .model.init import Init, start_value
from .model.vit import Shape, VisionTransformer

# arch: width, depth, heads, feed-forward. S to g as DINOv2 table 17; pico to tiny for small data and tests.
ARCHS: dict[str, tuple[int, int, int, Literal["mlp", "swiglu"]]] = {
    "vit_pico": (48, 4, 3, "mlp"),
    "vit_nano": (96, 4, 3, "mlp"),
    "vit_micro": (128, 6, 4, "mlp"),
    "vit_tiny": (192, 12, 3, "mlp"),
    "vit_small": (384, 12, 6, "mlp"),
    "vit_base": (768, 12, 12, "mlp"),
    "vit_large": (1024, 24, 16, "mlp"),
    "vit_giant2": (1536, 40, 24, "swiglu"),
}


Built = TypeVar("Built", bound=nn.Module)


class Learner(nn.Module):
    """What is trained, and what the EMA follows: a backbone with its DINO and iBOT heads.

    Tied heads are one module under one name (`ibot_head` is None), so that optimizer, EMA, sharding and checkpoints
    see their parameters once; `patch_head` is the head of the patch-level loss in both cases.
    """

    def __init__(self, backbone: VisionTransformer, dino_head: Head, ibot_head: Head | None):
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head

    @property
    def patch_head(self) -> Head:
        return self.dino_head if self.ibot_head is None else self.ibot_head


def backbone_shape(model: ModelConfig, image_size: int) -> Shape:
    """The shape of a backbone whose position table fits images of `image_size` pixels."""
    dim, depth, num_heads, ffn = ARCHS[model.arch]
    if model.ffn != "arch":
        ffn = model.ffn
    return Shape(
        dim=dim,
        depth=depth,
        num_heads=num_heads,
        patch_size=model.patch_size,
        image_size=image_size,
        num_registers=model.num_registers,
        ffn=ffn,
        mlp_ratio=4.0,
        in_chans=model.in_chans,
        position=model.position,
        ffn_multiple=model.ffn_multiple,
        untie_norms=model.untie_norms,
    )


def build_learner(
    model: ModelConfig, heads: HeadsConfig, *, image_size: int, seed: int, device: torch.device | str = "cpu"
) -> Learner:
    """A freshly initialised learner; the same seed gives the same weights on every device.

    On the device `meta` it has shapes only, to be counted, or sharded and then given values by `materialise`.
    """
    with torch.device("meta"):
        backbone = VisionTransformer(
            backbone_shape(model, image_size),
            drop_path=model.drop_path,
            layerscale=model.layerscale,
            rope_jitter=model.rope_jitter,
            attention=model.attention,
        )
        learner = Learner(backbone, *build_heads(heads, backbone.shape.dim))
    return learner if str(device) == "meta" else materialise(learner, device=device, seed=seed, init=model.init)


@torch.no_grad()
def materialise(module: Built, *, device: torch.device | str, seed: int, init: Init) -> Built:
    """Give a module on the meta device, sharded or not, memory on `device` and start values, in place.

    Each value is drawn whole on the CPU, from a generator named by the parameter: it depends neither on the device nor
    on the sharding nor on what else there is. Raises RuntimeError for a parameter or buffer that nothing fills.
    """
    module.to_empty(device=device)
    for path, owner in module.named_modules():
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            full_name = f"{path}.{name}".removeprefix(".")
            generator = torch_generator(seed, "weights", full_name)
            value = start_value(owner, name, shape=tensor.shape, init=init, generator=generator)
            if value.isnan().any():
                raise RuntimeError(f"{full_name} has no start value: {type(owner).__name__} does not say what it is")
            if isinstance(tensor, DTensor):
                value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
                tensor = tensor.to_local()
            tensor.copy_(value)
    return module


def build_heads(heads: HeadsConfig, dim: int) -> tuple[Head, Head | None]:
    """The DINO head and the iBOT head of features [M, dim]; None where one head serves both losses."""

    def head(num_prototypes: int, hidden: int, bottleneck: int) -> Head:
        return Head(
            dim,
            hidden=hidden,
            bottleneck=bottleneck,
            num_layers=heads.num_layers,
            num_prototypes=num_prototypes,
            weight_norm=heads.weight_norm,
        )

    sizes = (heads.num_prototypes, heads.hidden, heads.bottleneck)
    own = (heads.ibot_prototypes, heads.ibot_hidden, heads.ibot_bottleneck)
    if not heads.tied:
        return head(*sizes), head(*(a or b for a, b in zip(own, sizes, strict=True)))
    if any(own):
        raise UserError(f"heads.tied: found ibot sizes {own} beside it; expected 0 for all, or heads.tied=false")
    return head(*sizes), None
