"""Training by `regen submit` on a real Slurm: two nodes, data and checkpoints in a store, whatever ends a job early.

A run that shall be told something in the middle is held there (SIGSTOP), so that little is computed while Slurm, which
looks at limits every 30 s, takes its time.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
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
    wait_until,
    whys,
)
from tests.helpers.ranks import run_regen
from tests.helpers.slurm import submit, wait_for
from tests.helpers.stores import use
from tests.helpers.tiny import tiny_run
from tests.helpers.video import moving_square, write_video
from tools.local_services.s3 import ObjectServer
from tools.local_services.slurm import SlurmCluster

STEPS, SAVE_EVERY = 40, 10
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
    code = run_regen("train", shop.config, "--ranks", 2, "name=undisturbed", log=shop.folder / "undisturbed.log")
    assert code == 0, (shop.folder / "undisturbed.log").read_text()
    return losses(shop.run("undisturbed"))


@pytest.fixture
def regen_submit(shop: Workshop, slurm: SlurmCluster) -> Submitter:
    return Submitter(shop.folder, slurm.environment())


def train(regen_submit: Submitter, shop: Workshop, name: str, *more: object) -> Submission:
    """Two nodes, a rank on each, unless `more` says otherwise."""
    return regen_submit.job(shop.run(name), "train", shop.config, f"name={name}", *ON_TWO_NODES, *more)


def set_time_limit(slurm: SlurmCluster, run: Path, number: str) -> None:
    """In one to two minutes from now: not before the run is where it shall be told, however slow the machine is."""
    minutes = int(time.time() - attempts(run)[0].start.time) // 60 + 2
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
    assert told(run).count("nothing is left to do: all 40 steps are done") == 2
    assert (run / "metrics.jsonl").read_bytes() == before
    assert len(attempts(run)) == 1


@pytest.mark.parametrize("how", ["preempted", "time limit", "signal"])
def test_a_job_that_must_go_saves_and_goes_on(
    how: str, regen_submit: Submitter, shop: Workshop, slurm: SlurmCluster, undisturbed: dict[int, float]
) -> None:
    """A job of higher priority, the time limit, a signal of a person: told, saved at the step it was in, requeued,
    resumed; the losses are those of a run that nothing happened to, bit for bit."""
    name = how.replace(" ", "_")
    if shop.run(name).exists():  # this test is run once more after it failed
        name += "_again"
    run = shop.run(name)
    lead = ("--set", "signal_lead_s=110") if how == "time limit" else ()
    job = train(regen_submit, shop, name, *lead, "checkpoint.every=1000")
    number = job.id()
    assert number
    other = None
    with held(run, 2, 5) as ranks:
        if how == "preempted":
            other = submit(slurm, shop.folder, "true", "--partition=high", "--nodes=2", "--exclusive")
        elif how == "signal":
            slurm.run("scancel", "--signal=USR2", number)
        else:
            set_time_limit(slurm, run, number)
        wait_until(lambda: all(has_been_told(each, signal.SIGUSR2) for each in ranks.values()), lambda: told(run))
    if how == "time limit":  # long enough for the rest
        wait_until(lambda: whys(run)[0], lambda: told(run))
        slurm.run("scontrol", "update", f"JobId={number}", "TimeLimit=60")
    if other:
        assert wait_for(slurm, other) == "COMPLETED"
    assert wait_for_end(run) == "done", told(run)
    assert whys(run) == [how, "done"]
    first, second = attempts(run)
    assert first.start.step == 0
    assert (second.start.step or 0) >= 5, "there was no save but the one when it was told"
    assert losses(run) == undisturbed
    assert wait_for(slurm, number) == "COMPLETED"


def test_a_cancelled_job_saves_and_does_not_come_back(
    regen_submit: Submitter, shop: Workshop, slurm: SlurmCluster
) -> None:
    """`scancel` leaves the ranks half a minute, Slurm's default; they save, and the job is not requeued although
    they could go on."""
    run = shop.run("cancelled")
    job = train(regen_submit, shop, "cancelled", "checkpoint.every=1000")
    number = job.id()
    assert number
    config = Path(slurm.environment()["SLURM_CONF"])
    before = config.read_text()
    try:
        config.write_text(before.replace("KillWait=3", "KillWait=30"))
        slurm.run("scontrol", "reconfigure")
        with held(run, 2, 5) as ranks:
            slurm.run("scancel", number)
            everyone = [*ranks.values()]
            wait_until(lambda: all(has_been_told(each, signal.SIGTERM) for each in everyone), lambda: told(run))
        assert wait_for(slurm, number) == "CANCELLED"
    finally:
        config.write_text(before)
        slurm.run("scontrol", "reconfigure")
    assert whys(run) == ["stopped"], told(run)


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
    """Two nodes, then one: the file STOP ends the first job for good, the same command with other nodes goes on."""
    run = shop.run("fewer")
    job = train(regen_submit, shop, "fewer")
    with held(run, 2, 5):
        (run / "STOP").touch()
    assert wait_for_end(run) == "stopped", told(run)
    assert job.id()
    assert wait_for(slurm, str(job.id())) == "FAILED"  # with exit code 75: whatever depends on it shall not run
    train(regen_submit, shop, "fewer", "--nodes", 1)
    assert wait_for_end(run, starts=2) == "done", told(run)
    assert [each.start.nodes for each in attempts(run)] == [("node1", "node2"), ("node1",)]
    found = losses(run)
    assert sorted(found) == sorted(undisturbed)
    assert max(abs(found[step] - undisturbed[step]) for step in found) < 1e-4
    assert found != undisturbed, "one rank adds in another order"
