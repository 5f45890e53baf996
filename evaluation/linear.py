"""Linear probe on frozen features: a grid of classifiers trained at once, as DINOv2's evaluation does it.

N train images, B of one batch, M test images, D width, F width of all that is read, H width of what a head reads,
L learning rates, C classes.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.errors import UserError
from runtime.progress import Progress
from runtime.seeding import torch_generator

from .classify import Reading, hold_out, need_test, read_halves
from .data import LabelledImages
from .knn import bootstrap_interval
from .models import Extractor, digest
from .tables import Row

RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.3, 0.5)  # DINOv2 app. B.3
BLOCKS = (1, 4)  # last blocks whose class tokens a head reads (DINOv2 app. B.3)
STEPS = 12_500  # of SGD (DINOv2 app. B.3)
BATCH = 1024  # images of a step: eight processes of 128 (DINOv2's code)
MOMENTUM = 0.9


class Part(NamedTuple):
    """Which columns of the features [N, F] a head reads."""

    blocks: int  # class tokens of so many last blocks
    patches: bool  # and the mean patch token of the last one
    start: int
    stop: int


class Heads(NamedTuple):
    """Classifiers that read the same part, one for each learning rate."""

    part: Part
    weights: Tensor  # [H, L, C]
    biases: Tensor  # [L, C]


def judge_linear(model: Extractor, task: LabelledImages, how: Reading, *, steps: int = STEPS) -> Row:
    """Accuracy on the test half of the head that is best on a held-out tenth of the train half, trained again on all.

    Features are computed once, of centre crops: DINOv2 trains on random crops instead.
    """
    need_test(task, "linear")
    if steps < 1:
        raise UserError(f"--steps: found {steps}; expected 1 or more")
    deep, parts = deepen(model)
    halves = read_halves(deep, task, how)
    assert halves.test is not None
    fitted, held = hold_out(halves.train_labels, halves.classes, seed=how.seed)
    train, test = (torch.from_numpy(values).to(model.device) for values in (halves.train, halves.test))
    labels, test_labels = (torch.from_numpy(v).to(model.device) for v in (halves.train_labels, halves.test_labels))
    settings: dict[str, Any] = {"num_classes": len(halves.classes), "steps": steps, "seed": how.seed}
    grid = train_heads(train[fitted], labels[fitted], parts, RATES, **settings)
    found = [
        {"blocks": heads.part.blocks, "patches": heads.part.patches, "rate": rate, "accuracy": accuracy, "loss": loss}
        for heads in grid
        for rate, accuracy, loss in zip(RATES, *held_out_scores(heads, train[held], labels[held]), strict=True)
    ]
    best = max(range(len(found)), key=lambda i: (found[i]["accuracy"], -found[i]["loss"]))
    (final,) = train_heads(train, labels, [parts[best // len(RATES)]], [found[best]["rate"]], **settings)
    correct = (logits(final, test)[:, 0].argmax(dim=1) == test_labels).cpu().numpy()
    low, high = bootstrap_interval(correct, seed=how.seed)
    chosen = {name: found[best][name] for name in ("blocks", "patches", "rate")}
    return {
        **halves.facts,
        "steps": steps,
        "linear": {"accuracy": float(correct.mean()), "low": low, "high": high, **chosen},
        "held_out": [entry | {"loss": entry["loss"] if math.isfinite(entry["loss"]) else None} for entry in found],
    }


def deepen(model: Extractor) -> tuple[Extractor, tuple[Part, ...]]:
    """The model with all that heads read as its feature [B, F], and which parts there are.

    The feature is the class tokens of the last blocks, oldest first, then the mean patch token of the last, so that
    each head reads adjoining columns. A model without class tokens gives its own pooling in their stead, once.
    """

    def read(images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        if model.layers is not None:
            return model.layers(images, max(BLOCKS))
        pooled, patches = model.encode(images)
        return [pooled], patches

    def encode(images: Tensor) -> tuple[Tensor, None]:
        tokens, patches = read(images)
        return torch.cat(tokens if patches is None else [*tokens, patches.mean(dim=1)], dim=1), None

    with torch.inference_mode():
        tokens, patches = read(torch.zeros(1, 3, model.size, model.size, device=model.device))
    width, depth = tokens[0].shape[1], len(tokens)
    ends = {False: depth * width}
    if patches is not None:
        ends[True] = depth * width + patches.shape[2]
    blocks = sorted({min(num, depth) for num in BLOCKS})
    parts = tuple(Part(num, mean, (depth - num) * width, end) for num in blocks for mean, end in ends.items())
    return dataclasses.replace(model, encode=encode, hash=digest(model.hash, "blocks", parts)), parts


@torch.no_grad()
def train_heads(
    x: Tensor, labels: Tensor, parts: Sequence[Part], rates: Sequence[float], *, num_classes: int, steps: int, seed: int
) -> list[Heads]:
    """One head for each part and learning rate, by SGD with momentum and a cosine to zero (DINOv2 app. B.3).

    x float32 [N, F], labels int64 [N]. The heads of a part are one matrix [H, L * C], so that a step is two products
    for each part whatever the number of rates. Heads of one part start alike, and no head depends on the others.
    """
    grid = [Heads(part, *_start(part, len(rates), num_classes, seed, x.device)) for part in parts]
    speeds = [[torch.zeros_like(w) for w in heads[1:]] for heads in grid]
    rate = torch.tensor(rates, device=x.device)[:, None]  # [L, 1]
    with Progress(f"linear probe, {len(parts) * len(rates)} heads", total=steps, unit="steps") as progress:
        for step, rows in enumerate(_batches(len(x), steps, seed)):
            rows = rows.to(x.device)
            batch, wanted = x[rows], F.one_hot(labels[rows], num_classes)[:, None]  # [B, F], [B, 1, C]
            decayed = rate * (1 + math.cos(math.pi * step / steps)) / 2
            for heads, speed in zip(grid, speeds, strict=True):
                slope = (logits(heads, batch).softmax(dim=2) - wanted) / len(rows)  # [B, L, C] of cross-entropy
                inputs = batch[:, heads.part.start : heads.part.stop]
                gradients = (inputs.T @ slope.flatten(1)).view_as(heads.weights), slope.sum(dim=0)
                for value, moving, gradient in zip(heads[1:], speed, gradients, strict=True):
                    value -= decayed * moving.mul_(MOMENTUM).add_(gradient)
            progress.advance(1)
    return grid


def logits(heads: Heads, x: Tensor) -> Tensor:
    """[B, L, C] of features x [B, F]."""
    inputs = x[:, heads.part.start : heads.part.stop]
    return (inputs @ heads.weights.flatten(1)).unflatten(1, heads.biases.shape) + heads.biases


def held_out_scores(heads: Heads, x: Tensor, labels: Tensor) -> tuple[list[float], list[float]]:
    """Accuracy and cross-entropy of each learning rate on x [M, F], labels [M]; a diverged head's loss is infinite."""
    right, loss = torch.zeros(2, len(heads.biases), device=x.device)
    for batch, wanted in zip(x.split(BATCH), labels.split(BATCH), strict=True):
        scores = logits(heads, batch).log_softmax(dim=2)  # [B, L, C]
        right += (scores.argmax(dim=2) == wanted[:, None]).sum(dim=0)
        loss -= scores[torch.arange(len(batch)), :, wanted].sum(dim=0)
    return (right / len(x)).tolist(), (loss / len(x)).nan_to_num(nan=math.inf).tolist()


def _start(part: Part, num_rates: int, num_classes: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights [H, L, C] from N(0, 0.01^2), equal for all rates, and biases of zero [L, C] (DINOv2's code)."""
    draw = torch_generator(seed, "linear heads", part.blocks, str(part.patches))
    weights = 0.01 * torch.randn(part.stop - part.start, 1, num_classes, generator=draw)
    return weights.repeat(1, num_rates, 1).to(device), torch.zeros(num_rates, num_classes, device=device)


def _batches(num: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Rows of each step: epochs in an order drawn anew, cut into whole batches."""
    size, done = min(BATCH, num), 0
    for epoch in range(steps):  # at most one epoch a step
        order = torch.randperm(num, generator=torch_generator(seed, "linear epoch", epoch))
        for rows in order.split(size)[: num // size]:
            if done == steps:
                return
            yield rows
            done += 1
