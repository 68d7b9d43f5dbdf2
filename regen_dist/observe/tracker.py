"""Weights & Biases, if the config asks for it. The only module that imports wandb.

The record on disk is the truth; this is a copy. Whatever goes wrong here is said once and never stops a run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regen_dist.config.job import CommonConfig

log = logging.getLogger(__name__)


class Tracker:
    """Sends metrics and pictures to wandb; switches itself off at the first failure."""

    def __init__(self, config: CommonConfig, run: Path) -> None:
        self._run: Any = None
        self.failures = 0
        if config.wandb.mode != "disabled":
            self._guard(lambda: self._start(config, run))

    def log(
        self,
        step: int,
        values: Mapping[str, Any],
        pictures: Mapping[str, Path] | None = None,
        videos: Mapping[str, Path] | None = None,
    ) -> None:
        """Metrics (and pictures and videos by name) of one step."""
        if self._run is not None:
            self._guard(lambda: self._send(step, values, pictures or {}, videos or {}))

    def close(self) -> None:
        if self._run is not None:
            self._guard(self._run.finish)

    def _start(self, config: CommonConfig, run: Path) -> None:
        import wandb

        settings = config.wandb
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=config.name,
            id=config.name,
            resume="allow",
            mode=settings.mode,
            dir=str(run),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(init_timeout=60, silent=True),
        )

    def _send(
        self, step: int, values: Mapping[str, Any], pictures: Mapping[str, Path], videos: Mapping[str, Path]
    ) -> None:
        import wandb

        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        shown = {name: wandb.Image(str(path)) for name, path in pictures.items()}
        played = {name: wandb.Video(str(path), format="mp4") for name, path in videos.items()}
        self._run.log({**numbers, **shown, **played}, step=step)

    def _guard(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - an outage of a web service must not end weeks of training
            self.failures += 1
            self._run = None
            log.warning("wandb failed and is off for the rest of this run (metrics.jsonl goes on): %s", error)
