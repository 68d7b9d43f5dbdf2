"""Embeddings of a shard's captions, each once while it is held."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regen_dist.inference import preencode
from regen_dist.inference.preencode import Captions
from tests.helpers.preencoding import StandInText


def test_embeddings_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preencode, "_TOGETHER", 2)
    monkeypatch.setattr(preencode, "_MAX_EMBEDDINGS", 3)
    asked = ["a", "b", "a", "", None, "c", "d", "e", "a"]
    encoder: Any = StandInText()
    held = Captions(encoder, asked, encoder.null().bfloat16())
    for caption in asked:
        expected = encoder.encode([caption])[0] if caption else encoder.null()
        encoder.asked.pop() if caption else None
        assert torch.equal(held.embedding(caption), expected.bfloat16())
        assert len(held._embeddings) <= 3
    assert encoder.asked == ["a", "b", "c", "d", "e", "a", "b"]
