"""What the losses gather from all processes: two gloo processes against one, in one spawned pair.

Run as a script this file is one of the two processes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pretrain.loss.koleo import koleo_loss
from pretrain.loss.targets import sinkhorn_shift, update_center

ROOT = Path(__file__).parents[2]
SPLITS = {"even": (4, 4), "uneven": (5, 3), "nothing here": (8, 0), "nothing anywhere": (0, 0)}
KOLEO_GROUPS = (0, 3)  # groups of 3 rows reach over the border between two processes of 4 rows


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, w, center = (torch.randn(shape, generator=generator) for shape in ((8, 6), (5, 6), (5,)))
    return F.normalize(z, dim=-1), w, center


def compute(rows: dict[str, torch.Tensor], group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    """Everything that has a `group`, for each set of rows of this process."""
    _, w, center = data()
    out = {}
    for name, z in rows.items():
        out[f"sinkhorn, {name}"] = sinkhorn_shift(z, w, temperature=0.07, group=group)
        out[f"center, {name}"] = update_center(center, z, w, group=group)
    for size in KOLEO_GROUPS:
        z = rows["even"].clone().requires_grad_()
        loss = koleo_loss(z, group=group, rows=size)
        (out[f"koleo gradient, {size}"],) = torch.autograd.grad(loss, z)
        out[f"koleo, {size}"] = loss.detach()
    return out


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    z, _, _ = data()
    rows = {name: z[: sum(split)].split(split)[rank] for name, split in SPLITS.items()}
    torch.save(compute(rows, dist.group.WORLD), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """Results of both processes."""
    folder = tmp_path_factory.mktemp("losses")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pair = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=env) for rank in range(2)]
    assert [process.wait(120) for process in pair] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one() -> dict[str, torch.Tensor]:
    z, _, _ = data()
    return compute({name: z[: sum(split)] for name, split in SPLITS.items()}, None)


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("what", ["sinkhorn", "center"])
def test_statistics_are_those_of_all_rows(one, two, what, name):
    for process in two:
        assert torch.allclose(process[f"{what}, {name}"], one[f"{what}, {name}"], atol=1e-5)


@pytest.mark.parametrize("size", KOLEO_GROUPS)
def test_koleo_and_its_averaged_gradient_are_those_of_all_rows(one, two, size):
    """Data parallelism averages gradients; a row's gradient is in the graph of its own process only."""
    for process in two:
        assert process[f"koleo, {size}"] == pytest.approx(one[f"koleo, {size}"].item(), rel=1e-5)
    got = torch.cat([process[f"koleo gradient, {size}"] for process in two]) / 2
    assert torch.allclose(got, one[f"koleo gradient, {size}"], atol=1e-5)
    assert got.abs().max() > 0


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
