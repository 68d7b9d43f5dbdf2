"""Checkpoint manifest: the metadata of a checkpoint, whose presence commits a folder of shards; and the
identity of its run."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

from regen_dist.config import AnyRunConfig
from regen_dist.config.identity import read_or_create_run_id, read_run_id, write_run_id
from regen_dist.errors import CheckpointError
from regen_dist.jsontext import json_text

SCHEMA = 2
_CHECKSUM = "manifest_sha256"


class FileFacts(TypedDict):
    """Size and SHA-256 (hex) of a file, computed by its writer in memory."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class CheckpointManifest:
    """Metadata of a checkpoint.

    Args:
        step: completed optimizer steps.
        samples: clips that were trained on, over all ranks.
        config_hash: hash of the run's resolved config.
        version: version of this package, with the commit if it is known.
        topology: `world_size`, `engine` and `precision` of the run that saved it.
        state: state of the run besides tensors: counters, position and identity of the data, state of the guards.
        metrics: results of the newest validation; empty if there was none.
        rollbacks: steps that the run rolled back to, in order. Distinguishes its history from abandoned steps.
        shapes: the full shape of every parameter.
        files: every shard with its facts.
        saved_at: ISO 8601, UTC.
        run_id: id of the run that saved it (config/identity.py); empty for an imported checkpoint, or one older than
            run ids.
    """

    step: int
    samples: int
    config_hash: str
    version: str
    topology: dict[str, Any]
    state: dict[str, Any]
    metrics: dict[str, float]
    rollbacks: list[int]
    shapes: dict[str, list[int]]
    files: dict[str, FileFacts] = field(default_factory=dict)
    saved_at: str = ""
    schema: int = SCHEMA
    run_id: str = ""

    @property
    def skipped_in_a_row(self) -> int:
        """Return the number of consecutive steps up to this one that were skipped for non-finite gradients."""
        guards = self.state.get("guards", {})
        return int(guards.get("nonfinite", {}).get("in_a_row", 0))

    @property
    def world_size(self) -> int:
        return int(self.topology["world_size"])

    @property
    def size_bytes(self) -> int:
        return sum(facts["bytes"] for facts in self.files.values())

    @property
    def age(self) -> tuple[int, int]:
        """Return a sort key of a run's checkpoints: all that follow a rollback are newer than those before it."""
        return len(self.rollbacks), self.step

    def with_files(self, files: dict[str, FileFacts]) -> CheckpointManifest:
        """Return a copy with these files and the current time as `saved_at`."""
        return replace(self, files=files, saved_at=datetime.now(UTC).isoformat(timespec="seconds"))

    def is_followed_by(self, newer: CheckpointManifest) -> bool:
        """Return true if `newer` was trained from this checkpoint (or is it), with no rollback in between."""
        count = len(self.rollbacks)
        limits = [newer.step, *newer.rollbacks[count:]]
        return newer.rollbacks[:count] == self.rollbacks and self.step <= min(limits)


def to_text(manifest: CheckpointManifest) -> str:
    """Return canonical JSON with its own checksum, so that any changed byte is detected."""
    content = asdict(manifest)
    return _canonical({**content, _CHECKSUM: _sha256(_canonical(content))})


def parse_manifest(text: bytes | str, where: str) -> CheckpointManifest:
    """Parse a manifest that `to_text` wrote.

    Raises:
        CheckpointError: it is damaged, or of another schema.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        content = json.loads(text)
        stored = content.pop(_CHECKSUM, None)
        schema = content["schema"]
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{where} is damaged: {type(error).__name__}: {error}"
            "; `regen checkpoint verify RUN` shows which checkpoints are whole"
        ) from error
    is_intact = stored == _sha256(text.replace(f',\n "{_CHECKSUM}": "{stored}"\n}}\n', "\n}\n"))
    older = schema != SCHEMA and stored is None  # older than checksums, or not written by this package
    if not is_intact and not older:
        raise CheckpointError(
            f"{where} is damaged: it does not match its own checksum"
            "; `regen checkpoint verify RUN` shows which checkpoints are whole"
        )
    if schema != SCHEMA:
        raise CheckpointError(
            f"{where} has schema {schema}, this version reads {SCHEMA}"
            "; use the version that wrote it, or start a new run"
        )
    metrics = {name: math.nan if value is None else value for name, value in content["metrics"].items()}
    return CheckpointManifest(**content | {"metrics": metrics})


def _canonical(content: dict[str, Any]) -> str:
    return json_text(content, indent=1, ensure_ascii=True) + "\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# Run identity of checkpoints: a run resumes from its own checkpoints only, whatever its name. Imports no torch.
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
