"""The loop: batches in, steps made, rows of metrics out."""

import functools
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.environment import cores
from runtime.metrics import append_lines
from runtime.progress import Progress
from runtime.seeding import key
from runtime.signals import StopRequest
from runtime.world import World

from .build import Learner
from .config import PretrainConfig
from .data.loader import batches
from .data.shards import ShardSet
from .schedules import at_step
from .state import TrainState
from .step import NonFiniteLoss, train_step


def training_steps(
    state: TrainState,
    teacher: Learner | None,
    config: PretrainConfig,
    shards: ShardSet,
    *,
    world: World,
    stop: StopRequest | None,
) -> Iterator[tuple[dict[str, float], bool]]:
    """Make the steps that are left; after each, yield its row of metrics and whether a stop was asked for.

    The row is full at the steps that are logged or checkpointed, and empty in between, where nothing waits for
    the device.
    """
    precision = choose_precision(config.train.precision, world.device)
    if world.device.type == "cpu":
        torch.set_num_threads(threads(world.local_size))
    loader = batches(
        shards,
        crops=config.crops,
        mask=config.mask,
        seed=config.seed,
        batch_size=config.train.batch_size,
        world_rank=world.rank,
        world_size=world.size,
        start_step=state.step,
        num_steps=config.train.steps - state.step,
        num_workers=config.workers,
        patch_size=config.model.patch_size,
    )
    clock = Clock()
    with Progress("step", total=config.train.steps, unit="steps", done=state.step) as progress:
        note = ""
        for batch in clock.waiting(loader):
            values = at_step(state.step, config.optim, config.teacher, config.train)
            seed_step(config.seed, state.step, world)
            batch = batch.to(world.device)
            logged = is_logged(state.step + 1, config)
            try:
                measured = train_step(
                    state,
                    teacher or state.ema,
                    batch,
                    values,
                    weights=config.loss,
                    clip=config.optim.clip,
                    precision=precision,
                    group=world.group,
                    all_patches=teacher is not None,
                    measure=logged,
                )
            except NonFiniteLoss as error:
                raise RuntimeError(
                    f"step {state.step + 1}, rank {world.rank}: {error}; the optimizer has not moved and the last "
                    f"checkpoint is good\n  samples {batch.samples.tolist()[:16]}; try a lower optim.lr"
                ) from error
            clock.count(len(batch.samples) * world.size)
            if batch.skipped:
                append_lines(Path(config.out) / "skipped.txt", batch.skipped)
            row: dict[str, float] = {}
            asked = stop_asked(stop, world)
            if logged or asked:
                row = mean_over_processes(measured, world)
                row |= {"lr": values.lr, "weight_decay": values.weight_decay, "momentum": values.momentum}
                row |= {"temperature": values.temperature, **clock.rates(), "memory_gb": peak_memory_gb(world.device)}
                note = (
                    f"loss {row['loss']:.3f} (dino {row['dino']:.3f} ibot {row['ibot']:.3f} koleo {row['koleo']:.3f}) "
                    f"{row['images_per_second']:.0f} img/s wait {row['wait']:.0%}"
                )
            if world.is_main:
                progress.advance(1, note)
            yield row, asked


def threads(processes: int) -> int:
    """Compute threads of each of some training processes on this machine's CPU: half of its cores, at least 1.

    The other half is the loader's. Threads that share cores with it wait for each other at every small operation: on
    2 busy cores two threads ran at a tenth of the speed of one. The number of workers has no say, because the number
    of threads decides the order of sums, and results must not depend on workers.
    """
    return max(1, cores() // (2 * processes))


def is_logged(step: int, config: PretrainConfig) -> bool:
    """Whether the row of `step` (counted from 1) goes into metrics.jsonl."""
    return step % config.train.log_every == 0 or step % config.checkpoint.every == 0 or step == config.train.steps


def seed_step(seed: int, step: int, world: World) -> None:
    """Drop path draws from torch's generator: name its state by the step, so that a resumed run draws the same."""
    torch.manual_seed(key(seed, "drop path", step, world.rank) % 2**63)


def stop_asked(stop: StopRequest | None, world: World) -> bool:
    """Whether any process was asked to stop; all agree, because they save together."""
    if world.group is None:
        return bool(stop)
    flag = torch.tensor(float(bool(stop)), device=world.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=world.group)
    return bool(flag)


def mean_over_processes(measured: dict[str, torch.Tensor], world: World) -> dict[str, float]:
    """Each value, averaged over the processes: they see equal parts of the batch."""
    values = torch.stack([value.float() for value in measured.values()])
    if world.group is not None:
        dist.all_reduce(values, group=world.group)
    return dict(zip(measured, (values / world.size).tolist(), strict=True))


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products (AVX512-BF16 or AMX); elsewhere they are emulated."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the device multiplies it faster than float32."""
    if name == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_multiplies_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far, in GB: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Clock:
    """Images per second and the share of time spent waiting for the loader, since the last row."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.waited, self.images = 0.0, 0

    def waiting(self, loader: Iterator) -> Iterator:
        """The batches of `loader`, with the time until each one added to `waited`."""
        iterator = iter(loader)
        while True:
            before = time.perf_counter()
            batch = next(iterator, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def count(self, images: int) -> None:
        self.images += images

    def rates(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.start
        rates = {"images_per_second": self.images / seconds, "wait": self.waited / seconds}
        self.start, self.waited, self.images = time.perf_counter(), 0.0, 0
        return rates
