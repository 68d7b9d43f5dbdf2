"""What `regen bench data` compares is the same work on both sides, and its figures are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from regen_dist.config.datasets import ReadConfig
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.synthetic.dataset import build_synthetic
from regen_dist.data.synthetic.shapes import SyntheticOptions
from regen_dist.errors import DataError
from tools.bench import data_cases
from tools.bench.common import Turn, in_turn, ratio, summary
from tools.bench.data import by_cpu_time, copy_dataset, faster, table, without_store
from tools.bench.data_cases import by_webdataset, make_small_samples, piped, waited


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips of moving shapes, in two shards."""
    folder = tmp_path_factory.mktemp("shapes")
    build_synthetic(folder, SyntheticOptions(number=12, seed=0, side=48, frames=20, samples_per_shard=6), workers=0)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Forty small samples in several shards."""
    folder = str(tmp_path_factory.mktemp("small"))
    make_small_samples(folder, 40, shard_mb=1)
    return folder


def test_cases_take_turns() -> None:
    asked: list[str] = []

    def case(name: str) -> Turn:
        asked.append(name)
        return Turn(len(asked), 1.0)

    rounds = in_turn({"a": lambda: case("a"), "b": lambda: case("b")}, 3)
    assert asked == list("ababab")
    assert [turn.amount for turn in rounds["b"]] == [2, 4, 6]


def test_a_ratio_is_formed_within_each_round() -> None:
    """A machine that becomes ten times slower changes no ratio."""
    fast, slow = [Turn(10, 1), Turn(10, 10)], [Turn(5, 1), Turn(5, 10)]
    assert ratio(fast, slow) == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert [turn.amount for turn in faster([Turn(1, 1), Turn(9, 1)], [Turn(2, 1), Turn(3, 1)])] == [2, 9]


def test_a_summary_has_the_median_and_both_ends() -> None:
    found = summary([Turn(6, 2, {"own_cpu_s": 1.0}), Turn(6, 1, {"own_cpu_s": 5.0}), Turn(6, 3, {"own_cpu_s": 2.0})])
    assert found["per_s"] == {"median": 3.0, "min": 2.0, "max": 6.0}
    assert found["own_cpu_s"] == 2.0


def test_the_stores_cpu_time_is_taken_out_of_all_cores() -> None:
    turn = without_store(Turn(100, 10, {"store_cpu_s": 4.0}), cores=2)
    assert turn.rate == pytest.approx(100 / 8)


def test_rates_by_cpu_time_ignore_the_clock() -> None:
    slow, alone = Turn(100, 9.0, {"own_cpu_s": 3.0, "store_cpu_s": 2.0}), Turn(100, 1.0, {"own_cpu_s": 4.0})
    assert [turn.rate for turn in by_cpu_time([slow, alone])] == [20, 25]


def test_every_way_of_reading_brings_every_byte(small: str) -> None:
    dataset = open_dataset(small)
    rows = data_cases.shuffled_rows(dataset)
    assert sorted(rows) == list(range(40))
    assert len(dataset.manifest.shards) > 1
    ours = data_cases.by_fetcher(small, ReadConfig(), rows)
    plain = by_webdataset([str(Path(small) / entry.name) for entry in dataset.manifest.shards])
    for turn in (ours, plain):
        assert (turn.amount, turn.facts["samples"]) == (dataset.records["size"].sum(), 40)


def test_a_wrong_byte_is_not_counted(small: str, tmp_path: Path) -> None:
    copy_dataset(small, str(tmp_path / "copy"))
    dataset = open_dataset(tmp_path / "copy")
    row = dataset.row(3)
    with (tmp_path / "copy" / row.shard).open("r+b") as file:
        file.seek(row.offset)
        file.write(bytes(8))
    with pytest.raises(DataError, match="a benchmark needs a whole dataset: the bytes differ"):
        data_cases.by_fetcher(str(tmp_path / "copy"), ReadConfig(), [3])


def test_small_samples_are_made_once_and_differ_in_size(small: str) -> None:
    sizes = open_dataset(small).records["size"]
    assert 20_000 <= sizes.min() < sizes.max() <= 200_000
    before = (Path(small) / "manifest.json").stat().st_mtime_ns
    make_small_samples(small, 40, shard_mb=1)
    assert (Path(small) / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"options.number: 40 there, 41 now"):
        make_small_samples(small, 41, shard_mb=1)


def test_a_copy_is_the_same_dataset_and_replaces_nothing(small: str, shapes: Path, tmp_path: Path) -> None:
    for _ in range(2):
        copy_dataset(shapes, str(tmp_path))
    assert open_dataset(tmp_path).fingerprint == open_dataset(shapes).fingerprint
    with pytest.raises(DataError, match="holds another dataset"):
        copy_dataset(small, str(tmp_path))


def test_without_aws_there_is_no_pipe(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    assert piped(small) is None
    monkeypatch.setattr("shutil.which", lambda name, path=None: "/a place/aws")
    found = piped(small)
    assert found is not None
    assert found[0].startswith("pipe:'/a place/aws' s3 cp --quiet ")
    assert found[0].endswith("small-000000.tar -")


@pytest.mark.parametrize("mixed", [False, True])
def test_planning_costs_time_and_memory(mixed: bool) -> None:
    large = np.ones(1 << 26)  # half a gigabyte: what another process holds does not count
    found = data_cases.plan(20_000, mixed=mixed)
    del large
    assert found["peak_mb"] < 500
    assert found["seconds"] > 0
    assert found["peak_mb"] >= found["before_mb"] > 0
    streams = data_cases.make_order(20_000, mixed=mixed).streams
    assert sum(sum(stream.sizes) for stream in streams) == pytest.approx(20_000, rel=0.001)


def lines(*waits: tuple[float, float]) -> list[dict[str, float]]:
    """Log lines of ten steps each: data wait, seconds a step."""
    return [{"step": 10 * (n + 1), "data_wait": wait, "step_s": step_s} for n, (wait, step_s) in enumerate(waits)]


def test_data_wait_is_that_of_warm_steps() -> None:
    found = waited(lines((0.9, 5.0), (0.5, 1.0), (0.01, 1.0), (0.04, 2.0)))
    assert found["data_wait"] == pytest.approx((0.01 + 0.08) / 3)
    assert (found["worst_line"], found["first_line"], found["warm_steps"]) == (0.04, 0.9, 20)
    with pytest.raises(DataError, match="the run has 2 lines"):
        waited(lines((0.9, 5.0), (0.5, 1.0)))


def test_the_table_tells_figures_ratios_and_targets() -> None:
    rounds = {"alone": [Turn(200, 1)], "loader": [Turn(180, 1)]}
    section = {
        "what": "17 frames",
        "unit": "clips",
        "target": 0.9,
        "cases": {name: summary(turns) for name, turns in rounds.items()},
        "ratios": {"loader": ratio(rounds["loader"], rounds["alone"]), "elsewhere": ratio([Turn(2, 1)], [Turn(1, 1)])},
    }
    wait = {"one rank": {"data_wait": 0.0051, "step_s": 0.6}}
    text = table(json.loads(json.dumps({"clips": [section], "wait": wait})))
    assert "| 17 frames: alone | 200 clips/s |  |  |" in text
    assert "| 17 frames: loader | 180 clips/s | 0.90 (0.90 to 0.90) | ≥ 0.9 |" in text
    assert "| 17 frames: elsewhere |  | 2.00 (2.00 to 2.00) | ≥ 0.9 |" in text
    assert "one rank, 0.60 s a step | 0.51% of step time |  | ≤ 2 % |" in text
