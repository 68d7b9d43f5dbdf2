"""Text-to-video runs as if trained, made in a moment: checkpoint, latent space, embedder and text encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.config import EmbedderConfig, T2VConfig, config_hash, save_config
from regen_dist.config.t2v import TextConfig
from regen_dist.data.format.latents import TextEmbedding
from regen_dist.inference.encoder import FrozenEncoder
from regen_dist.inference.generate import as_in_cache
from regen_dist.inference.latent_space import LatentSpace, LatentSpread, LatentStatistics
from regen_dist.models.encoder import Latents
from regen_dist.models.text import TextEncoder, make_small_encoder
from tests.helpers.checkpoints import model_state, save_checkpoint, saved_run
from tests.helpers.latents import write_cache
from tests.helpers.preencoding import StandInText
from tests.helpers.tiny import tiny_t2v

CPU = torch.device("cpu")
CHANNELS, FPS = 8, 8.0


class WordEncoder(StandInText):
    """A text encoder without a model, that takes up to seven words."""

    def cuts(self, caption: str) -> bool:
        """More than eight tokens, the end of the sentence included."""
        return len(caption.split()) > 7


def latent_space(
    embedder: EmbedderConfig | None = None, *, images: bool = True, buckets: tuple[tuple[int, int], ...] = ((32, 32),)
) -> LatentSpace:
    """The space of a cache that a trained embedder and a `WordEncoder` would have made."""
    encoder = {} if embedder is None else FrozenEncoder.load(embedder.folder, device=CPU).facts()
    facts = {
        "fingerprint": "cache",
        "num_frames": 5,
        "channels": CHANNELS,
        "fps": FPS,
        "encoder": encoder,
        "preprocessing": {"buckets": [list(size) for size in buckets], "stride": 1},
        "text": WordEncoder().facts(),
    }
    null = WordEncoder().null()
    return LatentSpace(facts, latent_statistics(images=images), TextEmbedding(null, torch.ones(1, dtype=torch.bool)))


def cache_for(embedder: EmbedderConfig, folder: Path, **options: Any) -> Path:
    """A cache of random latents (see `write_cache`) that says that a trained embedder and a `WordEncoder` made it."""
    write_cache(folder, **{"text_width": WordEncoder.width, **options})
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    encoder = FrozenEncoder.load(embedder.folder, device=CPU).facts()
    manifest["options"] |= {"encoder": encoder, "text": WordEncoder().facts()}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def latent_statistics(*, images: bool = True) -> LatentStatistics:
    """Of latents of which every channel, content, motion and images have a mean and a spread of their own."""
    generator = torch.Generator().manual_seed(0)

    def drawn(scale: float, mean: float) -> torch.Tensor:
        spread = torch.linspace(0.5, 1.5, CHANNELS)[:, None, None]
        return torch.randn(4, CHANNELS, 4, 4, generator=generator) * spread * scale + mean

    clips = LatentSpread.of(Latents(drawn(0.3, 0.2), drawn(0.2, -0.1)))
    still = LatentSpread.of(Latents(drawn(0.4, 0.1), drawn(0.0, 0.0)), images=True) if images else None
    return LatentStatistics(clips, still, {"dataset": "random numbers"})


def saved_t2v(output: Path, embedder: EmbedderConfig | None = None, *, step: int = 7, **changes: Any) -> T2VConfig:
    """A run of the tiny text-to-video model with one checkpoint of two ranks and its latent space."""
    config = tiny_t2v(output, **{"model__text_width": WordEncoder.width, **changes})
    save_config(config, config.folder)
    latent_space(embedder).write(config.folder)
    save_checkpoint(
        CheckpointFolder(config.checkpoints), step, model_state(config), ranks=2, digest=config_hash(config),
        metrics={"loss": 0.5},
    )  # fmt: skip
    return config


# A text-to-video run with its embedder and a text encoder of transformers, as if trained, made in a moment.


CAPTIONS = ("a small red circle moves left", "a large green square moves up", "a blue star stands still")
TEXT_WIDTH, MAX_TOKENS = 16, 6


class Parts(NamedTuple):
    """The runs, and the folder of the text encoder."""

    run: T2VConfig
    embedder: EmbedderConfig
    text: Path


def saved_parts(folder: Path, *, embedder: dict[str, Any] | None = None, **changes: Any) -> Parts:
    """All three, which belong together; captions are cut at six tokens."""
    codec = saved_run(folder / "runs", **(embedder or {}))
    make_small_encoder(CAPTIONS, folder / "t5", width=TEXT_WIDTH)
    run = saved_t2v(folder / "runs", codec, model__text_width=TEXT_WIDTH, **changes)
    encoder = TextEncoder.load(TextConfig(encoder=str(folder / "t5"), max_tokens=MAX_TOKENS))
    space = latent_space(codec)
    null = as_in_cache(encoder.null())
    embedding = TextEmbedding(null, torch.ones(len(null), dtype=torch.bool))
    LatentSpace({**space.facts, "text": encoder.facts()}, space.statistics, embedding).write(run.folder)
    return Parts(run, codec, folder / "t5")


SMALL_MODEL = {"blocks": 1, "heads": 2, "width": 16, "text_width": 16}


def t2v_run(output: Path, *urls: Path, **changes: Any) -> T2VConfig:
    """A text-to-video run on one cache or several; changes are sections, laid over its own."""
    sources = [{"url": str(url)} for url in urls]
    values: dict[str, Any] = {
        "name": "t2v",
        "output": str(output),
        "model": SMALL_MODEL,
        "data": {"url": str(urls[0])} if len(urls) == 1 else {"mixture": sources},
        "engine": {"kind": "plain", "precision": "fp32"},
        "train": {"steps": 8, "batch_global": 4},
    }
    merged = {name: {**values.get(name, {}), **section} for name, section in changes.items()}
    return T2VConfig.model_validate({**values, **merged})
