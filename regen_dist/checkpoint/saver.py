"""Asynchronous checkpoint saver: copies the state to host memory and writes it in a thread while training continues.

    copy   every rank copies its pieces to host memory; training continues
    clear  rank 0 removes the debris of earlier saves
    shard  every rank writes its pieces under a temporary name, and hashes them
    vote   all ranks exchange their results; if one could not write its shard, the checkpoint is abandoned
    commit rank 0 checks the files, writes the manifest, renames the folder, and sets `latest`, last
    prune  rank 0 deletes what the retention policy does not keep

The thread has its own process group. At most one save is in flight. A failed save leaves the existing checkpoints as
they are, and all ranks reach the same outcome.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.checkpoint.manifest import CheckpointManifest, FileFacts
from regen_dist.checkpoint.retention import to_delete
from regen_dist.checkpoint.shards import nonfinite, shard_name
from regen_dist.config.run import CheckpointConfig
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import CheckpointError, RegenError, StoreUnavailable
from regen_dist.observe.terminal import warn

Hook = Callable[[str], None]


class Outcome(NamedTuple):
    """Result of a save.

    Args:
        step: step of the checkpoint.
        problem: why it was not committed, the same on every rank; empty if it was.
        seconds: time from the start of the copy to the result.
        blocked_s: time that training was blocked: by the copy, and by waiting for the save.
        size_bytes: size of all shards.
        is_outage: true if the store gave no answer, which another try may get.
    """

    step: int
    problem: str
    seconds: float
    blocked_s: float
    size_bytes: int
    is_outage: bool = False


class Saver:
    """Saver of a run's checkpoints. Every rank has one, and all call the same methods in the same order.

    Args:
        folder: the checkpoint folder.
        ranks: the ranks that save.
        policy: the retention policy.
        phase: called with the name of each phase of the writing thread, for heartbeats and fault injection in tests.
    """

    def __init__(
        self, folder: CheckpointFolder, ranks: Ranks, policy: CheckpointConfig, phase: Hook = lambda name: None
    ) -> None:
        self.folder, self._policy, self._phase = folder, policy, phase
        self._ranks = ranks.apart()
        self._host: dict[str, Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._began, self._blocked = 0.0, 0.0

    def save(self, manifest: CheckpointManifest, pieces: Mapping[str, Tensor]) -> Outcome | None:
        """Start a save: copy the pieces, then write in the background. A collective.

        Args:
            manifest: manifest of the checkpoint, without its files.
            pieces: pieces of this rank, float32 on any device; they may change once this returns.

        Returns:
            the outcome of the previous save, if it was not collected yet: this waits for it.
        """
        before = self.settle()
        self._began = time.perf_counter()
        self._copy(pieces)
        self._thread = threading.Thread(target=self._write, args=(manifest,), name="checkpoint", daemon=True)
        self._thread.start()
        self._blocked = time.perf_counter() - self._began
        return before

    @property
    def finished(self) -> bool:
        """Return true if a save has ended whose outcome was not collected yet. Ranks may differ briefly: vote."""
        return self._outcome is not None

    def settle(self, timeout_s: float | None = None) -> Outcome | None:
        """Wait for the save in flight and return its outcome; None if there is none."""
        if self._thread is None:
            return None
        began = time.perf_counter()
        self._thread.join(timeout_s)
        self._blocked += time.perf_counter() - began
        if self._outcome is None:
            return None
        outcome, self._thread, self._outcome = self._outcome, None, None
        return outcome._replace(blocked_s=self._blocked)

    @torch.no_grad()
    def _copy(self, pieces: Mapping[str, Tensor]) -> None:
        """Copy the pieces into reused host buffers, page-locked for asynchronous copies from a GPU.

        The copy has a stream of its own, which waits for what the step has queued so far; only this stream is waited
        for, so that collectives of other streams go on.
        """
        on_gpu = {piece.device for piece in pieces.values() if piece.is_cuda}
        with ExitStack() as copying:
            for device in on_gpu:
                if device not in self._streams:
                    self._streams[device] = torch.cuda.Stream(device)
                stream = self._streams[device]
                stream.wait_stream(torch.cuda.current_stream(device))
                copying.enter_context(torch.cuda.stream(stream))
            for name, piece in pieces.items():
                if name not in self._host:
                    self._host[name] = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=piece.is_cuda)
                self._host[name].copy_(piece, non_blocking=True)
        for device in on_gpu:
            self._streams[device].synchronize()

    def _write(self, manifest: CheckpointManifest) -> None:
        files: dict[str, FileFacts] = {}
        is_outage = False
        try:
            files = self._write_shards(manifest.step)
            self._ranks.on_main(lambda: self._commit(manifest.with_files(files)))
            problem = ""
        except Exception as error:  # noqa: BLE001 - reported to the loop as the outcome
            problem = str(error) if isinstance(error, RegenError) else f"{type(error).__name__}: {error}"
            is_outage = isinstance(error, StoreUnavailable)
        seconds = time.perf_counter() - self._began
        size_bytes = sum(facts["bytes"] for facts in files.values())
        self._outcome = Outcome(manifest.step, problem, seconds, 0.0, size_bytes, is_outage)

    def _write_shards(self, step: int) -> dict[str, FileFacts]:
        """Write every rank's file and return the facts of all; raise on all ranks if one could not write its own."""
        self._phase("clear")
        self._ranks.on_main(lambda: self.folder.begin(step))
        self._phase("shard")
        name = shard_name(self._ranks.rank, self._ranks.world_size)
        facts: FileFacts | None = None
        problem, is_outage = "", False
        try:
            self._refuse_broken()
            facts = self.folder.write_shard(step, name, self._host)
        except Exception as error:  # noqa: BLE001 - passed to the vote: no rank may leave before the others know
            problem, is_outage = f"rank {self._ranks.rank}: {error}", isinstance(error, StoreUnavailable)
        self._phase("vote")
        results = self._ranks.gather((name, facts, problem, is_outage))
        if failed := [each for each in results if each[2]]:
            self._ranks.on_main(self.folder.clear_debris)  # frees space for the next attempt
            kind = StoreUnavailable if all(outage for *_, outage in failed) else CheckpointError
            raise kind("; ".join(problem for _, _, problem, _ in failed))
        return {name: facts for name, facts, *_ in results}

    def _refuse_broken(self) -> None:
        """Raise CheckpointError if a value is not finite: an unusable checkpoint must not replace a good one."""
        if broken := nonfinite(self._host):
            raise CheckpointError(
                f"{len(broken)} of {len(self._host)} tensors hold values that are not finite, among them {broken[0]}; "
                "lower optimizer.lr"
            )

    def _commit(self, manifest: CheckpointManifest) -> None:
        try:
            self.folder.commit(manifest, self._phase)
        except RegenError:
            self.folder.clear_debris()
            raise
        self._phase("prune")
        self._prune(manifest)

    def _prune(self, newest: CheckpointManifest) -> None:
        """Apply the retention policy. A failed deletion is retried after the next save: the checkpoint is committed."""
        try:
            for step in deletable(self.folder, newest, self._policy):
                self.folder.remove(step)
        except (RegenError, OSError) as error:
            warn(f"old checkpoints in {self.folder.url} were not deleted: {error}")


def deletable(folder: CheckpointFolder, newest: CheckpointManifest, policy: CheckpointConfig) -> list[int]:
    """Return the steps in a folder that the policy does not keep, ascending."""
    manifests = []
    for step in folder.steps():
        try:
            manifests.append(folder.manifest(step))
        except CheckpointError:  # damaged: reported when it is loaded, and not deleted here
            continue
    return to_delete(
        manifests,
        newest,
        policy,
        pinned=folder.pins(),
        is_good=lambda manifest: not folder.problems(manifest, checksums=False),
    )
