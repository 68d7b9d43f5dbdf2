"""Peak performance and memory of the machine, the denominators of the metrics."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from regen_dist.observe.devices import accelerator


class Peak(NamedTuple):
    """Dense TFLOP/s of one GPU: bf16 on tensor cores with fp32 sums, and fp32 without TF32, as torch multiplies. None:
    the GPU has no such unit, or the vendor publishes no figure; then it is measured."""

    bf16: float | None
    fp32: float
    source: str


# By words of the device's name. From NVIDIA's data sheets; half of the figure if only that with sparsity is given.
GPU_PEAKS = {
    "GB200": Peak(2500.0, 80.0, "GB200 NVL72 (per GPU: half of the superchip)"),
    "B200": Peak(2250.0, 75.0, "HGX B200 (an eighth of the board)"),
    "GH200": Peak(989.0, 67.0, "GH200 Grace Hopper Superchip"),
    "H200": Peak(989.0, 67.0, "H200 Tensor Core GPU, SXM"),
    "H200 NVL": Peak(835.5, 60.0, "H200 Tensor Core GPU, NVL"),
    "H100": Peak(989.0, 67.0, "H100 Tensor Core GPU, SXM"),
    "H100 PCIe": Peak(756.0, 51.0, "H100 PCIe product brief"),
    "H100 NVL": Peak(835.5, 60.0, "H100 Tensor Core GPU, NVL"),
    "A100": Peak(312.0, 19.5, "A100 Tensor Core GPU"),
    "A10": Peak(125.0, 31.2, "A10 Tensor Core GPU"),
    "A10G": Peak(70.0, 35.0, "A10G (made for AWS G5)"),
    "L40S": Peak(362.0, 91.6, "L40S GPU"),
    "L40": Peak(181.0, 90.5, "L40 GPU"),
    "L4": Peak(121.0, 30.3, "L4 Tensor Core GPU"),
    "4090": Peak(165.0, 82.6, "Ada GPU architecture white paper, RTX 4090"),
    "V100": Peak(None, 15.7, "V100 Tensor Core GPU, SXM2 (tensor cores take fp16 alone)"),
}
GPU_PEAK_TFLOPS = {name: peak.bf16 for name, peak in GPU_PEAKS.items() if peak.bf16 is not None}


def known_peak(name: str) -> Peak | None:
    """Return the data sheet's peak of a device by its torch name; None if no entry fits.

    The entry with the most words wins: "NVIDIA H100 PCIe" is no "H100" of the SXM kind, and "A100-SXM4-80GB" no "A10".
    """
    words = set(re.split(r"[\s-]+", name))
    fitting = [entry for entry in GPU_PEAKS if words.issuperset(entry.split())]
    return GPU_PEAKS[max(fitting, key=lambda entry: len(entry.split()))] if fitting else None


def peak_tflops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Return the peak TFLOP/s of one rank: the data sheet's for a known GPU and dtype, else measured by square matrix
    products for `seconds`."""
    if device.type == "cuda" and (known := known_peak(torch.cuda.get_device_name(device))):
        peak = {torch.bfloat16: known.bf16, torch.float32: known.fp32}.get(dtype)
        if peak is not None:
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
