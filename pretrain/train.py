"""A training run from configuration to export: build, resume, loop, checkpoint, export. Read from top to bottom."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from runtime.config import build, claim_output
from runtime.environment import describe as describe_environment
from runtime.errors import Stopped, UserError
from runtime.files import read_json, require_space, write_json
from runtime.metrics import MetricsWriter, read_metrics
from runtime.progress import say
from runtime.signals import StopRequest
from runtime.world import World, open_world

from .build import Learner, build_learner, describe
from .checkpoint import checkpoints, load, save, step_name
from .config import PretrainConfig
from .data.config import check as check_crops
from .data.shards import ShardSet
from .export import export_learner
from .loop import training_steps
from .optim import build_optimizer
from .parallel.shard import shard
from .state import TrainState

Hook = Callable[[TrainState], dict[str, float]]


def pretrain(config: PretrainConfig, *, hooks: Sequence[Hook] = (), stop: StopRequest | None = None) -> Path:
    """Train, or go on where `config.out` stands; returns the export folder of the last step.

    `hooks` are called with the state at every checkpoint; what they return joins the metrics. Raises UserError for a
    wrong config or data, Stopped when `stop` was set and the state is saved.
    """
    return train(config, hooks=hooks, stop=stop)


def train(
    config: PretrainConfig,
    *,
    teacher: Learner | None = None,
    hooks: Sequence[Hook] = (),
    stop: StopRequest | None = None,
) -> Path:
    """`pretrain` with the student's EMA as teacher, or distillation from a frozen `teacher`."""
    out = Path(config.out)
    export = out / "exports" / step_name(config.train.steps)
    shards = ShardSet.open(config.data.shards)
    check(config, shards)
    with open_world(config.device) as world:
        if world.is_main:
            claim_output(out, config)
        world.barrier()
        if (export / "card.json").is_file():
            return export
        state = start(config, world)
        if world.is_main:
            size = sum(p.numel() for p in state.student.parameters()) * 16
            require_space(out, (config.checkpoint.keep + 1) * size, what=f"{config.checkpoint.keep} checkpoints")
            write_json(out / "environment.json", describe_environment() | {"device": str(world.device)})
            times = config.train.steps * config.train.batch_size / len(shards)
            say(f"{describe(config)}; {len(shards)} images, each seen {times:.3g} times")
        resume(state, out, world=world, data=shards.fingerprint)
        if teacher is not None:
            teacher = teacher.to(world.device)
        run_steps(state, teacher, config, shards, world=world, hooks=hooks, stop=stop)
        rows = read_metrics(out)
        data = {"fingerprint": shards.fingerprint, "samples": len(shards), "shards": list(config.data.shards)}
        export_learner(state.ema, export, config, step=state.step, data=data, metrics=rows[-1] if rows else {})
        write_status(out, "done", state, config, world)
        world.barrier()
    return export


def check(config: PretrainConfig, shards: ShardSet) -> None:
    """Raise UserError for values that no schema can refuse."""
    check_crops(config.crops, config.mask, patch_size=config.model.patch_size)
    for name, value in (("train.steps", config.train.steps), ("train.batch_size", config.train.batch_size),
                        ("checkpoint.every", config.checkpoint.every), ("checkpoint.keep", config.checkpoint.keep),
                        ("train.log_every", config.train.log_every)):  # fmt: skip
        if value < 1:
            raise UserError(f"{name}: found {value}; expected at least 1")
    if not len(shards):
        raise UserError(f"data.shards: no image in {', '.join(config.data.shards)}")


def start(config: PretrainConfig, world: World) -> TrainState:
    """Step 0: a fresh student and an EMA equal to it, sharded where there are several processes."""
    if config.train.batch_size % world.size:
        raise UserError(f"train.batch_size: {config.train.batch_size} does not divide over {world.size} processes")
    student = build_learner(config.model, config.heads, image_size=config.crops.global_size, seed=config.seed).to(
        world.device
    )
    ema = copy.deepcopy(student).eval().requires_grad_(False)
    if world.mesh is not None:
        shard(student, world.mesh)
        shard(ema, world.mesh)
    return TrainState(0, student, ema, build_optimizer(student, config.optim))


def resume(state: TrainState, out: Path, *, world: World, data: str) -> None:
    """Go on from the newest checkpoint, if there is one."""
    found = checkpoints(out)
    if found:
        load(state, found[-1], world=world, data=data)
        if world.is_main:
            say(f"going on from {found[-1]}")


def run_steps(
    state: TrainState,
    teacher: Learner | None,
    config: PretrainConfig,
    shards: ShardSet,
    *,
    world: World,
    hooks: Sequence[Hook],
    stop: StopRequest | None,
) -> None:
    """All steps that are left, with metrics, hooks and checkpoints."""
    out = Path(config.out)
    metrics = MetricsWriter(out, start_step=state.step) if world.is_main else None
    try:
        for row, asked_to_stop in training_steps(state, teacher, config, shards, world=world, stop=stop):
            last = state.step == config.train.steps
            due = state.step % config.checkpoint.every == 0 or last or asked_to_stop
            if due:
                for hook in hooks:
                    row |= hook(state)
            if metrics is not None and (due or state.step % config.train.log_every == 0):
                metrics.write(state.step, row)
            if due:
                save(state, out, keep=config.checkpoint.keep, world=world, data=shards.fingerprint)
                write_status(out, "stopped" if asked_to_stop and not last else "running", state, config, world)
            if asked_to_stop and not last:
                raise Stopped(f"step {state.step} of {config.train.steps} is saved in {out}")
    finally:
        if metrics is not None:
            metrics.close()


def write_status(out: Path, status: str, state: TrainState, config: PretrainConfig, world: World) -> None:
    if world.is_main:
        write_json(out / "status.json", {"status": status, "step": state.step, "steps": config.train.steps})


def restore(checkpoint: Path, config_file: Path) -> tuple[Learner, PretrainConfig, int, str]:
    """The EMA teacher of a checkpoint on the CPU, with the run's config, its step and its data fingerprint."""
    config = build(PretrainConfig, yaml.safe_load(config_file.read_text()))
    world = World()
    state = start(config, world)
    position = read_json(checkpoint / "position.json")
    load(state, checkpoint, world=world, data=position["data"])
    return state.ema, config, state.step, position["data"]
