"""The share of a device's peak: names that contain each other, and a rate that is measured."""

import pytest
import torch

from pretrain.rate import PEAKS, measured_flops, peak_flops, throughput

CPU = torch.device("cpu")


def test_a_step_a_second_of_half_the_peak():
    found = throughput(64.0, batch_size=64, flops=5e11, tokens=7000, peak=1e12)
    assert found == {"tokens_per_second": 7000, "mfu": 0.5}


def test_the_measured_rate_is_that_of_the_machine():
    """A product of 512 x 512 matrices cannot be much faster than the rate says, nor the rate beyond any CPU."""
    assert 1e8 < measured_flops(CPU, torch.float32, repeats=2) < 1e14
    assert peak_flops(CPU, torch.float32) > 1e8


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla T4", 65e12),
    ],
)
def test_known_devices(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak


def test_no_name_hides_a_longer_one():
    names = list(PEAKS)
    assert [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a in b] == []
