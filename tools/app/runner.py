"""One job at a time, each in a process of its own: progress, cancelling, and results that exist whole or not at all.

OUT/uploads           files from browsers; gradio's cache
OUT/work/NNNN         a job at work; removed when it ends in any way
OUT/results/NNNN-KIND result of a finished job, moved there in one step
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from regen_dist.errors import ConfigError, DataError, RegenError
from regen_dist.jsontext import json_text
from regen_dist.programs import python, with_safe_path
from regen_dist.shared_files import lock_alone

State = Literal["running", "done", "failed", "cancelled"]
Kind = Literal["reconstruct", "generate"]
UPLOADS, WORK, RESULTS = "uploads", "work", "results"
REQUEST, OUTPUT, GIVEN = "request.json", "output", "given"
MARKER = ".regen-app"  # file of a folder that belongs to an app
_LONGEST_NAME = 80

WORKER = "tools.app.runner"

GRACE_S = 3.0  # between SIGTERM and SIGKILL
_LOG_LINES = 5


class JobRunning(ConfigError):
    """Another job is running; only one runs at a time."""


@dataclass
class Job:
    """One job of the app. `done` of `total` units of the stage `what` are finished; `message` says how it ended.

    Attributes:
        number: counts up over the life of the folder.
        kind: `reconstruct` or `generate`.
        folder: the result; exists once the state is `done`.
    """

    number: int
    kind: Kind
    folder: Path
    state: State = "running"
    what: str = "starting"
    done: int = 0
    total: int = 0
    message: str = ""
    cancelling: bool = False
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def share(self) -> float:
        """Share of the stage that is finished, 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 0.0


class JobRunner:
    """Runner of one job at a time. Uploads and leftovers of an earlier app are removed at the start.

    Args:
        folder: the app's own folder; created if needed.
        command: command of the worker process, which takes the folder of the job as its last argument.
        environment: environment of the worker process; that of this process by default.

    Raises:
        ConfigError: the folder holds something else, or another app uses it.
    """

    def __init__(
        self, folder: Path, command: tuple[str, ...] | None = None, environment: Mapping[str, str] = os.environ
    ) -> None:
        self.folder = folder.absolute()
        self.uploads, self._work, self.results = (self.folder / name for name in (UPLOADS, WORK, RESULTS))
        self._command, self._environment = command or tuple(python("-m", WORKER)), environment
        self._claim = _claim(self.folder)
        for each in (self.uploads, self._work):
            shutil.rmtree(each, ignore_errors=True)
        for each in (self.uploads, self._work, self.results):
            each.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self.job: Job | None = None

    def start(self, kind: Kind, request: Mapping[str, Any], source: Path | None = None) -> Job:
        """Start a job.

        Args:
            kind: kind of the work.
            request: settings of the job, plain values.
            source: uploaded file that it reads; it is linked or copied as `source` with its ending.

        Raises:
            JobRunning: another job has not ended.
        """
        with self._lock:
            if self.job is not None and not self.job.ended.is_set():
                running = f"job {self.job.number} ({self.job.kind})"
                raise JobRunning(f"{running} is running, and one runs at a time; wait for it or cancel it")
            names = (re.match(r"\d+", each.name) for each in self.results.iterdir())
            last = self.job.number if self.job else 0
            number = max([last, *(int(found[0]) for found in names if found)]) + 1
            work = self._work / f"{number:04d}"
            (work / OUTPUT).mkdir(parents=True)
            given = _take(source, work) if source else None
            (work / REQUEST).write_text(json_text({**request, "kind": kind, "source": given}), encoding="utf-8")
            job = Job(number, kind, self.results / f"{number:04d}-{kind}")
            self._process = subprocess.Popen(
                [*self._command, str(work)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace", env=with_safe_path(self._environment), start_new_session=True,
            )  # fmt: skip
            self.job = job
            threading.Thread(target=self._follow, args=(job, self._process, work), daemon=True).start()
            return job

    def cancel(self) -> Job | None:
        """End the running job and everything that it started, and wait until its files are gone. Return it; None where
        no job runs."""
        job, process = self.job, self._process
        if job is None or process is None or job.ended.is_set():
            return None
        job.cancelling = True
        _signal(process, signal.SIGTERM)
        if not job.ended.wait(GRACE_S):
            _signal(process, signal.SIGKILL)
            job.ended.wait()
        return job

    def close(self) -> None:
        """Cancel what runs, and leave the folder to another app."""
        self.cancel()
        self._claim.close()

    def _follow(self, job: Job, process: subprocess.Popen[str], work: Path) -> None:
        """Read the worker's reports until it ends, then keep its result or remove it."""
        assert process.stdout is not None, "a pipe by Popen"
        try:
            log = _read_reports(job, process.stdout)
            code = process.wait()
            _signal(process, signal.SIGKILL)  # what the worker started and left behind
            if not code:
                os.replace(work / OUTPUT, job.folder)
            elif not job.cancelling and not job.message:
                job.message = f"the job ended with code {code}: " + ("; ".join(log) or "it printed nothing")
            job.state = "done" if not code else "cancelled" if job.cancelling else "failed"
        except OSError as error:
            job.state, job.message = "failed", f"the result cannot be kept: {error}"
        finally:
            shutil.rmtree(work, ignore_errors=True)
            if process.stdin:
                with suppress(OSError):
                    process.stdin.close()
            job.ended.set()


def _claim(folder: Path) -> IO[str]:
    """Take a folder for this app alone: an empty one, or one that an app made. Return the open file that holds it."""
    marker = folder / MARKER
    if folder.is_dir() and not marker.is_file() and any(folder.iterdir()):
        raise ConfigError(f"{folder} holds something else; give the app an empty or a new folder with --out")
    return lock_alone(marker, "end that app, or give another folder with --out")


def _read_reports(job: Job, lines: IO[str]) -> list[str]:
    """Take over the worker's reports; return the last lines of anything else that it printed."""
    log: deque[str] = deque(maxlen=_LOG_LINES)
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            log.append(line.strip())
        elif "error" in found:
            job.message = str(found["error"])
        else:
            job.what = str(found.get("what", job.what))
            job.done, job.total = int(found.get("done", 0)), int(found.get("total", 0))
    return [each for each in log if each]


def shown_name(name: str) -> str:
    """Reduce a file name of the browser to a plain one: the last part, of harmless characters."""
    last = re.split(r"[/\\]", name)[-1]
    plain = re.sub(r"[^\w .+()-]", "_", last).lstrip(". ")
    return plain[:_LONGEST_NAME] or "upload"


def _take(source: Path, work: Path) -> str:
    """Link or copy an upload into the job's folder, by its name as it is shown, with a plain ending."""
    ending = source.suffix.lower()
    target = work / GIVEN / (shown_name(source.stem) + (ending if re.fullmatch(r"[.][a-z0-9]{1,5}", ending) else ""))
    target.parent.mkdir()
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
    return str(target)


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal to the worker's session: the worker and its children."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def checked(values: Mapping[str, float | None], bounds: Mapping[str, tuple[float, float]]) -> None:
    """Raise one ConfigError that names every value outside its bounds (None: not given)."""
    problems = [
        f"{name} is {values[name]:g}; {low:g} to {high:g} is allowed"
        for name, (low, high) in bounds.items()
        if (value := values[name]) is not None and not low <= value <= high
    ]
    if problems:
        raise ConfigError("; ".join(problems))


# Worker process of the app: one job, read from its folder, its result written to the folder `output` in it.
#
# `JobRunner` starts it. It prints one JSON object a line, and ends when its parent does: its standard input is a pipe
# that is never written.


def report(**values: Any) -> None:
    """Print a report, which `JobRunner` reads.

    Args:
        values: `what` is done, with `done` of `total` units; or the `error` that ends the job.
    """
    print(json_text(values), flush=True)


def reconstruct(request: dict[str, Any], out: Path) -> None:
    """Reconstruct an uploaded video, as `regen reconstruct` does, with the contact sheet and the measures."""
    from regen_dist.evaluation.metrics import Options
    from regen_dist.evaluation.reconstruct import reconstruct as job
    from regen_dist.inference.codec import Codec
    from regen_dist.inference.frames import SourceVideo
    from tools.reconstruct import decoder_label, model_facts

    source = SourceVideo(Path(request["source"]), short_side=request["short_side"], max_frames=request["max_frames"])
    height, width = source.stored
    if height * width > request["max_pixels"]:  # by the first frame: the container may have said something else
        raise DataError(
            f"the video's frames have {width}x{height} pixels, more than the {request['max_pixels'] / 1e6:.3g} million "
            "that are allowed; scale it down first"
        )
    model = Path(request["model"])
    report(what="loading the model")
    codec = Codec.load(model)
    options = Options(steps=request["steps"], fps=request["fps"], seed=request["seed"])
    total = source.num_frames
    report(what="frames", done=0, total=total)
    job(
        source, codec, out, options, label=decoder_label(codec, options.steps), model=model_facts(model, codec),
        progress=lambda frame: report(what="frames", done=frame, total=total),
    )  # fmt: skip


def generate(request: dict[str, Any], out: Path) -> None:
    """Generate videos of a prompt, as `regen generate` does; with an image they begin with it."""
    from regen_dist.inference.codec import Codec
    from regen_dist.inference.generate import Layout, Prompt, load_text_encoder
    from regen_dist.inference.generate import generate as job
    from regen_dist.inference.generation_settings import resolve_settings
    from regen_dist.inference.given_media import read_image
    from regen_dist.inference.sampler import TextToVideoModel

    report(what="loading the models")
    model = TextToVideoModel.load(request["model"])
    settings = resolve_settings(
        model, steps=request["steps"], guidance=request["guidance"], seed=request["seed"], negative=request["negative"]
    )
    image = read_image(Path(request["source"]), (settings.height, settings.width)) if request["source"] else None
    codec = Codec.load(request["embedder"], device=model.device)
    names = Layout(request["samples"])
    job(
        model, codec, lambda: load_text_encoder(model.space, request["text"], model.device),
        names.expanded([Prompt(0, request["prompt"])]), out, settings, batch=1, layout=names, given=image,
        paths={"run": request["model"], "embedder": request["embedder"], "text_encoder": request["text"]},
        progress=lambda what, done, total: report(what=f"videos {what}", done=done, total=total),
    )  # fmt: skip


_JOBS = {"reconstruct": reconstruct, "generate": generate}


def main(folder: Path) -> int:
    """Do the job of a folder; return the exit code."""

    def end_with_parent() -> None:
        os.read(0, 1)  # not sys.stdin, whose lock would be held when the interpreter ends
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    try:
        _JOBS[request["kind"]](request, folder / OUTPUT)
    except RegenError as error:
        report(error=str(error).replace(str(folder / OUTPUT), "the result").replace(f"{folder}/", ""))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
