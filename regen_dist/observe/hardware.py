"""Peak performance and memory of the machine, the denominators of the metrics."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import torch

from regen_dist.observe.devices import accelerator

# Dense bf16 TFLOP/s from the vendors' data sheets, by a part of the device name.
GPU_PEAK_TFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10": 125.0,
    "4090": 165.0,
    "V100": 125.0,
}


def peak_tflops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Return the peak TFLOP/s of one rank: the data sheet's for a known GPU, else measured by square matrix products
    for `seconds`."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in GPU_PEAK_TFLOPS.items():
            if part in name:
                return peak
    side = 8192 if device.type == "cuda" else 512
    a = torch.randn(side, side, device=device, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best / 1e12


def has_native_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return true if this machine's CPU has bf16 instructions (AMX, AVX-512 BF16, or ARM BF16). Others convert every
    number: on an AMD EPYC without them, a training step was measured to take 11 times as long as in float32."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux: assume that it has
        return True
    flags = {flag for line in text.splitlines() if line.startswith(("flags", "Features")) for flag in line.split()}
    return bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})


def memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this rank so far: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe_machine() -> dict[str, Any]:
    """Return the hardware and versions that measurements depend on."""
    packages = ("regen-dist", "torch", "deepspeed", "av", "scikit-image", "imageio-ffmpeg")
    gpu = accelerator(torch.device("cuda")) if torch.cuda.is_available() else {}
    return {
        "device": gpu.pop("device", None) or _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        **({"accelerator": gpu} if gpu else {}),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """Return the CPU's name as reported by the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
