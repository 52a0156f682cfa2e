"""What the figures of `bench.py` were measured on."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
PACKAGES = ("torch", "pytorch-lightning", "numba", "numpy", "scikit-learn")


def processor() -> tuple[str, list[str]]:
    """The processor's name, and which of the instructions that matter here it has, where the system tells."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return platform.processor() or platform.machine(), []
    lines = [line.split(":", 1) for line in file.read_text().splitlines() if ":" in line]
    values = {name.strip(): value.strip() for name, value in reversed(lines)}
    flags = values.get("flags", values.get("Features", "")).split()
    return values.get("model name", platform.machine()), [flag for flag in FLAGS if flag in flags]


def describe(device: str) -> dict[str, Any]:
    """Processor, cores, threads, versions and, if it is used, the GPU."""
    name, flags = processor()
    found: dict[str, Any] = {"processor": name, "flags": flags, "cores": os.cpu_count()}
    if hasattr(os, "sched_getaffinity"):
        found["cores"] = len(os.sched_getaffinity(0))
    found |= {"threads": torch.get_num_threads(), "python": platform.python_version()}
    found["versions"] = {name: metadata.version(name) for name in PACKAGES}
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found
