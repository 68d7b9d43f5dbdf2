"""What the parts of `regen gpu-check` share: where they run, how they compare, how they take time. And the first part:
what is installed, and whether ranks can talk."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from regen_dist.errors import RegenError

Choice = TypeVar("Choice")
_PACKAGES = ("regen-dist", "torch", "deepspeed", "flash-attn", "flash-attn-3", "apex")


class LeftOut(Exception):
    """A part that this machine has no room or no hardware for; says what it would take."""


@dataclass(frozen=True)
class Machine:
    """Where a part runs. On the CPU everything is small, so that it takes seconds.

    Args:
        device: a CUDA device, or the CPU.
        minutes: that each model is trained for; 0 trains none.
        folder: for what training makes.
    """

    device: torch.device
    minutes: float = 0.0
    folder: Path = Path("runs/gpu_check")

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """That models compute in."""
        return torch.bfloat16 if self.is_cuda else torch.float32

    @property
    def precision(self) -> str:
        """The same as the config says it."""
        return "bf16" if self.is_cuda else "fp32"

    @property
    def tolerance(self) -> float:
        """Of relative errors of single operations: bf16 has 8 bits, each of which sums round a few times."""
        return 2e-2 if self.is_cuda else 1e-4

    def size(self, cuda: Choice, cpu: Choice) -> Choice:
        """A full size, or the small one that stands for it on the CPU."""
        return cuda if self.is_cuda else cpu

    def wait(self) -> None:
        """Until the device has done all that it was asked for."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], repeats: int = 3) -> float:
        """Of one call: the median of some, after one that warms up."""
        work()
        return median(self._once(work) for _ in range(repeats))

    def _once(self, work: Callable[[], object]) -> float:
        self.wait()
        begun = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - begun

    def forget_peak(self) -> None:
        """Give back cached memory, and let the peak begin anew."""
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; infinite where a number is not finite."""
    found, expected = found.detach().float(), expected.detach().float()
    error = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected).clamp(min=1e-30)
    return float(torch.where(error.isfinite(), error, torch.inf))


def require_close(what: str, found: float, most: float) -> float:
    """An error, if it is small enough.

    Raises:
        RegenError: it is too large, or no number.
    """
    if not found <= most:
        raise RegenError(f"{what}: relative error {found:.2g}, at most {most:.2g} was expected")
    return found


def versions(machine: Machine) -> dict[str, Any]:
    """Name what is installed, and sum over a group of one rank: NCCL on a GPU, and gloo beside it."""
    import torch.distributed as dist

    from regen_dist.distributed.ranks import process_group, read_environment

    facts: dict[str, Any] = {"packages": {name: _version(name) for name in _PACKAGES}, "torch": torch.__version__}
    facts |= _cuda_facts(machine) if machine.is_cuda else {"device": "cpu"}
    ranks = read_environment({})
    with process_group(ranks, needed=True):
        twin = dist.new_group(backend="gloo")
        sums = {}
        for name, group, device in (("own", None, machine.device), ("gloo", twin, torch.device("cpu"))):
            values = torch.arange(4.0, device=device)
            dist.all_reduce(values, group=group)
            if values.tolist() != [0.0, 1.0, 2.0, 3.0]:
                raise RegenError(f"the sum over one rank by {dist.get_backend(group)} is {values.tolist()}")
            sums[name] = dist.get_backend(group)
    told = [f"torch {torch.__version__}", *(f"{key} {facts[key]}" for key in ("cuda", "cudnn", "nccl") if key in facts)]
    return {**facts, "groups": sums, "summary": ", ".join([*told, "groups " + " and ".join(sums.values())])}


def _cuda_facts(machine: Machine) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(machine.device)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "gpus": torch.cuda.device_count(),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def _driver() -> str:
    """The driver's version as the kernel module tells it."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8", errors="replace") as file:
            return file.readline().strip()
    except OSError:
        return "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
