"""Data order identity, batch division and run ids. Imports no torch."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from regen_dist.config.datasets import DataConfig
from regen_dist.config.files import write_text_atomically
from regen_dist.config.run import CommonConfig
from regen_dist.config.t2v import LatentDataConfig
from regen_dist.errors import ConfigError
from regen_dist.registry import Site, problems

_FACTS = "frames, sizes and sources of the samples"


def order_identity(
    config: DataConfig, fingerprints: Sequence[str], *, num_frames: int, batch_global: int, seed: int
) -> dict[str, str]:
    """Return everything that determines the clips of a step, by config names; a run resumes only if it is equal.

    Args:
        config: config of the data.
        fingerprints: those of its datasets, in the order of `config.sources`.
        num_frames: frames of a clip (k + 1).
        batch_global: samples of one optimizer step.
        seed: seed of the order.
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
    return _as_text(facts)


def latent_identity(
    config: LatentDataConfig, fingerprints: Sequence[str], *, batch_global: int, seed: int
) -> dict[str, str]:
    """Return everything that determines the rows and texts of a step on cached latents, like `order_identity`.

    Args:
        config: config of the data.
        fingerprints: those of its caches, in the order of `config.sources`.
        batch_global: samples of one optimizer step.
        seed: seed of the order.
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
    return _as_text(facts)


def facts_identity(digests: Sequence[str | None]) -> dict[str, str]:
    """Return the part of an identity that sorts samples into buckets: a new index of the same bytes, by another version
    of a decoder, may count other frames.

    Args:
        digests: `described.facts` of the manifests; nothing is returned where one is older than that.
    """
    return _as_text({_FACTS: digests}) if digests and all(digests) else {}


def order_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Describe the differences between two identities; empty if there are none. Samples' facts are compared where both
    have them."""
    names = [*now, *(name for name in before if name not in now)]
    names = [name for name in names if name != _FACTS or (name in before and name in now)]
    return [
        f"{name} was {before.get(name, 'not recorded')}, is {now.get(name, 'not recorded')}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def different_latents(fingerprints: Mapping[str, str]) -> str:
    """Explain why latent caches (fingerprints by URL) must not be mixed; empty if they may."""
    first: dict[str, str] = {}
    for url, fingerprint in fingerprints.items():
        first.setdefault(fingerprint, url)
    if len(first) < 2:
        return ""
    named = ", ".join(f"{url} ({fingerprint[:12]})" for fingerprint, url in first.items())
    return (
        f"these caches were made differently, as their fingerprints show: {named}; their latents do not mean the same: "
        "make them with one config of `regen preencode`, or leave one out"
    )


def _as_text(facts: Mapping[str, object]) -> dict[str, str]:
    return {name: str(_plain(value)) for name, value in facts.items()}


def _plain(value: object) -> object:
    """Convert tuples to lists, so that values saved as JSON compare equal."""
    return [_plain(each) for each in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


# --- division of a global batch over ranks ---


def clips_per_rank(config: CommonConfig, world_size: int) -> int:
    """Return the clips of one micro-batch on one rank; ranks that share rows of tokens have the same clips.

    Raises:
        ConfigError: the global batch cannot be divided over that many ranks; names the numbers that fit.
    """
    for problem in problems("engine.kind", config.engine.kind, Site(num_ranks=world_size)):
        raise ConfigError(problem)
    train, shared = config.train, config.engine.sequence_parallel
    return micro_batch_size(train.batch_global, train.accumulation, num_readers(config, world_size), shared)


def check_partition_size(config: CommonConfig, world_size: int) -> None:
    """Raise ConfigError if ranks that keep a second copy of the weights together do not divide all ranks evenly."""
    size = config.engine.zero.partition_size
    if world_size % size:
        raise ConfigError(
            f"engine.zero.partition_size {size} does not divide the {world_size} ranks; set it to the GPUs of a node, "
            "or to 1"
        )


def micro_batch_size(batch_global: int, accumulation: int, readers: int, shared: int = 1) -> int:
    """Divide a global batch into micro-batches and return the samples of each. All batch division is done here.

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
    """Return the number of ranks, or groups of ranks that share rows of tokens, with separate samples.

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


# --- run id: random, stored in the run folder, so that runs of the same name can be distinguished ---

RUN_ID_FILE = "run_id"
_RUN_ID = re.compile(r"[0-9a-f]{16}")


def read_or_create_run_id(folder: Path) -> str:
    """Return the id of the run in a folder, 16 hexadecimal characters; created atomically if there is none.

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
    except FileExistsError:  # another process created it first
        return read_or_create_run_id(folder)
    except OSError:  # a disk without hard links
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return made


def read_run_id(folder: Path) -> str | None:
    """Return the id of the run in a folder; None if there is none yet.

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
    """Store an id as that of the run in a folder."""
    write_text_atomically(folder / RUN_ID_FILE, f"{run_id}\n")
