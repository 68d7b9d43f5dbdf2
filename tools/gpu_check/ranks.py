"""A rank that raises while the others wait for it: the job must end in seconds and show the traceback. As a program,
this is one of those ranks."""

from __future__ import annotations

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from launcher.supervise import rank_environment, rank_environments, supervise
from regen_dist.distributed.ranks import process_group, read_environment
from regen_dist.errors import RegenError
from regen_dist.programs import python
from tools.gpu_check.machine import Machine

MESSAGE = "raised on purpose by regen gpu-check"
_MOST_S = 45.0  # with the start of two processes


def ranks(machine: Machine) -> dict[str, Any]:
    """Start two ranks, one of which raises: over NCCL with two GPUs, otherwise over gloo on the CPU."""
    nccl = machine.is_cuda and torch.cuda.device_count() > 1
    common = rank_environment(os.environ, 2) | ({} if nccl else {"CUDA_VISIBLE_DEVICES": ""})
    with TemporaryDirectory() as folder:
        begun = time.monotonic()
        ended = supervise(
            python("-m", "tools.gpu_check.ranks"), rank_environments(common, 2), logs=Path(folder), grace_s=10.0
        )
        seconds = time.monotonic() - begun
        output = (Path(folder) / "rank_1.log").read_text(encoding="utf-8", errors="replace")
    if ended.code == 0:
        raise RegenError("a rank raised, and the job ended with exit code 0")
    if MESSAGE not in output or "Traceback" not in output:
        raise RegenError(f"a rank raised, and its log shows no traceback:\n{output[-2000:]}")
    if seconds > _MOST_S:
        raise RegenError(f"a rank raised, and the job ended after {seconds:.0f} s; at most {_MOST_S:.0f} s are right")
    over = "NCCL" if nccl else "gloo (NCCL needs two GPUs)"
    return {"seconds": seconds, "nccl": nccl, "summary": f"ended after {seconds:.0f} s with its traceback, over {over}"}


def main() -> None:
    """One rank: sums with the other, then rank 1 raises where rank 0 waits for it."""
    own = read_environment()
    with process_group(own, needed=True):
        for _ in range(3):
            own.sum([1.0])
        if own.rank == 1:
            raise RuntimeError(MESSAGE)
        own.sum([1.0])


if __name__ == "__main__":
    main()
