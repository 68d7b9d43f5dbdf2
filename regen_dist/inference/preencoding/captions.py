"""Text embeddings of the captions of one shard.

Legend: L tokens, D their width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor

from regen_dist.errors import CheckpointError
from regen_dist.models.text import TextEncoder

_TOGETHER = 32  # captions that are handed to the encoder
_HELD = 1024  # embeddings that are kept for captions that come again: 2 GB at 256 tokens of width 4096


class Captions:
    """Embeds captions a few ahead of their use, each once while it is held.

    Args:
        encoder: embeds them, each as if it were alone.
        captions: those that will be asked for, in that order.
        null: the embedding of the empty caption [L, D], for videos that have none.
    """

    def __init__(self, encoder: TextEncoder, captions: Iterable[str | None], null: Tensor) -> None:
        self._encoder, self._null = encoder, null
        self._captions = list(dict.fromkeys(caption for caption in captions if caption))
        self._places = {caption: place for place, caption in enumerate(self._captions)}
        self._held: OrderedDict[str, Tensor] = OrderedDict()

    def embedding(self, caption: str | None) -> Tensor:
        """Of one of the captions: bf16 [L, D] on the CPU."""
        if not caption:
            return self._null
        if caption not in self._held:
            self._embed(self._places[caption])
        return self._held[caption]

    def _embed(self, place: int) -> None:
        some = self._captions[place : place + _TOGETHER]
        for caption, text in zip(some, self._encoder.encode(some), strict=True):
            self._held[caption] = as_stored(text)
        while len(self._held) > _HELD:
            self._held.popitem(last=False)


def as_stored(text: Tensor) -> Tensor:
    """An embedding as a cache holds it; CheckpointError where it is not finite."""
    stored = text.detach().to("cpu", torch.bfloat16)
    if not bool(torch.isfinite(stored).all()):
        raise CheckpointError("the text encoder gives embeddings that are not finite; its weights are broken")
    return stored
