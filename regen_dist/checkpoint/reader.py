"""Choice of the checkpoint to resume from: the newest good one, agreed on by all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.checkpoint.manifest import CheckpointManifest
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import CheckpointError, NoGoodCheckpoint, RegenError
from regen_dist.observe.streams import warn

Say = Callable[[str], None]


class _Candidate(NamedTuple):
    """Committed checkpoint: its manifest, or the reason why it cannot be read."""

    step: int
    manifest: CheckpointManifest | None
    problem: str


def newest_good(
    folder: CheckpointFolder,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    *,
    checksums: bool = False,
    before: int | None = None,
    say: Say = warn,
) -> CheckpointManifest | None:
    """Return the checkpoint that `latest` names if it is good, else the newest good one that it was trained from.

    A collective: all ranks return the same manifest, or all raise the same error.

    Args:
        folder: the run's checkpoints.
        ranks: the ranks that share the verification.
        checksums: verify checksums, not only sizes.
        before: consider only checkpoints of steps below this.
        say: called on every rank for every rejected checkpoint, with the file and the reason.

    Returns:
        the manifest; None when the folder holds no committed checkpoint.

    Raises:
        NoGoodCheckpoint: there are checkpoints, but none is good.
        DataError: the store does not answer or denies access; this is never treated as damage.
    """
    candidates = _candidates(folder, before)
    passed_over: list[str] = []
    while (candidate := ranks.on_main(lambda: next(candidates, None))) is not None:
        problem = candidate.problem or _problem(folder, ranks, candidate.manifest, checksums)
        if not problem:
            if passed_over:
                say(f"resuming from {folder.url} at step {candidate.step}, the newest good checkpoint")
            return candidate.manifest
        say(problem)
        passed_over.append(problem)
    if passed_over:
        raise NoGoodCheckpoint(
            f"{folder.url} holds no checkpoint{'' if before is None else f' before step {before}'} that can be used: "
            f"{'; '.join(passed_over)}. Restore the files, or start the run from scratch with --fresh"
        )
    return None


def _candidates(folder: CheckpointFolder, before: int | None) -> Iterator[_Candidate]:
    """Yield the candidates in order of preference. The first needs no reading of all manifests."""
    first = pointed = None
    try:
        pointed = folder.pointer()
    except CheckpointError as error:
        yield _Candidate(-1, None, str(error))
    if pointed is not None and (before is None or pointed < before):
        first = _read(folder, pointed)
        yield first
    committed = folder.steps()
    others = sorted((_read(folder, step) for step in committed if step != pointed), key=_newest_first)
    others = [each for each in others if before is None or each.step < before]
    yield from (each for each in others if _leads_to(each, first, pointed))
    if pointed not in (None, *committed):  # a damaged pointer to a lower step does not exclude later ones
        yield from (each for each in others if not _leads_to(each, first, pointed))


def _read(folder: CheckpointFolder, step: int) -> _Candidate:
    try:
        return _Candidate(step, folder.manifest(step), "")
    except CheckpointError as error:
        return _Candidate(step, None, str(error))


def _newest_first(candidate: _Candidate) -> tuple[float, int]:
    """Return a sort key; an unreadable checkpoint counts as new, so that it is reported."""
    rollbacks = float("inf") if candidate.manifest is None else len(candidate.manifest.rollbacks)
    return -rollbacks, -candidate.step


def _leads_to(candidate: _Candidate, first: _Candidate | None, pointed: int | None) -> bool:
    """Return true if the checkpoint that `latest` names was trained from this one, as far as can be determined."""
    if first is not None and first.manifest is not None and candidate.manifest is not None:
        return candidate.manifest.is_followed_by(first.manifest)
    return pointed is None or candidate.step < pointed


def _problem(folder: CheckpointFolder, ranks: Ranks, manifest: CheckpointManifest | None, checksums: bool) -> str:
    """Describe problems of a checkpoint's files; empty if there are none. The ranks share the verification."""
    assert manifest is not None, "a candidate without a problem has a manifest"
    share = (ranks.rank, ranks.world_size) if checksums else (0, 1)
    own: list[str] = []
    error: RegenError | None = None
    if checksums or ranks.is_main:
        try:
            own = folder.problems(manifest, checksums=checksums, share=share)
        except RegenError as caught:
            error = caught
    ranks.raise_together(error)
    found = [problem for each in ranks.gather(own) for problem in each]
    return f"checkpoint of step {manifest.step} in {folder.url}: {'; '.join(found)}" if found else ""
