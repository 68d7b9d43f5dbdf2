"""Saving: a copy of the state in host memory, written and committed by a thread while training goes on.

    copy   every rank copies its pieces to host memory; the step goes on
    clear  rank 0 removes the debris of earlier saves
    shard  every rank writes its pieces under a temporary name, and hashes them
    vote   all ranks tell each other whether they succeeded; a checkpoint that one of them could not write is given up
    commit rank 0 checks what it sees, writes the manifest, renames, and moves the pointer, last
    prune  rank 0 deletes what the retention policy does not keep

The thread has a process group of its own. At most one save is in flight. Whatever happens, the checkpoints that were
there stay, and every rank comes to the same verdict.
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
from regen_dist.errors import CheckpointError, RegenError
from regen_dist.observe.streams import warn

Hook = Callable[[str], None]


class Outcome(NamedTuple):
    """What became of a save.

    Args:
        step: of the checkpoint.
        problem: why it was not committed, the same on every rank; empty when it was.
        seconds: from the beginning of the copy to the verdict.
        blocked_s: how long training stood still for it: for the copy, and wherever it was waited for.
        size_bytes: of all shards.
    """

    step: int
    problem: str
    seconds: float
    blocked_s: float
    size_bytes: int


class Saver:
    """Saves the checkpoints of a run. Every rank has one, and calls its methods alike.

    Args:
        folder: where they go.
        ranks: who saves.
        policy: which of them are kept.
        phase: told what the writing thread does next: for heartbeats, and for tests that end the process there.
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
        """Begin to save: copy the pieces, then write in the background. A collective.

        Args:
            manifest: of the checkpoint, without its files.
            pieces: of this rank, float32 on any device; free to change when this returns.

        Returns:
            the outcome of the save before, when that was still in flight or not asked for yet: this waits for it.
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
        """Whether a save has ended whose outcome was not asked for yet. Ranks may differ for a moment: vote."""
        return self._outcome is not None

    def settle(self, timeout_s: float | None = None) -> Outcome | None:
        """Wait for the save in flight and give its outcome; None when there is none."""
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
        """Into buffers that are made once: page-locked where that makes the copy from a GPU asynchronous. It has a
        stream of its own, which waits for what the step has queued so far and is waited for alone: collectives that
        other streams still have to do are not."""
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
        try:
            files = self._write_shards(manifest.step)
            self._ranks.on_main(lambda: self._commit(manifest.with_files(files)))
            problem = ""
        except Exception as error:  # noqa: BLE001 - the outcome, told to the loop
            problem = str(error) if isinstance(error, RegenError) else f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - self._began
        size_bytes = sum(facts["bytes"] for facts in files.values())
        self._outcome = Outcome(manifest.step, problem, seconds, 0.0, size_bytes)

    def _write_shards(self, step: int) -> dict[str, FileFacts]:
        """Every rank's file; raises on all ranks alike when one could not write its own."""
        self._phase("clear")
        self._ranks.on_main(lambda: self.folder.begin(step))
        self._phase("shard")
        name = shard_name(self._ranks.rank, self._ranks.world_size)
        facts: FileFacts | None = None
        problem = ""
        try:
            self._refuse_broken()
            facts = self.folder.write_shard(step, name, self._host)
        except Exception as error:  # noqa: BLE001 - handed to the vote: no rank may leave before the others know
            problem = f"rank {self._ranks.rank}: {error}"
        self._phase("vote")
        said = self._ranks.gather((name, facts, problem))
        if problems := [problem for _, _, problem in said if problem]:
            self._ranks.on_main(self.folder.clear_debris)  # room for the next try
            raise CheckpointError("; ".join(problems))
        return {name: facts for name, facts, _ in said}

    def _refuse_broken(self) -> None:
        """A checkpoint that nobody can go on from must not take the place of a good one."""
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
        """What cannot be deleted now is tried again after the next save: the checkpoint is committed."""
        try:
            for step in deletable(self.folder, newest, self._policy):
                self.folder.remove(step)
        except (RegenError, OSError) as error:
            warn(f"old checkpoints in {self.folder.url} were not deleted: {error}")


def deletable(folder: CheckpointFolder, newest: CheckpointManifest, policy: CheckpointConfig) -> list[int]:
    """The steps in a folder that the policy does not keep, ascending."""
    manifests = []
    for step in folder.steps():
        try:
            manifests.append(folder.manifest(step))
        except CheckpointError:  # damaged: named by whoever wants to load it, and not this function's to delete
            continue
    return to_delete(
        manifests,
        newest,
        policy,
        pinned=folder.pins(),
        is_good=lambda manifest: not folder.problems(manifest, checksums=False),
    )
