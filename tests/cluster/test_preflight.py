"""The preflight against a real store and a real Slurm: what they refuse is told before they are asked in earnest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import ClusterConfig
from launcher.job import ID_FILE, new_folder, write_job
from launcher.preflight import check, runs, scheduler, storage
from launcher.preflight.findings import Subject
from launcher.submit import SubmissionRequest, train_request
from regen_dist.checkpoint.export import model_shapes
from regen_dist.checks.data import data
from regen_dist.checks.findings import Target
from regen_dist.checks.resume import resume
from regen_dist.config import to_yaml
from regen_dist.data.storage.store import Store
from regen_dist.data.synthetic.dataset import build_synthetic
from regen_dist.data.synthetic.shapes import SyntheticOptions
from tests.helpers.jobs import Submitter
from tests.helpers.slurm import submit
from tests.helpers.stores import READER, use
from tests.helpers.tiny import tiny_run
from tools.local_services.s3 import ObjectServer
from tools.local_services.slurm import SlurmCluster

LOCAL = ClusterConfig(kind="local")


def order(folder: Path, url: str, cluster: ClusterConfig = LOCAL, **changes: Any) -> SubmissionRequest:
    config = tiny_run(folder / "runs", url, **{"engine__kind": "zero3", **changes})
    return train_request(config, cluster, "test")


def texts(found: Any) -> list[str]:
    return [each.text for each in found]


# The store


def test_a_store_that_serves_is_no_problem_and_keeps_no_trace(bucket_url: str, tmp_path: Path) -> None:
    build_synthetic(f"{bucket_url}/train", SyntheticOptions(2, seed=1, side=48, frames=12), workers=0)
    Store(f"{bucket_url}/runs/tiny").put("latest", b"step-00000004\n")
    before = Store(bucket_url).list()
    report = check(order(tmp_path, f"{bucket_url}/train", checkpoint__url=f"{bucket_url}/runs"))
    assert report.problems == []
    assert Store(bucket_url).list() == before


def test_data_that_is_not_in_the_store(bucket_url: str, tmp_path: Path) -> None:
    made = order(tmp_path, f"{bucket_url}/train", data__validation_url="s3://no-such-bucket/held_out")
    missing, elsewhere = texts(data(made.configs[0], Target()))
    assert f"data: {bucket_url}/train: there is no manifest.json, so no finished dataset; build one" in missing
    assert "data.validation_url: s3://no-such-bucket/held_out: there is no bucket 'no-such-bucket'" in elsewhere


def test_keys_that_may_only_read(
    bucket_url: str, object_store: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, object_store.environment(READER))
    told = texts(storage.checkpoints(Subject(order(tmp_path, "none", checkpoint__url=bucket_url))))
    assert len(told) == 1
    assert told[0].startswith(f"checkpoints cannot be written: {bucket_url}/tiny/preflight-")
    assert "access denied when trying to write" in told[0]


def test_no_keys_at_all(bucket_url: str, object_store: ObjectServer, tmp_path: Path, monkeypatch: Any) -> None:
    kept = {name: value for name, value in object_store.environment().items() if "KEY" not in name}
    use(monkeypatch, kept)
    told = texts(data(order(tmp_path, f"{bucket_url}/train").configs[0], Target()))
    assert len(told) == 1
    assert "no credentials were found; checked AWS_ACCESS_KEY_ID" in told[0]


def test_a_store_that_is_down_is_told_in_seconds(bucket_url: str, tmp_path: Path) -> None:
    """Everything that asks it at once; told for the data and for the checkpoints. The endpoint is the cluster's."""
    down = ClusterConfig(kind="local", environment={"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    began = time.monotonic()
    report = check(order(tmp_path, f"{bucket_url}/train", down, checkpoint__url=bucket_url))
    assert time.monotonic() - began < 60
    checked, checkpoints = report.problems
    assert checked.startswith(f"data: {bucket_url}/train/manifest.json: could not read it in")
    assert checkpoints.startswith(f"checkpoints cannot be written: {bucket_url}/tiny/preflight-")
    assert all("at the endpoint 127.0.0.1:9 (AWS_ENDPOINT_URL)" in each for each in report.problems)


def test_a_run_that_is_done_in_the_store(bucket_url: str, tmp_path: Path) -> None:
    from regen_dist.checkpoint.manifest import CheckpointManifest, to_text

    made = order(tmp_path, "none", checkpoint__url=bucket_url)
    manifest = CheckpointManifest(
        step=8, samples=0, config_hash="", version="", topology={}, state={"data": None}, metrics={}, rollbacks=[],
        shapes=model_shapes(made.configs[0].model),
    )  # fmt: skip
    Store(f"{bucket_url}/tiny").put("step-00000008/manifest.json", to_text(manifest).encode())
    assert texts(resume(made.configs[0], Target())) == []
    Store(f"{bucket_url}/tiny").put("latest", b"step-00000008\n")
    assert texts(resume(made.configs[0], Target())) == ["nothing is left to do: all 8 steps are done"]


# Slurm


@pytest.fixture
def here(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> SlurmCluster:
    """This process asks the suite's Slurm."""
    for name, value in slurm.environment().items():
        monkeypatch.setenv(name, value)
    return slurm


def asks(tmp_path: Path, **changes: Any) -> list[str]:
    """Answer of the scheduler to a run on two nodes."""
    wanted = {"partition": "main", "nodes": 2, "time_min": 10, "signal_lead_s": 60, **changes}
    return texts(scheduler.scheduler(Subject(order(tmp_path, "none", ClusterConfig.model_validate(wanted)))))


def test_a_job_that_fits(here: SlurmCluster, tmp_path: Path) -> None:
    assert asks(tmp_path, gpus_per_node=2) == []
    assert asks(tmp_path, partition=None) == []
    assert asks(tmp_path, partition="main,high") == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"partition": "nope"}, ["Invalid partition name", "no partition 'nope'; set partition to one of: main, high"]),
        (
            {"nodes": 3},
            [
                "(3 node(s) x 0 GPU(s) for 10 min;",
                "configuration is not available",
                "at most 2 node(s)",
            ],
        ),
        ({"gpus_per_node": 8}, ["(2 node(s) x 8 GPU(s)", "configuration is not available", "(gpu:2, 4 cores"]),
        ({"gpu_type": "h100", "gpus_per_node": 1}, ["configuration is not available"]),
        ({"constraint": "a100"}, ["Invalid feature specification"]),
        ({"sbatch": {"no-such-option": True}}, ["unrecognized option '--no-such-option'"]),
    ],
    ids=str,
)
def test_a_job_that_slurm_would_refuse(
    changes: dict[str, Any], told: list[str], here: SlurmCluster, tmp_path: Path
) -> None:
    found = asks(tmp_path, **changes)
    assert len(found) == 1
    assert [each for each in told if each not in found[0]] == [], found[0]


@pytest.fixture
def high(here: SlurmCluster) -> Iterator[SlurmCluster]:
    """With a partition that has limits, for a while."""
    here.run("scontrol", "update", "PartitionName=high", "MaxTime=1-00:30:00", "MaxNodes=1")
    yield here
    here.run("scontrol", "update", "PartitionName=high", "MaxTime=UNLIMITED", "MaxNodes=UNLIMITED", "State=UP")


def test_limits_of_a_partition(high: SlurmCluster, tmp_path: Path) -> None:
    """Slurm takes a job that is too long, or for a partition that is down, and lets it wait for ever."""
    assert asks(tmp_path, partition="high", nodes=1, time_min=1470) == []
    assert asks(tmp_path, partition="high", nodes=1, time_min=1471) == [
        "time_min 1471 is longer than partition high allows (1470 min): the job would wait forever; give --time 1470, "
        "it is requeued and goes on"
    ]
    assert "partition high: at most 1 node(s)" in asks(tmp_path, partition="high")[0]
    high.run("scontrol", "update", "PartitionName=high", "State=DOWN")
    assert "partition high is DOWN: the job would wait forever" in asks(tmp_path, partition="high", nodes=1)[0]


def test_slurm_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert asks(tmp_path) == ["sbatch not found: submit where Slurm is installed, or with --cluster local"]


def test_a_folder_that_slurm_would_read_otherwise(here: SlurmCluster, tmp_path: Path) -> None:
    cluster = ClusterConfig(nodes=2, time_min=10, signal_lead_s=60)
    made = order(tmp_path / "50%j", "none", cluster)
    told = check(made, checks=[scheduler.scheduler]).problems
    assert len(told) == 1
    assert "choose another output folder" in told[0]


def test_a_job_that_waits_for_the_same_run(here: SlurmCluster, tmp_path: Path) -> None:
    made = order(tmp_path, "none", ClusterConfig(time_min=10, signal_lead_s=60))
    job = made.job(new_folder(made.base), tmp_path)
    write_job(job)
    number = submit(here, tmp_path, "true", "--hold")
    (job.folder / ID_FILE).write_text(number)
    told = texts(runs.alive(Subject(made)))
    assert len(told) == 1
    assert f"job {number} (test) runs or waits for it already" in told[0]
    here.run("scancel", number)
    assert texts(runs.alive(Subject(made))) == []


def test_by_the_command_line(here: SlurmCluster, tmp_path: Path) -> None:
    """Several things at once, and none of it reaches Slurm; a dry run tells them, too."""
    (tmp_path / "tiny.yaml").write_text(to_yaml(tiny_run("runs", "nowhere", engine__kind="zero3")))
    regen_submit = Submitter(tmp_path, here.environment())
    asked = ("train", "tiny.yaml", "--cluster", "loopback", "--nodes", 3)
    refused = regen_submit(*asked)
    assert refused.returncode == 2
    assert "tiny was not submitted: 3 problems" in refused.stderr
    for told in ("ranks that fit: 1, 2, 4", "there is no folder", "Slurm would refuse the job (3 node(s)"):
        assert told in refused.stderr
    assert not here.run("squeue", "--noheader")
    dry = regen_submit(*asked, "--dry-run")
    assert dry.returncode == 0
    assert dry.stderr.count("problem: ") == 3
