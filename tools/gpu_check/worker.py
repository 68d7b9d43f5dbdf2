"""One part of `regen gpu-check`, in this process: `python -m tools.gpu_check.worker --help`. The ranks of its part
`ranks` are this program, too."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from launcher.supervise import rank_environment, rank_environments, supervise
from regen_dist.config.files import write_text_atomically
from regen_dist.distributed.ranks import make_repeatable, process_group, read_environment
from regen_dist.errors import RegenError
from regen_dist.jsontext import json_text
from regen_dist.programs import python
from tools.gpu_check.machine import Machine, PartLeftOut

_SIZED_GIB = 70  # of a GPU of 80 GB, for which the parts are sized, torch sees 79


def run_check(function: str, machine: Machine) -> dict[str, Any]:
    """Return the result of a part: `status`, a one-line `summary`, and figures (`facts`)."""
    module, name = function.split(":")
    try:
        facts: dict[str, Any] = getattr(import_module(f"tools.gpu_check.{module}"), name)(machine)
    except PartLeftOut as why:
        return {"status": "left out", "summary": str(why), "facts": {}}
    except RegenError as error:
        return {"status": "failed", "summary": str(error), "facts": {}}
    except torch.OutOfMemoryError as error:
        has_gib = torch.cuda.get_device_properties(machine.device).total_memory / 2**30
        if has_gib < _SIZED_GIB:
            summary = f"needs more than the {has_gib:.0f} GiB of this GPU: its sizes are for one of 80 GB"
            return {"status": "left out", "summary": summary, "facts": {}}
        return {"status": "failed", "summary": str(error), "facts": {"traceback": traceback.format_exc()}}
    except Exception as error:  # noqa: BLE001 - a part must not hide what the others find
        summary = f"{type(error).__name__}: {error}"
        return {"status": "failed", "summary": summary, "facts": {"traceback": traceback.format_exc()}}
    return {"status": "passed", "summary": facts.pop("summary"), "facts": facts}


# A rank that raises while the others wait for it: the job must end in seconds and show the traceback.

_RANK = "raising-rank"  # the program's only argument, in the place of a part
MESSAGE = "raised on purpose by regen gpu-check"
_MOST_S = 45.0  # with the start of two processes


def ranks(machine: Machine) -> dict[str, Any]:
    """Start two ranks, one of which raises: over NCCL with two GPUs, otherwise over gloo on the CPU."""
    nccl = machine.is_cuda and torch.cuda.device_count() > 1
    common = rank_environment(os.environ, 2) | ({} if nccl else {"CUDA_VISIBLE_DEVICES": ""})
    with TemporaryDirectory() as folder:
        begun = time.monotonic()
        ended = supervise(
            python("-m", "tools.gpu_check.worker", _RANK), rank_environments(common, 2), logs=Path(folder), grace_s=10.0
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


def raising_rank() -> None:
    """Sum with the other rank; then rank 1 raises where rank 0 waits for it."""
    own = read_environment()
    with process_group(own, needed=True):
        for _ in range(3):
            own.sum([1.0])
        if own.rank == 1:
            raise RuntimeError(MESSAGE)
        own.sum([1.0])


def main() -> None:
    """Run one part and write its result to a file."""
    parser = argparse.ArgumentParser(description="One part of `regen gpu-check`.")
    parser.add_argument("function", help="module:name")
    parser.add_argument("--out", type=Path, required=True, help="file for the result")
    parser.add_argument("--cpu", action="store_true", help="small sizes, on the CPU")
    parser.add_argument("--minutes", type=float, default=0.0, help="minutes of training")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu_check"), help="folder for the output of training")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = torch.device("cpu") if given.cpu else torch.device("cuda", 0)
    if not given.cpu:
        torch.cuda.set_device(device)
    make_repeatable(device, deterministic=False)  # the arithmetic of a training run
    found = run_check(given.function, Machine(device, given.minutes, given.folder))
    if not given.cpu:
        found["facts"]["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    write_text_atomically(given.out, json_text(found) + "\n")


if __name__ == "__main__":
    raising_rank() if sys.argv[1:] == [_RANK] else main()
