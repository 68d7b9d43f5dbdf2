"""Folders, datasets and disks, as the preflight sees them on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import ClusterConfig
from launcher.preflight import runs as space
from launcher.preflight import storage
from launcher.preflight import storage as places
from launcher.preflight.findings import Estimate, Estimates, NoEstimate, Subject
from launcher.submit import SubmissionRequest, command_request, sweep_request, train_request
from tests.helpers.tiny import tiny_run

LOCAL = ClusterConfig(kind="local")


def order(output: Path, url: Path | str = "none", cluster: ClusterConfig = LOCAL, **changes: Any) -> SubmissionRequest:
    return train_request(tiny_run(output, url, **changes), cluster, "test")


def on_slurm(shared: Path) -> ClusterConfig:
    return ClusterConfig(time_min=10, signal_lead_s=60, shared=shared)


def texts(found: Any) -> list[str]:
    return [each.text for each in found]


def test_a_run_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    told = texts(places.folders(Subject(order(tmp_path / "file" / "runs"))))
    assert told == [
        f"the run folder {tmp_path}/file/runs/tiny cannot be written to: {tmp_path}/file: Not a directory; choose "
        "another by output=FOLDER"
    ]
    command = command_request("x", tmp_path / "file" / "x", ["check"], LOCAL, "test")
    assert "output=FOLDER (of `regen submit run`: --output FOLDER)" in texts(places.folders(Subject(command)))[0]


def test_looking_at_folders_leaves_nothing(tmp_path: Path) -> None:
    subject = Subject(order(tmp_path / "runs", checkpoint__url=str(tmp_path / "elsewhere")))
    assert texts(places.folders(subject)) == []
    assert texts(storage.checkpoints(subject)) == []
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    told = texts(storage.checkpoints(Subject(order(tmp_path, checkpoint__url=str(tmp_path / "file")))))
    assert len(told) == 1
    assert f"checkpoints cannot be written to {tmp_path}/file/tiny: {tmp_path}/file: Not a directory" in told[0]


def test_folders_that_nodes_do_not_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link out of the shared folder is no way into it."""
    common, away = tmp_path / "common", tmp_path / "away"
    common.mkdir()
    away.mkdir()
    (common / "link").symlink_to(away)
    monkeypatch.chdir(common)
    made = order(away / "runs", common / "link", on_slurm(common), checkpoint__url=f"file://{away}/saved")
    assert texts(places.shared(Subject(made))) == [
        f"{what} is not in {common}, which all nodes share (cluster key shared); move it there"
        for what in (
            f"the run folder of tiny {away}/runs/tiny", f"the data {common}/link", f"checkpoint.url {away}/saved",
        )
    ]  # fmt: skip
    inside = order(common / "runs", "s3://bucket/train", on_slurm(common))
    assert texts(places.shared(Subject(inside))) == []
    monkeypatch.chdir(away)
    assert texts(places.shared(Subject(inside))) == [
        f"this folder, {away}, is not in {common}: relative paths in the job mean nothing on its nodes"
    ]


def test_a_shared_folder_that_is_not_mounted(tmp_path: Path) -> None:
    told = texts(places.shared(Subject(order(tmp_path, cluster=on_slurm(tmp_path / "gone")))))
    assert told == [
        f"cluster key shared: there is no folder {tmp_path}/gone on this machine; mount it, or correct the key"
    ]


class Told(Estimates):
    """Estimates without a model; None: it did not answer."""

    def __init__(self, parameters: int | None, **memory: int) -> None:
        super().__init__()
        self.parameters, self.memory, self.asked = parameters, memory, 0

    def of(self, config: Any, world_size: int) -> Estimate:
        self.asked += 1
        if self.parameters is None:
            raise NoEstimate("`regen describe` failed: no torch")
        return Estimate(self.parameters, self.memory)


def _with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(space, "free_bytes", lambda folder: free)


def test_a_disk_without_room_for_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that are kept, one that is written, one that was cut off; 16 bytes a parameter."""
    subject = Subject(order(tmp_path, checkpoint__every=1), estimates=Told(2**30))
    _with_free(monkeypatch, 4 * 16 * 2**30)
    assert texts(space.space(subject)) == []
    _with_free(monkeypatch, 4 * 16 * 2**30 - 1)
    told = texts(space.space(subject))
    assert len(told) == 1
    assert (
        f"the disk of {tmp_path}/tiny/checkpoints has 64.0 GiB free, the checkpoints of tiny need 64.0 GiB" in told[0]
    )
    assert "4 at once" in told[0]
    subject = Subject(order(tmp_path), estimates=Told(2**30, **{"discriminator (fp32, on every GPU)": 2**30}))
    _with_free(monkeypatch, 3 * 16 * 2**30)
    assert "the checkpoints of tiny need 51.0 GiB" in texts(space.space(subject))[0]


def test_what_lies_there_already_is_not_needed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(order(tmp_path, checkpoint__every=1), estimates=Told(1000))
    shard = tmp_path / "tiny" / "checkpoints" / "step-00000001" / "rank-00000-of-00001.safetensors"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(bytes(40_000))
    _with_free(monkeypatch, 24_000)
    assert texts(space.space(subject)) == []
    _with_free(monkeypatch, 23_999)
    assert len(texts(space.space(subject))) == 1


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"every": 10}, 4),
        ({"every": 10, "keep_last": 3, "keep_best": 2}, 7),
        ({"every": 10, "keep_every": 20}, 9),
        ({"every": 100}, 3),  # it never makes more than one
    ],
)
def test_how_many_checkpoints_lie_there_at_once(changes: dict[str, int], kept: int, tmp_path: Path) -> None:
    named = {f"checkpoint__{name}": value for name, value in changes.items()}
    assert space.checkpoints_kept(tiny_run(tmp_path, train__steps=100, **named)) == kept


def test_runs_on_one_disk_need_room_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [(tiny_run(tmp_path, name=name, checkpoint__every=1), "tiny") for name in ("a", "b")]
    subject = Subject(sweep_request(runs, LOCAL, "test"), estimates=Told(1000))
    _with_free(monkeypatch, 2 * 4 * 16_000)
    assert texts(space.space(subject)) == []
    _with_free(monkeypatch, 2 * 4 * 16_000 - 1)
    assert "the checkpoints of a, b need" in texts(space.space(subject))[0]


def test_sizes_that_the_run_has_seen_are_taken_before_an_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        {"kind": "train", "step": 1, "step_s": 1.0},
        {"kind": "checkpoint", "step": 1, "seconds": 1.0, "blocked_s": 0.1, "bytes": 500, "problem": None},
    ]
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = Told(10**15)
    _with_free(monkeypatch, 2000)
    assert texts(space.space(Subject(order(tmp_path, checkpoint__every=1), estimates=told))) == []
    assert told.asked == 0


def test_room_in_a_bucket_is_nobodys_business(tmp_path: Path) -> None:
    told = Told(10**15)
    assert texts(space.space(Subject(order(tmp_path, checkpoint__url="s3://bucket/runs"), estimates=told))) == []
    assert told.asked == 0


def test_an_estimate_that_fails_is_a_note(tmp_path: Path) -> None:
    found = list(space.space(Subject(order(tmp_path), estimates=Told(None))))
    assert [each.forbids for each in found] == [False]
    assert found[0].text.endswith("`regen describe` failed: no torch")
