"""`troodon pretrain` watches over a run: k-NN in the loop, Weights & Biases, a report with curves."""

import importlib.util

import pytest
import yaml

from runtime.errors import EXIT_DONE, EXIT_USER
from runtime.metrics import read_metrics
from tools import cli

CONFIG = {
    "device": "cpu",
    "workers": 0,
    "data": {"shards": ["embedded:pool/quick-0000.tar"]},
    "model": {"arch": "vit_pico", "patch_size": 8},
    "crops": {"global_size": 16, "local_size": 8, "num_local": 1},
    "heads": {"num_prototypes": 16, "hidden": 16, "bottleneck": 8},
    "train": {"steps": 5, "batch_size": 4, "log_every": 3},
    "checkpoint": {"every": 4},
}


@pytest.fixture
def pretrain(tmp_path, capsys):
    """A function: overrides -> (exit status, stderr, folder of the run)."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    out = tmp_path / "run"

    def call(*overrides: str):
        status = cli.main(["pretrain", str(tmp_path / "config.yaml"), f"out={out}", *overrides])
        return status, capsys.readouterr().err, out

    return call


@pytest.mark.parametrize(
    ("overrides", "logged", "judged"),
    [([], [3, 4, 5], [4, 5]), (["monitor.every=2"], [2, 3, 4, 5], [2, 4, 5])],
)
def test_knn_is_measured_when_it_is_asked_for(pretrain, overrides, logged, judged):
    """At checkpoints, or every so many steps; at the last step in any case."""
    status, said, out = pretrain("monitor.knn=embedded:eval", *overrides)
    assert status == EXIT_DONE, said
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == logged
    assert [row["step"] for row in rows if "knn" in row] == judged
    assert all(0 <= row.get("knn", 0) <= 1 for row in rows)
    page = (out / "report.html").read_text()
    assert "k-NN accuracy" in page
    assert "gradient norm, backbone" in page


def test_without_labels_there_is_the_rank(pretrain):
    _, _, out = pretrain()
    assert all(row["rank"] >= 1 and "knn" not in row for row in read_metrics(out))


def test_a_folder_that_is_not_there_is_the_users_error(pretrain, tmp_path):
    status, said, out = pretrain(f"monitor.knn={tmp_path / 'nowhere'}")
    assert status == EXIT_USER
    assert f"monitor.knn: no folder {tmp_path / 'nowhere'}" in said
    assert not out.exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed here")
def test_wandb_that_is_not_installed_is_said_before_anything_is_done(pretrain):
    status, said, out = pretrain("monitor.wandb=birds")
    assert status == EXIT_USER
    assert "monitor.wandb: found 'birds', but the package wandb is not installed" in said
    assert not out.exists()
