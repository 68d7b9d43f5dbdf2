"""What is trained on: moving shapes, and their cache by an embedder and a text encoder of fresh weights, which are as
fast as trained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from regen_dist.checkpoint.export import MODEL_FILE, write_model
from regen_dist.config.exported import EXPORT_CONFIG_FILE, ExportConfig
from regen_dist.config.files import write_text_atomically
from regen_dist.config.preencode import PreencodeConfig
from regen_dist.config.schema import RunConfig
from regen_dist.config.text import TextConfig
from regen_dist.data.dataset.catalogue import open_dataset
from regen_dist.data.making.moving_shapes import SyntheticOptions
from regen_dist.data.making.synthetic import build_synthetic
from regen_dist.inference.preencode import preencode
from regen_dist.models import build_model
from regen_dist.models.text import make_small_encoder

_SAMPLES_PER_SHARD, _BATCH_CLIPS, _MAX_TOKENS = 64, 16, 64


class Prepared(NamedTuple):
    """Folders of the videos, of their cache, and of the exported embedder that made it; and what to say of them: bytes,
    and the speed of pre-encoding."""

    videos: Path
    cache: Path
    embedder: Path
    facts: dict[str, Any]


def prepare(work: Path, embedder: RunConfig, *, videos: int, side: int, clips: int, text_width: int) -> Prepared:
    """Make videos and cache in an empty folder.

    Args:
        work: where to.
        embedder: its config; the weights are drawn.
        videos: how many.
        side: of a video, in pixels: a multiple of 16.
        clips: of a video, which has no frame more.
        text_width: of the captions' embeddings.

    Raises:
        DataError: there are no such videos.
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
    done = preencode(_preencoding(paths, work / "text"))
    assert done.manifest is not None, "one task makes all shards"
    facts = {"videos": videos, "frames": frames, "side": side, "cache_bytes": done.manifest.totals.bytes}
    return paths._replace(facts=facts | done.manifest.options["sizes"] | {"preencoded_per_s": done.clips_per_s})


def _preencoding(paths: Prepared, text: Path) -> PreencodeConfig:
    return PreencodeConfig(
        embedder=str(paths.embedder), data=str(paths.videos), output=str(paths.cache),
        text=TextConfig(encoder=str(text), max_tokens=_MAX_TOKENS), batch_clips=_BATCH_CLIPS,
    )  # fmt: skip


def _write_embedder(config: RunConfig, folder: Path) -> None:
    """An exported model of fresh weights."""
    folder.mkdir()
    torch.manual_seed(config.train.seed)
    weights = {name: param.detach() for name, param in build_model(config.model).named_parameters()}
    write_model(folder / MODEL_FILE, weights, "float32")
    write_text_atomically(folder / EXPORT_CONFIG_FILE, ExportConfig.of(config).to_yaml())
