"""Checkpoints are whole or absent, through kills, full disks and damage; and they say where a run stands."""

import copy
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import Unreadable, Writer, checkpoints, load, load_newest, save
from pretrain.state import TrainState
from runtime.errors import Failed, UserError
from runtime.world import World

WORLD = World()


def build(step: int = 0, seed: int = 0) -> TrainState:
    """A state as after `step` steps of some model, with moments that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    student: Any = torch.nn.Sequential(torch.nn.Linear(200, 100), torch.nn.Linear(100, 200))
    for parameter in student.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    ema = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.5)
    optimizer.step()
    optimizer.zero_grad()
    return TrainState(step, student, ema, optimizer)


def flat(state: TrainState) -> dict[str, torch.Tensor]:
    found = {}

    def walk(prefix, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}/{key}", inner)
        elif isinstance(value, torch.Tensor):
            found[prefix] = value.detach().clone()

    walk("", state.state_dict())
    return found


def names(out: Path) -> list[str]:
    return [folder.name for folder in checkpoints(out)]


def test_everything_comes_back(tmp_path):
    state = build(step=7)
    with Writer(tmp_path, keep=2, world=WORLD) as writer:
        writer.save(state, data="abc", stage="gram", reader={"shard": 3, "buffer": [1, 2]})
    other = build(seed=1)
    position = load(other, checkpoints(tmp_path)[0], world=WORLD, data="abc")
    assert (position.step, position.stage, position.readers) == (7, "gram", ({"shard": 3, "buffer": [1, 2]},))
    assert other.step == 7
    before, after = flat(state), flat(other)
    assert before.keys() == after.keys()
    assert any("exp_avg" in name for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(path.name[0] != "." for path in (tmp_path / "checkpoints").iterdir())


def test_without_a_reader_the_position_says_none(tmp_path):
    save(build(step=3), tmp_path, keep=1, world=WORLD, data="abc")
    assert json.loads((checkpoints(tmp_path)[0] / "position.json").read_text()) == {
        "step": 3, "data": "abc", "stage": "", "readers": [],
    }  # fmt: skip


def test_a_position_of_an_older_version_is_read(tmp_path):
    state = build(step=3)
    save(state, tmp_path, keep=1, world=WORLD, data="abc")
    (checkpoints(tmp_path)[0] / "position.json").write_text('{"step": 3, "data": "abc"}')
    assert load(state, checkpoints(tmp_path)[0], world=WORLD, data="abc").step == 3


def test_files_are_on_the_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    """Else a power loss leaves a folder of that name with empty files."""
    order: list[str] = []
    fsync, rename = os.fsync, Path.rename
    link = Path("/proc/self/fd")
    monkeypatch.setattr("os.fsync", lambda fd: (order.append(Path(os.readlink(link / str(fd))).name), fsync(fd)))
    monkeypatch.setattr("pathlib.Path.rename", lambda a, b: (order.append(f"-> {Path(b).name}"), rename(a, b)))
    save(build(step=3), tmp_path, keep=1, world=WORLD, data="abc")
    named = order.index("-> step-00000003")
    files = {path.name for path in checkpoints(tmp_path)[0].iterdir()}
    assert files <= set(order[:named])
    assert ".step-00000003.tmp" in order[:named]
    assert order[named + 1] == "checkpoints"


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_while_an_old_one_is_removed_leaves_no_part_of_it(tmp_path, monkeypatch, moment):
    """shutil.rmtree of a folder under its own name would leave one that looks whole."""
    save(build(step=1), tmp_path, keep=1, world=WORLD, data="abc")

    def die(folder: Path, **_: object) -> None:
        if not folder.exists():
            return
        if moment == "after":
            os.unlink(folder / ".metadata")
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "pretrain.checkpoint.shutil.rmtree", lambda path, **_: die(Path(path)) if path.exists() else None
    )
    with pytest.raises(KeyboardInterrupt):
        save(build(step=2), tmp_path, keep=1, world=WORLD, data="abc")
    assert names(tmp_path) == ["step-00000002"]


def test_the_newest_stay_and_the_multiples_for_ever(tmp_path):
    state = build()
    with Writer(tmp_path, keep=2, keep_every=4, world=WORLD) as writer:
        for step in range(1, 11):
            state.step = step
            writer.save(state, data="abc")
    assert names(tmp_path) == ["step-00000004", "step-00000008", "step-00000009", "step-00000010"]


def test_in_the_background_the_state_of_the_save_is_written(tmp_path):
    """What the optimizer does after `save` returned must not reach the file."""
    state = build(step=5)
    before = flat(state)
    with Writer(tmp_path, keep=2, world=WORLD, background=True) as writer:
        writer.save(state, data="abc")
        with torch.no_grad():
            for parameter in [*state.student.parameters(), *state.ema.parameters()]:
                parameter.fill_(9.0)
        state.step = 6
        writer.wait()
        assert names(tmp_path) == ["step-00000005"]
        writer.save(state, data="abc")
    assert names(tmp_path) == ["step-00000005", "step-00000006"]
    load(state, checkpoints(tmp_path)[0], world=WORLD, data="abc")
    after = flat(state)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_leftovers_of_a_killed_save_are_removed_at_the_start(tmp_path):
    save(build(step=1), tmp_path, keep=3, world=WORLD, data="abc")
    for name in (".step-00000002.tmp", ".step-00000000.old"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "__0_0.distcp").write_bytes(b"half")
    assert names(tmp_path) == ["step-00000001"]
    Writer(tmp_path, keep=3, world=WORLD)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("background", [False, True])
def test_a_failing_write_leaves_the_last_good_checkpoint(tmp_path, background):
    state = build(step=1)
    save(state, tmp_path, keep=1, world=WORLD, data="abc")
    good = flat(state)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # every longer write fails, as on a full disk
    try:
        state.step = 2
        with pytest.raises(Failed, match=r"step 2 could not be written.*free.*\n.*newest whole one is step-00000001"):  # noqa: SIM117
            with Writer(tmp_path, keep=1, world=WORLD, background=background) as writer:
                writer.save(state, data="abc")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    load(state, checkpoints(tmp_path)[0], world=WORLD, data="abc")
    assert all(torch.equal(good[name], value) for name, value in flat(state).items())


def test_no_room_for_the_last_small_file_is_no_checkpoint_either(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pretrain.checkpoint.write_json", full)
    with pytest.raises(Failed, match=r"No space left on device\n  the newest whole one is none"):
        save(build(step=1), tmp_path, keep=1, world=WORLD, data="abc")
    assert list((tmp_path / "checkpoints").iterdir()) == []


FULL_DISK = """
from test_checkpoint import WORLD, Path, build, save
state = build()
for state.step in range(1, 20):
    save(state, Path("disk"), keep=20, world=WORLD, data="abc")
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    """On a 6 MB tmpfs, in a mount namespace of its own."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine gives no mount namespace to an ordinary user")
    (tmp_path / "disk").mkdir()
    (tmp_path / "fill.py").write_text(FULL_DISK)
    shell = f"mount -t tmpfs -o size=6m none disk && {sys.executable} fill.py; ls -A disk/checkpoints"
    paths = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[2])))
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", shell], cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths},
        capture_output=True, text=True,
    )  # fmt: skip
    left = done.stdout.split()
    assert left == [f"step-{step:08d}" for step in range(1, len(left) + 1)] != []
    assert f"Failed: checkpoint of step {len(left) + 1} could not be written" in done.stderr
    assert f"newest whole one is {left[-1]}; make room" in done.stderr


def damage(folder: Path, how: str) -> None:
    data = folder / "__0_0.distcp"
    if how == "cut data":
        os.truncate(data, data.stat().st_size // 2)
    elif how == "no data":
        data.unlink()
    elif how == "cut metadata":
        os.truncate(folder / ".metadata", 100)
    elif how == "no metadata":
        (folder / ".metadata").unlink()
    elif how == "no position":
        (folder / "position.json").unlink()
    elif how == "empty position":
        (folder / "position.json").write_text("")


@pytest.mark.parametrize("how", ["cut data", "no data", "cut metadata", "no metadata", "no position", "empty position"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, how, capsys):
    state = build(step=1)
    save(state, tmp_path, keep=3, world=WORLD, data="abc")
    good = flat(state)
    newer = build(step=2, seed=1)
    save(newer, tmp_path, keep=3, world=WORLD, data="abc")
    damage(tmp_path / "checkpoints" / "step-00000002", how)
    with pytest.raises(Unreadable):
        load(build(seed=2), tmp_path / "checkpoints" / "step-00000002", world=WORLD, data="abc")
    other = build(seed=2)
    position = load_newest(other, tmp_path, world=WORLD, data="abc")
    assert position is not None
    assert position.step == other.step == 1
    assert all(torch.equal(good[name], value) for name, value in flat(other).items())
    assert "cannot be read" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["broken-step-00000002", "step-00000001"]


def test_when_none_can_be_read_the_run_does_not_begin_anew_in_silence(tmp_path):
    save(build(step=1), tmp_path, keep=3, world=WORLD, data="abc")
    damage(checkpoints(tmp_path)[0], "cut data")
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        load_newest(build(), tmp_path, world=WORLD, data="abc")
    assert (tmp_path / "checkpoints" / "broken-step-00000001").is_dir()


def test_a_run_without_checkpoints_begins(tmp_path):
    assert load_newest(build(), tmp_path, world=WORLD, data="abc") is None


def test_other_data_is_the_users_error_and_breaks_nothing(tmp_path):
    save(build(step=1), tmp_path, keep=3, world=WORLD, data="abc")
    with pytest.raises(UserError, match="trained on other shards"):
        load_newest(build(), tmp_path, world=WORLD, data="xyz")
    assert names(tmp_path) == ["step-00000001"]
