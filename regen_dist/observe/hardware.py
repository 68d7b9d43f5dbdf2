"""The machine: its peak performance and memory, the denominators of the metrics, and the choice of the device."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import resource
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from regen_dist.errors import BackendError
from regen_dist.programs import GPUS_PER_NODE


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
_PARTIAL = {"MIG", "Laptop", "D"}  # words of a slice of a GPU, and of lesser chips under the same name (RTX 4090 D)
GPU_PEAK_TFLOPS = {name: peak.bf16 for name, peak in GPU_PEAKS.items() if peak.bf16 is not None}


def known_peak(name: str) -> Peak | None:
    """Return the data sheet's peak of a device by its torch name; None if no entry fits.

    The entry with the most words wins: "NVIDIA H100 PCIe" is no "H100" of the SXM kind, and "A100-SXM4-80GB" no "A10".
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb" is a seventh of one, and fits none.
    """
    words = set(re.split(r"[\s-]+", name))
    if words & _PARTIAL:
        return None
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
    _product_seconds(a)  # the first product of a process loads the library: it may take longer than all of `seconds`
    best, end = _product_seconds(a), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, _product_seconds(a))
    return 2 * side**3 / best / 1e12


def _product_seconds(a: torch.Tensor) -> float:
    start = time.perf_counter()
    a @ a
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - start


def has_native_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return true if this machine's CPU has bf16 instructions (AMX, AVX-512 BF16, or ARM BF16). Others convert every
    number: on an AMD EPYC without them, a training step was measured to take 11 times as long as in float32."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux: assume that it has
        return True
    flags = {flag for line in text.splitlines() if line.startswith(("flags", "Features")) for flag in line.split()}
    return bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})


def inference_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype that a model computes in outside training: that of its training (`bf16` or `fp32`), but float32
    on a CPU without bf16 instructions, where a product of bf16 matrices was measured to take 30 times as long."""
    is_slow = device.type == "cpu" and not has_native_bf16()
    return torch.bfloat16 if precision == "bf16" and not is_slow else torch.float32


def memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this rank so far: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def process_memory_bytes(name: str) -> int:
    """Return a figure of /proc/self/status: `VmRSS` is resident now, `VmHWM` was at most since the process began, or
    since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> None:
    """Reset `VmHWM` (Linux, proc(5): clear_refs), after freed memory has gone back to the system.

    Raises:
        OSError: the system does not allow it.
    """
    with suppress(AttributeError, OSError):  # another C library than glibc: freed memory then counts as in use
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def describe_machine() -> dict[str, Any]:
    """Return the hardware and versions that measurements depend on."""
    packages = ("regen-dist", "torch", "deepspeed", "av", "imageio-ffmpeg")
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


# Device selection: a GPU if one was requested or is present, else the CPU; never a silent fallback to the CPU.


_DRIVER = Path("/proc/driver/nvidia")
_TO_USE_CPUS = "or, to compute on CPUs on purpose, set CUDA_VISIBLE_DEVICES= (empty), and ask for no GPUs"


def choose_device(
    local_rank: int = 0, environment: Mapping[str, str] = os.environ, driver: Path = _DRIVER
) -> torch.device:
    """Return the device that a process computes on.

    If a scheduler shows each task only its own GPU (`--gpus-per-task`, `--gpu-bind`), that one has index 0.

    Args:
        local_rank: rank of this process on its machine; each has its own GPU.
        environment: environment of this process. `REGEN_GPUS_PER_NODE` is the number that the launcher requested.
        driver: folder of the NVIDIA driver's information.

    Raises:
        BackendError: GPUs were requested or are present, but torch can use none; or there are fewer GPUs than ranks.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", _index(local_rank, torch.cuda.device_count()))
    asked = environment.get(GPUS_PER_NODE, "0")
    if asked != "0":
        raise BackendError(
            f"{asked} GPU(s) a node were requested, and torch can use none here: {why_no_cuda(environment)}; fix "
            f"that; {_TO_USE_CPUS}"
        )
    found = _gpus_of(driver)
    if found and environment.get("CUDA_VISIBLE_DEVICES") != "":
        raise BackendError(
            f"this machine has {found} NVIDIA GPU(s), and torch can use none: {why_no_cuda(environment)}; fix that; "
            f"{_TO_USE_CPUS}"
        )
    return torch.device("cpu")


def _index(local_rank: int, visible: int) -> int:
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise BackendError(
            f"local rank {local_rank} sees {visible} GPUs (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}): each rank needs its own. Start as many ranks on a "
            "node as it has GPUs (--ranks, --tasks-per-node), or let the scheduler give each task one"
        )
    return local_rank


def _gpus_of(driver: Path) -> int:
    """Return the number of GPUs that the driver has, visible to this process or not."""
    try:
        return len(os.listdir(driver / "gpus"))
    except OSError:  # no driver
        return 0


def why_no_cuda(environment: Mapping[str, str] = os.environ) -> str:
    """Explain why `torch.cuda` is not available."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a build with it (docs/gpu.md)"
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())
    return f"no device is visible (CUDA_VISIBLE_DEVICES={visible})"


def accelerator(device: torch.device, driver: Path = _DRIVER) -> dict[str, Any]:
    """Return the GPU of a process and the versions of driver, CUDA, cuDNN, NCCL and torch; on a CPU, torch's only."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if device.type != "cuda":
        return {"device": "cpu"} | found
    properties = torch.cuda.get_device_properties(device)
    cudnn: int | None = torch.backends.cudnn.version()
    return {
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "driver": _driver_version(driver),
        **found,
        "cudnn": None if cudnn is None else f"{cudnn // 10_000}.{cudnn // 100 % 100}.{cudnn % 100}",
        "nccl": _nccl_version(),
    }


def _driver_version(driver: Path) -> str | None:
    """Parse the driver version, such as "570.86.15" in "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15
    …"."""
    with suppress(OSError):
        words = (driver / "version").read_text(encoding="utf-8", errors="replace").split()
        return next((word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()), None)
    return None


def _nccl_version() -> str | None:
    if not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def summarise_machine(facts: Mapping[str, Any]) -> str:
    """Format the facts of `accelerator` in one line."""
    names = {"driver": "driver", "cuda": "CUDA", "cudnn": "cuDNN", "nccl": "NCCL"}
    versions = [f"{names.get(name, name)} {facts[name]}" for name in ("torch", *names) if facts.get(name)]
    memory = f" ({facts['memory_bytes'] / 2**30:.0f} GiB)" if "memory_bytes" in facts else ""
    return f"{facts['device']}{memory}: {', '.join(versions)}"
