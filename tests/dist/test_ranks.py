"""Ranks as processes: the cost of a start, a rank that raises inside a collective, and the naming of slow ranks."""

from __future__ import annotations

import socket
import sys
import textwrap
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from launcher.supervise import launch
from regen_dist.config import AnyRunConfig
from regen_dist.config.embedder import EmbedderConfig
from regen_dist.data.synthetic.dataset import build_synthetic
from regen_dist.data.synthetic.shapes import SyntheticOptions
from regen_dist.observe.record import read_record
from tests.dist.conftest import START_S
from tests.helpers.comeback import ending, small_run, train
from tests.helpers.latents import write_cache
from tests.helpers.ranks import Job, run_ranks, train_jobs
from tests.helpers.tiny import tiny_dataset, tiny_t2v

COSTLY = {"torch._inductor.compile_fx", "skimage.metrics", "scipy.ndimage"}  # seconds each where a disk is slow


def _imported(config: EmbedderConfig) -> list[str]:
    assert train(config) == 0
    assert "deepspeed.runtime.zero.muon.original_muon" in sys.modules, "what would import the compiler"
    return sorted(COSTLY & sys.modules.keys())


def test_training_imports_no_compiler_and_no_measures(tmp_path: Path) -> None:
    """A step, a validation with its picture, and a checkpoint."""
    config = small_run(tmp_path, tiny_dataset(tmp_path / "data"), "start", train__steps=1)
    assert run_ranks(_imported, 2, config) == [[], []]
    assert list((config.folder / "pictures").glob("*.png"))


def test_two_ranks_begin_at_the_linear_code_that_one_of_them_fitted(tmp_path: Path) -> None:
    """The losses are those of one process, far below those from cosines; when the run resumes, all goes on."""
    shapes = tmp_path / "shapes"
    build_synthetic(shapes, SyntheticOptions(number=48, seed=1, side=32, frames=5), workers=0)

    def run(name: str, start: str, **changes: Any) -> EmbedderConfig:
        return small_run(tmp_path, shapes, name, model__linear_start=start, train__steps=2, **changes)

    def losses(config: EmbedderConfig, ranks: int) -> list[float]:
        assert run_ranks(train, ranks, config) == [0] * ranks
        return ending(config).losses

    two = run("two", "pca")
    fitted = losses(two, 2)
    assert fitted == pytest.approx(losses(run("one", "pca", engine__kind="plain"), 1), rel=1e-4)
    assert max(fitted) < 0.8 * min(losses(run("cosines", "dct"), 2))
    assert losses(two.model_copy(update={"train": two.train.model_copy(update={"steps": 3})}), 2)[:2] == fitted


# A rank that raises in the middle of a collective: heard at once, and everybody ends within seconds.


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
    from regen_dist.training.run import train
    from tests.helpers.tiny import tiny_run

    config = tiny_run("RUNS", engine__kind="zero3")
    ranks = read_environment()
    torch.cuda.is_available = torch.cuda.is_initialized = lambda: ranks.rank == 0  # the driver of rank 1's node is old
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_properties = lambda device: type("Gpu", (), {"uuid": "GPU-1"})
    with ending_at_once():
        MEET
    raise AssertionError("they must not meet")
"""
# On their own, or by the first act of a training.
MEETINGS = ("with process_group(ranks, needed=True): pass", "train(config, ranks)")


@pytest.mark.parametrize("meeting", MEETINGS, ids=["alone", "training"])
@pytest.mark.parametrize(("asked", "said"), [("8", "were requested"), ("0", "1 ranks have a GPU and 1 do not")])
def test_ranks_without_a_gpu_among_others_end_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path, asked: str, said: str, meeting: str
) -> None:
    """Told by every rank, with the code of what a user can mend; no rank waits for NCCL."""
    monkeypatch.setenv("REGEN_GPUS_PER_NODE", asked)
    program = tmp_path / "program.py"
    text = textwrap.dedent(GPU_OF_ONE).replace("MEET", meeting).replace("RUNS", str(tmp_path / "runs"))
    program.write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(root))
    assert launch([sys.executable, str(program)], ranks=2, logs=tmp_path) == 5
    log = (tmp_path / "rank_1.log").read_text(encoding="utf-8")
    assert "error: rank 1 on" in log or "1 ranks have a GPU" in log
    assert said in log
    assert "Traceback" not in log


# A run of two real ranks, of which one reads slowly: its log, its record and its tracker name it.


pytestmark = pytest.mark.timeout(1200)

SLOW_S = 0.3


def _train(config: AnyRunConfig) -> list[Any]:
    """Train, with the batches of rank 1 late."""
    from regen_dist.training.loop import Trainer

    batches = Trainer.open_batches

    def late(self: Trainer) -> Generator[Any]:
        for batch in batches(self):
            time.sleep(SLOW_S * self.ranks.rank)
            yield batch

    Trainer.open_batches = late  # type: ignore[method-assign]
    return train_jobs([Job(config)])


def test_the_slow_rank_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cache = write_cache(tmp_path / "cache")
    config = tiny_t2v(
        tmp_path, cache, engine__kind="zero3", train__steps=4, train__slow_ranks_every=2, tensorboard__enabled=True
    )
    assert run_ranks(_train, 2, config, timeout_s=START_S) == [[0], [0]]
    told = [line for line in read_record(config.folder / "metrics.jsonl", "event") if "ranks, min" in line["event"]]
    assert [line["step"] for line in told] == [2, 4]
    for line in told:
        waits = line["event"].split("; ")[0]
        assert f"(most: rank 1 on {socket.gethostname()} " in waits
        assert waits.index("rank 1 on") < waits.index("rank 0 on")
    board = EventAccumulator(str(config.folder / "tensorboard"))
    board.Reload()
    most, least = (board.Scalars(f"ranks/data_wait_s_{end}") for end in ("max", "min"))
    assert [each.step for each in most] == [2, 4]
    assert all(each.value >= SLOW_S for each in most)
    assert all(low.value < high.value - SLOW_S / 2 for low, high in zip(least, most, strict=True))
    assert len(board.Scalars("train/loss")) == 4
