"""Which ranks are slow: real ranks over gloo, of which one waits for its data and one computes more."""

from __future__ import annotations

import socket
import time

import pytest

from regen_dist.distributed.ranks import Ranks, process_group, read_environment
from regen_dist.training.metrics import RankClock, RankReport, RankTimes, compared
from tests.helpers.ranks import run_ranks

SLOW_S = 0.3  # far above what a loaded machine adds to a step


def _steps(ranks: Ranks) -> list[RankReport]:
    """Rank 1 waits for its data in the first steps; in later ones it computes."""
    clock, reports = RankClock(ranks), []
    for slow in ("data", "compute"):
        for _ in range(3):
            with clock.step():
                with clock.waiting():
                    time.sleep(SLOW_S if slow == "data" and ranks.rank == 1 else 0.0)
                until = time.process_time() + (SLOW_S if slow == "compute" and ranks.rank == 1 else 0.0)
                while time.process_time() < until:
                    pass
            ranks.barrier()
        reports.append(clock.report())
    return reports


def _in_group() -> list[RankReport]:
    ranks = read_environment()
    with process_group(ranks, needed=True):
        return _steps(ranks)


@pytest.mark.timeout(300)
def test_the_slow_rank_is_named() -> None:
    """By its data wait where that is slow, and by its processor's time where it computes more; all ranks say the
    same."""
    one, two = run_ranks(_in_group, 2)
    assert [report.text for report in one] == [report.text for report in two]
    waits, computes = one
    host = socket.gethostname()
    assert f"data wait {waits.figures['ranks/data_wait_s_min']:.3f} / " in waits.text
    assert f"(most: rank 1 on {host} {waits.figures['ranks/data_wait_s_max']:.3f}, rank 0 on {host}" in waits.text
    assert waits.figures["ranks/data_wait_s_max"] >= SLOW_S
    assert waits.figures["ranks/data_wait_s_min"] < SLOW_S / 2
    assert waits.figures["ranks/data_wait_s_median"] == pytest.approx(
        (waits.figures["ranks/data_wait_s_min"] + waits.figures["ranks/data_wait_s_max"]) / 2
    )
    assert computes.figures["ranks/data_wait_s_max"] < SLOW_S / 2  # each report is of its own steps
    assert computes.figures["ranks/cpu_s_max"] >= SLOW_S
    assert f"CPU time {computes.figures['ranks/cpu_s_min']:.3f}" in computes.text
    assert computes.text.split("CPU time")[1].split("most: ")[1].startswith("rank 1 ")


def test_the_worst_three_are_named() -> None:
    """Of many, in order, with their hosts."""
    times = [RankTimes(rank, f"node{rank // 2}", rank % 5 / 10, 1.0, 0.5) for rank in range(8)]
    report = compared(times)
    assert "data wait 0.000 / 0.150 / 0.400 s (most: rank 4 on node2 0.400, rank 3 on node1 0.300, rank 2 on" in (
        report.text
    )
    assert report.figures["ranks/step_s_median"] == 1.0
    assert report.text.count("rank ") == 9
