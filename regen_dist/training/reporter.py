"""Where the figures and pictures of a run go: the record, the progress line, trackers, picture files. Only rank 0
reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from regen_dist.checkpoint.saver import Outcome
from regen_dist.config.files import write_text_atomically
from regen_dist.config.job import CommonConfig
from regen_dist.distributed.ranks import Ranks
from regen_dist.evaluation.sheet import sheet_frames, write_sheet
from regen_dist.inference.frames import write_video
from regen_dist.observe.devices import accelerator, shown
from regen_dist.observe.progress import ProgressLine
from regen_dist.observe.record import Record
from regen_dist.observe.trackers import Trackers
from regen_dist.pixels import to_frames
from regen_dist.training.slow_ranks import RankReport
from regen_dist.training.tasks import Validation


class Reporter:
    """Reports on rank 0; silent elsewhere."""

    def __init__(self, config: CommonConfig, ranks: Ranks, step: int) -> None:
        self._silent, self._run = not ranks.is_main, config.folder
        if self._silent:
            return
        self._record = Record(self._run / "metrics.jsonl", step)
        self._line = ProgressLine(config.train.steps, step)
        self._trackers = Trackers(config, self._run, step)
        self._unseen = False
        self._line.say(
            f"{self._run}: {'resumed at' if step else 'starting at'} step {step} on {ranks.world_size} rank(s)"
        )
        machine = accelerator(ranks.device)
        self._line.say(f"rank 0 on {shown(machine)}")
        self._record.write("event", step, {"event": "start", "world_size": ranks.world_size, "machine": machine})

    def train(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of the steps since the last log line."""
        if self._silent:
            return
        self._record.write("train", step, figures)
        self._line.train(step, figures)
        self._trackers.log(step, {f"train/{name}": value for name, value in figures.items()})

    def validation(self, step: int, result: Validation) -> None:
        """Figures of the validation, and what there is to look at: a picture of the first sample's source and what was
        made of it; videos, where they were generated from captions."""
        if self._silent:
            return
        self._record.write("validation", step, result.figures)
        self._line.validation(result.figures)
        figures = {f"validation/{name}": value for name, value in result.figures.items()}
        pictures, videos = (self._shown(write, step, result) for write in (self._draw, self._write_videos))
        self._trackers.log(step, figures, pictures, videos)

    def _shown(
        self, write: Callable[[int, Validation], dict[str, Path]], step: int, result: Validation
    ) -> dict[str, Path]:
        """Files to look at; none where the disk refuses, which is said once and ends no run."""
        try:
            return write(step, result)
        except OSError as error:
            if not self._unseen:
                self._unseen = True
                self.say(step, f"warning: no picture or video of step {step}, and the run goes on: {error}")
            return {}

    def gradients(self, step: int, norms: Mapping[str, float]) -> None:
        """The norm of every layer's gradient in a step."""
        if self._silent:
            return
        self._record.write("gradients", step, norms)
        self._trackers.log(step, {f"gradients/{layer}": norm for layer, norm in norms.items()})

    def _draw(self, step: int, result: Validation) -> dict[str, Path]:
        if result.source is None or result.made is None:
            return {}
        path = self._run / "pictures" / f"step-{step:08d}.png"
        source, made = (to_frames(video[0]) for video in (result.source, result.made))
        numbers = sheet_frames(min(len(source), len(made)))
        path.parent.mkdir(exist_ok=True)
        write_sheet(
            path, numbers, [source[n] for n in numbers], {result.label: [made[n] for n in numbers]},
            title=f"step {step}: {result.title}", errors=not result.captions,
        )  # fmt: skip
        return {"validation/clip": path}

    def _write_videos(self, step: int, result: Validation) -> dict[str, Path]:
        """Videos that were generated, in `generated/` in the run folder, each named by its number; their captions."""
        if result.made is None or not result.captions:
            return {}
        folder = self._run / "generated" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / "captions.txt", "".join(f"{caption}\n" for caption in result.captions))
        paths = [folder / f"{number:02d}.mp4" for number in range(len(result.captions))]
        for path, video in zip(paths, result.made, strict=True):
            write_video(path, to_frames(video), result.fps)
        return {f"validation/video {number}": path for number, path in enumerate(paths)}

    def say(self, step: int, text: str) -> None:
        """Something that happened: on the terminal and in the record."""
        if not self._silent:
            self._line.say(text)
            self._record.write("event", step, {"event": text})

    def ranks(self, step: int, report: RankReport) -> None:
        """Which ranks are slow: on the terminal, in the record and in the trackers."""
        if not self._silent:
            self.say(step, report.text)
            self._trackers.log(step, report.figures)

    def checkpoint(self, outcome: Outcome) -> None:
        """A save that has ended, well or not."""
        if self._silent:
            return
        figures = {"seconds": outcome.seconds, "blocked_s": outcome.blocked_s, "bytes": outcome.size_bytes}
        self._record.write("checkpoint", outcome.step, figures | {"problem": outcome.problem or None})

    def rewind(self, step: int) -> None:
        """The run went back to `step`: what was recorded of later ones is dropped."""
        if not self._silent:
            self._record.rewind(step)
            self._trackers.rewind(step)

    def close(self) -> None:
        if not self._silent:
            self._line.close()
            self._record.close()
            self._trackers.close()
