"""The other side of bench_learning.py: LightlyTrain's DINOv2, run by the Python of its own environment.

    LIGHTLY_PYTHON benchmarks/lightly_dinov2.py train SETTINGS.json
    LIGHTLY_PYTHON benchmarks/lightly_dinov2.py convert CHECKPOINT ...     (its teacher as .safetensors beside each)

LightlyTrain takes a model instance, so width, depth and patch size are free. Its telemetry is off.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"

TEACHER = "teacher_embedding_model.wrapped_model._model."


def train(settings: dict[str, Any]) -> None:
    import lightly_train  # pyright: ignore[reportMissingImports]
    import torch
    from lightly_train._models.dinov2_vit.dinov2_vit_src.models import (  # pyright: ignore[reportMissingImports]
        vision_transformer,
    )

    torch.manual_seed(settings["pretrain"]["seed"])
    model = vision_transformer.DinoVisionTransformer(**settings["model"])
    if settings["fan_in"]:  # the start values of our narrow models; its heads keep their own
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear):
                torch.nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
    lightly_train.pretrain(model=model, **settings["pretrain"])


def convert(checkpoint: Path) -> None:
    """Write the teacher's weights in the layout of DINOv2, and four random images with its class tokens of them."""
    import torch
    from safetensors.torch import save_file

    found = torch.load(checkpoint, map_location="cpu", weights_only=False)
    weights = {k.removeprefix(TEACHER): v for k, v in found["state_dict"].items() if k.startswith(TEACHER)}
    model = found["lightly_train"]["models"]["model"].eval()
    model.load_state_dict(weights)
    side = round((weights["pos_embed"].shape[1] - 1) ** 0.5) * weights["patch_embed.proj.weight"].shape[-1]
    images = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cls = model(images)
    flat = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name): value.clone() for name, value in weights.items()}
    save_file(flat | {"check.images": images, "check.cls": cls.clone()}, checkpoint.with_suffix(".safetensors"))


if __name__ == "__main__":
    verb, *files = sys.argv[1:]
    if verb == "train":
        train(json.loads(Path(files[0]).read_text()))
    else:
        for file in files:
            convert(Path(file))
