"""Training a copy-detection network from pictures to a model folder; goes on where its output folder stands."""

import datetime
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from runtime.config import claiming, to_dict
from runtime.environment import describe as describe_environment
from runtime.errors import Stopped, UserError
from runtime.files import read_json, replacing, write_json
from runtime.metrics import MetricsWriter
from runtime.progress import Progress, say
from runtime.signals import StopRequest
from runtime.world import choose_device

from ..threads import torch_threads
from .config import CopyTrainConfig
from .data import Pictures, Views, load_pictures
from .edits import STRONG, edit
from .loss import copy_loss
from .model import KIND, MEAN, STD, CopyNetwork, save_network, unit_vectors

LOG_EVERY = 20  # steps


def describe(config: CopyTrainConfig) -> str:
    """The plan in one line."""
    network = build_network(config)
    parameters = sum(p.numel() for p in network.parameters())
    return (
        f"copy network of {parameters / 1e6:.2f} M parameters at {config.network.size} px, "
        f"{config.optim.steps} steps of {config.optim.batch_size} images -> {config.out}/model"
    )


def train_copy(config: CopyTrainConfig, *, stop: StopRequest | None = None) -> Path:
    """Train, or go on where `config.out` stands; the folder of the model.

    Raises UserError for a wrong config or data, Stopped when `stop` was set and the state is saved.
    """
    check(config)
    out = Path(config.out)
    with claiming(out, config):
        if (out / "status.json").is_file() and read_json(out / "status.json")["status"] == "done":
            return out / "model"
        pictures = load_pictures(config)
    write_json(out / "environment.json", describe_environment())
    run = _Run(config, pictures, out)
    run.resume()
    with torch_threads(max(1, torch.get_num_threads() - config.workers)):
        run.all_steps(stop)
    return out / "model"


def check(config: CopyTrainConfig) -> None:
    """Raise UserError for values that no schema can refuse."""
    for key, value, least in (
        ("optim.steps", config.optim.steps, 1),
        ("optim.batch_size", config.optim.batch_size, 2),
        ("source.held_out", config.source.held_out, 1),
        ("network.size", config.network.size, 32),
        ("network.dim", config.network.dim, 2),
        ("workers", config.workers, 0),
    ):
        if value < least:
            raise UserError(f"{key}: found {value}; expected at least {least}")


def build_network(config: CopyTrainConfig) -> CopyNetwork:
    """With fresh weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return CopyNetwork(config.network.channels, config.network.layers, config.network.dim)


def rate(step: int, config: CopyTrainConfig) -> float:
    """Learning rate of a step: linear warm-up, then a cosine to zero."""
    optim = config.optim
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    share = (step - optim.warmup_steps) / max(1, optim.steps - optim.warmup_steps)
    return optim.lr * (1 + math.cos(math.pi * share)) / 2


def entropy_weight(step: int, config: CopyTrainConfig) -> float:
    """Grows over the first quarter: at full weight from the start, vectors spread before views find their partners."""
    return config.loss.entropy_weight * min(1.0, 4 * step / config.optim.steps)


class _Run:
    """Everything that changes from step to step."""

    def __init__(self, config: CopyTrainConfig, pictures: Pictures, out: Path):
        self.config, self.pictures, self.out = config, pictures, out
        self.device = choose_device(config.device)
        network = build_network(config).to(self.device)
        network.trunk.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.network: nn.Module = network
        self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.optim.ema), use_buffers=True)
        decayed = [p for p in network.parameters() if p.ndim > 1]
        others = [p for p in network.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
            fused=True,
        )
        self.step = 0
        self.seconds = 0.0
        self.train_rows, self.held_out = pictures.split(config.source.held_out, config.seed)
        self.views = Views(pictures, self.train_rows, config)

    def all_steps(self, stop: StopRequest | None) -> None:
        """The steps that are left, with checkpoints and metrics. Raises Stopped."""
        total = self.config.optim.steps
        metrics = MetricsWriter(self.out, start_step=self.step)
        saved = time.monotonic()
        progress = Progress("step", total=total, unit="steps", done=self.step)
        try:
            with progress:
                for views in self.batches():
                    row = self.advance(views)
                    last, asked = self.step == total, bool(stop)
                    if self.step % LOG_EVERY == 0:
                        metrics.write(self.step, row)
                    progress.advance(1, " ".join(f"{name} {value:.3g}" for name, value in row.items()))
                    if last or asked or time.monotonic() - saved > 60 * self.config.checkpoint_minutes:
                        self.save("done" if last else "stopped" if asked else "running")
                        saved = time.monotonic()
                    if asked and not last:
                        raise Stopped(f"step {self.step} of {total} is saved in {self.out}")
        finally:
            metrics.close()

    def batches(self) -> Iterator[Tensor]:
        """The views of every step that is left, made ahead in worker processes."""
        workers = self.config.workers
        return iter(
            DataLoader(
                self.views,
                batch_size=None,
                sampler=range(self.step, self.config.optim.steps),
                num_workers=workers,
                prefetch_factor=4 if workers else None,
                worker_init_fn=_start_worker,
            )
        )

    def advance(self, views: Tensor) -> dict[str, float]:
        """One step; loss and images per second."""
        start = time.monotonic()
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.step, config)
        self.network.train()
        vectors = unit_vectors(self.network, views.to(self.device).flatten(0, 1))
        first, second = vectors.chunk(2)
        loss, contrast = copy_loss(
            first, second, temperature=config.loss.temperature, entropy_weight=entropy_weight(self.step, config)
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.average.update_parameters(self.network)
        self.step += 1
        values = {"loss": loss.item(), "contrast": contrast.item()}
        spent = time.monotonic() - start
        self.seconds += spent
        return values | {"img/s": len(vectors) / spent}

    def save(self, status: str) -> None:
        """The state to go on from, and the model as it is now."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "data": self.pictures.fingerprint,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with replacing(self.out / "checkpoint.pt") as temporary:
            torch.save(state, temporary)
        network = self.average.module
        assert isinstance(network, CopyNetwork)
        measured = self.measure(network.eval())
        say(f"step {self.step}: " + ", ".join(f"{name} {value:.3f}" for name, value in measured.items()))
        save_network(network, self.out / "model", self.card(measured))
        write_json(self.out / "status.json", {"status": status, "step": self.step, "steps": self.config.optim.steps})

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one. Raises UserError when it was made from other pictures."""
        path = self.out / "checkpoint.pt"
        if not path.is_file():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["data"] != self.pictures.fingerprint:
            raise UserError(
                f"source.paths: {path} was trained on other images\n  give those, or another out=... to start afresh"
            )
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        say(f"going on from step {self.step}")

    def measure(self, network: nn.Module) -> dict[str, float]:
        """How often a strong edit of a held-out picture finds it among all pictures, first or among the first ten."""
        others = self.train_rows[: len(self.held_out)]
        others = others[torch.arange(len(self.held_out)).numpy() % len(others)]
        edits = edit(
            self.pictures.large[self.held_out],
            self.pictures.plain[others],
            self.views.overlays,
            STRONG,
            seed=self.config.seed,
            purpose="measure",
            step=0,
        )
        with torch.inference_mode():
            queries = unit_vectors(network, edits.to(self.device))
            base = torch.cat(
                [unit_vectors(network, chunk.to(self.device)) for chunk in self.pictures.plain.split(1024)]
            )
        similarity = queries @ base.T
        own = similarity.gather(1, torch.from_numpy(self.held_out).to(self.device)[:, None])
        rank = (similarity > own).sum(1)
        return {
            "held_out_top1": (rank < 1).float().mean().item(),
            "held_out_top10": (rank < 10).float().mean().item(),
            "held_out_cosine": own.mean().item(),
            "nearest_other_cosine": similarity.masked_fill(similarity == own, -1).amax(1).mean().item(),
        }

    def card(self, measured: dict[str, float]) -> dict:
        """What card.json says of the model."""
        config = to_dict(self.config)
        return {
            "format": 1,
            "kind": KIND,
            "model": config["network"],
            "mean": MEAN,
            "std": STD,
            "step": self.step,
            "recipe": {
                "source": "SSCD (Pizzi et al. 2022, arXiv 2202.10261), own code and weights",
                **{key: config[key] for key in ("seed", "loss", "optim")},
                "hours": round(self.seconds / 3600, 3),
                "device": self.device.type,
            },
            "data": {
                "about": self.config.source.about,
                "pictures": len(self.pictures.ids),
                "held_out": len(self.held_out),
                "fingerprint": self.pictures.fingerprint,
                "sources": self.pictures.sources,
            },
            "metrics": {name: round(value, 4) for name, value in measured.items()},
            "date": datetime.date.today().isoformat(),
        }


def _start_worker(_: int) -> None:
    """A request to stop comes to the whole process group; the network's process decides when its workers end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)  # the network's step takes longer than the edits of the next one
