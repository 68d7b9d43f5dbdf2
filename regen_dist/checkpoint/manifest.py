"""What a committed checkpoint says of itself. The manifest is what makes a folder of shards a checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, TypedDict

from regen_dist.errors import CheckpointError
from regen_dist.jsontext import json_text

SCHEMA = 2
_CHECKSUM = "manifest_sha256"


class FileFacts(TypedDict):
    """Size and SHA-256 (hex) of a file, as its writer had it in memory."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class CheckpointManifest:
    """Everything about a checkpoint but its tensors.

    Args:
        step: optimizer steps that were made.
        samples: clips that were trained on, over all ranks.
        config_hash: of the run's resolved config.
        version: of this package, with the commit where it is known.
        topology: who saved it: `world_size`, `engine`, `precision`.
        state: what the run needs besides tensors: counters, the data's place and identity, the guards' memory.
        metrics: of the newest validation, empty when there was none.
        rollbacks: the steps that the run went back to, in order. Tells a history from the futures it gave up.
        shapes: the full shape of every parameter.
        files: every shard with its facts.
        saved_at: ISO 8601, UTC.
        run_id: of the run that saved it (config/identity.py); empty for an imported checkpoint, or one from before
            there were ids.
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
        """How many steps were skipped for gradients that are not finite, one after the other, up to this one."""
        guards = self.state.get("guards", {})
        return int(guards.get("nonfinite", {}).get("in_a_row", 0))

    @property
    def trusted_before(self) -> int:
        """Checkpoints of steps below this are from before the skipped steps, and from before the update that may have
        broken the weights."""
        return self.step - self.skipped_in_a_row

    @property
    def world_size(self) -> int:
        """The number of ranks that saved it."""
        return int(self.topology["world_size"])

    @property
    def size_bytes(self) -> int:
        """Of all shards together."""
        return sum(facts["bytes"] for facts in self.files.values())

    @property
    def age(self) -> tuple[int, int]:
        """Orders the checkpoints of a run: after a rollback everything is newer than before it."""
        return len(self.rollbacks), self.step

    def with_files(self, files: dict[str, FileFacts]) -> CheckpointManifest:
        """The same, saved now, as these files."""
        return replace(self, files=files, saved_at=datetime.now(UTC).isoformat(timespec="seconds"))

    def is_followed_by(self, newer: CheckpointManifest) -> bool:
        """Whether `newer` was trained from this one (or is it). False for what lies in a future that was gone back
        from."""
        count = len(self.rollbacks)
        limits = [newer.step, *newer.rollbacks[count:]]
        return newer.rollbacks[:count] == self.rollbacks and self.step <= min(limits)


def to_text(manifest: CheckpointManifest) -> str:
    """Canonical JSON that carries its own checksum: any byte that changes is noticed."""
    content = asdict(manifest)
    return _canonical({**content, _CHECKSUM: _sha256(_canonical(content))})


def parse_manifest(text: bytes | str, where: str) -> CheckpointManifest:
    """The manifest in `text`, exactly as `to_text` wrote it.

    Args:
        text: the file's content.
        where: the file's place, for messages.

    Raises:
        CheckpointError: it is damaged, or of another schema.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        content = json.loads(text)
        told = content.pop(_CHECKSUM, None)
        schema = content["schema"]
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: {type(error).__name__}: {error}") from error
    if schema != SCHEMA and told is None:  # before this package wrote checksums, or by none of it
        raise CheckpointError(f"{where} has schema {schema}, this version reads {SCHEMA}")
    if told != _sha256(text.replace(f',\n "{_CHECKSUM}": "{told}"\n}}\n', "\n}\n")):
        raise CheckpointError(f"{where} is damaged: it does not match its own checksum")
    if schema != SCHEMA:
        raise CheckpointError(f"{where} has schema {schema}, this version reads {SCHEMA}")
    metrics = {name: math.nan if value is None else value for name, value in content["metrics"].items()}
    return CheckpointManifest(**content | {"metrics": metrics})


def _canonical(content: dict[str, Any]) -> str:
    return json_text(content, indent=1, ensure_ascii=True) + "\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
