"""Retention of checkpoints: what is kept, and what is deleted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from regen_dist.checkpoint.manifest import CheckpointManifest
from regen_dist.checkpoint.retention import to_delete
from regen_dist.config.run import CheckpointConfig


def _manifest(step: int, psnr: float | None = None, rollbacks: Sequence[int] = ()) -> CheckpointManifest:
    return CheckpointManifest(
        step=step, samples=0, config_hash="", version="", topology={"world_size": 1}, state={},
        metrics={} if psnr is None else {"psnr_db": psnr}, rollbacks=list(rollbacks), shapes={},
    )  # fmt: skip


RUN = [_manifest(step, psnr) for step, psnr in [(10, 20.0), (20, 25.0), (30, 22.0), (40, float("nan")), (50, None)]]


def _kept(
    run: Sequence[CheckpointManifest], newest: CheckpointManifest | None = None, bad: Sequence[int] = (), **policy: Any
) -> list[int]:
    pinned = policy.pop("pinned", set())
    deleted = to_delete(
        run, newest or run[-1], CheckpointConfig(**policy), pinned=pinned, is_good=lambda each: each.step not in bad
    )
    return sorted({each.step for each in run} - set(deleted))


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ({"keep_last": 2}, [40, 50]),
        ({"keep_last": 3}, [30, 40, 50]),
        ({"keep_last": 9}, [10, 20, 30, 40, 50]),
        ({"keep_last": 2, "keep_every": 20}, [20, 40, 50]),
        ({"keep_last": 2, "keep_best": 1}, [20, 40, 50]),
        ({"keep_last": 2, "keep_best": 2}, [20, 30, 40, 50]),
        ({"keep_last": 2, "keep_best": 1, "best_is": "min"}, [10, 40, 50]),
        ({"keep_last": 2, "keep_best": 1, "best_metric": "other"}, [40, 50]),
        ({"keep_last": 2, "pinned": {10}}, [10, 40, 50]),
    ],
)
def test_policies(policy: dict[str, Any], kept: list[int]) -> None:
    """The last, every n-th, the best, and pinned ones; together, where several are asked for."""
    assert _kept(RUN, **policy) == kept


def test_the_best_is_the_one_that_was_measured() -> None:
    """Later checkpoints have the figures of the newest validation, too, until the next one."""
    run = [_manifest(step, psnr) for step, psnr in [(10, 20.0), (20, 25.0), (30, 25.0), (40, 25.0), (50, 22.0)]]
    run += [_manifest(60, 22.0), _manifest(70, 22.0)]
    assert _kept(run, keep_last=2, keep_best=1) == [20, 60, 70]
    assert _kept(run, keep_last=2, keep_best=2) == [20, 50, 60, 70]


def test_bad_ones_do_not_count() -> None:
    """Two good ones stay, however many bad ones are newer."""
    assert _kept(RUN, keep_last=2, bad=[50, 40]) == [20, 30]
    assert _kept(RUN, keep_last=2, keep_best=1, bad=[20]) == [30, 40, 50]


def test_nothing_goes_while_fewer_than_two_are_good() -> None:
    """Even when the policy would have it."""
    assert _kept(RUN, keep_last=2, bad=[10, 20, 30, 40]) == [10, 20, 30, 40, 50]


def test_a_given_up_future_does_not_count_and_goes() -> None:
    """After a rollback to step 20 the steps 30 to 50 of before are neither good nor kept."""
    run = [*RUN[:1], _manifest(20, rollbacks=[20]), *RUN[2:], _manifest(35, rollbacks=[20])]
    assert _kept(run, newest=run[-1], keep_last=3) == [10, 20, 35]


def test_what_somebody_has_pointed_back_from_stays() -> None:
    """Who sets `latest` to an older step by hand does not lose the later ones by that."""
    assert _kept(RUN, newest=RUN[2], keep_last=2) == [20, 30, 40, 50]
