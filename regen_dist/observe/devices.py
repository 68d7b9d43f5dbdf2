"""Device selection: a GPU if one was requested or is present, else the CPU; never a silent fallback to the CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from regen_dist.errors import BackendError
from regen_dist.programs import GPUS_PER_NODE

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
    """Return the GPU of a process and the versions of driver, CUDA, cuDNN, NCCL and torch; on a CPU, torch's only.

    Args:
        device: device of the process.
        driver: folder of the NVIDIA driver's information.
    """
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


def shown(facts: Mapping[str, Any]) -> str:
    """Format the facts of `accelerator` in one line."""
    names = {"driver": "driver", "cuda": "CUDA", "cudnn": "cuDNN", "nccl": "NCCL"}
    versions = [f"{names.get(name, name)} {facts[name]}" for name in ("torch", *names) if facts.get(name)]
    memory = f" ({facts['memory_bytes'] / 2**30:.0f} GiB)" if "memory_bytes" in facts else ""
    return f"{facts['device']}{memory}: {', '.join(versions)}"
