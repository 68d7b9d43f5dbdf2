"""A run that is started again and again: what every start does, and what must be equal in the end."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from regen_dist.config.embedder import EmbedderConfig
from regen_dist.observe.record import read_record
from tests.helpers.checkpoints import tensors
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_run


class Ending(NamedTuple):
    """What a run came to: the loss of every step, and the SHA-256 of every whole tensor of its last checkpoint
    (weights, both moments, EMA)."""

    losses: list[float]
    hashes: dict[str, str]


def small_run(folder: Path, data: Path, name: str, **changes: object) -> EmbedderConfig:
    """Two ranks' share of ZeRO-3 on the smallest model, some parameters gathered and some kept, saved at every step."""
    values = {
        "engine__kind": "zero3", "engine__persistence_threshold": 500, "checkpoint__every": 1,
        "model__decoder__blocks": 1, "model__latent__noise_std": 0.1,
    }  # fmt: skip
    return tiny_run(folder, data, name=name, **{**values, **changes})


def train(config: EmbedderConfig) -> int:
    """The real loop, in a rank. Returns its exit code."""
    from regen_dist.training import run

    return run.train(config)


def undisturbed(config: EmbedderConfig, world_size: int = 2) -> Ending:
    """Train from the beginning to the end in one start."""
    assert run_ranks(train, world_size, config) == [0] * world_size
    return ending(config)


def ending(config: EmbedderConfig) -> Ending:
    """What a finished run came to; fails when a step is missing or stands in its record twice."""
    lines = read_record(config.folder / "metrics.jsonl", "train")
    assert [line["step"] for line in lines] == list(range(1, config.train.steps + 1))
    found = tensors(config.folder, config.train.steps)
    hashes = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in found.items()}
    return Ending([line["loss"] for line in lines], hashes)


def assert_equal(found: Ending, expected: Ending) -> None:
    """Bit for bit."""
    assert found.losses == expected.losses
    assert found.hashes.keys() == expected.hashes.keys()
    different = [name for name, value in expected.hashes.items() if found.hashes[name] != value]
    assert not different
    assert len(set(expected.hashes.values())) > len(expected.hashes) // 2, "the tensors differ from each other"


def first_lines(logs: Path, words: Sequence[str] = ("resumed at step", "starting at step")) -> list[str]:
    """Where a start says it began: the lines of rank 0 with one of `words`."""
    text = (logs / "rank_0.log").read_text(errors="replace") if (logs / "rank_0.log").exists() else ""
    return [line for line in text.splitlines() if any(word in line for word in words)]
