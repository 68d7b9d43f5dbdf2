"""The embedder that the package carries: small, whole, and better than the linear code that it began from."""

from __future__ import annotations

import torch

from regen_dist.inference.codec import PACKAGED_EMBEDDER, Codec
from regen_dist.models.embedder import Regen
from tests.helpers.video import moving_square

LARGEST_BYTES = 8_000_000


def test_the_packaged_embedder_beats_its_linear_code() -> None:
    assert (PACKAGED_EMBEDDER / "model.safetensors").stat().st_size <= LARGEST_BYTES
    codec = Codec.load(PACKAGED_EMBEDDER)
    assert isinstance(codec.model, Regen)
    assert codec.model.linear is not None
    clip = torch.from_numpy(moving_square(17)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    latents, times = codec.encode(clip), torch.arange(17)
    made = codec.decode(latents, times)
    linear = codec.model.linear(*(part.bfloat16() for part in latents), times[None].float())
    errors = [float((each.clamp(-1, 1) - clip).square().mean()) for each in (made, linear)]
    assert errors[0] < 0.8 * errors[1]


def test_its_card_names_the_film_and_its_licence() -> None:
    card = (PACKAGED_EMBEDDER / "README.md").read_text()
    assert "Big Buck Bunny" in card
    assert "CC BY 3.0" in card
