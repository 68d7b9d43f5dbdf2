"""The rounds of `regen bench checkpoint`: each starts the runs and the ranks anew, one after the other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from uuid import uuid4

from launcher.local import die_with, launch
from launcher.seaweed import start_store
from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.config import load_config, save_config
from regen_dist.data.objects.store import Store
from regen_dist.distributed.environment import without_ranks
from regen_dist.errors import EXIT_OK, EXIT_RESUME, TrainingError
from regen_dist.evaluation.checkpoint_speed import rank
from regen_dist.evaluation.checkpoint_speed.blocking import Saving, saving
from regen_dist.evaluation.checkpoint_speed.report import cases_section, state_section, training_section
from regen_dist.observe.record import read_record
from regen_dist.programs import python, regen

_MODES = {"asynchronous": "true", "synchronous": "false"}
_TAIL_LINES = 20


class Place(NamedTuple):
    """A folder in a bucket, or None; what it is; and the environment in which it can be reached."""

    url: str | None
    described: str
    environment: dict[str, str]


class Round(NamedTuple):
    """What one round found: the runs by mode, the ranks' figures by their number, a checkpoint's bytes and files."""

    runs: dict[str, Saving]
    measured: dict[int, dict[str, Any]]
    written_bytes: int
    files: int
    store: str


@dataclass(frozen=True)
class Bench:
    """What is measured.

    Args:
        config: file of the run.
        overrides: changes to it.
        ranks: that train, save and load.
        repeats: turns of saving and loading in a round.
        work: folder for everything, on the disk that is measured.
        say: told what is done.
    """

    config: Path
    overrides: Sequence[str]
    ranks: int
    repeats: int
    work: Path
    say: Callable[[str], None]

    @property
    def clips(self) -> Path:
        """The dataset that is trained on."""
        return self.work / "clips"

    def round(self, number: int, url: str | None, *, bucket: bool) -> Round:
        """Everything once: a run of each kind, saving and loading by as many ranks, loading by another number."""
        folder = self.work / f"round-{number}"
        runs = {mode: self._train(folder, mode) for mode in _MODES}
        checkpoints = CheckpointFolder(folder / "asynchronous" / "checkpoints")
        manifest = checkpoints.manifest(checkpoints.steps()[-1])
        with place(url, bucket=bucket) as there:
            measured = {self.ranks: self._measure(folder, self.ranks, there)}
            other = 1 if self.ranks > 1 else 2
            measured[other] = self._measure(folder, other, there, "--load")
        shutil.rmtree(folder)  # room for the next
        return Round(runs, measured, manifest.size_bytes, len(manifest.files), there.described)

    def _train(self, folder: Path, mode: str) -> Saving:
        """A run from start to end, and what its record says."""
        places = [*self._places(folder), f"name={mode}", f"checkpoint.asynchronous={_MODES[mode]}"]
        program = regen("train", str(self.config), *self.overrides, *places)
        program += ["--ranks", str(self.ranks)]
        folder.mkdir(exist_ok=True)
        log = folder / f"{mode}.log"
        with log.open("wb") as file:
            ending = die_with(os.getpid())  # this command may be killed
            own = without_ranks(os.environ)
            ended = subprocess.run(program, env=own, stdout=file, stderr=file, check=False, preexec_fn=ending)
        _check(ended.returncode, f"the run with {mode} saves", log)
        found = saving(read_record(folder / mode / "metrics.jsonl"))
        cost = median(found.cost_s(save) for save in found.saves)
        self.say(f"  {mode} saves: {cost:.3f} s each, of a run whose steps take {found.step_s:.3f} s")
        return found

    def _measure(self, folder: Path, ranks: int, there: Place, *options: str) -> dict[str, Any]:
        """What the rank program finds with so many ranks."""
        measured = folder / "measured"
        save_config(load_config(self.config, [*self.overrides, *self._places(folder)]), measured)
        program = python("-m", rank.__name__, str(measured), f"--repeats={self.repeats}", *options)
        program += [f"--url={there.url}"] if there.url else []
        code = launch(program, ranks=ranks, logs=measured, environment=there.environment)
        _check(code, f"measuring with {ranks} rank(s)", rank.log_file(measured, ranks))
        self.say(f"  saved and loaded by {ranks} rank(s)" if not options else f"  loaded by {ranks} rank(s)")
        return json.loads(rank.result_file(measured, ranks).read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    def _places(self, folder: Path) -> list[str]:
        return [f"data.url={self.clips}", f"output={folder}"]


@contextmanager
def place(url: str | None, *, bucket: bool) -> Iterator[Place]:
    """Where checkpoints go beside the disk for the length of a `with` block: a folder of its own in the bucket that
    `url` names, which is emptied in the end, or in a server that this starts."""
    inherited = dict(os.environ)
    if not bucket:
        yield Place(None, "none", inherited)
    elif url is None:
        with TemporaryDirectory(prefix="regen-bench-") as folder, start_store(Path(folder)) as server:
            address = f"s3://{server.bucket}/checkpoints"
            yield Place(address, "SeaweedFS on this machine, on its cores", inherited | server.environment())
    else:
        address = f"{url.rstrip('/')}/regen-bench-{uuid4().hex[:8]}"
        try:
            yield Place(address, "the store that --url names", inherited)
        finally:
            store = Store(address)
            for name in store.list():
                store.delete(name)


def sections(rounds: Sequence[Round]) -> dict[str, Any]:
    """The figures of all rounds together."""
    ranks, other = rounds[0].measured
    ours = [each.measured[ranks] for each in rounds]
    copies = [median(turn["seconds"] for turn in each["save"]["bare copy"]) for each in ours]
    asynchronous, synchronous = ([each.runs[mode] for each in rounds] for mode in _MODES)
    return {
        "store": rounds[0].store,
        "state": state_section(ours[0]["parameters"], rounds[0].written_bytes, rounds[0].files),
        "training": training_section(asynchronous, synchronous, copies),
        "save": cases_section("save", _together([each["save"] for each in ours])),
        "load": {
            str(number): cases_section("load", _together([each.measured[number]["load"] for each in rounds]))
            for number in (ranks, other)
        },
        "restored_alike": all(found["restored_alike"] for each in rounds for found in each.measured.values()),
        "deepspeed_elsewhere": rounds[0].measured[other].get("deepspeed_says", ""),
    }


def _together(rounds: Sequence[dict[str, list[dict[str, Any]]]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [turn for each in rounds for turn in each[name]] for name in rounds[0]}


def _check(code: int, what: str, log: Path) -> None:
    if code == EXIT_RESUME:
        raise KeyboardInterrupt  # it was asked to stop, and this command with it
    if code != EXIT_OK:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
        raise TrainingError(f"{what} ended with exit code {code}:\n{tail}")
