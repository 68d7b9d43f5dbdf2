"""Common base of the benches: records, their folders, child programs, turns, costs, and the comparison of two
records."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Event, Lock
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from launcher.supervise import die_with
from regen_dist.distributed.environment import without_ranks
from regen_dist.errors import EXIT_RESUME, ConfigError, DataError, TrainingError
from regen_dist.jsontext import json_text
from regen_dist.shared_files import lock_alone
from regen_dist.tables import Column, Table, numbers

if TYPE_CHECKING:
    from regen_dist.config import AnyRunConfig


def split_arguments(config: Path, overrides: Sequence[str], default: Path) -> tuple[Path, list[str]]:
    """Separate the optional config from overrides: a first argument that is not a config is an override of the default
    one."""
    given = "=" not in str(config)
    return config if given else default, [*([] if given else [str(config)]), *overrides]


# The record of a bench: NAME.json and, as tables, NAME.md in a folder that one process fills at a time.


def opening_facts() -> dict[str, Any]:
    """Return the first facts of every record: command, machine, and load of the machine."""
    from regen_dist.observe.hardware import describe_machine

    command = " ".join(["regen", *sys.argv[1:]])
    return {"command": command, "machine": describe_machine(), "load_before": os.getloadavg()}


def config_facts(path: Path, overrides: Sequence[str], config: AnyRunConfig) -> dict[str, Any]:
    """Return the description of a config for a record."""
    from regen_dist.config import config_hash

    return {"config": str(path), "overrides": list(overrides), "config_hash": config_hash(config)}


def write_record(out: Path, name: str, facts: dict[str, Any], text: str) -> None:
    """Write a finished record and its tables, print the tables, and say where both are."""
    from regen_dist.config.files import write_text_atomically

    facts["load_after"] = os.getloadavg()
    files = {out / f"{name}.json": json_text(facts, indent=1) + "\n", out / f"{name}.md": text}
    for path, content in files.items():
        write_text_atomically(path, content)
    print(text)
    print(f"written: {', '.join(map(str, files))}", file=sys.stderr)


def only_one(out: Path) -> IO[str]:
    """Keep a bench's folder from a second process, whose runs and figures would mix with these, until the returned file
    is closed.

    Raises:
        ConfigError: another process uses the folder.
    """
    return lock_alone(out / ".lock", "wait for its end, or give another --out")


def claim_minutes(out: Path, minutes: float, option: str) -> None:
    """Keep a folder for arms of one training time, which `option` sets.

    Raises:
        ConfigError: its arms have another.
    """
    from regen_dist.config.files import write_text_atomically

    path = out / "minutes.json"
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json_text(minutes) + "\n")
    found = json.loads(path.read_text(encoding="utf-8"))
    if found != minutes:
        raise ConfigError(
            f"the arms in {out} have {found:g} minutes each, now {minutes:g} are asked for; give {option} {found:g}, "
            "or another --out"
        )


_TAIL_LINES = 20


def require_success(code: int, what: str, log: Path | str = "") -> None:
    """Check the exit code of a program of a bench, which printed `log` (a text, or its file).

    Raises:
        KeyboardInterrupt: it was asked to stop, and this command with it.
        TrainingError: it failed; with the end of its log.
    """
    if code == EXIT_RESUME:
        raise KeyboardInterrupt
    if code:
        printed = log if isinstance(log, str) else log.read_text(encoding="utf-8", errors="replace")
        tail = printed.splitlines()[-_TAIL_LINES:]
        raise TrainingError("\n".join([f"{what} ended with exit code {code}{':' if tail else ''}", *tail]))


# Several commands side by side on this machine, each with its log; what is done already is skipped by the commands.


def run_side_by_side(
    commands: Mapping[str, Sequence[str]], *, logs: Path, at_once: int, done: Callable[[str], None] = lambda name: None
) -> None:
    """Run every command, `at_once` at a time with an equal share of the cores; `done(name)` is called as they end.

    On an interrupt nothing more is started; running commands are asked to end (SIGTERM) and waited for. Where this
    process is killed they end with it.

    Raises:
        TrainingError: some failed (the others were still run); lists them with their logs.
    """
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, len(os.sched_getaffinity(0)) // at_once)
    environment = {**without_ranks(os.environ), "OMP_NUM_THREADS": str(threads)}

    running: dict[str, subprocess.Popen[bytes]] = {}
    starting, stopping = Lock(), Event()

    def run(name: str) -> int:
        with (logs / f"{name}.log").open("ab") as log, starting:
            if stopping.is_set():
                return EXIT_RESUME
            running[name] = subprocess.Popen(
                commands[name], env=environment, stdout=log, stderr=log, preexec_fn=die_with(os.getpid())
            )
        code = running[name].wait()
        if not stopping.is_set():
            done(name)
        return code

    with ThreadPoolExecutor(at_once) as pool:
        try:
            codes = dict(zip(commands, pool.map(run, commands), strict=True))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            with starting:
                stopping.set()
                for process in running.values():
                    process.terminate()  # nothing where it has ended
            raise
    if failed := {name: code for name, code in codes.items() if code}:
        listed = ", ".join(f"{name} (exit code {code}, see {logs / name}.log)" for name, code in failed.items())
        raise TrainingError(f"{len(failed)} of {len(codes)} runs failed: {listed}")


@contextmanager
def local_store() -> Iterator[tuple[str, int]]:
    """Start an S3 server that this process and its children use for the duration of the block; yield the URL of its
    bucket, and its process."""
    from tools.local_services.s3 import start_store

    with TemporaryDirectory(prefix="regen-bench-") as folder, start_store(Path(folder)) as server:
        before = dict(os.environ)
        os.environ |= server.environment() | {"REGEN_CACHE": f"{folder}/cache"}
        try:
            yield f"s3://{server.bucket}", server.process.pid
        finally:
            os.environ.clear()
            os.environ |= before


LOCAL_STORE, GIVEN_STORE = "SeaweedFS on this machine, on its cores", "the store that --url names"


# Figures that a bench declares for its record, so that two records can be compared: each with the better direction
# and its noise.

NOISE = 0.1  # default relative noise of a figure: machines are shared


class Figure(NamedTuple):
    """One number of a record.

    Attributes:
        name: name within its bench; the same in every record.
        value: value in this record.
        higher_is_better: true for speeds, false for times and bytes.
        noise: the share by which it differs between two runs of the same code.
    """

    name: str
    value: float
    higher_is_better: bool
    noise: float = NOISE


Declared = Callable[[Mapping[str, Any]], Iterable[Figure]]
MEASURED: list[Column | str] = [
    "measured",
    *numbers("figure", "ratio (lowest to highest)", "target"),
]  # columns of most benches


class ChangeKind(StrEnum):
    """Meaning of a figure's change."""

    WORSE = "worse"
    BETTER = "better"
    SAME = ""
    MISSING = "not in both"


class Change(NamedTuple):
    """One figure in two records; None where a record lacks it."""

    bench: str
    name: str
    old: float | None
    new: float | None
    kind: ChangeKind

    @property
    def ratio(self) -> float | None:
        """New value over old."""
        return None if self.new is None or not self.old else self.new / self.old


def changes(
    old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]], declared: Mapping[str, Declared]
) -> list[Change]:
    """Return the change of every figure that is in both records.

    Args:
        old, new: facts by bench.
        declared: figures declared by each bench.

    Raises:
        DataError: no bench is in both, or a record has another format.
    """
    both = [bench for bench in declared if bench in old and bench in new]
    if not both:
        raise DataError(
            f"the records have no bench in common: {', '.join(old) or 'none'} in the old one, "
            f"{', '.join(new) or 'none'} in the new one; compare files that `regen bench all` wrote"
        )
    found = []
    for bench in both:
        before, after = (_figures(bench, declared[bench], facts[bench]) for facts in (old, new))
        for name in before | after:
            one, other = before.get(name), after.get(name)
            found.append(Change(bench, name, one and one.value, other and other.value, _change_kind(one, other)))
    return found


def table(found: Iterable[Change]) -> str:
    """A row for each figure: those that got worse first, then those that got better."""
    order = list(ChangeKind)
    rows = []
    for each in sorted(found, key=lambda change: order.index(change.kind)):
        values = ("" if value is None else f"{value:,.4g}" for value in (each.old, each.new, each.ratio))
        rows.append([each.bench, each.name, *values, each.kind.value])
    return Table(["bench", "figure", *numbers("old", "new", "new / old"), "change"], rows).to_markdown()


def _figures(bench: str, declared: Declared, facts: Mapping[str, Any]) -> dict[str, Figure]:
    try:
        return {figure.name: figure for figure in declared(facts)}
    except (KeyError, TypeError) as error:
        raise DataError(f"a record of the bench {bench!r} is not of this version ({error!r}); measure anew") from error


def _change_kind(old: Figure | None, new: Figure | None) -> ChangeKind:
    if old is None or new is None or not old.value:
        return ChangeKind.MISSING
    gain = new.value / old.value if new.higher_is_better else old.value / max(new.value, 1e-12)
    if gain < 1 - new.noise:
        return ChangeKind.WORSE
    return ChangeKind.BETTER if gain > 1 / (1 - new.noise) else ChangeKind.SAME


# Measurements that are compared are taken in turn, over and over, so that what disturbs the machine disturbs them all
# alike. Ratios are formed within a round.


@dataclass(frozen=True)
class Turn:
    """One measurement: `amount` (clips, bytes or samples) in `seconds`, and what else was seen on the way."""

    amount: float
    seconds: float
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Amount per second."""
        return self.amount / self.seconds


Case = Callable[[], Turn]
Rounds = dict[str, list[Turn]]


def in_turn(
    cases: Mapping[str, Case], repeats: int, on_turn: Callable[[str, Turn], None] = lambda name, turn: None
) -> Rounds:
    """Run every case once, then again, `repeats` times; `on_turn(name, turn)` is called after each."""
    rounds: Rounds = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            turn = case()
            rounds[name].append(turn)
            on_turn(name, turn)
    return rounds


def spread_text(found: Mapping[str, float]) -> str:
    """Format a `spread`."""
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def summary(turns: Sequence[Turn]) -> dict[str, Any]:
    """A case's rate over the rounds, and the medians of what else was seen."""
    facts = {name: median(turn.facts[name] for turn in turns) for name in turns[0].facts}
    return {
        "per_s": spread([turn.rate for turn in turns]),
        "amount": median(turn.amount for turn in turns),
        "seconds": median(turn.seconds for turn in turns),
        **facts,
    }


def ratio(turns: Sequence[Turn], others: Sequence[Turn]) -> dict[str, float]:
    """Return the speedup of `turns` over `others`, round by round."""
    return spread([turn.rate / other.rate for turn, other in zip(turns, others, strict=True)])


@contextmanager
def measured(store: int | None) -> Iterator[dict[str, float]]:
    """Measure the cost of a block; filled in at its end: `seconds`; `own_cpu_s`, CPU seconds of this process and of its
    workers that live through the whole block; `store_cpu_s`, of the process `store`."""
    own = [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]
    costs: dict[str, float] = {}
    watched = {"own_cpu_s": own} | ({"store_cpu_s": [store]} if store else {})
    before = {name: sum(map(cpu_seconds, each)) for name, each in watched.items()}
    begun = time.perf_counter()
    yield costs
    costs["seconds"] = time.perf_counter() - begun
    costs |= {name: sum(map(cpu_seconds, each)) - before[name] for name, each in watched.items()}


def turn_of(amount: float, costs: Mapping[str, float], **facts: float) -> Turn:
    """Return the turn of the costs that `measured` recorded."""
    return Turn(amount, costs["seconds"], {name: costs[name] for name in costs if name != "seconds"} | facts)


def cpu_seconds(process: int) -> float:
    """Return the CPU seconds of a running process so far, with all threads and its ended children."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
