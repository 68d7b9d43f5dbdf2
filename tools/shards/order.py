"""`regen shards order`: what a run trains on, and when."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from regen_dist.config import AnyRunConfig
    from regen_dist.data.reading.sample_set import SampleSet


def order(
    config: Annotated[Path, typer.Argument(help="A run's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the config, as a.b=value.")] = None,
    step: Annotated[
        int | None, typer.Option(min=1, help="Name the samples of this step, counted from 1 as in metrics.jsonl.")
    ] = None,
) -> None:
    """Show the buckets and shares of a run's data, or the samples of one step, without reading a video or a latent.

    Example: regen shards order configs/embedder/nano.yaml data.url=runs/shards --step 100
    """
    from rich.console import Console

    from regen_dist.config import load_config

    data = _opened(load_config(config, overrides or []))
    if step is None:
        Console().print(_buckets(data))
    else:
        typer.echo(_batch(data, step))


def _opened(config: AnyRunConfig) -> SampleSet[Any]:
    from regen_dist.config import RunConfig
    from regen_dist.data.reading.latents import LatentSet
    from regen_dist.data.reading.training_set import TrainingSet

    batch, seed = config.train.batch_global, config.train.seed
    if isinstance(config, RunConfig):
        return TrainingSet(config.data, num_frames=config.model.num_frames, batch_global=batch, seed=seed)
    return LatentSet(config.data, batch_global=batch, seed=seed)


def _buckets(data: SampleSet[Any]) -> Table:
    from rich.table import Table

    table = Table(title=data.summary(), title_justify="left")
    for name in ("clip", "samples", "share of steps", "times an epoch", "by dataset"):
        table.add_column(name, justify="right")
    for share in data.order.expected():
        height, width, frames = share.bucket
        table.add_row(
            f"{frames} x {height} x {width}",
            f"{share.samples}",
            f"{share.steps:.1%}",
            f"{share.samples_per_epoch / share.samples:.2f}" if share.samples else "",
            ", ".join(f"{part:.1%}" for part in share.datasets),
        )
    return table


def _batch(data: SampleSet[Any], step: int) -> str:
    """A line for each sample, wide and plain: it is copied and searched rather than looked at."""
    batch = data.order.global_batch(step - 1)
    height, width, frames = batch.bucket
    lines = [f"step {step}: {len(batch.rows)} clips of {frames} x {height} x {width}", "epoch  id  key  shard  dataset"]
    for place, epoch in zip(data.places(batch), batch.epochs.tolist(), strict=True):
        dataset = data.datasets[place.dataset]
        sample = dataset.sample(place.row.row)
        lines.append(f"{epoch}  {sample.id}  {sample.key}  {sample.shard}  {dataset.store.url}")
    return "\n".join(lines)
