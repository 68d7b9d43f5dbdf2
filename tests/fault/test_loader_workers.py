"""A loader whose workers die, cannot work, or run out of room: one clear error, never a hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from regen_dist.config.datasets import DataConfig
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.loading import clip_loader
from regen_dist.data.loading.clip_loader import ClipReader, decoding_problems
from regen_dist.errors import DataError
from tests.helpers.datasets import start, worker_ids
from tests.helpers.jobs import is_stopped, wait_until
from tests.helpers.machine import wait_until_gone


@pytest.fixture
def config(dataset_folder: Path) -> DataConfig:
    return DataConfig(url=str(dataset_folder), size=(32, 40), short_side=48, workers=1, prefetch=64)


def _board(batches: Any) -> list[int]:
    board: list[int] = batches.gi_frame.f_locals["board"][0].tolist()
    return board


def _held_while_decoding(batches: Any) -> tuple[int, int]:
    """Hold the first worker still in the middle of decoding; the sample's dataset and row."""
    worker, deadline = worker_ids(batches)[0], time.monotonic() + 30
    assert _board(batches)[0] == worker
    while time.monotonic() < deadline:
        if (noted := decoding_problems(_board(batches))) and noted[2]:
            os.kill(worker, signal.SIGSTOP)
            wait_until(lambda: is_stopped(worker), lambda: "SIGSTOP had no effect")
            if (noted := decoding_problems(_board(batches))) and noted[2]:
                return noted[:2]
            os.kill(worker, signal.SIGCONT)
    raise AssertionError("it was never caught")


def test_a_worker_that_dies_names_what_it_was_decoding(config: DataConfig) -> None:
    """And the others end with it."""
    batches = start(config.model_copy(update={"workers": 2}))
    next(batches)
    dataset, row = _held_while_decoding(batches)
    workers = worker_ids(batches)
    os.kill(workers[0], signal.SIGKILL)
    name = open_dataset(config.url or "").sample(row).name
    with pytest.raises(DataError) as caught:
        list(islice(batches, 200))
    assert dataset == 0
    assert f"a decoding process died while it decoded {name} (process {workers[0]})" in str(caught.value)
    assert "lower data.workers, data.prefetch or data.read.ahead_mb" in str(caught.value)
    wait_until_gone(workers)


@pytest.mark.parametrize(
    ("note", "words"),
    [
        ([7, 0, 3], "while it decoded {name} (process 7)"),
        ([7, ~0, 3], "between two samples, the last was {name} (process 7)"),
        ([7, -1, -1], "before its first sample (process 7)"),
        ([-1, -1, -1], "before its first sample (process 7)"),
    ],
)
def test_what_is_said_of_the_dead(config: DataConfig, note: list[int], words: str) -> None:
    dataset = open_dataset(config.url or "")
    said = clip_loader._dead_workers_message([7], torch.tensor([[6, 0, 1], note]), (dataset,))
    assert words.format(name=dataset.sample(3).name) in said
    assert dataset.sample(1).name not in said, "that one lives"


class _Ended:
    """A worker process that is known to be dead after it was asked a few times."""

    pid, asked = 7, 0

    def is_alive(self) -> bool:
        self.asked += 1
        return self.asked < 5


@pytest.mark.parametrize(
    ("error", "dead"),
    [
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), [7, 8]),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), [7]),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0."), []),
        (ConnectionResetError("Connection reset by peer"), [7]),
        (EOFError(), [7]),
    ],
)
def test_who_is_dead(error: Exception, dead: list[int]) -> None:
    """A batch that a dead worker can no longer hand over breaks the connection before its death is known."""
    assert clip_loader._dead_workers(error, SimpleNamespace(_workers=[_Ended()])) == dead


def test_a_loader_that_is_closed_ends_its_workers(config: DataConfig) -> None:
    with closing(start(config.model_copy(update={"workers": 2}))) as batches:
        next(batches)
        workers = worker_ids(batches)
        os.kill(workers[0], signal.SIGSTOP)  # as good as one that waits for a store without end
    wait_until_gone(workers)


def test_a_mistake_in_the_program_is_not_taken_for_a_dead_worker(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(ClipReader, "read", fail)
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        next(start(config.model_copy(update={"workers": 0})))


def test_a_cache_that_cannot_be_used_is_one_clear_error(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "samples").touch()
    reading = config.read.model_copy(update={"cache": str(tmp_path)})
    with pytest.raises(DataError, match=r"^the cache folder .*samples cannot be used: ") as caught:
        next(start(config.model_copy(update={"read": reading})))
    assert len(str(caught.value).splitlines()) == 1


_SMALL_SHARED_MEMORY = """
import sys
from regen_dist.config.embedder import DataConfig
from regen_dist.errors import DataError
from tests.helpers.datasets import read

if __name__ == "__main__":
    try:
        read(DataConfig(url=sys.argv[1], size=(32, 40), short_side=48, workers=1), 3)
    except DataError as error:
        print(error)
        sys.exit(3)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "run.py"
    path.write_text(_SMALL_SHARED_MEMORY)
    return path


@pytest.mark.parametrize("fill", ["", "head -c 204800 /dev/zero > /dev/shm/others; "])
def test_too_little_shared_memory_is_one_clear_error(dataset_folder: Path, script: Path, root: Path, fill: str) -> None:
    """A container has 64 MB of it by default; this one has less than a batch, or none that others left."""
    mount = f'mount -t tmpfs -o size=200k none /dev/shm || exit 42; {fill}exec "$0" "$@"'
    ran = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, sys.executable, script, dataset_folder],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    if ran.returncode in (1, 42) and ("unshare" in ran.stderr or "mount" in ran.stderr):
        pytest.skip(f"no small disk can be mounted here: {ran.stderr.strip()}")
    assert ran.returncode == 3, ran.stderr
    assert "no shared memory for " in ran.stdout
    assert "docker run --shm-size" in ran.stdout


_KILLED = """
import os, signal, sys
from regen_dist.config.embedder import DataConfig
from regen_dist.data.loading.clip_loader import clip_batches
from regen_dist.data.loading.datasets import TrainingSet

if __name__ == "__main__":
    config = DataConfig(url=sys.argv[1], size=(32, 40), workers=2)
    data = TrainingSet(config, num_frames=9, batch_global=8, seed=3)
    batches = clip_batches(data, accumulation=1, rank=0, world_size=1, cursor=0)
    next(batches)
    print(*[worker.pid for worker in batches.gi_frame.f_locals["batches"]._workers], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_killed_run(dataset_folder: Path, tmp_path: Path, root: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(_KILLED)
    environment = os.environ | {"PYTHONPATH": str(root)}
    # A file, not a pipe: the workers hold a pipe open as long as they live.
    with (tmp_path / "pids").open("w") as output:
        subprocess.run([sys.executable, str(script), str(dataset_folder)], stdout=output, env=environment, check=False)
    workers = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(workers) == 2
    wait_until_gone(workers)
