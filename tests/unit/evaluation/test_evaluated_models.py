"""Costs of the models that are compared."""

from __future__ import annotations

from pathlib import Path

from regen_dist.evaluation.evaluated_models import load_models
from tests.helpers.autoencoders import frozen_model, save_autoencoder
from tests.helpers.saved import saved_run


def test_a_frozen_encoder_is_not_counted_as_free(tmp_path: Path) -> None:
    """Its operations are unknown, not 0; those of our own encoder, and of either decoder, are counted."""
    frozen = saved_run(tmp_path / "frozen", model=frozen_model("wan", save_autoencoder("wan", tmp_path / "vae")))
    own = saved_run(tmp_path / "own")
    given = [f"frozen={frozen.folder}", f"own={own.folder}"]
    first, second = (load() for load in load_models(given, steps=1, clip_frames=9, baselines=False))
    found = first.flops(32, 32)
    assert found is not None
    assert found[0] is None
    assert found[1] > 0
    assert all(second.flops(32, 32) or (None,))
