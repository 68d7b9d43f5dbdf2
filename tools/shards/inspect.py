"""`regen shards inspect`, `captions`, `order` and `verify`: the content of a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regen_dist.errors import DataError
from regen_dist.jsontext import json_text
from regen_dist.tables import Table, counted, numbers
from tools.shards.progress import Workers, progress_bar

if TYPE_CHECKING:
    from rich.console import Console

    from regen_dist.config import AnyRunConfig
    from regen_dist.data.format.catalogue import Dataset
    from regen_dist.data.format.index import Sample
    from regen_dist.data.inspect.check import Depth
    from regen_dist.data.inspect.overview import Histogram, Overview
    from regen_dist.data.loading.datasets import SampleSet


_BAR, _REASONS = 30, 12
_LONG = "statistics"  # of latents: dozens of numbers, printed by --json only
_EIGHTHS = " ▏▎▍▌▋▊▉"


def inspect(
    url: Annotated[str, typer.Argument(help="Folder or URL of a dataset.", metavar="URL")],
    sheet: Annotated[
        Path | None, typer.Option(help="Path of the contact sheet (PNG); in the cache folder by default.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples on the contact sheet; 0 makes none.", min=0, max=200)] = 12,
    seed: Annotated[
        int | None, typer.Option(help="Seed to draw random samples; evenly spread by default.", min=0)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the numbers as JSON; a sheet is written only with --sheet.")
    ] = False,
) -> None:
    """Show a dataset's content: a table, histograms, what was left out, and a contact sheet (none for a latent cache).

    Example: regen shards inspect runs/shards --sheet runs/shards.png --samples 12
    """

    from rich.console import Console

    from regen_dist.data.format.catalogue import open_dataset
    from regen_dist.data.format.manifest import only_videos
    from regen_dist.data.inspect.contact import choose_rows, write_contact_sheet
    from regen_dist.data.inspect.overview import make_overview

    dataset = open_dataset(url)
    if sheet:
        only_videos(dataset.manifest, url)
    with progress_bar() as progress:
        overview = make_overview(dataset, progress)
    if as_json:
        typer.echo(json_text(overview.to_json(), indent=1, ensure_ascii=False))
    else:
        _show(overview, Console())
    if samples and (sheet or not as_json) and dataset.manifest.kind != "latents":
        path = sheet or _default_sheet(dataset)
        write_contact_sheet(dataset, path, choose_rows(len(dataset), samples, seed))
        typer.echo(f"Contact sheet: {path}", err=as_json)


def _default_sheet(dataset: Dataset) -> Path:
    """Return a path outside the dataset, which may be in a bucket, and outside the current folder."""
    from regen_dist.data.format.catalogue import cache_folder

    name = dataset.store.url.rstrip("/").rpartition("/")[2]
    return cache_folder() / "sheets" / f"{name}-{dataset.fingerprint[:8]}.png"


def _show(overview: Overview, console: Console) -> None:
    from regen_dist.data.format.manifest import one_line

    _table(overview).show(console)
    width = max((len(bar.label) for histogram in overview.histograms.values() for bar in histogram.bars), default=0)
    digits = max(
        (len(f"{bar.count:,}") for histogram in overview.histograms.values() for bar in histogram.bars), default=0
    )
    for name, histogram in overview.histograms.items():
        console.print(f"\n[bold]{name}[/bold]{_spread(histogram)}", highlight=False)
        for line in _bars(histogram, width, digits):
            console.print(line, highlight=False, markup=False)
    if overview.left_out:
        console.print("\n[bold]left out[/bold], by reason", highlight=False)
        for reason, count in overview.left_out[:_REASONS]:
            console.print(f"  {count:>{digits},}  {one_line(reason)}", highlight=False, markup=False, soft_wrap=True)
        if len(overview.left_out) > _REASONS:
            console.print(f"  and {len(overview.left_out) - _REASONS} more reasons (--json lists all)")


def _table(overview: Overview) -> Table:
    totals = overview.totals
    sources = "" if overview.sources is None else f" from {counted(overview.sources, 'source')}"
    options = {name: value for name, value in overview.options.items() if name != _LONG}
    sections = {name: value for name, value in options.items() if isinstance(value, Mapping)}
    rows = {
        "made by": "regen preencode" if overview.kind == "latents" else f"regen shards {overview.kind}",
        "samples": f"{totals.samples:,}{sources}",
        "length": f"{_duration(totals.seconds)}, {counted(totals.frames, 'frame')}",
        "size": f"{totals.bytes / 1e6:,.1f} MB in {counted(totals.shards, 'shard')}",
        "shards lie in": overview.shards_url or "",
        "captions": f"of {counted(overview.captions, 'sample')}",
        "left out": f"{sum(count for _, count in overview.left_out):,}",
        "options": _settings({name: value for name, value in options.items() if name not in sections}),
        **{name: _settings(section) for name, section in sections.items()},
        "fingerprint": overview.fingerprint,
    }
    return Table(["", ""], [row for row in rows.items() if row[1]], title=overview.url)


def _settings(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.1f} s"
    minutes, hours = int(seconds) // 60 % 60, int(seconds) // 3600
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min"


def _spread(histogram: Histogram) -> str:
    if histogram.low is None or histogram.low == histogram.high:
        return ""
    return f"  {histogram.low:g} to {histogram.high:g}, median {histogram.median:g}"


def _bars(histogram: Histogram, width: int, digits: int) -> Iterator[str]:
    """Yield one line per bar: label, bar, count, share. Widths in characters."""
    most, total = max(bar.count for bar in histogram.bars), sum(bar.count for bar in histogram.bars)
    for bar in histogram.bars:
        eighths = max(round(bar.count / most * _BAR * 8), 1 if bar.count else 0)
        drawn = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        yield f"  {bar.label:>{width}}  {drawn:<{_BAR}}  {bar.count:>{digits},} {bar.count / total:>6.1%}"


# `regen shards captions`: prompts from a dataset.


def captions(
    url: Annotated[str, typer.Argument(help="Folder or URL of a dataset.", metavar="URL")],
    out: Annotated[Path, typer.Option(help="Text file to write, one caption per line.")],
    number: Annotated[int, typer.Option(min=1, help="Number of captions, from the first samples that have one.")] = 200,
    first_frames: Annotated[
        Path | None, typer.Option(help="Folder for their first frames, 00000.png, …, for `regen generate --image`.")
    ] = None,
    first_clips: Annotated[
        Path | None, typer.Option(help="Folder for their first clips, 00000.mp4, …, for `regen generate --continue`.")
    ] = None,
    clip_frames: Annotated[int, typer.Option(min=2, help="Frames of a first clip: k + 1 of the embedder.")] = 17,
) -> None:
    """Write the captions of a dataset's first samples, as prompts for `regen generate --prompts`.

    Example: regen shards captions runs/shapes/held_out --out runs/prompts.txt --number 200
    """
    from regen_dist.config.files import write_text_atomically
    from regen_dist.data.format.catalogue import open_dataset
    from regen_dist.errors import DataError

    dataset = open_dataset(url)
    found = list(islice(_captioned(dataset), number))
    if not found:
        raise DataError(f"{url}: no sample has a caption; build the dataset with captions, or give another")
    write_text_atomically(out, "".join(f"{caption}\n" for caption, _ in found))
    if first_frames is not None:
        _write_first_frames(dataset, [sample for _, sample in found], first_frames)
    if first_clips is not None:
        _write_first_clips(dataset, [sample for _, sample in found], first_clips, clip_frames)
    fewer = f" (fewer than the {number} that were asked for: no more samples have one)" if len(found) < number else ""
    typer.echo(f"{out}: {len(found)} captions of {url}{fewer}")


def _captioned(dataset: Dataset) -> Iterator[tuple[str, Sample]]:
    """Yield captions, each on one line, with their samples in dataset order; an index is read when its shard is
    reached."""
    from regen_dist.data.format.index import read_index, samples_of

    for shard in dataset.manifest.shards:
        table, _ = read_index(dataset.store.get(shard.index))
        for sample in samples_of(table):
            caption = " ".join((sample.caption or "").split())
            if caption:
                yield caption, sample


def _write_first_frames(dataset: Dataset, samples: list[Sample], folder: Path) -> None:
    from PIL import Image

    from regen_dist.data.video.conversion import frame_to_rgb
    from regen_dist.data.video.reader import VideoReader

    folder.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(samples):
        with VideoReader(dataset.read(sample)) as reader:
            _, frame = next(reader.frames([0]))
            Image.fromarray(frame_to_rgb(frame)).save(folder / f"{number:05d}.png")


def _write_first_clips(dataset: Dataset, samples: list[Sample], folder: Path, frames: int) -> None:
    """Write the first frames of each video as a video of its own, lossless but for the rounding of colours."""
    from regen_dist.data.video.conversion import frame_to_rgb
    from regen_dist.data.video.reader import VideoReader
    from regen_dist.errors import DataError
    from regen_dist.inference.frames import VideoWriter

    folder.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(samples):
        with VideoReader(dataset.read(sample)) as reader:
            length = len(reader.table.pts)
            if length < frames:
                raise DataError(f"{sample.name} has {length} frames, fewer than the {frames} of --clip-frames")
            with VideoWriter(folder / f"{number:05d}.mp4", reader.rate, crf=0) as writer:
                for _, frame in reader.frames(range(frames)):
                    writer.write(frame_to_rgb(frame))


# `regen shards order`: the data order of a run.


def order(
    config: Annotated[Path, typer.Argument(help="A run's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Config overrides, as a.b=value.")] = None,
    step: Annotated[
        int | None, typer.Option(min=1, help="List the samples of this step, counted from 1 as in metrics.jsonl.")
    ] = None,
) -> None:
    """Show the buckets and shares of a run's data, or the samples of one step, without reading a video or a latent.

    Example: regen shards order configs/embedder/nano.yaml data.url=runs/shards --step 100
    """
    from regen_dist.config import load_config

    data = _opened(load_config(config, overrides or []))
    if step is None:
        _buckets(data).show()
    else:
        typer.echo(_batch(data, step))


def _opened(config: AnyRunConfig) -> SampleSet[Any]:
    from regen_dist.config import EmbedderConfig
    from regen_dist.data.loading.datasets import LatentSet, TrainingSet

    batch, seed = config.train.batch_global, config.train.seed
    if isinstance(config, EmbedderConfig):
        return TrainingSet(config.data, num_frames=config.model.num_frames, batch_global=batch, seed=seed)
    return LatentSet(config.data, batch_global=batch, seed=seed)


def _buckets(data: SampleSet[Any]) -> Table:
    rows = []
    for share in data.order.expected():
        height, width, frames = share.bucket
        rows.append(
            (
                f"{frames} x {height} x {width}",
                f"{share.samples}",
                f"{share.steps:.1%}",
                f"{share.samples_per_epoch / share.samples:.2f}" if share.samples else "",
                ", ".join(f"{part:.1%}" for part in share.datasets),
            )
        )
    columns = numbers("clip", "samples", "share of steps", "times an epoch", "by dataset")
    return Table(columns, rows, title=data.summary())


def _batch(data: SampleSet[Any], step: int) -> str:
    """Return one line per sample, as wide as it is: it is copied and searched, too."""
    batch = data.order.global_batch(step - 1)
    height, width, frames = batch.bucket
    rows = []
    for place, epoch in zip(data.places(batch), batch.epochs.tolist(), strict=True):
        dataset = data.datasets[place.dataset]
        sample = dataset.sample(place.row.row)
        rows.append((str(epoch), str(sample.id), sample.key, sample.shard, dataset.store.url))
    table = Table([*numbers("epoch", "id"), "key", "shard", "dataset"], rows)
    return "\n".join([f"step {step}: {len(rows)} clips of {frames} x {height} x {width}", *table.to_lines()])


# `regen shards verify`: integrity of a dataset.

_REMEDIES = {
    "index": "copy the tars named again from where they came; remove the indices that are bad, or whose tars were "
    "changed on purpose, and run `regen shards index` again",
    "build": "remove the shards named, with their indices, and run the build again",
    "synthetic": "remove the shards named, with their indices, and run `regen shards synthetic` again",
    "latents": "remove the shards named, with their indices, and run `regen preencode` again",
}
_CHECKED: dict[Depth, str] = {
    "quick": "every object is there and has its size (no byte was read)",
    "bytes": "everything is as it was written",
    "deep": "everything is as it was written, and every frame decodes",
}
_UNPACKED = "everything is as it was written, and all latents unpack"


def verify(
    url: Annotated[str, typer.Argument(help="Folder or URL of a dataset.", metavar="URL")],
    quick: Annotated[bool, typer.Option("--quick", help="List the objects and compare sizes; read no shard.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Also decode every frame, or unpack all latents.")] = False,
    workers: Workers = None,
) -> None:
    """Verify every shard, index and sample against its checksum; list what is bad. Exit code 3 if anything is.

    Example: regen shards verify runs/shards --deep
    """
    from regen_dist.data.inspect.check import verify_dataset

    if quick and deep:
        raise typer.BadParameter("--quick and --deep exclude each other; give one of them")
    depth: Depth = "quick" if quick else "deep" if deep else "bytes"
    with progress_bar() as progress:
        result = verify_dataset(url, depth, workers=workers, progress=progress)
    for note in result.notes:
        typer.echo(f"Note: {note}")
    if result.bad:
        title = f"{counted(len(result.bad), 'problem')} in {url}; {_REMEDIES[result.manifest.kind]}:"
        raise DataError("\n".join([title, *result.bad]))
    totals = result.manifest.totals
    checked = _UNPACKED if depth == "deep" and result.manifest.kind == "latents" else _CHECKED[depth]
    typer.echo(f"{url}: {checked}: {counted(totals.samples, 'sample')} in {counted(totals.shards, 'shard')}")
