"""Where metrics go beside the record: one interface for wandb and TensorBoard, each where the config asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from regen_dist.config.job import CommonConfig
from regen_dist.observe.tensorboard import TensorBoard
from regen_dist.observe.tracker import Tracker


class MetricTracker(Protocol):
    """A copy of a run's metrics. Nothing that goes wrong in it stops a run."""

    def log(
        self, step: int, values: Mapping[str, Any], pictures: Mapping[str, Path], videos: Mapping[str, Path]
    ) -> None:
        """Metrics, pictures and videos by name, of one step."""

    def rewind(self, step: int) -> None:
        """The run went back to `step`."""

    def close(self) -> None:
        """Send what is left."""


class Trackers:
    """All trackers of a run.

    Args:
        config: of the run.
        run: its folder.
        step: that it starts from.
    """

    def __init__(self, config: CommonConfig, run: Path, step: int = 0) -> None:
        self._all: list[MetricTracker] = [Tracker(config, run)]
        if config.tensorboard.enabled:
            self._all.append(TensorBoard(run / "tensorboard", step))

    def log(
        self,
        step: int,
        values: Mapping[str, Any],
        pictures: Mapping[str, Path] | None = None,
        videos: Mapping[str, Path] | None = None,
    ) -> None:
        """Metrics, pictures and videos by name, of one step."""
        for each in self._all:
            each.log(step, values, pictures or {}, videos or {})

    def rewind(self, step: int) -> None:
        """The run went back to `step`."""
        for each in self._all:
            each.rewind(step)

    def close(self) -> None:
        """Send what is left."""
        for each in self._all:
            each.close()
