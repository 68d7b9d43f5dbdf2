"""The Fréchet distance between two sets of features, each taken as a Gaussian (Dowson and Landau, 1982)."""

from __future__ import annotations

import torch
from torch import Tensor

from regen_dist.errors import DataError


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)), with A and B the covariances.

    With fewer samples than features the covariances have no full rank and the distance comes out too high, the more so
    the fewer there are: compare distances of equally many samples alone. The root is never formed: with A = X'X and
    B = Y'Y its trace is the sum of the singular values of X Y'.

    Args:
        a, b: features [N, D], at least two of each.

    Raises:
        DataError: a set has fewer than two.
    """
    if min(len(a), len(b)) < 2:
        raise DataError(f"a Fréchet distance takes at least two features a set, found {len(a)} and {len(b)}")
    (mean_a, x), (mean_b, y) = _centred(a), _centred(b)
    root = torch.linalg.svdvals(x @ y.T).sum()
    distance = (mean_a - mean_b).square().sum() + x.square().sum() + y.square().sum() - 2 * root
    return max(0.0, float(distance))


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D], and X [N, D] with X'X the covariance, in float64."""
    features = features.double()
    mean = features.mean(0)
    return mean, (features - mean) / (len(features) - 1) ** 0.5
