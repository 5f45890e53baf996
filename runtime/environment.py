"""What this machine and this installation are: checked before any verb that needs torch, recorded in every run.

Annotations stay text so that a Python too old can import this and be told so.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

from .errors import UserError

PACKAGES = ("torch", "torchvision", "timm", "faiss-cpu", "faiss-gpu-cuvs", "webdataset", "pyarrow", "numpy", "pillow",
            "submitit", "scikit-learn", "xformers")  # fmt: skip


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> None:
    """Raise UserError when Python is older than 3.11."""
    if version[:2] < (3, 11):
        raise UserError(
            f"python: {'.'.join(map(str, version[:3]))} is too old; troodon needs 3.11 or newer\n"
            f"  make a virtual environment from a newer one: python3.12 -m venv .venv"
        )


def check_torch(versions: dict[str, str | None] | None = None) -> None:
    """Raise UserError when torch is absent, older than 2.11, or a CPU build beside torchvision's CUDA build.

    torchvision has no CPU build on the package index: its operators then fail to register at import.
    """
    versions = package_versions() if versions is None else versions
    torch, torchvision = versions.get("torch"), versions.get("torchvision")
    if torch is None:
        raise UserError("torch: not installed\n  pip install -e . (or make quickstart) installs what troodon needs")
    if tuple(int(part) for part in torch.split("+")[0].split(".")[:2]) < (2, 11):
        raise UserError(
            f"torch: {torch} is too old; troodon needs 2.11 or newer\n  pip install --upgrade torch torchvision"
        )
    if "+cpu" in torch and torchvision is not None and "+cpu" not in torchvision:
        raise UserError(
            f"torch: {torch} is a CPU build beside torchvision {torchvision}, which is built for CUDA: its operators "
            f"cannot load\n  pip uninstall torch torchvision, then pip install torch torchvision from the same index "
            f"(the CUDA build also runs on CPU)"
        )


def package_versions() -> dict[str, str | None]:
    """Installed version of each package we build on; None where absent. Imports none of them."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def describe() -> dict[str, Any]:
    """What `environment.json` of a run holds."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": cores(),
        "packages": package_versions(),
        "troodon": _own_version(),
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _own_version() -> str:
    try:
        return importlib.metadata.version("troodon")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
