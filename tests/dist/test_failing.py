"""A rank that raises in the middle of a collective: heard at once, and everybody ends within seconds."""

from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path

import pytest

from launcher.supervise import launch

# NCCL's way of leaving a group waits for the kernels of its collectives, and those for ranks that never come; gloo's
# does not, so that it is made to. So may whatever waits at the interpreter's end: here a thread that is no daemon.
PROGRAM = """
    import threading, time
    import torch
    import torch.distributed as dist
    from regen_dist.distributed.rendezvous import ending_at_once
    from regen_dist.distributed.ranks import process_group, read_environment
    from regen_dist.errors import BackendError

    dist.destroy_process_group = lambda: time.sleep(600)
    ranks = read_environment()
    with ending_at_once(), process_group(ranks, needed=True):
        dist.barrier()
        threading.Thread(target=time.sleep, args=(600,)).start()
        if ranks.rank == 1:
            {act}
        dist.all_reduce(torch.ones(1000))
"""


@pytest.mark.parametrize(
    ("act", "code", "said", "silent"),
    [
        ('raise ValueError("the kernel is out of range")', 1, 'in <module>\n    raise ValueError("the kernel', "\0"),
        ('raise BackendError("no such kernel")', 5, "rank 1: error: no such kernel\n", "Traceback"),
        ("raise KeyboardInterrupt", 130, "\nKeyboardInterrupt\n", "\0"),
        ("raise SystemExit(9)", 9, "", "Traceback"),
    ],
    ids=["fault", "to-be-mended", "interrupted", "exit"],
)
def test_one_ranks_error_ends_the_job(tmp_path: Path, act: str, code: int, said: str, silent: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM).format(act=act), encoding="utf-8")
    began = time.monotonic()
    assert launch([sys.executable, str(program)], ranks=2, logs=tmp_path, grace_s=300.0) == code
    assert time.monotonic() - began < 120  # imports take most of it; a group left in order would wait for ten minutes
    log = (tmp_path / "rank_1.log").read_text(encoding="utf-8")
    assert said in log
    assert log.count(said or "\0") <= 1
    assert silent not in log


GPU_OF_ONE = """
    import torch
    from regen_dist.distributed.rendezvous import ending_at_once
    from regen_dist.distributed.ranks import process_group, read_environment

    ranks = read_environment()
    torch.cuda.is_available = torch.cuda.is_initialized = lambda: ranks.rank == 0  # the driver of rank 1's node is old
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_properties = lambda device: type("Gpu", (), {"uuid": "GPU-1"})
    with ending_at_once(), process_group(ranks, needed=True):
        raise AssertionError("they must not meet")
"""


@pytest.mark.parametrize(("asked", "said"), [("8", "were requested"), ("0", "1 ranks have a GPU and 1 do not")])
def test_ranks_without_a_gpu_among_others_end_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, said: str
) -> None:
    """Told by every rank, with the code of what a user can mend; no rank waits for NCCL."""
    monkeypatch.setenv("REGEN_GPUS_PER_NODE", asked)
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(GPU_OF_ONE), encoding="utf-8")
    assert launch([sys.executable, str(program)], ranks=2, logs=tmp_path) == 5
    log = (tmp_path / "rank_1.log").read_text(encoding="utf-8")
    assert "error: rank 1 on" in log or "1 ranks have a GPU" in log
    assert said in log
    assert "Traceback" not in log
