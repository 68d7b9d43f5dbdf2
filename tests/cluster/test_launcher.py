"""Training by `regen submit` on a real Slurm: two nodes, data and checkpoints in a store, whatever ends a job early.

A run that shall be told something in the middle is held there (SIGSTOP), so that little is computed while Slurm, which
looks at limits every 30 s, takes its time.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import pytest

from launcher.job import Submission
from regen_dist.config import to_yaml
from regen_dist.data.build.build import build_shards
from regen_dist.data.build.segments import BuildOptions
from tests.helpers.jobs import (
    Submitter,
    attempts,
    has_been_told,
    held,
    losses,
    told,
    wait_for_end,
    wait_for_ends,
    wait_until,
    whys,
)
from tests.helpers.ranks import run_regen_ranks, said
from tests.helpers.slurm import submit, wait_for
from tests.helpers.stores import use
from tests.helpers.tiny import tiny_run
from tests.helpers.video import moving_square, write_video
from tools.local_services.s3 import ObjectServer
from tools.local_services.slurm import SlurmCluster

STEPS, SAVE_EVERY = 30, 8
ON_TWO_NODES = ("--cluster", "loopback", "--nodes", 2, "--set", "retry.failures=2")


class Workshop:
    """A dataset in the store, a config that keeps its checkpoints there too, and who submits it."""

    def __init__(self, folder: Path, store: ObjectServer) -> None:
        self.folder, self.store = folder, store
        self.url = f"s3://{store.bucket}/launcher-{uuid4().hex[:8]}"
        self.config = folder / "tiny.yaml"

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def prepare(self) -> None:
        for seed in (1, 2):
            write_video(self.folder / "videos" / f"{seed}.mp4", moving_square(96, 48, 64, seed=seed))
        options = BuildOptions(segment_seconds=1.0, short_side=48, samples_per_shard=4, min_frames=20)
        build_shards([self.folder / "videos"], f"{self.url}/train", options, workers=0)
        made = tiny_run(
            self.folder / "runs", f"{self.url}/train", engine__kind="zero3", train__steps=STEPS,
            checkpoint__every=SAVE_EVERY, checkpoint__url=f"{self.url}/runs",
        )  # fmt: skip
        self.config.write_text(to_yaml(made))


@pytest.fixture(scope="module")
def shop(object_store: ObjectServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    shop = Workshop(tmp_path_factory.mktemp("launcher"), object_store)
    with pytest.MonkeyPatch.context() as patch:
        use(patch, object_store.environment())
        patch.setenv("REGEN_CACHE", str(shop.folder / "cache"))
        shop.prepare()
        yield shop


@pytest.fixture(scope="module")
def undisturbed(shop: Workshop) -> dict[int, float]:
    """The losses of two ranks on this machine."""
    logs = shop.folder / "undisturbed"
    assert run_regen_ranks("train", shop.config, "name=undisturbed", logs=logs) == [0, 0], said(logs)
    return losses(shop.run("undisturbed"))


@pytest.fixture
def regen_submit(shop: Workshop, slurm: SlurmCluster) -> Submitter:
    return Submitter(shop.folder, slurm.environment())


def train(regen_submit: Submitter, shop: Workshop, name: str, *more: object) -> Submission:
    """Two nodes, a rank on each, unless `more` says otherwise."""
    return regen_submit.job(shop.run(name), "train", shop.config, f"name={name}", *ON_TWO_NODES, *more)


def wait_for_signal(ranks: dict[int, int], number: signal.Signals, run: Path) -> None:
    """Block until all ranks, which are held, have been sent a signal."""
    wait_until(lambda: all(has_been_told(each, number) for each in ranks.values()), lambda: told(run))


def set_time_limit(slurm: SlurmCluster, run: Path, number: str) -> None:
    """In one to two minutes from now: not before the run is where it shall be told, however slow the machine is."""
    minutes = int(time.time() - attempts(run)[-1].start.time) // 60 + 2
    slurm.run("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")


def test_two_nodes_train_from_the_store_as_two_ranks_here(
    regen_submit: Submitter, shop: Workshop, slurm: SlurmCluster, undisturbed: dict[int, float]
) -> None:
    """ZeRO-3 over two nodes with one task each: every loss equal, bit for bit. A finished job that is requeued does
    nothing, and so does the same command again."""
    run = shop.run("two_nodes")
    job = train(regen_submit, shop, "two_nodes")
    assert wait_for_end(run) == "done", told(run)
    assert losses(run) == undisturbed
    assert attempts(run)[0].start.nodes == ("node1", "node2")
    assert (run / "logs" / "rank_0.log").exists()
    assert (run / "logs" / "rank_1.log").exists()
    before = (run / "metrics.jsonl").read_bytes()
    number = str(job.id())
    assert wait_for(slurm, number) == "COMPLETED"
    slurm.run("scontrol", "requeue", number)
    wait_for(slurm, number, "PENDING", "RUNNING")
    again = str(train(regen_submit, shop, "two_nodes", "--force").id())
    for each in (number, again):
        assert wait_for(slurm, each) == "COMPLETED"
    assert told(run).count(f"nothing is left to do: all {STEPS} steps are done") == 2
    assert (run / "metrics.jsonl").read_bytes() == before
    assert len(attempts(run)) == 1


def test_a_job_that_must_go_saves_and_goes_on(
    regen_submit: Submitter, shop: Workshop, slurm: SlurmCluster, undisturbed: dict[int, float]
) -> None:
    """A signal of a person, then a job of higher priority, then the time limit: each time told, saved at the step it
    was in, requeued, resumed; the losses are those of a run that nothing happened to, bit for bit."""
    name = "moved_again" if shop.run("moved").exists() else "moved"  # this test is run once more after it failed
    run, reasons = shop.run(name), ("signal", "preempted", "time limit")
    job = train(regen_submit, shop, name, "--set", "signal_lead_s=110", "checkpoint.every=1000")
    number = job.id()
    assert number
    for start, why in enumerate(reasons, 1):
        reached = max(losses(run)) if start > 1 else 0
        with held(run, 2, reached + 3, starts=start) as ranks:
            if why == "signal":
                slurm.run("scancel", "--signal=USR2", number)
            elif why == "preempted":
                other = submit(slurm, shop.folder, "true", "--partition=high", "--nodes=2", "--exclusive")
            else:
                set_time_limit(slurm, run, number)
            wait_for_signal(ranks, signal.SIGUSR2, run)
        wait_for_ends(run, start)
    slurm.run("scontrol", "update", f"JobId={number}", "TimeLimit=60")  # long enough for the rest
    assert wait_for(slurm, other) == "COMPLETED"
    assert wait_for_end(run, starts=4) == "done", told(run)
    assert whys(run) == [*reasons, "done"]
    steps = [each.start.step or 0 for each in attempts(run)]
    assert steps[0] == 0
    assert all(after >= before + 3 for before, after in pairwise(steps)), "no save but those when it was told"
    assert losses(run) == undisturbed
    assert wait_for(slurm, number) == "COMPLETED"


def test_a_rank_that_is_killed_goes_on_from_the_last_checkpoint(
    regen_submit: Submitter, shop: Workshop, undisturbed: dict[int, float]
) -> None:
    """No save, no word of the rank: the process above it tells. The same job goes on."""
    run = shop.run("killed")
    train(regen_submit, shop, "killed")
    with held(run, 2, SAVE_EVERY + 2, saved=True) as ranks:
        os.kill(ranks[1], signal.SIGKILL)
    assert wait_for_end(run) == "done", told(run)
    assert whys(run) == ["failed", "done"]
    first, second = attempts(run)
    assert first.end is not None
    assert (first.end.code, first.end.at_fault) == (128 + signal.SIGKILL, ("node2",))
    assert second.start.step in range(SAVE_EVERY, STEPS, SAVE_EVERY)
    assert losses(run) == undisturbed


def test_a_stopped_run_goes_on_with_one_node(
    regen_submit: Submitter, shop: Workshop, slurm: SlurmCluster, undisturbed: dict[int, float]
) -> None:
    """`scancel` leaves the ranks half a minute, Slurm's default; they save, and the job is not requeued although they
    could go on. The same command with another number of nodes does."""
    run, never = shop.run("fewer"), "checkpoint.every=1000"
    number = train(regen_submit, shop, "fewer", never).id()
    assert number
    config = Path(slurm.environment()["SLURM_CONF"])
    before = config.read_text()
    try:
        config.write_text(before.replace("KillWait=3", "KillWait=30"))
        slurm.run("scontrol", "reconfigure")
        with held(run, 2, 5) as ranks:
            slurm.run("scancel", number)
            wait_for_signal(ranks, signal.SIGTERM, run)
        assert wait_for(slurm, number) == "CANCELLED"
    finally:
        config.write_text(before)
        slurm.run("scontrol", "reconfigure")
    assert whys(run) == ["stopped"], told(run)
    reached = max(losses(run))
    train(regen_submit, shop, "fewer", never, "--nodes", 1)
    assert wait_for_end(run, starts=2) == "done", told(run)
    first, second = (each.start for each in attempts(run))
    assert (first.nodes, second.nodes, second.step) == (("node1", "node2"), ("node1",), reached)
    found = losses(run)
    assert sorted(found) == sorted(undisturbed)
    assert max(abs(found[step] - undisturbed[step]) for step in found) < 1e-4
    assert found != undisturbed, "one rank adds in another order"
