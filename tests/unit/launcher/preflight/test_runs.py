"""The preflight of existing runs: times, jobs, checkpoints, memory; and of text-to-video runs."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher import attempts, job
from launcher.cluster import ClusterConfig
from launcher.job import ID_FILE, Submission
from launcher.local_executor import LOCK
from launcher.preflight import findings, runs, scheduler, storage
from launcher.preflight import runs as timing
from launcher.preflight.findings import Estimate, Estimates, NoEstimate, Subject
from launcher.preflight.runs import measured
from launcher.submit import SubmissionRequest, command_request, sweep_request, train_request
from regen_dist.config.embedder import EmbedderConfig
from regen_dist.errors import BackendError
from regen_dist.models.embedder import build_model
from tests.helpers.commands import run_here
from tests.helpers.jobs import ended, started
from tests.helpers.latents import write_cache
from tests.helpers.t2v import t2v_run
from tests.helpers.tiny import tiny_run

LOCAL = ClusterConfig(kind="local")
TIMED = ClusterConfig(time_min=10, signal_lead_s=60)


def texts(found: Any, *, forbids: bool = True) -> list[str]:
    return [each.text for each in found if each.forbids == forbids]


def subject(config: EmbedderConfig, cluster: ClusterConfig = LOCAL, *, fresh: bool = False) -> Subject:
    return Subject(train_request(config, cluster, "test", fresh=fresh))


def record(config: EmbedderConfig, *lines: dict[str, Any]) -> None:
    config.folder.mkdir(parents=True, exist_ok=True)
    (config.folder / "metrics.jsonl").write_text("".join(json.dumps({"step": 1, **line}) + "\n" for line in lines))


def began(ranks: int = 1, at: float = 0.0) -> dict[str, Any]:
    return {"kind": "event", "event": "start", "world_size": ranks, "time": at}


def step(seconds: float) -> dict[str, Any]:
    return {"kind": "train", "step_s": seconds}


def saved(seconds: float, problem: str | None = None) -> dict[str, Any]:
    return {"kind": "checkpoint", "seconds": seconds, "bytes": 1000, "problem": problem}


# Times
def test_high_values_of_steady_steps_and_good_saves(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    assert measured(config) is None
    record(config, began(2), step(90.0), step(1.0), step(3.0), saved(4.0), saved(99.0, "full"), began(4), step(70.0))
    found = measured(config)
    assert found is not None
    assert (found.step_s, found.save_s, found.ranks) == (3.0, 4.0, 4)
    record(config, began(), step(90.0))
    found = measured(config)
    assert found is not None
    assert (found.step_s, found.save_s) == (90.0, None)


def test_a_signal_that_comes_too_late(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    record(config, began(), step(9.0), step(10.0), saved(20.0))
    assert texts(timing.times(subject(config, TIMED))) == [
        "signal_lead_s 60 is too short for two steps of 10.0 s and two saves of 20.0 s, 60.0 s in all (measured by "
        "this run); give --set signal_lead_s=70"
    ]
    record(config, began(), step(9.0), step(9.9), saved(20.0))
    assert texts(timing.times(subject(config, TIMED))) == []


def test_a_signal_may_come_amid_a_validation(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    record(config, began(), step(9.0), step(5.0), saved(5.0), {"kind": "validation", "seconds": 40.0})
    (told,) = texts(timing.times(subject(config, TIMED)))
    assert "two saves of 5.0 s, a validation of 40.0 s, 60.0 s in all" in told


def test_wandb_takes_its_time_to_close(tmp_path: Path) -> None:
    """Where a job is ended amid it, its end is not written down."""
    for mode, said in (("offline", 0), ("online", 1)):
        config = tiny_run(tmp_path, wandb__mode=mode)
        record(config, began(), step(9.0), step(9.0), saved(10.0))
        found = texts(timing.times(subject(config, TIMED)))
        assert len(found) == said
    assert "two saves of 10.0 s, at most 22 s until wandb is closed, 60.0 s in all" in found[0]


def test_fewer_ranks_take_longer_for_a_step(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    record(config, began(4), step(1.0), step(9.0), saved(1.0))
    told = texts(timing.times(subject(config, TIMED)))
    assert len(told) == 1
    assert "two steps of 36.0 s" in told[0]
    assert "on 4 ranks; now there are 1" in told[0]


def test_the_limit_of_the_run_itself(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train__time_limit_s=100.0, train__time_limit_lead_s=30.0)
    record(config, began(), step(1.0), step(10.0), saved(10.0))
    told = texts(timing.times(subject(config)))
    assert len(told) == 1
    assert told[0].startswith("train.time_limit_lead_s 30 is too short")
    assert told[0].endswith("give train.time_limit_lead_s=50")
    late = tiny_run(tmp_path, train__time_limit_s=600.0)
    assert texts(timing.times(subject(late, TIMED)), forbids=False)[0].startswith(
        "train.time_limit_s 600 never applies"
    )


def test_a_run_that_has_measured_nothing_is_a_note(tmp_path: Path) -> None:
    assert list(timing.times(subject(tiny_run(tmp_path)))) == []
    found = list(timing.times(subject(tiny_run(tmp_path), TIMED)))
    assert [each.forbids for each in found] == [False]
    assert "signal_lead_s 60 could not be compared" in found[0].text


def test_a_limit_that_ends_before_the_next_checkpoint_is_a_note(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, checkpoint__every=60)
    record(config, began(at=1050.0), step(9.0), step(9.0), saved(10.0))
    (config.folder / "launch").mkdir()
    start = attempts.Start(job="1", restart=0, nodes=("a",), time=1000.0)
    attempts.write_entry(config.folder / "launch", start)
    told = texts(timing.times(subject(config, TIMED)), forbids=False)
    assert len(told) == 1
    assert "the run starts (50 s) but does not get to the checkpoint" in told[0]
    longer = ClusterConfig(time_min=12, signal_lead_s=60)
    assert texts(timing.times(subject(config, longer)), forbids=False) == []


# Other jobs
@contextmanager
def submitted(order: SubmissionRequest, folder_of: Path) -> Iterator[Submission]:
    """A local job that lives as long as the block."""
    made = order.job(job.new_folder(folder_of), Path("code"))
    job.write_job(made)
    (made.folder / ID_FILE).write_text("4711\n")
    with (made.folder / LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield made


def test_a_run_that_is_running(tmp_path: Path) -> None:
    checked = subject(tiny_run(tmp_path))
    with submitted(checked.request, checked.request.base):
        told = texts(runs.alive(checked))
    assert len(told) == 1
    assert "job 4711 (test) runs or waits for it already" in told[0]
    assert f"`regen jobs stop {tmp_path}/tiny`" in told[0]
    assert list(runs.alive(checked)) == []


def test_a_run_of_a_sweep_that_is_running(tmp_path: Path) -> None:
    """Alone while the sweep runs, and the sweep while it runs alone."""
    swept = [(tiny_run(tmp_path, name=name), "tiny") for name in ("tiny-lr1", "tiny-lr2", "tiny-lr3")]
    sweep, alone = Subject(sweep_request(swept, LOCAL, "test")), subject(swept[1][0])
    with submitted(sweep.request, sweep.request.base):
        assert f"`regen jobs stop {tmp_path}/tiny-sweep`" in texts(runs.alive(alone))[0]
        assert list(runs.alive(subject(tiny_run(tmp_path, name="other")))) == []
    with submitted(alone.request, alone.request.base):
        assert "for tiny-lr2 already" in texts(runs.alive(sweep))[0]


def test_an_array_of_which_a_part_was_resumed_and_has_ended(tmp_path: Path) -> None:
    """Its other tasks may still run, by the submission before; they are not in the way of the one that failed."""
    array = command_request("many", tmp_path / "many", ["shards", "{task}"], LOCAL, "test", tasks=3)
    part = array.part(array.tasks[:1])
    with submitted(array, array.base):
        assert "job 4711 (test) runs or waits for it" in texts(runs.alive(Subject(part)))[0]
        started(array.tasks[0], at=time.time())
        ended(array.tasks[0], "failed", at=time.time())
        assert list(runs.alive(Subject(part))) == []
        with submitted(part, array.base):
            pass
        (told,) = texts(runs.alive(Subject(array)))
        assert "for 00001, 00002 already" in told


def test_a_job_that_nobody_can_be_asked_about_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: Submission) -> bool:
        raise BackendError("squeue not found")

    monkeypatch.setattr(runs, "is_alive", unknown)
    checked = subject(tiny_run(tmp_path))
    with submitted(checked.request, checked.request.base):
        found = list(runs.alive(checked))
    assert [each.forbids for each in found] == [False]
    assert "still runs: squeue not found" in found[0].text


# Checkpoints


# Memory
class Told(Estimates):
    """An estimate that is given."""

    def __init__(self, **terms: int) -> None:
        super().__init__()
        self.terms, self.asked = terms, 0

    def of(self, config: EmbedderConfig, world_size: int) -> Estimate:
        self.asked += 1
        return Estimate(1, self.terms)


def on_cards(gigabytes: float | None, told: Estimates, gpus: int = 4, **changes: Any) -> Subject:
    cluster = ClusterConfig(kind="local", gpus_per_node=gpus, gpu_memory_gb=gigabytes)
    return Subject(train_request(tiny_run(engine__kind="zero3", **changes), cluster, "test"), estimates=told)


def test_a_model_that_is_too_large() -> None:
    told = Told(weights=2 << 30, moments=7 << 30, ema=1 << 30, activations=40 << 30)
    assert texts(scheduler.gpu_memory(on_cards(40.0, told))) == [
        "about 50.0 GiB are needed on each of 4 GPUs, a card has 40 (gpu_memory_gb); most of it: activations 40.0 GiB; "
        "moments 7.0 GiB; weights 2.0 GiB. To lower it, take more GPUs, raise train.accumulation (now 1), or set "
        "engine.activation_checkpointing=true (`regen describe` shows all of it)"
    ]
    [tight] = list(scheduler.gpu_memory(on_cards(55.0, told)))
    assert (tight.forbids, "91% of a card's 55" in tight.text) == (False, True)
    assert list(scheduler.gpu_memory(on_cards(60.0, told))) == []


def test_memory_is_not_looked_at_without_cards() -> None:
    told = Told(weights=1 << 40)
    assert list(scheduler.gpu_memory(on_cards(None, told))) == []
    assert list(scheduler.gpu_memory(on_cards(1.0, told, gpus=0))) == []
    assert list(scheduler.gpu_memory(on_cards(1.0, told, gpus=3))) == [], "the batch does not fit: told elsewhere"
    assert told.asked == 0


def test_runs_of_a_sweep_share_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def describe(config: EmbedderConfig, world_size: int, timeout_s: float) -> Estimate:
        asked.append(config.name)
        return Estimate(len(asked), {})

    monkeypatch.setattr(findings, "describe", describe)
    known = Estimates()
    first = known.of(tiny_run(name="a", optimizer__lr=1e-3), 2)
    assert known.of(tiny_run("elsewhere", name="b", optimizer__lr=3e-3, train__steps=9), 2) is first
    assert known.of(tiny_run(name="c", model__decoder__width=64), 2) is not first
    assert known.of(tiny_run(name="d"), 4) is not first
    assert asked == ["a", "c", "d"]


def test_describing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torch, or too slow: a note, and the time of all models together is limited."""

    def slow(config: EmbedderConfig, world_size: int, timeout_s: float) -> Estimate:
        raise subprocess.TimeoutExpired("describe", timeout_s)

    monkeypatch.setattr(findings, "describe", slow)
    [found] = list(scheduler.gpu_memory(on_cards(80.0, Estimates())))
    assert (found.forbids, found.text) == (
        False, "GPU memory was not estimated: `regen describe` took longer than 60 s",
    )  # fmt: skip
    with pytest.raises(NoEstimate, match="longer than 0 s"):
        Estimates(patience_s=0.0).of(tiny_run(), 1)


def test_describe_is_asked_with_the_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real command, here in this process; `regen check` is started as a process in the same way."""
    monkeypatch.setattr(subprocess, "run", run_here)
    config = tiny_run(engine__kind="zero3", model__decoder__width=64)
    found = findings.describe(config, 2, 120.0)
    assert found.parameters == sum(each.numel() for each in build_model(config.model).parameters())
    assert "AdamW's two moments (fp32, sharded)" in found.memory
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(NoEstimate, match="exit code 1"):
        findings.describe(tiny_run(), 1, 60.0)


# What the preflight says of a text-to-video run: the folders that its nodes share, and its estimate.


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"), videos=2)


def test_an_embedder_that_nodes_do_not_share(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "common").mkdir()
    monkeypatch.chdir(tmp_path / "common")
    run = t2v_run(tmp_path / "common", Path("cache"), generation={"embedder": str(tmp_path / "model")})
    place = ClusterConfig(time_min=10, signal_lead_s=60, shared=tmp_path / "common")
    found = [finding.text for finding in storage.shared(Subject(train_request(run, place, "test")))]
    assert len(found) == 1
    assert found[0].startswith(f"generation.embedder {tmp_path}/model is not in {tmp_path}/common")


def test_an_estimate_knows_the_clips_in_a_row(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.preflight.findings.describe", lambda config, *_: Estimate(len(config.name), {}))
    known, first = Estimates(), t2v_run(tmp_path, cache)
    longer = t2v_run(tmp_path, cache, data={"clips": [4]}).model_copy(update={"name": "longer"})
    images = t2v_run(tmp_path, cache, data={"image_fraction": 1.0}).model_copy(update={"name": "images_only"})
    renamed = first.model_copy(update={"name": "renamed"})
    assert [known.of(each, 1).parameters for each in (first, renamed, longer, images)] == [3, 3, 6, 11]
