"""A run that is killed or asked to stop goes on as if nothing had happened, to the last bit.

benchmarks/bench_resume.py does the same at more points of a longer run.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pretrain.config import PretrainConfig
from pretrain.train import pretrain
from runtime.config import build
from runtime.errors import Stopped
from runtime.files import locate
from runtime.metrics import read_metrics

STEPS = 12
CONFIG = {
    "device": "cpu",
    "workers": 0,
    "data": {"shards": ["embedded:pool"]},
    "model": {
        "arch": "vit_pico", "patch_size": 8, "init": "fan_in", "layerscale": 1.0, "num_registers": 1,
        "position": "rope", "rope_jitter": 1.5, "drop_path": 0.3,
    },
    "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
    "heads": {"num_prototypes": 32, "hidden": 32, "bottleneck": 16},
    "optim": {"lr": 2.0e-3, "reference_batch": 8},
    "train": {"steps": STEPS, "batch_size": 8, "accumulate": 2, "precision": "float32", "log_every": 1},
    "checkpoint": {"every": 3, "keep": 2},
}  # fmt: skip
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(out: Path, *overrides: str) -> list[str]:
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(CONFIG))
    return [sys.executable, "-m", "tools.cli", "pretrain", str(config), f"out={out}", *overrides]


def run(out: Path, *overrides: str) -> None:
    done = subprocess.run(command(out, *overrides), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def send_at(out: Path, step: int, number: signal.Signals, *overrides: str) -> tuple[int, str]:
    """Start, signal the process group once `step` is logged; returns the exit status and what was said."""
    process = subprocess.Popen(
        command(out, *overrides), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    while not any(row["step"] >= step for row in read_metrics(out)) and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, number)
    said = process.communicate()[0]
    return process.returncode, said


def lines(out: Path) -> list[str]:
    return [json.dumps(row) for row in read_metrics(out, clock=False)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("resume") / "whole"
    run(out)
    assert len(lines(out)) == STEPS
    return out


@pytest.mark.slow
def test_killed_twice(whole, tmp_path):
    out = tmp_path / "run"
    for step in (2, 5):  # before the first checkpoint, and two steps after it
        assert send_at(out, step, signal.SIGKILL)[0] == -signal.SIGKILL
    run(out)
    assert lines(out) == lines(whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_it_saves_at_once_and_leaves_with_75(whole, tmp_path, number):
    """With rows and checkpoints far apart: no step is lost, and the stop leaves no row that was not asked for."""
    out, apart = tmp_path / "run", ["checkpoint.every=100", "train.log_every=4"]
    status, said = send_at(out, 4, number, *apart)
    assert status == 75, said
    assert f"{number.name}: stopping" in said
    assert f"is saved in {out}" in said
    assert json.loads((out / "status.json").read_text())["status"] == "stopped"
    assert len(list((out / "checkpoints").iterdir())) == 1
    run(out, *apart)
    assert lines(out) == lines(whole)[3::4]


@pytest.mark.slow
def test_two_processes_go_on_as_one(tmp_path):
    """One of two processes is asked to stop, both save; one alone goes on with the same losses to float tolerance.

    Stochastic depth is off, because it is drawn for each process.
    """
    steady = ["model.drop_path=0.0"]
    alone, changed = tmp_path / "alone", tmp_path / "changed"
    run(alone, *steady)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pair = [
        subprocess.Popen(
            command(changed, *steady), env=ENVIRONMENT | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]  # fmt: skip
    while len(read_metrics(changed)) < 4 and pair[0].poll() is None:
        time.sleep(0.005)
    pair[1].terminate()
    assert [process.wait(timeout=120) for process in pair] == [75, 75]
    made = len(read_metrics(changed))
    assert 4 <= made < STEPS
    run(changed, *steady)
    for a, b in zip(read_metrics(alone, clock=False), read_metrics(changed, clock=False), strict=True):
        assert a["step"] == b["step"]
        for name in ("loss", "dino", "ibot", "koleo", "grad_norm/backbone", "mean_entropy/cls", "rank"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-3), (a["step"], name)


class StopAfter:
    """A stop request that becomes true after some steps, as a signal would."""

    def __init__(self, steps: int):
        self.steps = steps

    def __bool__(self) -> bool:
        self.steps -= 1
        return self.steps < 0


@pytest.mark.parametrize("after", [1, 3, 4])
def test_streams_and_stages_go_on_where_they_stood(tmp_path, after):
    """Shards behind a URL keep a position; a stop at the end of a stage must not hand it to the next."""
    pool = f"file://{locate('embedded:pool')}/quick-0000.tar"
    values = CONFIG | {
        "data": {"shards": [pool], "shuffle_buffer": 16},
        "train": CONFIG["train"] | {"steps": 4},
        "stages": [{"name": "second", "steps": 3, "set": {"optim.lr": 1.0e-3}}],
    }
    whole, stopped = (build(PretrainConfig, values | {"out": str(tmp_path / name)}) for name in ("whole", "stopped"))
    pretrain(whole)
    with pytest.raises(Stopped):
        pretrain(stopped, stop=StopAfter(after - 1))  # type: ignore[arg-type]
    pretrain(stopped)
    assert len(lines(tmp_path / "whole")) == 7
    assert lines(tmp_path / "whole") == lines(tmp_path / "stopped")
