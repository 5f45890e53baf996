"""Scores of a backbone while it trains: hooks for `pretrain.train`, on images decoded once and kept in memory.

B images, N train images, M test images.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imaging.decode import Rejected
from pretrain.export import MEAN, STD
from runtime.errors import UserError
from runtime.progress import say

from .data import Images, centre_crop, open_labelled
from .knn import knn_accuracy
from .labelfree import rankme
from .models import COVERAGE

Probe = Callable[[nn.Module], dict[str, float]]


def knn_probe(data: str, *, image_size: int, k: int = 10, temperature: float = 0.07, batch_size: int = 256) -> Probe:
    """A function backbone -> {"knn": accuracy, "rankme": rank} on the labelled folder `data`.

    backbone: has `forward_features(images [B, 3, H, W])` with a field `cls` [B, D]; `image_size` in pixels is what it
    is fed. Meant for sets that fit in memory at one byte per sample. Raises UserError when `data` is no such folder.
    """
    task = open_labelled(data)
    train, train_rows = _views(task.train, image_size)
    test, test_rows = _views(task.test, image_size) if task.test else (None, train_rows)
    train_labels, test_labels = task.train_labels[train_rows], task.test_labels[test_rows]

    def probe(backbone: nn.Module) -> dict[str, float]:
        training = backbone.training
        backbone.eval()
        known = _features(backbone, train, batch_size)
        judged = None if test is None else _features(backbone, test, batch_size)
        backbone.train(training)
        accuracy = knn_accuracy(known, train_labels, judged, test_labels, k=k, temperature=temperature)
        return {"knn": accuracy, "rankme": rankme(torch.from_numpy(known))}

    return probe


def hook(probe: Probe) -> Callable[[Any], dict[str, float]]:
    """The probe as a hook of the training loop: a function of its state, judging the EMA teacher.

    Where weights are sharded over processes, each of them judges all images: the forward pass gathers the weights of a
    block on all processes together, so that none may stay away, and it takes no longer than on one alone.
    """
    return lambda state: probe(state.ema.backbone)


def knn_hooks(data: str, *, image_size: int, key: str = "monitor.knn") -> list[Callable[[Any], dict[str, float]]]:
    """k-NN accuracy of the EMA teacher on the labelled folder `data`, as hooks; none where no folder is named.

    Raises UserError, naming `key` of the config, when `data` is no such folder.
    """
    try:
        return [hook(knn_probe(data, image_size=image_size))] if data else []
    except UserError as error:
        raise UserError(f"{key}: {str(error).removeprefix('evaluate: ')}") from error


def _views(images: Images, size: int) -> tuple[Tensor, np.ndarray]:
    """Centre crops uint8 [B, 3, size, size] of the images that decode, and their rows [B]."""
    views, rows = [], []
    for row in range(len(images)):
        name, data = images.read(row)
        try:
            view = centre_crop(data, size=size, coverage=COVERAGE)
        except Rejected as error:
            say(f"k-NN: skipped {name}: {error}")
            continue
        views.append(torch.from_numpy(np.array(view)).permute(2, 0, 1))
        rows.append(row)
    return torch.stack(views), np.array(rows)


@torch.no_grad()
def _features(backbone: nn.Module, views: Tensor, batch_size: int) -> np.ndarray:
    """CLS features float32 [B, D] of uint8 views [B, 3, H, W]."""
    device = next(backbone.parameters()).device
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    batches = [
        backbone.forward_features((batch.to(device) / 255 - mean) / std).cls.float().cpu()  # pyright: ignore[reportCallIssue]
        for batch in views.split(batch_size)
    ]
    return torch.cat(batches).numpy()
