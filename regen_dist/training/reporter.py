"""Where the figures and pictures of a run go: the record, the progress line, wandb, picture files. Only rank 0
reports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from regen_dist.checkpoint.saver import Outcome
from regen_dist.config.schema import RunConfig
from regen_dist.distributed.ranks import Ranks
from regen_dist.evaluation.sheet import sheet_frames, write_sheet
from regen_dist.inference.long import to_frames
from regen_dist.observe.progress import ProgressLine
from regen_dist.observe.record import Record
from regen_dist.observe.tracker import Tracker
from regen_dist.training.tasks import Validation


class Reporter:
    """Reports on rank 0; silent elsewhere."""

    def __init__(self, config: RunConfig, ranks: Ranks, step: int) -> None:
        self._silent, self._run = not ranks.is_main, config.folder
        if self._silent:
            return
        self._record = Record(self._run / "metrics.jsonl", step)
        self._line = ProgressLine(config.train.steps, step)
        self._tracker = Tracker(config, self._run)
        self._line.say(
            f"{self._run}: {'resumed at' if step else 'starting at'} step {step} on {ranks.world_size} rank(s)"
        )
        self._record.write("event", step, {"event": "start", "world_size": ranks.world_size})

    def train(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of the steps since the last log line."""
        if self._silent:
            return
        self._record.write("train", step, figures)
        self._line.train(step, figures)
        self._tracker.log(step, {f"train/{name}": value for name, value in figures.items()})

    def validation(self, step: int, result: Validation) -> None:
        """Figures of the validation clips, and a picture of the first: source, reconstruction, error."""
        if self._silent:
            return
        picture = self._run / "pictures" / f"step-{step:08d}.png"
        self._draw(picture, result, f"step {step}: {result.figures['psnr_db']:.2f} dB in one step")
        self._record.write("validation", step, result.figures)
        self._line.validation(result.figures)
        self._tracker.log(step, {f"validation/{n}": v for n, v in result.figures.items()}, {"validation/clip": picture})

    @staticmethod
    def _draw(path: Path, result: Validation, title: str) -> None:
        source, reconstruction = (to_frames(video[0]) for video in (result.source, result.reconstruction))
        numbers = sheet_frames(len(source))
        path.parent.mkdir(exist_ok=True)
        write_sheet(
            path, numbers, [source[n] for n in numbers], {"one step": [reconstruction[n] for n in numbers]}, title=title
        )

    def say(self, step: int, text: str) -> None:
        """Something that happened: on the terminal and in the record."""
        if not self._silent:
            self._line.say(text)
            self._record.write("event", step, {"event": text})

    def checkpoint(self, outcome: Outcome) -> None:
        """A save that has ended, well or not."""
        if self._silent:
            return
        figures = {"seconds": outcome.seconds, "blocked_s": outcome.blocked_s, "bytes": outcome.size_bytes}
        self._record.write("checkpoint", outcome.step, figures | {"problem": outcome.problem or None})

    def rewind(self, step: int) -> None:
        """The run went back to `step`: what was recorded of later ones is dropped."""
        if not self._silent:
            self._record.close()
            self._record = Record(self._run / "metrics.jsonl", step)

    def close(self) -> None:
        if not self._silent:
            self._line.close()
            self._record.close()
            self._tracker.close()
