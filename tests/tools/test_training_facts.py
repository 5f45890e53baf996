"""Curves of a training: those that the run has, under names that people read."""

import json

import yaml

from tools.training_facts import curves, training

ROWS = [
    {"step": step, "loss": 9.0 - step, "gram": 0.0, "grad_norm/backbone": 1.0, "grad_norm/dino_head": 2.0, "other": 1.0}
    for step in (1, 2)
] + [{"step": 3, "loss": 6.0, "knn": 0.5}]


def test_columns_have_names_and_what_had_no_part_is_left_out():
    assert curves(ROWS) == {
        "loss": "loss",
        "knn": "k-NN accuracy",
        "grad_norm/backbone": "gradient norm, backbone",
        "grad_norm/dino_head": "gradient norm, dino_head",
    }


def test_a_curve_needs_two_points_and_ends_at_its_last(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = training("Pretraining", tmp_path)
    assert [(chart.name, chart.last) for chart in found.charts] == [
        ("loss", "6"),
        ("gradient norm, backbone", "1"),
        ("gradient norm, dino_head", "2"),
    ]
    assert "polyline" in found.charts[0].svg
    assert found.why == "3 steps."


def test_steps_of_all_stages_are_asked_for(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = {
        "model": {"arch": "vit_tiny", "patch_size": 8},
        "train": {"steps": 3, "batch_size": 64},
        "crops": {"global_size": 64, "num_local": 4, "local_size": 32},
        "stages": [{"name": "gram", "steps": 2}],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert training("Training", tmp_path).why.startswith("vit_tiny/8, 3 of 5 steps so far of 64 images")
