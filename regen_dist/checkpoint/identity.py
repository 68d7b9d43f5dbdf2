"""Run identity of checkpoints: a run resumes from its own checkpoints only, whatever its name. Imports no torch."""

from __future__ import annotations

import shlex
from pathlib import Path

from regen_dist.checkpoint.manifest import CheckpointManifest
from regen_dist.config import AnyRunConfig
from regen_dist.config.identity import read_or_create_run_id, read_run_id, write_run_id
from regen_dist.errors import CheckpointError


def foreign_run_reason(config: AnyRunConfig, manifest: CheckpointManifest) -> str:
    """Explain why a run must not resume from a checkpoint found at its location; empty if it may."""
    own = read_run_id(config.folder)
    if not manifest.run_id or manifest.run_id == own:
        return ""
    if (
        own is None and config.checkpoint.url is None
    ):  # they are in the run folder: it is a copy of the checkpoints alone
        return ""
    command = f"regen checkpoint adopt {shlex.quote(str(config.folder))} {shlex.quote(config.checkpoints)}"
    return (
        f"the checkpoint of step {manifest.step} in {config.checkpoints} is of another run: it has the id "
        f"{manifest.run_id}, the run folder {config.folder} has {own or 'none yet'}. Give this run another name or "
        f"another checkpoint.url; or, if it is the same run, whose folder was lost, confirm it: `{command}`"
    )


def own_run_id(config: AnyRunConfig, manifest: CheckpointManifest | None) -> str:
    """Return the id of a run that resumes from a checkpoint or starts (None), and store it in the run folder.

    Raises:
        CheckpointError: the checkpoint belongs to another run.
    """
    if manifest is not None and (problem := foreign_run_reason(config, manifest)):
        raise CheckpointError(problem)
    if manifest is not None and manifest.run_id and read_run_id(config.folder) is None:
        write_run_id(config.folder, manifest.run_id)
    return read_or_create_run_id(config.folder)


def adopt(run: Path, manifest: CheckpointManifest) -> None:
    """Give a run folder, which need not exist yet, the identity of the run that saved a checkpoint."""
    if manifest.run_id:
        write_run_id(run, manifest.run_id)
