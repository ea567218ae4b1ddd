"""What a result was made with: interpreter, packages, processors, commit. Recorded beside every number."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "pillow", "safetensors")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of this checkout, "-dirty" when tracked files differ from it; None outside git."""
    command = ["git", "-C", str(Path(__file__).resolve().parents[1]), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def environment() -> dict[str, str]:
    """Name -> value, in the order worth reading. Takes milliseconds and reaches no network."""
    result = {"commit": _commit(), "python": platform.python_version()}
    result |= {package: _version(package) for package in _PACKAGES}
    result["platform"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    result["cpu"] = f"{cpu_name()}, {os.cpu_count()} cores"
    result["torch threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        result["gpu"] = ", ".join(f"{names.count(name)} x {name}" for name in sorted(set(names)))
        result["cuda"] = torch.version.cuda
    else:
        result["gpu"] = "none"
    return {name: value for name, value in result.items() if value}
