"""Two processes write one checkpoint together, in the background too, and fail, fall back and resume together.

One spawned pair for all of it; each process leaves what it saw in a file.
"""

import copy
import json
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pretrain.checkpoint import Writer, checkpoints, load, load_newest
from pretrain.state import TrainState
from runtime.errors import Failed
from runtime.world import World


def build(mesh, *, value: float, step: int = 0) -> TrainState:
    """A state whose weights and moments are `value`; sharded where there is a mesh."""
    student = torch.nn.Sequential(torch.nn.Linear(200, 100), torch.nn.Linear(100, 201))
    ema = copy.deepcopy(student)
    for module in (student, ema):
        if mesh is not None:
            fully_shard(module, mesh=mesh)
        for parameter in module.parameters():
            torch.nn.init.constant_(parameter, value)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0)
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()
    return TrainState(step, student, ema, optimizer)  # type: ignore[arg-type]


def values(state: TrainState) -> list[float]:
    """Smallest and largest of all weights and first moments of this process."""
    tensors = [*state.student.parameters(), *state.ema.parameters()]
    tensors += [moments["exp_avg"] * 10 for moments in state.optimizer.state.values()]
    local = torch.cat([getattr(t, "_local_tensor", t).detach().flatten() for t in tensors])
    return [round(float(local.min()), 5), round(float(local.max()), 5)]


def names(out: Path) -> list[str]:
    return [folder.name for folder in checkpoints(out)]


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    world, seen = World(rank, 2, rank, 2, mesh=mesh), {}

    out = folder / "together"
    state = build(mesh, value=1.0, step=1)
    with Writer(out, keep=9, world=world, background=True) as writer:
        writer.save(state, data="abc", stage="first", reader=[rank, 7])
        for parameter in (*state.student.parameters(), *state.ema.parameters()):
            torch.nn.init.constant_(parameter, 5.0)
    seen["background"] = names(out)
    state = build(mesh, value=2.0, step=2)
    with Writer(out, keep=9, world=world) as writer:
        writer.save(state, data="abc")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for background in (False, True):  # only the second process has no room
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        state.step = 3
        try:
            with Writer(out, keep=9, world=world, background=background) as writer:
                writer.save(state, data="abc")
        except Failed as error:
            seen[f"failed {background}"] = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        dist.barrier()
        seen[f"left {background}"] = sorted(path.name for path in (out / "checkpoints").iterdir())

    dist.barrier()
    if rank == 0:
        (out / "checkpoints" / "step-00000002" / "__1_0.distcp").write_bytes(b"damaged")
    dist.barrier()
    other = build(mesh, value=0.0)
    position = load_newest(other, out, world=world, data="abc")
    assert position is not None
    seen |= {"step": other.step, "readers": list(position.readers), "values": values(other)}
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("pair")
    mp.spawn(work, args=(folder,), nprocs=2)  # type: ignore[attr-defined]
    return folder, [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(2)]


pytestmark = pytest.mark.slow


def test_a_background_save_is_there_at_the_end(pair):
    assert [seen["background"] for seen in pair[1]] == [["step-00000001"]] * 2


@pytest.mark.parametrize("background", [False, True])
def test_what_fails_on_one_fails_on_both_and_leaves_the_last_good_one(pair, background):
    for seen in pair[1]:
        assert "checkpoint of step 3 could not be written" in seen[f"failed {background}"]
        assert "newest whole one is step-00000002" in seen[f"failed {background}"]
        assert seen[f"left {background}"] == ["step-00000001", "step-00000002"]


def test_both_fall_back_to_the_same_one_with_the_state_of_its_save(pair):
    folder, both = pair
    assert [seen["step"] for seen in both] == [1, 1]
    assert [seen["values"] for seen in both] == [[1.0, 1.0]] * 2
    assert [seen["readers"] for seen in both] == [[[0, 7], [1, 7]]] * 2
    assert (folder / "together" / "checkpoints" / "broken-step-00000002").is_dir()


def test_one_process_reads_what_two_wrote(pair):
    state = build(None, value=0.0)
    load(state, pair[0] / "together" / "checkpoints" / "step-00000001", world=World(), data="abc")
    assert values(state) == [1.0, 1.0]
