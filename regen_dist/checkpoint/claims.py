"""Exclusive claims: one process trains a run; a claim in the run folder, and one beside checkpoints kept elsewhere.

    RUN/claims/00000001.json      rank, host, process and start of the training process; renewed every few seconds

A claim is created exclusively (by a hard link, or a conditional write in a bucket), which works on NFS and on object
stores; file locks are not used. A process that takes over from a dead one creates the next number, so that only one of
several wins. A process of this machine is identified by its id, its start time and the boot id; one of another machine
is alive as long as it renews its claim. Clocks of other machines are never compared.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from regen_dist.config import AnyRunConfig
from regen_dist.data.storage.connection import StoreLimits
from regen_dist.data.storage.store import Store
from regen_dist.errors import CheckpointError, DataError, ObjectMissing, RunBusy
from regen_dist.jsontext import json_text
from regen_dist.observe.heartbeat import host_and_namespace
from regen_dist.shared_files import boot_id

CLAIMS = "claims"
_STATE, _START = 0, 19  # indices of the fields of /proc/PID/stat after the process name
_JOIN_S = 5.0
_CLAIM = re.compile(r"\d{8,}\.json")  # others are no claims, such as the .nfs… that NFS leaves of a file in use


class Patience(NamedTuple):
    """Time limits of a claim, in seconds.

    beat_s: interval of renewals. look_s: how long a silent claim of another machine is observed if its last renewal is
    old; stale_s: how long if it is recent. poll_s: interval of the observations.
    """

    beat_s: float = 10.0
    look_s: float = 25.0
    stale_s: float = 120.0
    poll_s: float = 1.0


@dataclass(frozen=True)
class Holder:
    """Training process that holds a claim. `since`, `written`: seconds since the epoch; `number`: counter of the
    renewals; `token`: unique for each start."""

    rank: int
    host: str
    pid: int
    started: int  # start time of the process, in kernel ticks since the boot
    boot: str
    namespace: str  # process id namespace of `pid`
    job: str  # Slurm job id, or ""
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


def this_process(run: Path) -> Holder:
    """Return the holder that describes this process."""
    host, namespace = host_and_namespace()
    now, restart = time.time(), os.environ.get("SLURM_RESTART_COUNT", "0")
    return Holder(
        rank=0, host=host, pid=os.getpid(), started=_process_start(os.getpid()) or 0, boot=boot_id(),
        namespace=namespace, job=os.environ.get("SLURM_JOB_ID", ""), restart=int(restart) if restart.isdigit() else 0,
        run=str(run.absolute()), since=now, written=now, number=0, token=secrets.token_hex(8),
    )  # fmt: skip


def has_ended(holder: Holder, me: Holder) -> bool | None:
    """Return true if the process of a claim has ended; None if it cannot be determined from this machine."""
    if holder.job and holder.job == me.job and holder.restart < me.restart:
        return True  # Slurm requeues a job only after it has ended
    if me.boot and me.namespace and (holder.boot, holder.namespace) == (me.boot, me.namespace):
        return _process_start(holder.pid) != holder.started
    return None


def _process_start(pid: int) -> int | None:
    """Return the start time of a process of this machine; None if there is no such process or it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    stat = text.rpartition(")")[2].split()
    return None if stat[_STATE] in "ZX" else int(stat[_START])


def parse_holder(text: bytes) -> Holder | None:
    """Parse the JSON text of a claim; None if it is not a claim."""
    try:
        found = json.loads(text)
        return Holder(**{each.name: found[each.name] for each in fields(Holder)})
    except (ValueError, KeyError, TypeError):
        return None


class _Found(NamedTuple):
    """Existing claim: its file name, its bytes, and its holder (None if it cannot be parsed)."""

    name: str
    text: bytes
    holder: Holder | None


class Claim:
    """Claim on one folder or URL, to be taken before anything is written there.

    Args:
        place: the run folder, or the folder or URL of its checkpoints.
        me: this process.
        limits: time limits of a bucket.
        patience: time limits for other processes.
        log: called with a message when this process waits for one of another machine.
    """

    def __init__(
        self,
        place: str | Path,
        me: Holder,
        limits: StoreLimits = StoreLimits(),  # noqa: B008 - frozen
        patience: Patience | None = None,
        log: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self._place, self._me, self._log = str(place), me, log
        self._store = Store(f"{str(place).rstrip('/')}/{CLAIMS}", limits)
        self._patience = patience or PATIENCE
        self._name = ""  # file name of the own claim
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost = ""  # reason why another process took over

    def take(self) -> None:
        """Take the claim, unless a live process holds it.

        Raises:
            RunBusy: a live process holds it.
        """
        while not self._name:
            dead = [each for each in self._all() if self._is_abandoned(each, full_wait=True)]
            number = max((int(Path(each.name).stem) for each in dead), default=0) + 1
            name = f"{number:08d}.json"
            if not self._store.put_new(name, self._text()):
                continue  # another process was quicker: examine its claim
            known = {each.text for each in dead} | {self._text()}
            if any(each.text not in known for each in self._all()):  # a claim that appeared meanwhile
                self._store.delete(name)
                time.sleep(random.uniform(0.0, self._patience.poll_s))
                continue
            self._name = name
            for each in dead:
                self._store.delete(each.name)
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._thread.start()

    def refuse_if_taken(self) -> None:
        """Check without changes that no live process holds the claim; silent processes of other machines are ignored.

        Raises:
            RunBusy: a live process holds it.
        """
        for each in self._all():
            self._is_abandoned(each, full_wait=False)

    def check(self) -> None:
        """Verify by reading it again that this process still holds the claim.

        Raises:
            CheckpointError: another process took over.
        """
        if self._name and not self._is_own():
            raise CheckpointError(
                f"{self._place}: {self.lost}. Nothing more is written there"
                "; end the other process before this run is resumed here"
            )

    def release(self) -> None:
        """Release the claim if it was taken. A store that does not answer is not an error: the claim is then
        recognised later as one of an ended process."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_JOIN_S)
        if self._name:
            with suppress(DataError):
                if self._is_own():
                    self._store.delete(self._name)
            self._name = ""

    def _all(self) -> list[_Found]:
        found = []
        for name in filter(_CLAIM.fullmatch, self._store.list()):
            with suppress(ObjectMissing):  # released meanwhile
                text = self._store.get(name)
                found.append(_Found(name, text, parse_holder(text)))
        return found

    def _is_abandoned(self, found: _Found, *, full_wait: bool) -> bool:
        """Return true if the holder of a claim has ended.

        Args:
            full_wait: observe a silent process of another machine for the whole time limit.

        Raises:
            RunBusy: the holder is alive.
        """
        gone = None if found.holder is None else has_ended(found.holder, self._me)
        if gone is False:
            raise self._busy(found)
        return True if gone else self._is_silent(found, full_wait=full_wait)

    def _is_silent(self, found: _Found, *, full_wait: bool) -> bool:
        """Observe a claim of another machine until it changes (RunBusy) or was silent for long enough (true)."""
        began, announced = time.monotonic(), False
        while True:
            time.sleep(self._patience.poll_s)
            try:
                if self._store.get(found.name) != found.text:
                    raise self._busy(found)
            except ObjectMissing:
                return True
            observed_s = time.monotonic() - began
            old = found.holder is None or time.time() - found.holder.written >= self._patience.stale_s
            if observed_s >= (self._patience.look_s if old or not full_wait else self._patience.stale_s):
                return True
            if not announced and full_wait:
                announced = True
                who = found.holder or found.name
                self._log(f"{self._place}: waiting {self._patience.stale_s:.0f} s for a sign of life of {who}")

    def _busy(self, found: _Found) -> RunBusy:
        return RunBusy(
            f"{self._place}: already being trained by {found.holder or found.name}. Wait for it, or end it first "
            "(`touch STOP` in its run folder, or `regen jobs stop`); or give this run another name"
        )

    def _text(self) -> bytes:
        return (json_text(asdict(self._me), indent=1) + "\n").encode()

    def _is_own(self) -> bool:
        """Look whether the claim is still there and no other process has created a later one, because it took this one
        for dead: a renewal that came late may have written this one again."""
        claims = {each.name: each.holder for each in self._all()}
        own = claims.pop(self._name, None)
        if own is None or own.token != self._me.token or (claims and max(claims) > self._name):
            by = next((str(claims[name]) for name in sorted(claims, reverse=True) if claims[name]), "another process")
            self.lost = f"the run was taken over by {by}, because this process gave no sign of life for too long"
        return not self.lost

    def _beat(self) -> None:
        """Renew the claim every few seconds; a failure does not end the process."""
        complained = False
        while not self._stop.wait(self._patience.beat_s):
            try:
                if not self._renew():
                    return
            except DataError as error:
                if not complained:
                    complained = True
                    self._log(f"warning: the claim on {self._place} cannot be renewed: {error}")

    def _renew(self) -> bool:
        """Renew the claim; return false if another process took over, before or meanwhile."""
        if not self._is_own():
            return False
        self._me = replace(self._me, number=self._me.number + 1, written=time.time())
        self._store.put(self._name, self._text())
        if not self._is_own():  # the write was so late that it was taken over meanwhile
            self._store.delete(self._name)
        return not self.lost


PATIENCE = Patience()


class Claims:
    """All claims of a run: on its folder and, if they are kept elsewhere, on its checkpoints."""

    def __init__(self, config: AnyRunConfig, limits: StoreLimits | None = None) -> None:
        me, read = this_process(config.folder), config.data.read
        self._claims = [Claim(config.folder, me)]
        saved_in = None if config.checkpoint.url is None else Store(config.checkpoints).folder
        in_run = saved_in is not None and saved_in.resolve() == config.folder.resolve()  # checkpoint.url is `output`
        if config.checkpoint.url is not None and not in_run:
            self._claims.append(Claim(config.checkpoints, me, limits or StoreLimits(read.stall_s, read.deadline_s)))

    def take(self) -> None:
        """Take all claims, or none and raise RunBusy if a live process holds one."""
        try:
            for claim in self._claims:
                claim.take()
        except BaseException:
            self.release()
            raise

    def refuse_if_taken(self) -> None:
        """Raise RunBusy if a live process holds one of the claims; change nothing."""
        for claim in self._claims:
            claim.refuse_if_taken()

    def check(self) -> None:
        """Raise CheckpointError if another process took over."""
        for claim in self._claims:
            claim.check()

    @property
    def lost(self) -> str:
        """Return why this process lost the run; empty while it holds it as far as is known."""
        return next((claim.lost for claim in self._claims if claim.lost), "")

    def release(self) -> None:
        for claim in self._claims:
            claim.release()
