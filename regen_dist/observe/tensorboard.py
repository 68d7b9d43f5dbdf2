"""TensorBoard tracker, if the config enables it. Videos become animated GIFs, which TensorBoard plays."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from regen_dist.data.video.conversion import frame_to_rgb
from regen_dist.data.video.reader import VideoReader
from regen_dist.errors import needing_extra

log = logging.getLogger(__name__)


class TensorBoard:
    """Writer of metrics, images and videos; disables itself at the first failure, with one warning.

    Args:
        folder: folder of the event files; those of earlier starts stay beside the new one.
        step: step that the run starts from: later steps of an earlier start are no longer shown.

    Attributes:
        failures: number of failures, at most 1.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self._folder, self.failures = folder, 0
        self._writer: Any = None
        self._open(step)

    def log(
        self,
        step: int,
        values: Mapping[str, Any],
        pictures: Mapping[str, Path] | None = None,
        videos: Mapping[str, Path] | None = None,
    ) -> None:
        """Log the metrics (and images and videos by name) of one step."""
        if self._writer is not None:
            self._guard(lambda: self._write(step, values, pictures or {}, videos or {}))

    def rewind(self, step: int) -> None:
        """Discard what was logged for steps after `step`."""
        if self._writer is not None:
            self._guard(self._writer.close)
            self._open(step)

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._guard(self._writer.close)
        self._writer = None

    def _open(self, step: int) -> None:
        self._writer = None if self.failures else self._guard(lambda: _writer(self._folder, step))

    def _write(
        self, step: int, values: Mapping[str, Any], pictures: Mapping[str, Path], videos: Mapping[str, Path]
    ) -> None:
        from PIL import Image

        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)
        for name, path in pictures.items():
            with Image.open(path) as image:
                self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        for name, path in videos.items():
            _add_gif(self._writer, name, path, step)
        self._writer.flush()

    def _guard(self, action: Callable[[], Any]) -> Any:
        """Return the action's result, or None with one warning if it failed."""
        try:
            return action()
        except Exception as error:  # noqa: BLE001 - a full disk or a broken picture must not end weeks of training
            self.failures += 1
            self._writer = None
            log.warning("TensorBoard failed and is off for the rest of this run (metrics.jsonl goes on): %s", error)
            return None


def _writer(folder: Path, step: int) -> Any:
    with needing_extra("tensorboard.enabled=true"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


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
