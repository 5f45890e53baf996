"""The whole pipeline on a few dozen real images: from a folder to a report, stopped, repeated, refused."""

import shutil
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from runtime.config import load
from runtime.files import locate, read_json
from tools import pipeline
from tools.cli import main
from tools.pipeline import RunConfig

SMALL = [
    "device=cpu",
    "workers=0",
    "bootstrap.train.steps=2",
    "bootstrap.train.batch_size=4",
    "pretrain.train.steps=3",
    "pretrain.train.batch_size=4",
    "distill.train.steps=2",
    "distill.train.batch_size=4",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A user's folder: 40 pictures in two nested folders, one of them a broken download."""
    folder = tmp_path_factory.mktemp("images")
    with tarfile.open(locate("embedded:pool/quick-0000.tar")) as tar:
        pictures = [m for m in tar if m.name.endswith(".jpg")][:40]
        for i, member in enumerate(pictures):
            place = folder / ("one" if i % 2 else "two/deeper")
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i}.jpg").write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    shutil.copy(locate("embedded:corrupt/files/not_found.jpg"), folder / "one" / "broken.jpg")
    return folder


@pytest.fixture(scope="module")
def own_run(images, tmp_path_factory) -> Path:
    """A run on that folder, with no seeds, no labels and no evaluation set."""
    out = tmp_path_factory.mktemp("own") / "run"
    assert main(["run", "quickstart", f"source.paths=[{images}]", f"out={out}", *SMALL]) == 0
    return out


def test_own_images_need_no_seeds_labels_or_evaluation_set(own_run):
    manifest = pq.read_table(own_run / "curate" / "manifest.parquet").to_pylist()
    assert len(manifest) == 41
    assert [row["fate"] for row in manifest if "broken" in row["key"]] == ["rejected"]
    assert {row["fate"] for row in manifest} <= {"kept", "duplicate", "rejected"}
    assert not (own_run / "evaluate" / "knn.json").exists()
    models = [row["model"] for row in read_json(own_run / "evaluate" / "labelfree.json")]
    assert models == ["pretrained", "distilled small", "random weights", "color thumbnail"]
    page = (own_run / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert len(page) > 10_000


def test_a_second_run_changes_nothing_and_is_quick(own_run, images, capsys):
    before = {path: path.stat().st_mtime_ns for path in own_run.rglob("*.safetensors")}
    assert main(["run", "quickstart", f"source.paths=[{images}]", f"out={own_run}", *SMALL]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in own_run.rglob("*.safetensors")}
    assert "pretrained" in capsys.readouterr().out


def test_another_config_in_the_same_folder_is_refused_with_the_difference(own_run, images, capsys):
    arguments = ["run", "quickstart", f"source.paths=[{images}]", f"out={own_run}", *SMALL, "seed=1"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "belongs to another config" in error
    assert "seed: 0 -> 1" in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["source.paths=[{tmp}/nowhere]"], "nowhere"),
        (["source.paths=[{tmp}/empty]"], "no image"),
        (["source.paths=[{tmp}/broken]"], "none of 3 images can be used"),
        (["source.paths=[]"], "source.paths: missing"),
        (["source.path=[x]"], "did you mean source.paths?"),
        (["pretrain.seed=3"], "pretrain.seed: give seed at the top"),
        (["pretrain.model.arch=vit_smal"], "did you mean vit_small?"),
        (["seed=often"], "seed"),
        (["pretrain.model.patch_size=7"], "model.patch_size 7"),
    ],
)
def test_wrong_input_is_refused_in_a_few_lines_and_leaves_no_folder(tmp_path, capsys, overrides, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for i in range(3):
        (tmp_path / "broken" / f"{i}.jpg").write_bytes(b"<html>404</html>" + bytes([i]))
    out = tmp_path / "run"
    given = [override.format(tmp=tmp_path) for override in overrides]
    assert main(["run", "quickstart", f"out={out}", *SMALL, *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    lines = [line for line in error.splitlines() if line.startswith(("troodon", "  "))]
    assert 1 <= len(lines) <= 3
    if "can be used" not in message:
        assert not out.exists()


def test_two_images_only(images, tmp_path):
    """Enough for nothing but a proof that nothing breaks."""
    folder = tmp_path / "two"
    folder.mkdir()
    for path in sorted(images.rglob("*.jpg"))[1:3]:
        shutil.copy(path, folder)
    assert main(["run", "quickstart", f"source.paths=[{folder}]", f"out={tmp_path / 'run'}", *SMALL]) == 0
    assert pq.read_table(tmp_path / "run" / "curate" / "manifest.parquet")["fate"].to_pylist() == ["kept", "kept"]


def test_embedded_seeds_and_labels_stay_with_the_embedded_images_only():
    shipped = pipeline.resolve(load(RunConfig, "quickstart"))
    own = pipeline.resolve(load(RunConfig, "quickstart", ["source.paths=[/my/images]"]))
    assert shipped.seeds.paths
    assert shipped.guard.paths
    assert shipped.evaluate.data
    assert (own.seeds.paths, own.guard.paths, own.evaluate.data) == ((), (), "")


def test_dry_run_prints_config_and_plan_and_makes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["run", "quickstart", f"out={out}", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "source:" in printed
    assert "# distil student small" in printed
    assert not out.exists()


def test_a_cpu_build_of_torch_beside_torchvisions_cuda_build_is_named(monkeypatch, tmp_path, capsys):
    from runtime import environment

    monkeypatch.setattr(environment, "package_versions", lambda: {"torch": "2.13.0+cpu", "torchvision": "0.28.0"})
    assert main(["run", "quickstart", f"out={tmp_path / 'run'}"]) == 2
    assert "is a CPU build beside torchvision" in capsys.readouterr().err


def test_a_full_disk_is_one_clear_line(monkeypatch, images, tmp_path, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    out = tmp_path / "run"
    assert main(["run", "quickstart", f"source.paths=[{images}]", f"out={out}", *SMALL]) == 2
    assert "are free" in capsys.readouterr().err
