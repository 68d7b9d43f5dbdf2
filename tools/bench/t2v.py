"""`regen bench t2v`: cost and gain of training from a latent cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from regen_dist.checkpoint.export import MODEL_FILE, write_model
from regen_dist.config import EmbedderConfig, T2VConfig, config_hash, load_config, load_embedder_config
from regen_dist.config.exported import EXPORT_CONFIG_FILE, ExportConfig
from regen_dist.config.files import t2v_only, write_text_atomically
from regen_dist.config.preencode import PreencodeConfig
from regen_dist.config.t2v import TextConfig
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.latents import LatentEntry
from regen_dist.data.loading.clip_loader import ClipBatch, clip_batches
from regen_dist.data.loading.datasets import LatentSet, TrainingSet
from regen_dist.data.loading.latent_loader import LatentBatch, collate_latents, read_entry, row_of
from regen_dist.data.synthetic.dataset import build_synthetic
from regen_dist.data.synthetic.shapes import SyntheticOptions
from regen_dist.errors import DataError
from regen_dist.inference.encoder import FrozenEncoder
from regen_dist.inference.preencode import preencode
from regen_dist.models.embedder import build_model
from regen_dist.models.text import make_small_encoder
from regen_dist.pixels import to_float
from regen_dist.tables import Table, numbers
from tools import stages
from tools.bench.common import (
    Figure,
    Rounds,
    Turn,
    config_facts,
    in_turn,
    measured,
    opening_facts,
    ratio,
    split_arguments,
    spread_text,
    summary,
    turn_of,
    write_record,
)
from tools.shards.progress import stopping_cleanly

_KEPT_STEPS = 8  # whose batches are kept in memory

_CONFIG = Path("configs/t2v/nano.yaml")


def t2v(
    config: Annotated[Path, typer.Argument(help="What is trained.", metavar="[CONFIG]")] = _CONFIG,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, as a.b=value.", metavar="[a.b=c …]")
    ] = None,
    embedder: Annotated[Path, typer.Option(help="Config of the embedder that makes the cache.")] = Path(
        "configs/embedder/nano.yaml"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the JSON and the table.")] = Path("runs/bench/t2v"),
    videos: Annotated[int, typer.Option(help="Moving shapes that are trained on.", min=1)] = 256,
    side: Annotated[int, typer.Option(help="Of a video, in pixels: a multiple of 16.", min=32)] = 64,
    seconds: Annotated[float, typer.Option(help="Length of one turn.", min=0.0)] = 20.0,
    repeats: Annotated[int, typer.Option(help="Turns of each.", min=1)] = 3,
) -> None:
    """Measure training steps a second from a latent cache, beside the same model fed from memory, and beside training
    that encodes videos on the way. Takes five minutes on two cores.

    Rows are of the most clips that the config has, and none of images, so that all steps are alike.

    Example: regen bench t2v --seconds 10
    """
    from rich.console import Console

    console = Console(stderr=True)
    config, asked = split_arguments(config, overrides or [], _CONFIG)
    run, own = _run(config, asked)
    encoding, encoding_own = _embedder(embedder, run)
    facts = opening_facts() | config_facts(config, own, run)
    facts |= {"embedder": str(embedder), "embedder_overrides": encoding_own, "embedder_hash": config_hash(encoding)}
    facts |= {"batch": run.train.batch_global, "seconds": seconds, "repeats": repeats, "warm_steps": WARM_STEPS}
    out.mkdir(parents=True, exist_ok=True)
    with stopping_cleanly(continues=False), TemporaryDirectory(dir=out, prefix=".work-") as folder:
        clips, width = max(run.data.clips), run.model.text_width
        made = prepare(Path(folder), encoding, videos=videos, side=side, clips=clips, text_width=width)
        trained = _Training(run, made)
        console.print(f"measuring, {repeats} turns of {seconds:g} s each")
        facts["training"] = compare(
            trained.step, trained.take, trained.feeds(encoding, side), seconds=seconds, repeats=repeats,
            on_turn=lambda name, turn: console.print(f"  {name}: {turn.rate:.2f} steps/s"),
        )  # fmt: skip
        facts["data"] = made.facts | {"reads": "local folder, warm page cache", "text_bytes": trained.text_bytes}
    write_record(out, "t2v", facts, table(facts))


class _Training:
    """Task and engine of a run in this process, on a prepared cache."""

    def __init__(self, config: T2VConfig, made: Prepared) -> None:
        from regen_dist.distributed.ranks import Ranks
        from regen_dist.distributed.zero3 import build_engine
        from regen_dist.training.loop import Stepper
        from regen_dist.training.metrics import StepMeter
        from regen_dist.training.t2v import TextToVideoTask

        data = config.data.model_copy(update={"url": str(made.cache)})
        self._config = config.model_copy(update={"data": data, "output": str(made.cache.parent)})
        self._made, self._ranks = made, Ranks()
        self._task = TextToVideoTask(self._config, self._ranks.device)
        engine = build_engine(self._config, self._ranks, self._task.build)
        meter = StepMeter(self._ranks, config.train.batch_global, peak_tflops=1.0)  # its MFU is not asked for
        self._stepper = Stepper(self._config, self._ranks, self._task, engine, meter)
        self._stepper.close_batches()  # every turn has batches of its own
        self._texts = texts_of(self._task.data)

    def step(self, batches: Iterator[LatentBatch]) -> None:
        """Run the training loop's step on these batches and wait for the loss, as the loop does."""
        self._stepper.batches = batches
        self._stepper.train_step()
        self._stepper.meter.end_step()

    def take(self, batches: Iterator[LatentBatch]) -> None:
        """Take the batches of a step without computing it."""
        for _ in range(self._config.train.accumulation):
            next(batches)

    def feeds(self, embedder: EmbedderConfig, side: int) -> dict[str, Feed]:
        """Return the sources of batches by name."""
        train, accumulation = self._config.train, self._config.train.accumulation
        encoder = FrozenEncoder.load(self._made.embedder, device=self._ranks.device)
        held = kept(self._task.batches(self._ranks, 0), _KEPT_STEPS * accumulation)
        source = embedder.data.model_copy(update={"url": str(self._made.videos), "size": (side, side), "buckets": ()})
        num_frames = max(self._config.data.clips) * encoder.num_frames
        videos = TrainingSet(source, num_frames=num_frames, batch_global=train.batch_global, seed=train.seed)
        return {
            MEMORY: lambda: over_and_over(held),
            CACHE: lambda: self._task.batches(self._ranks, 0),
            ENCODER: lambda: encoding(videos, encoder, self._texts, accumulation=accumulation),
        }

    @property
    def text_bytes(self) -> int:
        """Return the bytes of all caption embeddings in the cache."""
        return sum(text.nbytes for text, _ in self._texts.values())


def _run(config: Path, asked: Sequence[str]) -> tuple[T2VConfig, list[str]]:
    """Return the config and overrides of the training: one process, uniform rows."""
    own = [f"engine.precision={stages.working_precision()}", *asked, "engine.kind=plain", "data.image_fraction=0"]
    own += ["data.validation_url=null", "generation.embedder=null"]
    rows = max(t2v_only(load_config(config, own), str(config)).data.clips)
    own.append(f"data.clips=[{rows}]")
    return t2v_only(load_config(config, own), str(config)), own


def _embedder(config: Path, run: T2VConfig) -> tuple[EmbedderConfig, list[str]]:
    """Return the config and overrides of the embedder that makes a run's cache."""
    own = [f"model.latent.channels={run.model.latent_channels}", f"engine.precision={run.engine.precision}"]
    own += ["data.image_fraction=0", "data.stride=[1]", "data.flip=false", "data.validation_url=null"]
    return load_embedder_config(config, own), own


# Alternative sources of a training step's batches: memory, or videos encoded on the fly.
#
# Legend: b rows, n clips in a row, k+1 frames of a clip, C channels, h x w latent cells, L tokens, D their width.

Text = tuple[Tensor, Tensor]  # a caption's embedding [L, D] and its mask [L], as a cache holds them


def kept(batches: Generator[LatentBatch], number: int) -> list[LatentBatch]:
    """Return the first batches, in memory."""
    try:
        return list(islice(batches, number))
    finally:
        batches.close()


def over_and_over(batches: Sequence[LatentBatch]) -> Generator[LatentBatch]:
    """Yield batches from memory endlessly."""
    yield from cycle(batches)


def texts_of(data: LatentSet) -> dict[int, Text]:
    """Return the embedding of every caption of a cache by sample id, which is that of its video.

    Raises:
        DataError: an entry is damaged, or has no text.
    """
    (dataset,) = data.datasets
    texts = {}
    for row in map(dataset.row, range(len(dataset))):
        entry = read_entry(data.facts, row, dataset.read(row))
        if entry.text is None or entry.mask is None:
            raise DataError(f"{data.facts.url}: an entry without text; encode the captions too (`regen preencode`)")
        texts[row.id] = entry.text, entry.mask
    return texts


def encoding(
    data: TrainingSet, encoder: FrozenEncoder, texts: Mapping[int, Text], *, accumulation: int
) -> Generator[LatentBatch]:
    """Yield rows of clips of the videos, decoded by worker processes and encoded on demand."""
    batches = clip_batches(data, accumulation=accumulation, rank=0, world_size=1, cursor=0)
    try:
        for batch in batches:
            yield _encoded(batch, encoder, texts)
    finally:
        batches.close()


def _encoded(batch: ClipBatch, encoder: FrozenEncoder, texts: Mapping[int, Text]) -> LatentBatch:
    rows = len(batch.sample_ids)
    clips = _clips(to_float(batch.video.to(encoder.device)), encoder.num_frames)
    content, motion = (each.unflatten(0, (rows, -1)).float() for each in encoder.encode(clips))  # [b, n, C, h, w]
    found = [texts[number] for number in batch.sample_ids.tolist()]
    entries = [LatentEntry(c, m, text, mask) for c, m, (text, mask) in zip(content, motion, found, strict=True)]
    return collate_latents([row_of(entry, 0, entry.clips) for entry in entries], batch.sample_ids)._replace(
        epochs=batch.epochs, bad=batch.bad, num_replaced=batch.num_replaced, problem=batch.problem
    )


def _clips(video: Tensor, num_frames: int) -> Tensor:
    """Reshape rows of clips [b, 3, n*(k+1), H, W] to clips [b*n, 3, k+1, H, W]."""
    clips: Tensor = video.unflatten(2, (-1, num_frames))  # [b, 3, n, k+1, H, W]
    return clips.transpose(1, 2).flatten(0, 1)


# Training data: moving shapes, and their cache by a randomly initialised embedder and text encoder, which are as fast
# as trained ones.

_SAMPLES_PER_SHARD, _BATCH_CLIPS, _MAX_TOKENS = 64, 16, 64


class Prepared(NamedTuple):
    """Folders of the videos, their cache, and the exported embedder that made it; with sizes in bytes and the speed of
    pre-encoding."""

    videos: Path
    cache: Path
    embedder: Path
    facts: dict[str, Any]


def prepare(work: Path, embedder: EmbedderConfig, *, videos: int, side: int, clips: int, text_width: int) -> Prepared:
    """Make videos and cache in an empty folder.

    Args:
        work: target folder.
        embedder: config of the embedder, whose weights are random.
        videos: number of videos.
        side: height and width of a video in pixels: a multiple of 16.
        clips: clips per video, without further frames.
        text_width: width of the caption embeddings.

    Raises:
        DataError: such videos cannot be generated.
    """
    paths = Prepared(work / "videos", work / "latents", work / "embedder", {})
    frames = clips * embedder.model.num_frames
    build_synthetic(
        paths.videos,
        SyntheticOptions(videos, seed=0, side=side, frames=frames, samples_per_shard=_SAMPLES_PER_SHARD),
        workers=0,
    )
    _write_embedder(embedder, paths.embedder)
    captions = open_dataset(paths.videos).table()["caption"].to_pylist()
    make_small_encoder(captions, work / "text", width=text_width)
    text = TextConfig(encoder=str(work / "text"), max_tokens=_MAX_TOKENS)
    places: dict[str, Any] = {"embedder": str(paths.embedder), "data": str(paths.videos), "output": str(paths.cache)}
    done = preencode(PreencodeConfig(**places, text=text, batch_clips=_BATCH_CLIPS))
    assert done.manifest is not None, "one task makes all shards"
    facts = {"videos": videos, "frames": frames, "side": side, "cache_bytes": done.manifest.totals.bytes}
    return paths._replace(facts=facts | done.manifest.options["sizes"] | {"preencoded_per_s": done.clips_per_s})


def _write_embedder(config: EmbedderConfig, folder: Path) -> None:
    """An exported model of fresh weights."""
    folder.mkdir()
    torch.manual_seed(config.train.seed)
    weights = {name: param.detach() for name, param in build_model(config.model).named_parameters()}
    write_model(folder / MODEL_FILE, weights, "float32")
    write_text_atomically(folder / EXPORT_CONFIG_FILE, ExportConfig.of(config).to_yaml())


# Training steps per second by where the batches come from, in turn.

CACHE, MEMORY, ENCODER = "latent cache", "the same batches, from memory", "videos, encoded in the loop"
READER = "latent cache, read and let go"
CACHE_TARGET = 0.95
WARM_STEPS = 4  # of each turn, before the clock starts: what was read ahead until then is used up
_TICK_S = 0.01  # no CPU time is known better

TakeStep = Callable[[Iterator[LatentBatch]], None]  # one optimizer step on the batches that come next
Feed = Callable[[], Generator[LatentBatch]]  # begins anew, without end


def compare(
    step: TakeStep, take: TakeStep, feeds: Mapping[str, Feed], *, seconds: float, repeats: int,
    on_turn: Callable[[str, Turn], None],
) -> dict[str, Any]:  # fmt: skip
    """Measure steps per second of every feed in turn, with the ratios that express cost and gain of a cache; and the
    speed of the cache's reader alone.

    Args:
        step: consumes batches.
        take: takes the batches of a step without computing.
        feeds: named `CACHE`, `MEMORY` and `ENCODER`.
        seconds: minimum duration of a turn.
        repeats: turns of each.
        on_turn: called after each turn.
    """
    wanted = {name: (step, feed) for name, feed in feeds.items()} | {READER: (take, feeds[CACHE])}
    cases = {
        name: lambda run=run, feed=feed: steps_per_second(run, feed(), seconds) for name, (run, feed) in wanted.items()
    }
    return section(in_turn(cases, repeats, on_turn))


def section(rounds: Rounds) -> dict[str, Any]:
    """Combine the figures of all turns. `by_cpu` are ratios of steps per second of CPU time over all threads and
    workers, which vary less on a shared machine and include work on other cores."""
    cpu = {name: [by_cpu(turn) for turn in turns] for name, turns in rounds.items()}
    return {
        "unit": "steps",
        "cases": {name: {**summary(turns), "turns": [turn.rate for turn in turns]} for name, turns in rounds.items()},
        "ratios": _against(rounds),
        "by_cpu": _against(cpu),
        "target": CACHE_TARGET,
    }


def by_cpu(turn: Turn) -> Turn:
    """Return the turn with its CPU time as its duration."""
    return Turn(turn.amount, max(turn.facts["own_cpu_s"], _TICK_S), turn.facts)


def _against(rounds: Rounds) -> dict[str, Any]:
    return {other: ratio(rounds[CACHE], rounds[other]) for other in (MEMORY, ENCODER)}


def steps_per_second(step: TakeStep, batches: Generator[LatentBatch], seconds: float) -> Turn:
    """Measure steps per second after a warm-up; `data_wait` is the share of time spent waiting for batches. Closes the
    batches."""
    timed = _Timed(batches)
    try:
        for _ in range(WARM_STEPS):
            step(timed)
        timed.waited_s, steps = 0.0, 0
        with measured(None) as costs:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end or not steps:
                step(timed)
                steps += 1
    finally:
        batches.close()
    return turn_of(steps, costs, data_wait=timed.waited_s / costs["seconds"])


class _Timed(Iterator[LatentBatch]):
    """Batches with the total time spent waiting for them."""

    def __init__(self, batches: Iterator[LatentBatch]) -> None:
        self._batches, self.waited_s = batches, 0.0

    def __next__(self) -> LatentBatch:
        begun = time.perf_counter()
        batch = next(self._batches)
        self.waited_s += time.perf_counter() - begun
        return batch


# Figures of `regen bench t2v` as Markdown tables.


def table(facts: Mapping[str, Any]) -> str:
    """Format speeds, then sizes."""
    speeds = Table(
        [
            "training from",
            *numbers(
                "steps/s (lowest to highest)", "waits for batches", "the cache's speed against it", "by CPU time",
                "target",
            ),
        ],
        list(_speeds(facts["training"])),
    )  # fmt: skip
    sizes = Table(["on disk", *numbers("bytes", "of the videos")], list(_sizes(facts["data"])))
    return f"{speeds.to_markdown()}\n{sizes.to_markdown()}"


def _speeds(section: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for name, case in section["cases"].items():
        against = [spread_text(found) if (found := section[kind].get(name)) else "" for kind in ("ratios", "by_cpu")]
        target = f"≥ {section['target']:g}" if name == MEMORY else ""
        waits = f"{case['data_wait']:.1%}" if name != READER else ""
        yield name, spread_text(case["per_s"]), waits, *against, target


def _sizes(data: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    videos = data["source_bytes"]
    parts = {
        f"{data['videos']} videos of {data['frames']} frames of {data['side']}x{data['side']}": videos,
        "their pixels": data["pixel_bytes"],
        CACHE: data["cache_bytes"],
        "text embeddings in it": data["text_bytes"],
    }
    for name, size in parts.items():
        yield name, f"{size:,}", f"{size / videos:.2f}"


def t2v_figures(facts: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield the figures by which two records are compared. Ratios within a round vary less than rates."""
    for name, case in facts["training"]["cases"].items():
        yield Figure(f"{name}, steps/s", case["per_s"]["median"], True, noise=0.25)
    for name, found in facts["training"]["by_cpu"].items():
        yield Figure(f"latent cache against {name}, by CPU time", found["median"], True)
    yield Figure("bytes of the cache", facts["data"]["cache_bytes"], False, noise=0.01)
