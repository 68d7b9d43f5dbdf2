"""One codec at one size in a process of its own, so that the memory that it takes is its own.

    python -m regen_dist.evaluation.codec_cost.worker '{"do": "measure", "system": "nano", "sizes": ["17x64x64"]}'

Each thing that is known goes to the standard output at once, a JSON object a line: what ends the process early ends no
more than that. Linux alone tells the memory.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from regen_dist.evaluation.codec_cost.sizes import Coder, Size, parse_size
from regen_dist.evaluation.codec_cost.systems import DTYPES, System, check_frames, named
from regen_dist.jsontext import json_text

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_C = ctypes.CDLL(None)
_RESET_PEAK = "5"  # see proc(5)
_AGAIN_WITHIN_S = 30.0  # a pass that takes longer needs no second: what is done once weighs little in it


class Job(NamedTuple):
    """What a process is asked for.

    Args:
        do: "measure" or "count".
        system: a name.
        sizes: of the clips; one, where it measures.
        precision: "fp32" or "bf16".
        threads: of torch.
        repeats: passes that are timed, after one that is not.
        limit_bytes: memory that it may take; 0: any.
        packages: a folder with packages that are not installed, or "".
    """

    do: str
    system: str
    sizes: list[str]
    precision: str = "fp32"
    threads: int = 1
    repeats: int = 2
    limit_bytes: int = 0
    packages: str = ""


class Spent(NamedTuple):
    """What one call took: seconds on the clock and of the CPU, and bytes above those that it began with."""

    wall_s: float
    cpu_s: float
    peak_bytes: int | None


def main(arguments: list[str]) -> None:
    """Do the job that the first argument describes, and tell."""
    job = Job(**json.loads(arguments[0]))
    if job.packages:
        sys.path.append(job.packages)
    if job.limit_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (job.limit_bytes, job.limit_bytes))
    torch.set_num_threads(job.threads)
    system = named(job.system)
    for size in map(parse_size, job.sizes):
        try:
            if job.do == "count":
                tell(size=str(size), counted=system.count(size).facts(size))
            else:
                measure(system, size, job)
        except ImportError as error:
            tell(size=str(size), problem=f"not installed: {system.needs or error.name} ({error})")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what the table says of this codec
            tell(size=str(size), problem=reason(error))


def tell(**facts: Any) -> None:
    """One line to whoever started this process."""
    sys.stdout.write(json_text(facts) + "\n")
    sys.stdout.flush()


def reason(error: Exception) -> str:
    """The first line of what a codec says, at most 160 characters of it."""
    text = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "out of the memory that is allowed"
    return f"{type(error).__name__}: {text}"[:160]


def measure(system: System, size: Size, job: Job) -> None:
    """Encode and decode in turn; tells of every call."""
    begun = time.perf_counter()
    coder = system.coder(job.precision)
    video = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    video = video if system.is_own else video.to(DTYPES[job.precision])
    base = _resident("VmRSS")
    tell(built_s=time.perf_counter() - begun, base_bytes=base)
    with torch.no_grad():
        for number in range(1 + job.repeats):
            spent_s = one_pass(coder, video, base, number)
            if number == 0 and spent_s > _AGAIN_WITHIN_S:
                break


def one_pass(coder: Coder, video: torch.Tensor, base: int | None, number: int) -> float:
    """Encode and decode once; returns the seconds of both."""
    latents, encoding = spent(lambda: coder.encode(video), base)
    tell(encode=encoding._asdict(), number=number)
    frames, decoding = spent(lambda: coder.decode(latents), base)
    check_frames(frames, video.shape[2])
    tell(decode=decoding._asdict(), number=number)
    return encoding.wall_s + decoding.wall_s


def spent(call: Callable[[], Any], base: int | None) -> tuple[Any, Spent]:
    """What a call gives, and what it took."""
    _forget_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = _resident("VmHWM")
    return result, Spent(wall, cpu, None if peak is None or base is None else max(peak - base, 0))


def _forget_peak() -> None:
    """Give back what the allocator keeps of earlier calls, and begin with the peak where the process is now."""
    if hasattr(_C, "malloc_trim"):  # glibc's
        _C.malloc_trim(0)
    if _RESET.exists():
        _RESET.write_text(_RESET_PEAK)


def _resident(name: str) -> int | None:
    """Bytes of this process in memory: now (VmRSS), or at most (VmHWM); None where the system does not say."""
    if not _STATUS.exists():
        return None
    found = [line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith(name)]
    return int(found[0].split()[1]) * 1024 if found else None


if __name__ == "__main__":
    main(sys.argv[1:])
