"""Metric trackers beside the record: one interface for wandb and TensorBoard, each enabled by the config."""

from __future__ import annotations

import io
import logging
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from regen_dist.config.identity import read_or_create_run_id
from regen_dist.config.run import WANDB_CLOSE_S, CommonConfig
from regen_dist.data.video.conversion import frame_to_rgb
from regen_dist.data.video.reader import VideoReader
from regen_dist.errors import needing_extra

# This is the only module that imports wandb. The record on disk is authoritative; a tracker is a copy. A failure is
# reported once and never stops a run: every call runs in its own thread, with a time limit in seconds.
Numbers = Mapping[str, float]  # by name
Files = Mapping[str, Path]
log = logging.getLogger(__name__)

START_S, SEND_S, TEARDOWN_S = 30.0, 10.0, 2.0  # time limits of calls
FINISH_S = WANDB_CLOSE_S - TEARDOWN_S
_STEP = "step"  # x-axis of every curve; wandb's own counter drops points with a lower step than the last


class MetricTracker(ABC):
    """Copy of a run's metrics elsewhere; disables itself at the first failure, with one warning.

    Attributes:
        failures: number of failures, at most 1.
    """

    name: str

    def __init__(self) -> None:
        self._target: Any = None  # what is written to, while it works
        self.failures = 0

    def log(
        self, step: int, values: Mapping[str, Any], pictures: Files | None = None, videos: Files | None = None
    ) -> None:
        """Log the metrics (and images and videos by name) of one step, which may be lower than an earlier one."""
        target, numbers = self._target, {name: each for name, each in values.items() if isinstance(each, (int, float))}
        if target is not None:
            self._guard(lambda: self._send(target, step, numbers, pictures or {}, videos or {}))

    @abstractmethod
    def rewind(self, step: int) -> None:
        """Handle a rollback of the run to `step`."""

    @abstractmethod
    def close(self) -> None:
        """Flush and close."""

    @abstractmethod
    def _send(self, target: Any, step: int, numbers: Numbers, pictures: Files, videos: Files) -> None: ...

    def _guard(self, action: Callable[[], Any]) -> Any:
        """Return the action's result, or None with a warning if it failed."""
        try:
            return action()
        except Exception as error:  # noqa: BLE001 - an outage or a full disk must not end weeks of training
            self.failures += 1
            self._target = None
            log.warning("%s failed and is off for the rest of this run (metrics.jsonl goes on): %s", self.name, error)
            return None


class WandbTracker(MetricTracker):
    """Weights & Biases tracker, whose calls have time limits."""

    name = "wandb"

    def __init__(self, config: CommonConfig, run: Path) -> None:
        super().__init__()
        self._wanted = config.wandb.mode != "disabled"
        if self._wanted:
            self._target = self._guard(lambda: _bounded(lambda: _start(config, run), START_S))

    def rewind(self, step: int) -> None:
        """Do nothing: wandb keeps repeated points of a step, on our own x-axis."""

    def close(self) -> None:
        """Flush, and stop everything that the end of the process would wait for."""
        if not self._wanted:
            return
        if (run := self._target) is not None:
            self._guard(lambda: _bounded(run.finish, FINISH_S))
        if self.failures:
            _abandon_service()
        self._wanted, self._target = False, None

    def _send(self, target: Any, step: int, numbers: Numbers, pictures: Files, videos: Files) -> None:
        def send() -> None:
            import wandb

            shown = {name: wandb.Image(str(path)) for name, path in pictures.items()}
            played = {name: wandb.Video(str(path), format="mp4") for name, path in videos.items()}
            target.log({**numbers, **shown, **played, _STEP: step})

        _bounded(send, SEND_S)


def _bounded(action: Callable[[], Any], limit_s: float) -> Any:
    """Return the result of an action in a thread, waiting for it `limit_s` at most.

    Raises:
        TimeoutError: the action has not ended.
        Exception: that of the action.
    """
    results: list[Any] = []
    errors: list[Exception] = []

    def act() -> None:
        try:
            results.append(action())
        except Exception as error:  # noqa: BLE001 - raised again in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=act, name="wandb", daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    if thread.is_alive():
        raise TimeoutError(f"no answer within {limit_s:g} s")
    return results[0] if results else None


def _start(config: CommonConfig, folder: Path) -> Any:
    import wandb

    settings = config.wandb
    run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        name=config.name,
        id=read_or_create_run_id(folder),
        resume="allow",
        mode=settings.mode,
        dir=str(folder),
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(init_timeout=START_S, silent=True),
    )
    run.define_metric(_STEP)
    run.define_metric("*", step_metric=_STEP)
    return run


def _abandon_service() -> None:
    """End wandb's service process, which would block the end of this process without limit; unsent data is in the run
    folder (`wandb sync`)."""
    import wandb

    try:
        _bounded(wandb.teardown, TEARDOWN_S)  # also removes its exit hook
    except Exception as error:  # noqa: BLE001 - the failure was reported; this is cleanup
        log.debug("wandb's service did not end by itself: %s", error)
    for pid in _children("wandb-core"):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _children(name: str) -> list[int]:
    """Return the child processes of this process with a name; none without /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = stat.read_text().partition(" (")
            command, _, fields = rest.rpartition(") ")
        except OSError:  # it has ended
            continue
        if command == name and fields.split()[1] == str(os.getpid()):
            found.append(int(pid))
    return found


class Trackers:
    """All trackers of a run."""

    def __init__(self, config: CommonConfig, run: Path, step: int = 0) -> None:
        self._all: list[MetricTracker] = [WandbTracker(config, run)]
        if config.tensorboard.enabled:
            self._all.append(TensorBoard(run / "tensorboard", step))

    def log(
        self, step: int, values: Mapping[str, Any], pictures: Files | None = None, videos: Files | None = None
    ) -> None:
        for each in self._all:
            each.log(step, values, pictures, videos)

    def rewind(self, step: int) -> None:
        for each in self._all:
            each.rewind(step)

    def close(self) -> None:
        for each in self._all:
            each.close()


# TensorBoard tracker, if the config enables it. Videos become animated GIFs, which TensorBoard plays.


class TensorBoard(MetricTracker):
    """Writer of metrics, images and videos.

    Args:
        folder: folder of the event files; those of earlier starts stay beside the new one.
        step: step that the run starts from: later steps of an earlier start are no longer shown.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, step: int = 0) -> None:
        super().__init__()
        self._folder = folder
        self._open(step + 1 if step else 0)  # anew from step 0: what came of a start before is no longer shown

    def rewind(self, step: int) -> None:
        if self._target is not None:
            self._guard(self._target.close)
            self._open(step + 1)

    def close(self) -> None:
        if self._target is not None:
            self._guard(self._target.close)
        self._target = None

    def _open(self, first_step: int) -> None:
        self._target = None if self.failures else self._guard(lambda: _writer(self._folder, first_step))

    def _send(self, target: Any, step: int, numbers: Numbers, pictures: Files, videos: Files) -> None:
        from PIL import Image

        for name, value in numbers.items():
            target.add_scalar(name, value, step)
        for name, path in pictures.items():
            with Image.open(path) as image:
                target.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        for name, path in videos.items():
            _add_gif(target, name, path, step)
        target.flush()


def _writer(folder: Path, first_step: int) -> Any:
    """Writer of a new event file; earlier points of `first_step` and later ones are no longer shown."""
    with needing_extra("tensorboard.enabled=true"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(folder), purge_step=first_step)


def _add_gif(writer: Any, name: str, path: Path, step: int) -> None:
    """Write a video as a GIF; torch's own method needs moviepy."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    with VideoReader(path) as reader:
        rate = float(reader.rate)
        first, *others = [
            Image.fromarray(frame_to_rgb(frame)) for _, frame in reader.frames(range(len(reader.table.pts)))
        ]
    data = io.BytesIO()
    first.save(data, "GIF", save_all=True, append_images=others, duration=max(20, round(1000 / rate)), loop=0)
    image = Summary.Image(height=first.height, width=first.width, colorspace=3, encoded_image_string=data.getvalue())
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
