"""How fast a device multiplies matrices at best, and what share of that a run uses."""

import time

import torch

# Dense matrix products in bfloat16 or float16 (the sparse figures are twice these), FLOP/s: makers' data sheets.
# float32 without TF32 is far below; it is measured.
PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
    "A800": 312e12, "H800": 989e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A40": 150e12, "A10G": 70e12,
    "A10": 125e12, "A6000": 155e12, "A30": 165e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products of `dtype` on one device: the data sheet's, or measured in a fraction of a second.

    On a CPU it is what all threads of this process reach together.
    """
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAKS.items():  # the longer names stand before those that they contain
            if known in name:
                return peak
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype, *, repeats: int = 5) -> float:
    """FLOP/s of the fastest of some products of square matrices."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):  # the first also starts threads and picks kernels
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def throughput(
    images_per_second: float, *, batch_size: int, flops: float, tokens: float, peak: float
) -> dict[str, float]:
    """What a rate means: tokens of the student a second, and the share of `peak` FLOP/s of all processes (MFU).

    `flops` and `tokens` are those of a step of `batch_size` images (pretrain/cost.py); what is computed twice to save
    memory does not count, as in PaLM (Chowdhery et al. 2022, app. B).
    """
    steps_per_second = images_per_second / batch_size
    return {"tokens_per_second": steps_per_second * tokens, "mfu": steps_per_second * flops / peak}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
