"""Manifests: changes are noticed, abandoned futures differ from the history, and the retention rule keeps steps."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace

import pytest

from regen_dist.checkpoint.manifest import CheckpointManifest, parse_manifest, to_text
from regen_dist.errors import CheckpointError

MANIFEST = CheckpointManifest(
    step=7, samples=56, config_hash="abc", version="1.0", topology={"world_size": 2, "engine": "zero3"},
    state={"num_updates": 7, "window": [0.1, 1e-300, 3.3333333333333335]}, metrics={"psnr_db": 20.123456789},
    rollbacks=[], shapes={"weight": [2, 3]},
).with_files({"rank-00000-of-00002.safetensors": {"bytes": 3, "sha256": "00"}})  # fmt: skip


def test_round_trip() -> None:
    """The written manifest is read back, numbers bit for bit."""
    assert parse_manifest(to_text(MANIFEST).encode(), "here") == MANIFEST
    assert (MANIFEST.world_size, MANIFEST.size_bytes) == (2, 3)
    assert MANIFEST.saved_at.endswith("+00:00")


@pytest.mark.parametrize("bit", [0, 3, 5, 7])
def test_any_changed_byte_is_noticed(bit: int) -> None:
    """Digits of counters, white space, the checksum itself: no byte can change without an error that says where."""
    text = to_text(MANIFEST).encode()
    for position in range(len(text)):
        changed = bytearray(text)
        changed[position] ^= 1 << bit
        with pytest.raises(CheckpointError, match="here is damaged"):
            parse_manifest(bytes(changed), "here")


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_cut_manifest_is_damaged(length: int) -> None:
    """Whatever is left of it."""
    with pytest.raises(CheckpointError, match="here is damaged"):
        parse_manifest(to_text(MANIFEST)[:length], "here")


@pytest.mark.parametrize("text", ["[]", "null", '{"step": 7}', "[" * 100_000])
def test_other_json_is_damaged(text: str) -> None:
    """Valid JSON that is no manifest is an error of the same kind, not a crash."""
    with pytest.raises(CheckpointError, match="here is damaged"):
        parse_manifest(text, "here")


def test_another_schema_says_so() -> None:
    """A checkpoint of another version is no damage: what was found and what is read are told."""
    with pytest.raises(CheckpointError, match="has schema 3, this version reads 2"):
        parse_manifest(to_text(replace(MANIFEST, schema=3)), "here")
    with pytest.raises(CheckpointError, match="has schema 1, this version reads 2"):
        parse_manifest(json.dumps({"schema": 1, "step": 7}), "here")


def _at(step: int, *rollbacks: int) -> CheckpointManifest:
    return replace(MANIFEST, step=step, rollbacks=list(rollbacks))


@pytest.mark.parametrize(
    ("older", "newer", "follows"),
    [
        (_at(40), _at(80), True),
        (_at(80), _at(80), True),
        (_at(80), _at(40), False),
        (_at(40), _at(100, 60), True),
        (_at(60), _at(100, 60), True),
        (_at(80), _at(100, 60), False),  # given up when the run went back to 60
        (_at(80, 60), _at(100, 60), True),
        (_at(80, 60), _at(100, 60, 70), False),  # after going back to 60, and then to 70
        (_at(70, 60), _at(100, 60, 70), True),
        (_at(50, 60), _at(100, 60, 40), False),
        (_at(60), _at(100, 60, 40), False),  # went back twice, the second time further
        (_at(80, 60), _at(100, 50), False),  # of another history
    ],
)
def test_which_checkpoints_a_newer_one_was_trained_from(
    older: CheckpointManifest, newer: CheckpointManifest, follows: bool
) -> None:
    """Step numbers alone do not tell after a rollback."""
    assert older.is_followed_by(newer) is follows


def test_after_a_rollback_everything_is_newer() -> None:
    """The order of checkpoints: by rollbacks, then by steps."""
    assert _at(60, 60).age > _at(80).age > _at(60).age


def test_metrics_that_are_not_finite_are_null_in_the_file_and_nan_when_read() -> None:
    """In manifests of this version, and of those before, which wrote a bare NaN."""
    text = to_text(replace(MANIFEST, metrics={"psnr_db": math.nan, "loss": math.inf}))
    assert "NaN" not in text
    assert "Infinity" not in text
    assert all(math.isnan(value) for value in parse_manifest(text, "here").metrics.values())
    content = json.loads(text) | {"metrics": {"psnr_db": math.nan}}
    del content["manifest_sha256"]
    body = json.dumps(content, indent=1) + "\n"
    old = json.dumps(content | {"manifest_sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1) + "\n"
    assert math.isnan(parse_manifest(old, "here").metrics["psnr_db"])
    with pytest.raises(CheckpointError, match="does not match its own checksum"):
        parse_manifest(old.replace("NaN", "1.0"), "here")
