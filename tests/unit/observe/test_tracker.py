"""wandb: offline for real, and no trouble to the run when it fails."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regen_dist.observe.tracker import Tracker
from tests.helpers.tiny import tiny_run


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics and a picture land in an offline run under the run folder, without a network and without a failure."""
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    picture = tmp_path / "picture.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture)
    tracker = Tracker(tiny_run(wandb__mode="offline"), tmp_path)
    tracker.log(1, {"train/loss": 0.5, "name": "is no number"}, {"clip": picture})
    tracker.close()
    assert tracker.failures == 0
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
    assert list(run.rglob("*.png"))


def test_disabled_does_not_even_import_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default nothing is started and nothing is written."""
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("wandb was started"))
    tracker = Tracker(tiny_run(), tmp_path)
    tracker.log(1, {"loss": 0.5})
    tracker.close()
    assert tracker.failures == 0
    assert list(tmp_path.iterdir()) == []


def test_a_failing_start_is_counted_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No service: no exception, one warning that names the reason, and silence from then on."""
    import wandb

    def fail(**_: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(wandb, "init", fail)
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(tiny_run(wandb__mode="online"), tmp_path)
        for step in range(3):
            tracker.log(step, {"loss": 0.5})
        tracker.close()
    assert tracker.failures == 1
    assert [record.getMessage() for record in caplog.records if "no route to host" in record.getMessage()] == [
        record.getMessage() for record in caplog.records
    ]
    assert len(caplog.records) == 1
    assert "metrics.jsonl goes on" in caplog.text


class _Broken:
    """A run whose service went away after it started."""

    def __init__(self) -> None:
        self.calls = 0

    def log(self, *_: Any, **__: Any) -> None:
        self.calls += 1
        raise OSError("broken pipe")

    def finish(self) -> None:
        raise OSError("broken pipe")


def test_an_outage_in_the_middle_switches_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first failed call is the last one that is tried; nor does a picture that cannot be read stop the run."""
    import wandb

    broken = _Broken()
    monkeypatch.setattr(wandb, "init", lambda **_: broken)
    tracker = Tracker(tiny_run(wandb__mode="online"), tmp_path)
    for step in range(3):
        tracker.log(step, {"loss": 0.5})
    tracker.close()
    assert (tracker.failures, broken.calls) == (1, 1)
    tracker = Tracker(tiny_run(wandb__mode="online"), tmp_path)
    tracker.log(0, {}, {"clip": tmp_path / "missing.png"})
    assert tracker.failures == 1
