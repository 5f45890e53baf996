"""Checkpoints: DCP folders that appear whole or not at all, readable by any number of processes."""

import re
import shutil
import warnings
from pathlib import Path

from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from runtime.errors import UserError
from runtime.files import read_json, write_json
from runtime.world import World

from .state import TrainState


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (out / "checkpoints").glob("step-*")
    return sorted(folder for folder in found if re.fullmatch(r"step-\d{8}", folder.name))


def save(state: TrainState, out: Path, *, keep: int, world: World, data: str) -> None:
    """Write `checkpoints/step-.../` (all processes take part) and drop all but the newest `keep`."""
    final = out / "checkpoints" / step_name(state.step)
    if final.is_dir():
        return
    temporary = final.with_name(f".{final.name}.tmp")
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    world.barrier()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed")
        dcp_save(state.state_dict(), checkpoint_id=temporary, no_dist=world.mesh is None)
    if world.is_main:
        write_json(temporary / "position.json", {"step": state.step, "data": data})
        temporary.rename(final)
        for old in checkpoints(out)[:-keep]:
            shutil.rmtree(old)
    world.barrier()


def load(state: TrainState, folder: Path, *, world: World, data: str) -> None:
    """Fill `state` from a checkpoint. Raises UserError when it was made from other data."""
    position = read_json(folder / "position.json")
    if position["data"] != data:
        raise UserError(
            f"data.shards: {folder} was trained on other shards (fingerprint {position['data']}, now {data})\n"
            f"  give the shards it was trained on, or another out=..."
        )
    values = state.state_dict()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed")
        dcp_load(values, checkpoint_id=folder, no_dist=world.mesh is None)
    state.load_state_dict(values)
    state.step = position["step"]
