"""Presets of training: each is planned as `--dry-run` plans it, says what it must, and holds its source's numbers."""

import dataclasses
import functools
from importlib import resources

import pytest
import yaml

from pretrain.config import PretrainConfig
from pretrain.cost import flops_per_step
from pretrain.plan import UTILISATION, plan
from pretrain.schedules import at_step, scaled_lr
from pretrain.stages import resolve
from runtime.config import load, preset_names
from runtime.errors import UserError

PRESETS = ("tiny", "vits16_24gb", "vitb14_8gpu", "vitl14_8gpu", "vitl14_lvd", "vitg14_lvd", "vitl16_in1k_short",
           "vitl16_v3", "continue")  # fmt: skip


def preset(name: str, *overrides: str) -> PretrainConfig:
    return load(PretrainConfig, name, overrides)


def test_all_presets_of_training_are_listed():
    found = set()
    for name in preset_names():
        try:
            preset(name)
        except UserError:
            continue
        found.add(name)
    assert found == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_where_it_is_from_and_what_it_costs(name):
    text = resources.files("configs").joinpath(f"{name}.yaml").read_text()
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert text.startswith(head)
    for word in ("Source:", "Cost:", "Command:"):
        assert word in head, word
    assert "Expected" in head or name == "tiny"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_planned(name):
    """On the meta device: ViT-g takes as long as the tiny one."""
    given = ["continue_from=dinov2.pth"] if name == "continue" else []
    lines = plan(preset(name, "device=cpu", "train.precision=float32", *given))
    assert any("images at a time" in line for line in lines)
    assert sum("steps of" in line for line in lines) == len(resolve(preset(name)))


def test_a_frozen_backbone_needs_weights():
    """The preset `continue` as it is would train heads on noise."""
    with pytest.raises(UserError, match=r"optim\.freeze_backbone: found 0.1 of a backbone that knows nothing"):
        plan(preset("continue"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_states_only_what_differs(name):
    """A value that is the default anyway hides what the preset is about."""
    defaults = dataclasses.asdict(PretrainConfig())
    stated = yaml.safe_load(resources.files("configs").joinpath(f"{name}.yaml").read_text())
    same = [
        f"{group}.{key}"
        for group, values in stated.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if value == defaults[group][key]
    ]
    assert same == []


@pytest.mark.parametrize(("name", "peak"), [
    ("vitl16_in1k_short", 5.66e-3), ("vitl14_lvd", 3.46e-4), ("vitg14_lvd", 3.46e-4),
    ("vitl16_v3", 5e-5 * 4 * 2**0.5),
])  # fmt: skip
def test_peak_rates_are_the_sources(name, peak):
    config = preset(name)
    assert scaled_lr(config.optim, config.train.batch_size) == pytest.approx(peak, rel=2e-3)


def test_schedules_of_the_published_runs_in_steps():
    """method: 12,500 of 125,000 and 100,000 of 625,000 steps of warm-up, 37,500 of rising temperature, 1,250 frozen."""
    for name, warmup in (("vitl16_in1k_short", 12_500), ("vitg14_lvd", 100_000)):
        config = preset(name)
        values = functools.partial(at_step, optim=config.optim, teacher=config.teacher, train=config.train)
        assert values(warmup - 1).lr == pytest.approx(scaled_lr(config.optim, config.train.batch_size))
        assert values(warmup - 2).lr < values(warmup - 1).lr > values(warmup + 10).lr
        assert values(37_499).temperature < values(37_500).temperature == 0.07
        assert (values(1_249).last_layer_lr, values(1_250).last_layer_lr > 0) == (0.0, True)


@pytest.mark.parametrize(("name", "gpu_hours"), [
    ("vitl16_in1k_short", 32 * 24), ("vitl14_lvd", 96 * 3.3 * 24), ("vitg14_lvd", 22_016),
])  # fmt: skip
def test_published_times_are_what_the_plan_would_say_of_an_a100(name, gpu_hours):
    """312 TFLOP/s at the assumed share, without the high-resolution phase, to a fifth."""
    config = preset(name)
    share = next(iter(UTILISATION.values()))
    planned = config.train.steps * flops_per_step(config) / (312e12 * share) / 3600
    assert planned == pytest.approx(gpu_hours, rel=0.2)
