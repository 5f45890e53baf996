"""The plain form of a training step, the yardstick of bench_train_step.py: written down first, from the same modules.

A forward pass for each crop size, fused attention everywhere, every token through the last block, whole logits,
Sinkhorn on a matrix, foreach AdamW. Same losses as `pretrain.step.train_step`.

B images, M masked patches, K prototypes.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.build import build_learner
from pretrain.config import HeadsConfig, ModelConfig, OptimConfig
from pretrain.data.batch import Batch
from pretrain.data.config import MaskConfig
from pretrain.data.masks import draw_masks
from pretrain.loss.ibot import mask_weights
from pretrain.loss.koleo import koleo_loss
from pretrain.model import attention
from pretrain.model.noise import Noise
from pretrain.optim import build_optimizer, clip_gradients, set_schedule
from pretrain.schedules import StepValues
from pretrain.state import TrainState

VALUES = StepValues(lr=1e-4, weight_decay=0.04, momentum=0.992, temperature=0.05, last_layer_lr=1e-4, backbone_lr=1e-4)
LOCALS = 8


@dataclass(frozen=True)
class Case:
    """What is timed."""

    images: int = 8
    prototypes: int = 8192
    drop_path: float = 0.0


class Stopwatch:
    """Seconds spent in named parts of a step; inner parts are not subtracted from outer ones."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] += time.process_time() - start

    def wrap(self, name: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return timed


WATCH = Stopwatch()


def plain(state: TrainState, batch: Batch, precision: torch.dtype) -> dict[str, float]:
    """The same step as one would write it down first."""
    noise = Noise(rope=0, drop=state.step)
    with (
        mock.patch.object(attention, "_batched", plain_attention),
        torch.autocast("cpu", precision, enabled=precision != torch.float32),
    ):
        with torch.no_grad(), WATCH.part("teacher"):
            (taught,) = state.ema.backbone([batch.global_crops])
            cls_targets = plain_sinkhorn(state.ema.dino_head(taught.cls)).chunk(2)
            patch_targets = plain_sinkhorn(state.ema.patch_head(taught.patches[batch.masks]))
        with WATCH.part("student"):
            (whole,) = state.student.backbone([batch.global_crops], [batch.masks], noise=noise)
            (local,) = state.student.backbone([batch.local_crops], noise=noise)
        with WATCH.part("heads and losses"):
            crops = state.student.dino_head(torch.cat([whole.cls, local.cls])).chunk(2 + LOCALS)
            dino, pairs = torch.zeros(()), 0
            for i, logits in enumerate(crops):
                for j, target in enumerate(cls_targets):
                    if i != j:
                        dino = dino - (target * (logits.float() / 0.1).log_softmax(-1)).sum(-1).mean()
                        pairs += 1
            dino = dino / pairs
            logits = state.student.patch_head(whole.patches[batch.masks]).float() / 0.1
            each = -(patch_targets * logits.log_softmax(-1)).sum(-1)
            ibot = (each * mask_weights(batch.masks)).sum() / len(batch.masks)
            koleo = sum(koleo_loss(half) for half in whole.cls.chunk(2))
            loss = dino + ibot + 0.1 * koleo
    with WATCH.part("backward"):
        loss.backward()
    with WATCH.part("clip"):
        norms = clip_gradients(state.student, 3.0)
    with WATCH.part("optimizer"):
        set_schedule(state.optimizer, VALUES)
        state.optimizer.step()
        state.optimizer.zero_grad()
    with WATCH.part("ema"), torch.no_grad():
        ema, student = list(state.ema.parameters()), [p.detach() for p in state.student.parameters()]
        torch._foreach_mul_(ema, VALUES.momentum)
        torch._foreach_add_(ema, student, alpha=1 - VALUES.momentum)
    state.step += 1
    terms = {"loss": loss, "dino": dino, "ibot": ibot, "koleo": koleo, **norms}
    return {name: value.item() for name, value in terms.items()}


def plain_attention(q: Tensor, k: Tensor, v: Tensor, num_sequences: int) -> Tensor:
    q, k, v = (x.unflatten(0, (num_sequences, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def plain_sinkhorn(logits: Tensor) -> Tensor:
    """Three iterations on the matrix itself, as in the paper's algorithm."""
    q = (logits.float() / VALUES.temperature).exp().T  # [K, M]
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def make_state(form: str, case: Case) -> TrainState:
    model = ModelConfig(arch="vit_small", patch_size=16, drop_path=case.drop_path, layerscale=0.1)
    student = build_learner(model, HeadsConfig(num_prototypes=case.prototypes), image_size=224, seed=0).train()
    ema = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = build_optimizer(student, OptimConfig())
    if form == "plain":
        optimizer = torch.optim.AdamW(optimizer.param_groups, foreach=True, fused=False)
    return TrainState(0, student, ema, optimizer)


def make_batch(case: Case) -> Batch:
    generator = torch.Generator().manual_seed(0)
    count = 2 * case.images
    masks = draw_masks(0, 0, num_crops=count, crops=np.arange(count), grid=(14, 14), config=MaskConfig())
    return Batch(
        global_crops=torch.randn(count, 3, 224, 224, generator=generator),
        local_crops=torch.randn(LOCALS * case.images, 3, 96, 96, generator=generator),
        masks=masks,
        samples=torch.arange(case.images),
        skipped=(),
    )
