"""A config file on a real dataset, and the losses of its undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest

from regen_dist.config import to_yaml
from regen_dist.data.build.build import build_shards
from regen_dist.observe.record import read_record
from tests.helpers.datasets import OPTIONS, write_sources
from tests.helpers.ranks import run_regen_ranks
from tests.helpers.tiny import tiny_dataset, tiny_run

STEPS, SAVE_EVERY = 16, 4
LONGEST = ("test_hangs", "test_random_kills", "test_killed", "test_writer_deaths", "test_builds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that last longest come first, so that workers that share the suite by files end together."""
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    name = item.path.stem
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def losses(run: Path) -> list[float]:
    """The loss of every step; fails when a step is missing or stands in the record twice."""
    lines = read_record(run / "metrics.jsonl", "train")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven samples of two or three seconds. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("dataset")
    build_shards([write_sources(tmp_path_factory.mktemp("sources"))], folder, OPTIONS, workers=0)
    return folder


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks by default of the tests, ZeRO-3, bf16, a checkpoint every four of sixteen steps."""
    folder = tmp_path_factory.mktemp("fault")
    made = tiny_run(
        folder / "runs", tiny_dataset(folder / "data"), engine__kind="zero3", engine__precision="bf16",
        train__steps=STEPS, checkpoint__every=SAVE_EVERY,
    )  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(to_yaml(made))
    return path


@pytest.fixture(scope="session")
def undisturbed(config: Path) -> list[float]:
    """The losses of a run that nothing happens to."""
    assert run_regen_ranks("train", config, "name=undisturbed", logs=config.with_name("undisturbed")) == [0, 0]
    values = losses(config.parent / "runs" / "undisturbed")
    assert len(values) == STEPS
    return values
