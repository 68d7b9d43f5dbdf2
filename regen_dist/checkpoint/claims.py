"""One training at a time: a claim in the run folder and, where the checkpoints lie elsewhere, one beside them.

    RUN/claims/00000001.json      who trains: rank, host, process, since when; written anew every few seconds

A claim is taken by an exclusive creation (a hard link, or a conditional write of a bucket), which NFS and object stores
do alike; nothing here relies on locks of files. Whoever takes over from a dead process creates the next number, so
that of several one wins. A process of this machine is known by its id, its start and the boot; one on another machine
by whether it goes on writing: no clock of another machine is believed.
"""

from __future__ import annotations

import os
import random
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import NamedTuple

from regen_dist.config import AnyRunConfig
from regen_dist.data.storage.connection import StoreLimits
from regen_dist.data.storage.store import Store
from regen_dist.errors import CheckpointError, DataError, ObjectMissing, RunBusy
from regen_dist.jsontext import json_text
from regen_dist.observe.heartbeat import place_of_processes

CLAIMS = "claims"
_STATE, _START = 0, 19  # among the fields of /proc/PID/stat that follow the name
_JOIN_S = 5.0


class Patience(NamedTuple):
    """Seconds: between two signs of life; for how long a silent process of another machine is looked at when its last
    sign is old; and when it is not."""

    beat_s: float = 10.0
    look_s: float = 25.0
    stale_s: float = 120.0
    poll_s: float = 1.0


@dataclass(frozen=True)
class Holder:
    """A process that trains, as its claim tells it. `written`: seconds since the epoch; `number`: of the sign of
    life; `token`: no two starts have the same."""

    rank: int
    host: str
    pid: int
    started: int  # of the process, in the kernel's ticks since the boot
    boot: str
    namespace: str  # within which `pid` counts
    job: str  # of Slurm, or ""
    restart: int
    run: str  # the run folder
    since: float
    written: float
    number: int
    token: str

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
        job = f", job {self.job}" if self.job else ""
        return f"rank {self.rank} on {self.host} (process {self.pid}{job}) since {since}, in the run folder {self.run}"


def this_process(run: Path, environment: Mapping[str, str] = os.environ) -> Holder:
    """What this process claims with."""
    host, namespace = place_of_processes()
    now, restart = time.time(), environment.get("SLURM_RESTART_COUNT", "0")
    return Holder(
        rank=0, host=host, pid=os.getpid(), started=_process_start(os.getpid()) or 0, boot=_boot(),
        namespace=namespace, job=environment.get("SLURM_JOB_ID", ""), restart=int(restart) if restart.isdigit() else 0,
        run=str(run.absolute()), since=now, written=now, number=0, token=secrets.token_hex(8),
    )  # fmt: skip


def is_gone(holder: Holder, me: Holder) -> bool | None:
    """Whether the process of a claim has ended; None where that cannot be told from here at once."""
    if holder.job and holder.job == me.job and holder.restart < me.restart:
        return True  # Slurm starts a job again when it has ended
    if me.boot and me.namespace and (holder.boot, holder.namespace) == (me.boot, me.namespace):
        return _process_start(holder.pid) != holder.started
    return None


@cache
def _boot() -> str:
    """This boot of this machine; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _process_start(pid: int) -> int | None:
    """When a process of this machine was started; None when there is none, or it waits to be buried."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    told = text.rpartition(")")[2].split()
    return None if told[_STATE] in "ZX" else int(told[_START])


def parse_holder(text: bytes) -> Holder | None:
    """A claim as it was written; None for anything else."""
    import json

    try:
        found = json.loads(text)
        return Holder(**{each.name: found[each.name] for each in fields(Holder)})
    except (ValueError, KeyError, TypeError):
        return None


class _Found(NamedTuple):
    """A claim that is there: its name, its bytes, and who holds it (None: it cannot be read)."""

    name: str
    text: bytes
    holder: Holder | None


class Claim:
    """The claim on one place. Take it before anything is written there.

    Args:
        place: the run folder, or the folder or URL of its checkpoints.
        me: this process.
        limits: patience with a bucket.
        patience: with other processes.
        say: told when another machine's process is waited for.
    """

    def __init__(
        self,
        place: str | Path,
        me: Holder,
        limits: StoreLimits = StoreLimits(),  # noqa: B008 - frozen
        patience: Patience | None = None,
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self._place, self._me, self._say = str(place), me, say
        self._store = Store(f"{str(place).rstrip('/')}/{CLAIMS}", limits)
        self._patience = patience or PATIENCE
        self._name = ""  # of the own claim
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost = ""  # why it is not ours any more

    def take(self) -> None:
        """Make it ours, if nobody who lives holds it.

        Raises:
            RunBusy: somebody does.
        """
        while not self._name:
            dead = [each for each in self._all() if self._is_dead(each, to_the_end=True)]
            number = max((int(Path(each.name).stem) for each in dead), default=0) + 1
            name = f"{number:08d}.json"
            if not self._store.put_new(name, self._text()):
                continue  # another process was quicker: look at it
            known = {each.text for each in dead} | {self._text()}
            if any(each.text not in known for each in self._all()):  # one that came while we looked
                self._store.delete(name)
                time.sleep(random.uniform(0.0, self._patience.poll_s))
                continue
            self._name = name
            for each in dead:
                self._store.delete(each.name)
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._thread.start()

    def refuse_living(self) -> None:
        """Look, and change nothing. Of a silent process of another machine nothing is said.

        Raises:
            RunBusy: somebody who lives holds it.
        """
        for each in self._all():
            self._is_dead(each, to_the_end=False)

    def check(self) -> None:
        """Make sure, by a fresh look, that it is still ours.

        Raises:
            CheckpointError: another process took over.
        """
        if self._name and not self._still_ours():
            raise CheckpointError(f"{self._place}: {self.lost}. Nothing more is written there")

    def release(self) -> None:
        """Give it back; nothing happens where it was never taken. A store that does not answer is no error: the claim
        is then known as one of a process that has ended."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_JOIN_S)
        if self._name:
            with suppress(DataError):
                if self._still_ours():
                    self._store.delete(self._name)
            self._name = ""

    def _all(self) -> list[_Found]:
        """Every claim that is there."""
        found = []
        for name in self._store.list():
            with suppress(ObjectMissing):  # given back meanwhile
                text = self._store.get(name)
                found.append(_Found(name, text, parse_holder(text)))
        return found

    def _is_dead(self, found: _Found, *, to_the_end: bool) -> bool:
        """Whether nobody holds a claim any more.

        Args:
            to_the_end: wait until a process of another machine that is silent has been so for long enough.

        Raises:
            RunBusy: somebody does.
        """
        gone = None if found.holder is None else is_gone(found.holder, self._me)
        if gone is False:
            raise self._busy(found)
        return True if gone else self._is_silent(found, to_the_end=to_the_end)

    def _is_silent(self, found: _Found, *, to_the_end: bool) -> bool:
        """Look at a claim of which nothing else is known, until it changes or was silent for long enough."""
        began, told = time.monotonic(), False
        while True:
            time.sleep(self._patience.poll_s)
            try:
                if self._store.get(found.name) != found.text:
                    raise self._busy(found)
            except ObjectMissing:
                return True
            looked_s = time.monotonic() - began
            old = found.holder is None or time.time() - found.holder.written >= self._patience.stale_s
            if looked_s >= (self._patience.look_s if old or not to_the_end else self._patience.stale_s):
                return True
            if not told and to_the_end:
                told = True
                who = found.holder or found.name
                self._say(f"{self._place}: waiting {self._patience.stale_s:.0f} s for a sign of life of {who}")

    def _busy(self, found: _Found) -> RunBusy:
        return RunBusy(
            f"{self._place}: already being trained by {found.holder or found.name}. Wait for it, or end it first "
            "(`touch STOP` in its run folder, or `regen jobs stop`); or give this run another name"
        )

    def _text(self) -> bytes:
        return (json_text(asdict(self._me), indent=1) + "\n").encode()

    def _still_ours(self) -> bool:
        try:
            holder = parse_holder(self._store.get(self._name))
        except ObjectMissing:
            holder = None
        if holder is None or holder.token != self._me.token:
            by = next((str(each.holder) for each in self._all() if each.holder), "another process")
            self.lost = f"the run was taken over by {by}, because this process gave no sign of life for too long"
        return not self.lost

    def _beat(self) -> None:
        """Write a sign of life every few seconds; the process goes on where that fails."""
        complained = False
        while not self._stop.wait(self._patience.beat_s):
            try:
                if not self._still_ours():
                    return
                self._me = replace(self._me, number=self._me.number + 1, written=time.time())
                self._store.put(self._name, self._text())
            except DataError as error:
                if not complained:
                    complained = True
                    self._say(f"warning: the claim on {self._place} cannot be renewed: {error}")


PATIENCE = Patience()


class Claims:
    """All claims of a run. Where its checkpoints lie in its folder there is one."""

    def __init__(self, config: AnyRunConfig, limits: StoreLimits | None = None) -> None:
        me, read = this_process(config.folder), config.data.read
        self._claims = [Claim(config.folder, me)]
        if config.checkpoint.url is not None:
            self._claims.append(Claim(config.checkpoints, me, limits or StoreLimits(read.stall_s, read.deadline_s)))

    def take(self) -> None:
        """Take all; RunBusy when somebody who lives holds one, and then none is held."""
        try:
            for claim in self._claims:
                claim.take()
        except BaseException:
            self.release()
            raise

    def refuse_living(self) -> None:
        """RunBusy when somebody who lives holds one; nothing is changed."""
        for claim in self._claims:
            claim.refuse_living()

    def check(self) -> None:
        """CheckpointError when another process took over."""
        for claim in self._claims:
            claim.check()

    @property
    def lost(self) -> str:
        """Why the run is not ours any more; empty while it is, as far as is known."""
        return next((claim.lost for claim in self._claims if claim.lost), "")

    def release(self) -> None:
        """Give all back."""
        for claim in self._claims:
            claim.release()
