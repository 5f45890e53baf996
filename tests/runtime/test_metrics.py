"""metrics.jsonl keeps exactly the rows of the run that counts, through kills and restarts."""

import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runtime.errors import UserError
from runtime.metrics import MetricsWriter, append_lines, read_metrics, require_wandb


def write(out, steps, *, start_step, tensorboard=False, shift=0.0):
    writer = MetricsWriter(out, start_step=start_step, tensorboard=tensorboard)
    for step in steps:
        writer.write(step, {"loss": 1 / step + shift})
    writer.close()


def test_rows_come_back_as_written(tmp_path):
    write(tmp_path / "run", [10, 20], start_step=0)
    assert read_metrics(tmp_path / "run") == [{"step": 10, "loss": 0.1}, {"step": 20, "loss": 0.05}]
    assert read_metrics(tmp_path / "elsewhere") == []


def test_a_resumed_run_has_the_lines_of_an_uninterrupted_one(tmp_path):
    write(tmp_path / "whole", range(1, 9), start_step=0)
    write(tmp_path / "killed", range(1, 7), start_step=0)  # checkpoint at 4, killed after 6
    write(tmp_path / "killed", range(5, 9), start_step=4)
    name = "metrics.jsonl"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_row_cut_off_by_a_kill_is_dropped(tmp_path):
    write(tmp_path, [1, 2], start_step=0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    write(tmp_path, [2], start_step=1)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_row_is_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, start_step=0, tensorboard=False)
    writer.write(1, {"loss": 2.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    writer.close()


def test_tensorboard_shows_each_step_once(tmp_path):
    write(tmp_path, range(1, 7), start_step=0, tensorboard=True)
    write(tmp_path, range(5, 9), start_step=4, tensorboard=True, shift=1.0)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    events = board.Scalars("loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [event.value for event in events] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 6 / 5, 7 / 6, 8 / 7, 9 / 8])


def test_lines_are_appended(tmp_path):
    append_lines(tmp_path / "skipped.txt", ["a: corrupt"])
    append_lines(tmp_path / "skipped.txt", [])
    append_lines(tmp_path / "skipped.txt", ("b: empty", "c: truncated"))
    assert (tmp_path / "skipped.txt").read_text() == "a: corrupt\nb: empty\nc: truncated\n"


def test_what_the_clock_says_can_be_left_out(tmp_path):
    writer = MetricsWriter(tmp_path, start_step=0, tensorboard=False)
    writer.write(1, {"loss": 2.0, "images_per_second": 31.0, "mfu": 0.2, "wait": 0.0, "memory_gb": 1.5})
    writer.close()
    assert read_metrics(tmp_path, clock=False) == [{"step": 1, "loss": 2.0}]


def test_wandb_that_is_not_installed_is_the_users_error(tmp_path, monkeypatch):
    require_wandb("")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"monitor.wandb: found 'birds', but the package wandb is not installed"):
        MetricsWriter(tmp_path / "run", start_step=0, tensorboard=False, wandb="birds")
    assert not (tmp_path / "run").exists()


def test_wandb_gets_the_rows_and_a_restart_goes_on_with_its_run(tmp_path, monkeypatch):
    """With a stand-in for the package, which needs an account: the calls that its documentation asks for."""
    calls = []
    run = SimpleNamespace(
        define_metric=lambda *args, **kwargs: calls.append(("define", args, kwargs)),
        log=lambda row: calls.append(("log", row)),
        finish=lambda: calls.append(("finish",)),
    )
    stub = SimpleNamespace(init=lambda **kwargs: calls.append(("init", kwargs)) or run, __spec__=object())
    monkeypatch.setitem(sys.modules, "wandb", stub)  # type: ignore[arg-type]
    out = tmp_path / "run"
    for start, steps in ((0, [1, 2]), (1, [2])):
        writer = MetricsWriter(out, start_step=start, tensorboard=False, wandb="birds", config={"seed": 3})
        for step in steps:
            writer.write(step, {"loss": 1.0})
        writer.close()
    first, again = (call[1] for call in calls if call[0] == "init")
    assert first == again
    assert first["project"] == "birds"
    assert (first["name"], first["dir"], first["resume"], first["config"]) == ("run", str(out), "allow", {"seed": 3})
    assert "mode" not in first  # WANDB_MODE decides
    assert [call[1]["train_step"] for call in calls if call[0] == "log"] == [1, 2, 2]
    assert [call[0] for call in calls] == ["init", "define", "log", "log", "finish", "init", "define", "log", "finish"]
