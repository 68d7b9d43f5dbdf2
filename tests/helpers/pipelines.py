"""A text-to-video run with its embedder and a text encoder of transformers, as if trained, made in a moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from regen_dist.config import RunConfig, T2VConfig
from regen_dist.config.t2v import TextConfig
from regen_dist.data.format.latents import TextEmbedding
from regen_dist.inference.generate import as_in_cache
from regen_dist.inference.latent_space import LatentSpace
from regen_dist.models.text import TextEncoder, make_small_encoder
from tests.helpers.saved import saved_run
from tests.helpers.t2v import latent_space, saved_t2v

CAPTIONS = ("a small red circle moves left", "a large green square moves up", "a blue star stands still")
TEXT_WIDTH, MAX_TOKENS = 16, 6


class Parts(NamedTuple):
    """The runs, and the folder of the text encoder."""

    run: T2VConfig
    embedder: RunConfig
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
