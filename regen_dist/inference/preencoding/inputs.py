"""What a cache is made of, opened: videos, the embedder's encoder, the text encoder."""

from __future__ import annotations

from typing import Any, NamedTuple

from regen_dist.config.preencode import PreencodeConfig
from regen_dist.data.dataset.catalogue import Dataset, open_dataset
from regen_dist.data.dataset.index import read_index
from regen_dist.data.dataset.manifest import only_videos, read_all
from regen_dist.data.objects.store import limits_of
from regen_dist.errors import DataError
from regen_dist.inference.encoder import FrozenEncoder
from regen_dist.inference.preencoding.identity import cache_identity
from regen_dist.models.text import TextEncoder


class Inputs(NamedTuple):
    """The parts, and the identity of a cache that follows from them. `text` is None for a cache without text."""

    dataset: Dataset
    encoder: FrozenEncoder
    text: TextEncoder | None
    identity: dict[str, Any]


def open_inputs(config: PreencodeConfig) -> Inputs:
    """Open what a config names.

    Raises:
        DataError: the videos cannot be read, or none has a caption though text is asked for.
        CheckpointError: the embedder has no usable checkpoint.
        ConfigError: the embedder is none; the text encoder cannot be loaded.
    """
    dataset = open_dataset(config.data, config.read.cache, limits_of(config.read))
    only_videos(dataset.manifest, dataset.store.url)
    if config.text is not None:
        _check_captions(dataset)
    encoder = FrozenEncoder.load(config.embedder, config.weights)
    text = None if config.text is None else TextEncoder.load(config.text, encoder.device)
    return Inputs(dataset, encoder, text, cache_identity(config, dataset, encoder, text))


def _check_captions(dataset: Dataset) -> None:
    """Some videos may have none: they get the embedding of the empty caption."""
    indices = [entry.index for entry in dataset.manifest.shards]
    if not any(any(read_index(data)[0]["caption"].to_pylist()) for _, data in read_all(dataset.store, indices)):
        raise DataError(
            f"{dataset.store.url}: no video has a caption; build the dataset with captions (`regen shards build "
            "--captions LIST`), or set text=null for a cache without text"
        )
