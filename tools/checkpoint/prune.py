"""`regen checkpoint prune`: delete the checkpoints that are not to be kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from regen_dist.errors import ConfigError
from tools.checkpoint.place import RUN

if TYPE_CHECKING:
    from regen_dist.checkpoint.tending import Place, Pruned
    from regen_dist.config.schema import CheckpointConfig


def prune(
    run: Annotated[str, RUN],
    keep_last: Annotated[int | None, typer.Option(help="Keep the newest so many.", min=2)] = None,
    keep_every: Annotated[
        int | None, typer.Option(help="Also keep those of steps that are multiples of this; 0: none.", min=0)
    ] = None,
    keep_best: Annotated[int | None, typer.Option(help="Also keep the best so many.", min=0)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")] = False,
) -> None:
    """Delete what the run's config (with these changes) does not keep, and what was never committed. Pinned checkpoints
    stay, and never fewer than two good ones do. Not while the run trains.

    Example: regen checkpoint prune runs/demo --keep-last 2 --keep-every 1000 --dry-run
    """
    from regen_dist.checkpoint.tending import open_place
    from regen_dist.checkpoint.tending import prune as job

    place = open_place(run)
    policy = _policy(place, {"keep_last": keep_last, "keep_every": keep_every, "keep_best": keep_best})
    if place.run is None:
        typer.echo("Note: the run's folder is not known from here; see to it that the run is not training", err=True)
    _tell(place, job(place, policy, dry_run=dry_run), "would be deleted" if dry_run else "deleted")


def _policy(place: Place, changes: dict[str, int | None]) -> CheckpointConfig:
    from regen_dist.config.schema import CheckpointConfig

    told: dict[str, int | None] = {name: value for name, value in changes.items() if value is not None}
    if place.policy is None and "keep_last" not in told:
        raise ConfigError(
            f"what {place.folder.url} keeps is in its run's config, which is not here; name the run folder, or say "
            "--keep-last (and --keep-every, --keep-best)"
        )
    if told.get("keep_every") == 0:
        told["keep_every"] = None
    return (place.policy or CheckpointConfig()).model_copy(update=told)


def _tell(place: Place, pruned: Pruned, verb: str) -> None:
    for step, size in pruned.steps.items():
        typer.echo(f"{verb}: step {step}, {size:,} bytes")
    for name, size in pruned.debris.items():
        typer.echo(f"{verb}: {name} (never committed), {size:,} bytes")
    total = sum(pruned.steps.values()) + sum(pruned.debris.values())
    typer.echo(f"{place.folder.url}: {len(pruned.steps)} checkpoints and {total:,} bytes in all {verb}")
