"""Common base of the parts of `regen gpu-check` (device, comparison, timing), and the first part: installed versions
and communication between ranks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from regen_dist.errors import RegenError
from regen_dist.programs import python
from tools import stages

Choice = TypeVar("Choice")
_PACKAGES = ("regen-dist", "torch", "deepspeed", "flash-attn", "flash-attn-3", "apex")


class PartLeftOut(Exception):
    """A part for which this machine lacks memory or hardware; the message states the requirement."""


@dataclass(frozen=True)
class Machine:
    """Device of a part. On the CPU everything is small, so that it takes seconds.

    Args:
        device: a CUDA device, or the CPU.
        minutes: training time of each model; 0 trains none.
        folder: folder of training outputs.
    """

    device: torch.device
    minutes: float = 0.0
    folder: Path = Path("runs/gpu_check")

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Working dtype of the models."""
        return torch.bfloat16 if self.is_cuda else torch.float32

    @property
    def precision(self) -> str:
        """Working dtype as the config names it."""
        return "bf16" if self.is_cuda else "fp32"

    @property
    def tolerance(self) -> float:
        """Tolerance of relative errors of single operations: bf16 has 8 bits, and sums round several times."""
        return 2e-2 if self.is_cuda else 1e-4

    def size(self, cuda: Choice, cpu: Choice) -> Choice:
        """Return the full size, or its small replacement on the CPU."""
        return cuda if self.is_cuda else cpu

    def wait(self) -> None:
        """Block until the device has finished all work."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], repeats: int = 3) -> float:
        """Return the seconds of one call: the median of several after a warm-up."""
        work()
        return median(self._once(work) for _ in range(repeats))

    def _once(self, work: Callable[[], object]) -> float:
        self.wait()
        begun = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - begun

    def forget_peak(self) -> None:
        """Release cached memory and reset the peak."""
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of the expected; infinite if a number is not finite."""
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
    """Return the installed versions, after a sum over a group of one rank: NCCL on a GPU, and gloo."""
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
    text = [
        f"torch {torch.__version__}",
        *(f"{key} {facts[key]}" for key in ("cuda", "cudnn", "nccl") if key in facts),
    ]
    return {**facts, "groups": sums, "summary": ", ".join([*text, "groups " + " and ".join(sums.values())])}


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
    """Return the driver's version as reported by the kernel module."""
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


_ROOT = Path(__file__).parents[2]


def tests(machine: Machine) -> dict[str, Any]:
    """Run them. Without a GPU all of them are skipped, which shows that they can be collected."""
    folder = _ROOT / "tests" / "cuda"
    if not folder.is_dir():
        raise PartLeftOut("needs a checkout of the repository: the package carries no tests")
    if importlib.util.find_spec("pytest") is None:
        raise PartLeftOut("needs pytest: pip install -e '.[dev]'")
    command = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", str(folder))
    done = stages.run_program(command, folder=_ROOT)
    print(done.stdout, done.stderr, flush=True)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
    if done.returncode:
        raise RegenError(f"pytest ended with exit code {done.returncode}: {last}")
    if machine.is_cuda and "passed" not in last:
        raise RegenError(f"no test ran: {last}")
    return {"summary": last}
