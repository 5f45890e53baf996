"""`troodon doctor`: what this machine and this installation offer, and what to do about what is wrong."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from runtime.environment import check_python, check_torch, describe
from runtime.errors import EXIT_DONE, EXIT_FAILED, UserError
from runtime.files import human_bytes


def report(*, as_json: bool) -> int:
    """Print the examination to stdout; 1 when something stands in the way of every verb, else 0."""
    found = examine()
    print(json.dumps(found, indent=1) if as_json else as_text(found))
    return EXIT_FAILED if found["problems"] else EXIT_DONE


def examine(versions: dict[str, str | None] | None = None) -> dict[str, Any]:
    """Everything `doctor` says, as plain values; `versions` stands in for the installed packages in tests."""
    about = describe()
    if versions is not None:
        about["packages"] = versions
    problems = [*_complaints(check_python), *_complaints(check_torch, about["packages"])]
    notes = []
    found: dict[str, Any] = {
        **about,
        "memory": _memory(),
        "disk_free": {str(Path.cwd()): shutil.disk_usage(Path.cwd()).free},
        "slurm": shutil.which("sbatch") is not None,
    }
    if not problems:
        found["devices"], found["precision"] = _devices()
        found["attention"] = _attention()
        found["faiss"] = _faiss()
    if about["packages"].get("faiss-cpu") and about["packages"].get("faiss-gpu-cuvs"):
        notes.append("faiss-cpu and faiss-gpu-cuvs share one folder: pip uninstall both, then install the one you want")
    if about["packages"].get("xformers"):
        notes.append("xformers is installed; training uses it only when asked to, with model.attention=xformers")
    return {**found, "notes": notes, "problems": problems}


def as_text(found: dict[str, Any]) -> str:
    """The examination for a person."""
    packages = {name: version for name, version in found["packages"].items() if version}
    rows = [
        ("troodon", found["troodon"]),
        ("python", f"{found['python']}  {sys.executable}"),
        ("system", found["platform"]),
        ("processor", f"{found['processor']}, {found['cores']} cores for this process"),
        ("memory", human_bytes(found["memory"]) if found["memory"] else "unknown"),
        *(("disk free", f"{human_bytes(free)} in {folder}") for folder, free in found["disk_free"].items()),
    ]
    if "devices" in found:
        rows += [("device", f"{device['name']}  {device['detail']}") for device in found["devices"]]
        rows += [("precision", found["precision"]["says"]), ("attention", found["attention"])]
        rows += [("faiss", found["faiss"]["says"])]
    rows += [
        ("packages", ", ".join(f"{name} {version}" for name, version in packages.items())),
        ("absent", ", ".join(name for name, version in found["packages"].items() if not version) or "nothing"),
        (
            "slurm",
            "sbatch found"
            if found["slurm"]
            else "no sbatch here: troodon launch --cluster local works, slurm does not",
        ),
        *(("note", note) for note in found["notes"]),
        *(("problem", problem) for problem in found["problems"]),
        (
            "verdict",
            "troodon cannot run before the problem is solved" if found["problems"] else "ready: troodon quickstart",
        ),
    ]
    return "\n".join(f"{name:<10} {text}".replace("\n", "\n" + " " * 11) for name, text in rows)


def _complaints(check: Any, *arguments: Any) -> list[str]:
    try:
        check(*arguments)
    except UserError as error:
        return [str(error)]
    return []


def _memory() -> int | None:
    """Bytes of main memory; None where the system does not say."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _devices() -> tuple[list[dict[str, str]], dict[str, Any]]:
    """GPUs if any, else the CPU; and the precision that training takes, beside the CPU's measured rates."""
    import torch

    from pretrain.loop import choose_precision
    from runtime.world import choose_device

    chosen = str(choose_precision("auto", choose_device("auto"))).removeprefix("torch.")
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        detail = [f"{human_bytes(card.total_memory)}, compute capability {card.major}.{card.minor}" for card in cards]
        devices = [{"name": card.name, "detail": text} for card, text in zip(cards, detail, strict=True)]
        return devices, {"chosen": chosen, "says": f"{chosen} in training"}
    rates = {name: round(cpu_rate(getattr(torch, name)), 1) for name in ("float32", "bfloat16")}
    says = f"{chosen} in training; this CPU: float32 {rates['float32']}, bfloat16 {rates['bfloat16']} GFLOP/s"
    if max(rates, key=lambda name: rates[name]) != chosen:
        says += f"\ntrain.precision={'float32' if chosen == 'bfloat16' else 'bfloat16'} would be faster here"
    return [{"name": "cpu", "detail": f"{torch.get_num_threads()} threads"}], {"chosen": chosen, "says": says, **rates}


def cpu_rate(dtype: Any, *, size: int = 512, repeats: int = 5) -> float:
    """GFLOP/s of the fastest of `repeats` square products of `size` after one to warm up."""
    import torch

    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    torch.matmul(a, b)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.matmul(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def _attention() -> str:
    """What `model.attention=auto` comes to on this machine."""
    import torch

    from pretrain.model.attention import choose_backend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = (torch.bfloat16, torch.float32)
    half, single = (choose_backend("auto", device=device, dtype=dtype).name for dtype in dtypes)
    return f"{half} in bfloat16, {single} in float32 (model.attention=auto)"


def _faiss() -> dict[str, Any]:
    import faiss

    gpus = faiss.get_num_gpus()
    build = "GPU" if hasattr(faiss, "StandardGpuResources") else "CPU"
    says = f"{faiss.__version__}, {build} build ({faiss.get_compile_options().strip()})"
    return {"version": faiss.__version__, "build": build.lower(), "gpus": gpus, "says": says}
