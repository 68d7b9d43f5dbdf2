"""Whether the disk holds the checkpoints that a run keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launcher.preflight.estimates import NoEstimate
from launcher.preflight.findings import Finding, Subject, note, problem, shortened
from launcher.preflight.measured import measured
from launcher.preflight.places import nearest
from regen_dist.config import AnyRunConfig
from regen_dist.config.urls import parse_url
from regen_dist.config.worldsize import clips_per_rank
from regen_dist.data.objects.store import Store, free_bytes
from regen_dist.errors import ConfigError

BYTES_PER_PARAMETER = 16  # float32: master, two moments, EMA
GIB = 2**30


def space(subject: Subject) -> Iterator[Finding]:
    """Every local disk has room for what its runs will keep, beside what they hold already."""
    disks: dict[int, list[tuple[AnyRunConfig, Path]]] = {}
    for config in subject.configs:
        folder = parse_url(config.checkpoints).folder
        if folder is not None:
            disks.setdefault(nearest(folder).stat().st_dev, []).append((config, folder))
    for runs in disks.values():
        yield from _one_disk(runs, subject)


def _one_disk(runs: list[tuple[AnyRunConfig, Path]], subject: Subject) -> Iterator[Finding]:
    needed = 0
    try:
        for config, folder in runs:
            held = sum(Store(folder).list().values())
            needed += max(0, checkpoints_kept(config) * _checkpoint_bytes(config, subject) - held)
    except NoEstimate as error:
        yield note(f"free space was not compared with what checkpoints need: {error}")
        return
    except ConfigError:  # the batch does not fit the ranks, which another check tells
        return
    free, folder = free_bytes(runs[0][1]), runs[0][1]
    if needed > free:
        names = shortened([config.name for config, _ in runs])
        yield problem(
            f"the disk of {folder} has {free / GIB:.1f} GiB free, the checkpoints of {names} need {needed / GIB:.1f} "
            f"GiB more ({checkpoints_kept(runs[0][0])} at once: those kept, one being written, one cut off); make "
            "room, lower checkpoint.keep_last, keep_best or raise keep_every, or set checkpoint.url"
        )


def checkpoints_kept(config: AnyRunConfig) -> int:
    """The most that lie there at once: what retention keeps, one that is written, and the debris of one."""
    policy = config.checkpoint
    for_good = config.train.steps // policy.keep_every if policy.keep_every else 0
    wanted = policy.keep_last + policy.keep_best + for_good
    ever = -(-config.train.steps // policy.every)
    return min(wanted, ever) + 2


def _checkpoint_bytes(config: AnyRunConfig, subject: Subject) -> int:
    found, world_size = measured(config), subject.order.cluster.world_size
    if found is not None and found.save_bytes is not None:
        return found.save_bytes
    clips_per_rank(config, world_size)  # or the estimate would be refused, in other words
    return BYTES_PER_PARAMETER * subject.estimates.of(config, world_size).parameters
