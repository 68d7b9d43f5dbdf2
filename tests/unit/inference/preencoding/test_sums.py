"""What is counted over the entries of a cache."""

from __future__ import annotations

import pytest
import torch

from regen_dist.data.storage.store import Store
from regen_dist.errors import DataError
from regen_dist.inference.preencode import Sums, read_sums
from regen_dist.models.encoder import Latents


def test_sums_survive_their_file() -> None:
    """Bit for bit, in whatever parts they are read back and added; damage is told."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        Sums.of(Latents(*torch.randn(2, n, 8, 4, 4, generator=generator).bfloat16()), left_out=n) for n in (1, 2, 3)
    ]
    parts.insert(1, Sums.of(Latents(torch.ones(1, 8, 4, 4), torch.ones(0, 8, 4, 4)), left_out=5))
    store = Store("unused")
    total, again = Sums(), Sums()
    for part in parts:
        total, again = total + part, again + read_sums(store, "latents-000000", part.to_bytes())
    assert again.to_bytes() == total.to_bytes()
    assert total.frames_left_out == 11
    assert total.clips is not None
    assert total.images is not None
    assert (total.clips.num_clips, total.images.num_clips) == (6, 4)
    assert Sums().to_bytes() == read_sums(store, "latents-000000", Sums().to_bytes()).to_bytes()
    with pytest.raises(DataError, match=r"latents-000000\.statistics\.json: damaged"):
        read_sums(store, "latents-000000", b"{}")
