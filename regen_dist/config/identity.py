"""What decides which samples a step sees: a run goes on only while it stays the same. Imports no torch."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from regen_dist.config.files import write_text_atomically
from regen_dist.config.run import CommonConfig, DataConfig
from regen_dist.config.t2v import LatentDataConfig
from regen_dist.errors import ConfigError


def order_identity(
    config: DataConfig, fingerprints: Sequence[str], *, num_frames: int, batch_global: int, seed: int
) -> dict[str, str]:
    """While this is the same, a step alone says which clips it sees. Told in the words of the config.

    Args:
        config: of the data.
        fingerprints: of its datasets, in the order of `config.sources`.
        num_frames: frames of a clip (k + 1).
        batch_global: samples of one optimizer step.
        seed: of the order.
    """
    facts = {
        "dataset fingerprint": fingerprints,
        "data.mixture weights": config.weights,
        "data sizes": config.sizes,
        "frames of a clip": num_frames,
        "data.image_fraction": config.image_fraction,
        "data.short_side": config.short_side,
        "data.stride": config.stride,
        "data.flip": config.flip,
        "train.batch_global": batch_global,
        "train.seed": seed,
    }
    return _told(facts)


def latent_identity(
    config: LatentDataConfig, fingerprints: Sequence[str], *, batch_global: int, seed: int
) -> dict[str, str]:
    """The same for rows of cached latents: while this is the same, a step alone says which rows and texts it sees.

    Args:
        config: of the data.
        fingerprints: of its caches, in the order of `config.sources`.
        batch_global: samples of one optimizer step.
        seed: of the order.
    """
    facts = {
        "dataset fingerprint": fingerprints,
        "data.mixture weights": config.weights,
        "data.clips": config.clips,
        "data.image_fraction": config.image_fraction,
        "data.text_dropout": config.text_dropout,
        "train.batch_global": batch_global,
        "train.seed": seed,
    }
    return _told(facts)


def order_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between two identities, in words; empty when nothing does."""
    names = [*now, *(name for name in before if name not in now)]
    return [
        f"{name} was {before.get(name, 'not told')}, is {now.get(name, 'not told')}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _told(facts: Mapping[str, object]) -> dict[str, str]:
    return {name: str(_plain(value)) for name, value in facts.items()}


def _plain(value: object) -> object:
    """Tuples as lists, so that what was saved as JSON compares equal."""
    return [_plain(each) for each in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


# Whether a config fits a number of ranks.


def clips_per_rank(config: CommonConfig, world_size: int) -> int:
    """Clips of one micro-batch on one rank; ranks that share rows of tokens have the same clips.

    Raises:
        ConfigError: the global batch cannot be divided over that many ranks; names the numbers that fit.
    """
    if config.engine.kind == "plain" and world_size > 1:
        raise ConfigError(f"engine.kind=plain trains in one process, found {world_size} ranks; set engine.kind=zero3")
    train, shared = config.train, config.engine.sequence_parallel
    return micro_batch_size(train.batch_global, train.accumulation, num_readers(config, world_size), shared)


def micro_batch_size(batch_global: int, accumulation: int, readers: int, shared: int = 1) -> int:
    """Divide a global batch into micro-batches: samples of each. The one place where a batch is divided.

    Args:
        batch_global: samples of an optimizer step over all ranks.
        accumulation: micro-batches of a step, one after the other.
        readers: ranks, or groups of ranks, that have samples of their own.
        shared: ranks of such a group.

    Raises:
        ConfigError: it does not divide evenly; names the numbers of ranks that fit.
    """
    if readers < 1:
        raise ConfigError(f"found {readers * shared} ranks; at least 1 is needed")
    micro_batch, rest = divmod(batch_global, accumulation)
    if rest or not micro_batch or micro_batch % readers:
        fitting = [str(shared * number) for number in range(1, micro_batch + 1) if micro_batch % number == 0]
        groups = f" in groups of {shared} (engine.sequence_parallel)" if shared > 1 else ""
        remedy = f"ranks that fit: {', '.join(fitting)}"
        if rest or not micro_batch:
            remedy = "set train.batch_global to a multiple of train.accumulation"
        raise ConfigError(
            f"train.batch_global {batch_global} over train.accumulation {accumulation} is "
            f"{batch_global / accumulation:g} samples at a time, not a multiple of {readers * shared} ranks{groups}; "
            f"{remedy}"
        )
    return micro_batch // readers


def num_readers(config: CommonConfig, world_size: int) -> int:
    """How many ranks, or groups of ranks that share rows of tokens, have samples of their own.

    Raises:
        ConfigError: the ranks cannot be grouped so.
    """
    readers, rest = divmod(world_size, config.engine.sequence_parallel)
    if rest:
        raise ConfigError(
            f"engine.sequence_parallel {config.engine.sequence_parallel} groups ranks, and {world_size} ranks are no "
            "multiple of it; take a number of ranks that is, or set engine.sequence_parallel=1"
        )
    return readers


# The id of a run: random, kept in its folder, so that runs of one name are told apart. Imports no torch.

RUN_ID_FILE = "run_id"
_RUN_ID = re.compile(r"[0-9a-f]{16}")


def read_or_create_run_id(folder: Path) -> str:
    """The id of the run in a folder, 16 hexadecimal characters; made where there is none, once for all that ask.

    Raises:
        ConfigError: the file holds something else.
    """
    found = read_run_id(folder)
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    path, made = folder / RUN_ID_FILE, secrets.token_hex(8)
    temporary = folder / f".{RUN_ID_FILE}.{made}.tmp"
    temporary.write_text(f"{made}\n", encoding="utf-8")
    try:
        os.link(temporary, path)
    except FileExistsError:  # another process was quicker
        return read_or_create_run_id(folder)
    except OSError:  # a disk without hard links
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return made


def read_run_id(folder: Path) -> str | None:
    """The id of the run in a folder; None where there is none yet.

    Raises:
        ConfigError: the file holds something else.
    """
    path = folder / RUN_ID_FILE
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    if not _RUN_ID.fullmatch(text):
        raise ConfigError(f"{path} holds {text[:40]!r}, which is no id of 16 hexadecimal characters; delete the file")
    return text


def write_run_id(folder: Path, run_id: str) -> None:
    """Make the run in a folder the one of this id."""
    write_text_atomically(folder / RUN_ID_FILE, f"{run_id}\n")
