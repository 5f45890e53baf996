"""A training run from configuration to export: build, resume, loop, checkpoint, export. Read from top to bottom."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import yaml

from runtime.config import build, claiming, to_dict
from runtime.environment import describe as describe_environment
from runtime.errors import Stopped, UserError
from runtime.files import read_json, require_space, write_json
from runtime.metrics import MetricsWriter, read_metrics, require_wandb
from runtime.progress import say
from runtime.signals import StopRequest
from runtime.world import World, open_world

from .build import Learner, build_learner, materialise
from .checkpoint import Writer, load, load_newest, step_name
from .config import PretrainConfig
from .cost import checkpoint_bytes, describe
from .data.config import DataConfig
from .data.config import check as check_crops
from .data.sources import Data, open_data
from .ema import update_ema
from .export import describe_data, export_learner, read_origin
from .gram import check as check_gram
from .gram import is_snapshot, snapshot_folder
from .loop import choose_precision, training_steps
from .model.attention import choose_backend
from .optim import build_optimizer
from .parallel.prepare import prepare
from .public import start_from
from .schedules import check as check_schedules
from .stages import Stage, resolve
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
    out, stages = Path(config.out), resolve(config)
    export = out / "exports" / step_name(stages[-1].end)
    check(stages)
    with open_world(config.device) as world:
        with claiming(out, config) if world.is_main else nullcontext():
            world.barrier()
            if (export / "card.json").is_file():
                return export
            if not world.is_main:
                world.barrier()  # the main process scans tars without an index, the others find what it wrote
            opened = {stage.config.data: open_data(stage.config.data, index=out / "index") for stage in stages}
            if world.is_main:
                world.barrier()
            fingerprint = "+".join(data.fingerprint for data in opened.values())
            precision = choose_precision(config.train.precision, world.device)
            attention = choose_backend(config.model.attention, device=world.device, dtype=precision)
            state = start(config, world)
            position = load_newest(state, out, world=world, data=fingerprint)
            if position is None and config.continue_from:
                start_from(state.student, config, out, write=world.is_main)
                update_ema(state.ema, state.student, 0.0)
            if world.is_main:
                size = (config.checkpoint.keep + 1) * checkpoint_bytes(config)
                require_space(out, size, what=f"{config.checkpoint.keep} checkpoints")
                write_json(out / "environment.json", describe_environment() | {"device": str(world.device)})
                say(f"{describe(config)}, attention by {attention.name}; {images_seen(stages, opened)}")
        if teacher is not None:
            teacher = teacher.to(world.device)
        # Every stage reads from the start of its data: where a stream stands matters to the stage that it was left in.
        left = position if position and position.readers else None
        for stage in stages:
            data = opened[stage.config.data]
            if state.step < stage.end:
                reader = None
                if left and left.stage == stage.name:  # of another number of processes: the stream sees it by itself
                    reader = left.readers[min(world.rank, len(left.readers) - 1)]
                run_stage(
                    state, stage, stages, data, fingerprint=fingerprint, reader=reader, teacher=teacher, world=world,
                    hooks=hooks, stop=stop,
                )  # fmt: skip
            folder = out / "exports" / step_name(stage.end)
            if state.step == stage.end and not (folder / "card.json").is_file():
                keep_export(state, folder, stage, data)
        write_status(out, "done", state, stages[-1], stages, world)
        world.barrier()
    return export


def check(stages: Sequence[Stage]) -> None:
    """Raise UserError for values that no schema can refuse, in any stage."""
    check_gram(stages)
    for stage in stages:
        config = stage.config
        check_crops(config.crops, config.mask, patch_size=config.model.patch_size)
        check_schedules(config.optim, config.teacher)
        for name, value in (("train.steps", config.train.steps), ("train.batch_size", config.train.batch_size),
                            ("train.accumulate", config.train.accumulate), ("train.log_every", config.train.log_every),
                            ("checkpoint.every", config.checkpoint.every), ("checkpoint.keep", config.checkpoint.keep),
                            ):  # fmt: skip
            if value < 1:
                raise UserError(f"{name}: found {value}; expected at least 1")
        if config.optim.freeze_backbone and not config.continue_from:
            raise UserError(
                f"optim.freeze_backbone: found {config.optim.freeze_backbone} of a backbone that knows nothing\n"
                f"  give the weights to start from (continue_from=...), or optim.freeze_backbone=0"
            )
        if config.model.in_chans != 3:
            raise UserError(f"model.in_chans: found {config.model.in_chans}; the loader of shards gives images of 3")
    require_wandb(stages[0].config.monitor.wandb)


def start(config: PretrainConfig, world: World) -> TrainState:
    """Step 0: a fresh student and an EMA equal to it, prepared for this world before their weights exist."""
    train, stages = config.train, resolve(config)
    for stage in stages:
        batch_size, parts = stage.config.train.batch_size, world.size * stage.config.train.accumulate
        if batch_size % parts:
            raise UserError(
                f"train.batch_size: {batch_size} does not divide over {world.size} processes x train.accumulate "
                f"{stage.config.train.accumulate} (stage {stage.name})\n  try {max(parts, batch_size // parts * parts)}"
            )
    student = build_learner(
        config.model, config.heads, image_size=config.crops.global_size, seed=config.seed, device="meta"
    )
    ema = copy.deepcopy(student).eval().requires_grad_(False)
    precision = choose_precision(train.precision, world.device)
    prepare(student, ema, world=world, train=train, parallel=config.parallel, precision=precision)
    for learner in (student, ema):
        materialise(learner, device=world.device, seed=config.seed, init=config.model.init)
    state = TrainState(0, student, ema, build_optimizer(student, config.optim))
    if any(stage.config.loss.targets == "center" for stage in stages):
        for name, head in (("cls", student.dino_head), ("patches", student.patch_head)):
            state.centers[name] = torch.zeros(head.prototypes.weight.shape[0], device=world.device)
    state.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == torch.float16)
    return state


def images_seen(stages: Sequence[Stage], opened: Mapping[DataConfig, Data]) -> str:
    """How many images there are, and how often the run sees each."""
    counts = [data.num_images for data in opened.values() if data.num_images is not None]
    if len(counts) < len(opened):
        return "remote shards: nobody has counted their images"
    seen = sum(stage.config.train.steps * stage.config.train.batch_size for stage in stages)
    return f"{sum(counts)} images, each seen {seen / sum(counts):.3g} times"


def run_stage(
    state: TrainState,
    stage: Stage,
    stages: Sequence[Stage],
    data: Data,
    *,
    fingerprint: str,
    reader: Sequence[int] | None,
    teacher: Learner | None,
    world: World,
    hooks: Sequence[Hook],
    stop: StopRequest | None,
) -> None:
    """The steps of a stage that are left, with metrics, hooks, checkpoints and Gram snapshots."""
    config, out = stage.config, Path(stage.config.out)
    keeping = config.checkpoint
    metrics = None
    if world.is_main:
        metrics = MetricsWriter(out, start_step=state.step, wandb=config.monitor.wandb, config=to_dict(config))
    background = keeping.background and world.device.type == "cuda"
    with Writer(out, keep=keeping.keep, keep_every=keeping.keep_every, world=world, background=background) as writer:
        try:
            made = training_steps(state, stage, stages, data, teacher=teacher, reader=reader, world=world, stop=stop)
            for row, asked_to_stop, reader in made:
                last = state.step == stage.end
                if last or state.step % (config.monitor.every or keeping.every) == 0:
                    for hook in hooks:
                        row |= hook(state)
                if metrics is not None and row:
                    metrics.write(state.step, row)
                if is_snapshot(state.step, stage):
                    keep_export(state, snapshot_folder(state.step, out), stage, data)
                if last or asked_to_stop or state.step % keeping.every == 0:
                    writer.save(state, data=fingerprint, stage=stage.name, reader=reader)
                    unfinished = asked_to_stop and state.step < stages[-1].end
                    write_status(out, "stopped" if unfinished else "running", state, stage, stages, world)
                    if unfinished:
                        writer.wait()
                        raise Stopped(f"step {state.step} of {stages[-1].end} is saved in {out}")
        finally:
            if metrics is not None:
                metrics.close()


def keep_export(state: TrainState, folder: Path, stage: Stage, data: Data) -> None:
    """Export the EMA as it is now."""
    out = Path(stage.config.out)
    rows = read_metrics(out)
    export_learner(
        state.ema,
        folder,
        stage.config,
        step=state.step,
        data=describe_data(stage.config.data, fingerprint=data.fingerprint, samples=data.num_images),
        metrics=rows[-1] if rows else {},
        centers=state.centers,
        origin=read_origin(out),
    )


def write_status(
    out: Path, status: str, state: TrainState, stage: Stage, stages: Sequence[Stage], world: World
) -> None:
    if world.is_main:
        steps = stages[-1].end
        write_json(out / "status.json", {"status": status, "step": state.step, "steps": steps, "stage": stage.name})


def restore(checkpoint: Path, config_file: Path) -> tuple[TrainState, PretrainConfig, str]:
    """The state of a checkpoint on the CPU, with the config of its stage and its data fingerprint."""
    config = build(PretrainConfig, yaml.safe_load(config_file.read_text()))
    world = World()
    state = start(config, world)
    position = read_json(checkpoint / "position.json")
    load(state, checkpoint, world=world, data=position["data"])
    stage = next(stage for stage in resolve(config) if state.step <= stage.end)
    return state, stage.config, position["data"]
