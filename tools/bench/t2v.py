"""`regen bench t2v`: what training from a latent cache costs, and what it saves."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regen_dist.jsontext import json_text
from tools import stages
from tools.shards.stopping import stopping_cleanly

if TYPE_CHECKING:
    from regen_dist.config import RunConfig, T2VConfig
    from regen_dist.data.reading.latent_batches import LatentBatch
    from regen_dist.evaluation.t2v_speed.prepare import Prepared
    from regen_dist.evaluation.t2v_speed.suite import Feed

_KEPT_STEPS = 8  # whose batches are kept in memory


def t2v(
    config: Annotated[Path, typer.Argument(help="What is trained.")] = Path("configs/t2v/nano.yaml"),
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, as a.b=value.")] = None,
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

    from regen_dist.config import config_hash
    from regen_dist.evaluation.t2v_speed.prepare import prepare
    from regen_dist.evaluation.t2v_speed.report import table
    from regen_dist.evaluation.t2v_speed.suite import WARM_STEPS, compare
    from regen_dist.observe.hardware import describe_machine

    console, asked = Console(stderr=True), overrides or []
    run, own = _run(config, asked)
    encoding, encoding_own = _embedder(embedder, run)
    facts: dict[str, Any] = {"command": " ".join(["regen", *sys.argv[1:]]), "machine": describe_machine()}
    facts |= {"load_before": os.getloadavg(), "config": str(config), "overrides": own, "config_hash": config_hash(run)}
    facts |= {"embedder": str(embedder), "embedder_overrides": encoding_own, "embedder_hash": config_hash(encoding)}
    facts |= {"batch": run.train.batch_global, "seconds": seconds, "repeats": repeats, "warm_steps": WARM_STEPS}
    out.mkdir(parents=True, exist_ok=True)
    with stopping_cleanly(), TemporaryDirectory(dir=out, prefix=".work-") as folder:
        clips, width = max(run.data.clips), run.model.text_width
        made = prepare(Path(folder), encoding, videos=videos, side=side, clips=clips, text_width=width)
        trained = _Training(run, made)
        console.print(f"measuring, {repeats} turns of {seconds:g} s each")
        facts["training"] = compare(
            trained.step, trained.take, trained.feeds(encoding, side), seconds=seconds, repeats=repeats,
            told=lambda name, turn: console.print(f"  {name}: {turn.rate:.2f} steps/s"),
        )  # fmt: skip
        facts["data"] = made.facts | {"reads": "local folder, warm page cache", "text_bytes": trained.text_bytes}
    facts["load_after"] = os.getloadavg()
    (out / "t2v.json").write_text(json_text(facts, indent=1) + "\n", encoding="utf-8")
    (out / "t2v.md").write_text(table(facts), encoding="utf-8")
    print(table(facts))
    console.print(f"written: {out / 't2v.json'}, {out / 't2v.md'}")


class _Training:
    """The task and the engine of a run in this process, on a cache that was prepared."""

    def __init__(self, config: T2VConfig, made: Prepared) -> None:
        from regen_dist.distributed.engine import build_engine
        from regen_dist.distributed.ranks import Ranks
        from regen_dist.evaluation.t2v_speed.feeding import texts_of
        from regen_dist.training.meter import Meter
        from regen_dist.training.step import Stepper
        from regen_dist.training.t2v import TextToVideoTask

        data = config.data.model_copy(update={"url": str(made.cache)})
        self._config = config.model_copy(update={"data": data, "output": str(made.cache.parent)})
        self._made, self._ranks = made, Ranks()
        self._task = TextToVideoTask(self._config, self._ranks.device)
        engine = build_engine(self._config, self._ranks, self._task.build)
        meter = Meter(self._ranks, config.train.batch_global, peak_tflops=1.0)  # its MFU is not asked for
        self._stepper = Stepper(self._config, self._ranks, self._task, engine, meter)
        self._stepper.close_batches()  # every turn has batches of its own
        self._texts = texts_of(self._task.data)

    def step(self, batches: Iterator[LatentBatch]) -> None:
        """The loop's own step on these batches; the loss is waited for, as the loop does."""
        self._stepper.batches = batches
        self._stepper.train_step()
        self._stepper.meter.end_step()

    def take(self, batches: Iterator[LatentBatch]) -> None:
        """The batches of a step, which is not made."""
        for _ in range(self._config.train.accumulation):
            next(batches)

    def feeds(self, embedder: RunConfig, side: int) -> dict[str, Feed]:
        """Where batches come from."""
        from regen_dist.data.reading.training_set import TrainingSet
        from regen_dist.evaluation.t2v_speed.feeding import encoding, kept, over_and_over
        from regen_dist.evaluation.t2v_speed.suite import CACHE, ENCODER, MEMORY
        from regen_dist.inference.encoder import FrozenEncoder

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
        """Of all captions' embeddings in the cache."""
        return sum(text.nbytes for text, _ in self._texts.values())


def _run(config: Path, asked: Sequence[str]) -> tuple[T2VConfig, list[str]]:
    """What is trained, and the changes to its config: in one process, of rows that are alike."""
    from regen_dist.config import load_config
    from regen_dist.config.loading import t2v_only

    own = [f"engine.precision={stages.working_precision()}", *asked, "engine.kind=plain", "data.image_fraction=0"]
    own += ["data.validation_url=null", "generation.embedder=null"]
    rows = max(t2v_only(load_config(config, own), str(config)).data.clips)
    own.append(f"data.clips=[{rows}]")
    return t2v_only(load_config(config, own), str(config)), own


def _embedder(config: Path, run: T2VConfig) -> tuple[RunConfig, list[str]]:
    """What makes the cache of a run."""
    from regen_dist.config import load_embedder_config

    own = [f"model.latent.channels={run.model.latent_channels}", f"engine.precision={run.engine.precision}"]
    own += ["data.image_fraction=0", "data.stride=[1]", "data.flip=false", "data.validation_url=null"]
    return load_embedder_config(config, own), own
