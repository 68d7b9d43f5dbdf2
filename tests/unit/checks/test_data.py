"""Data that cannot be read is found before a run starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from regen_dist.checks import data as checked
from regen_dist.checks.data import data, frozen_encoder
from regen_dist.checks.findings import Target
from regen_dist.checks.run import CHECKS
from regen_dist.data.format.index import SCHEMA_VERSION
from regen_dist.data.format.manifest import MANIFEST
from tests.helpers.autoencoders import frozen_model
from tests.helpers.tiny import tiny_dataset, tiny_run


def texts(found: Any) -> list[str]:
    return [each.text for each in found]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def test_data_that_is_there(dataset: Path, tmp_path: Path) -> None:
    assert texts(data(tiny_run(tmp_path, dataset, data__validation_url=str(dataset)), Target())) == []
    assert checked.SCHEMA_VERSION == SCHEMA_VERSION
    assert checked.MANIFEST == MANIFEST


def test_the_folder_of_a_frozen_encoder(dataset: Path, tmp_path: Path) -> None:
    def found(path: Path) -> list[str]:
        return texts(frozen_encoder(tiny_run(tmp_path, dataset, model=frozen_model("wan", path)), Target()))

    (missing,) = found(tmp_path / "none")
    assert "none: no config.json there; give the folder of an autoencoder" in missing
    (tmp_path / "pipeline" / "vae").mkdir(parents=True)
    assert len(found(tmp_path / "pipeline")) == 1
    (tmp_path / "pipeline" / "vae" / "config.json").write_text("{}")
    assert found(tmp_path / "pipeline") == []
    assert texts(frozen_encoder(tiny_run(tmp_path, dataset), Target())) == []
    assert frozen_encoder in CHECKS


def _broken(dataset: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a dataset, with keys of its manifest changed."""
    import shutil

    shutil.copytree(dataset, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"schema_version": 1}, f"schema version 1, this program reads {SCHEMA_VERSION}"),
        ({"shards": []}, "a dataset without shards"),
        ({"shards": [{"name": "gone.tar", "index": "gone.parquet"}]}, "gone.parquet, file://"),
        ({"shards": [{}]}, "damaged (KeyError: 'index')"),
        ({"shards_url": "gopher://x"}, "URL scheme 'gopher:' is not supported"),
    ],
)
def test_data_that_is_not_whole(changes: dict[str, Any], told: str, dataset: Path, tmp_path: Path) -> None:
    broken = _broken(dataset, tmp_path / "broken", **changes)
    found = texts(data(tiny_run(tmp_path, broken), Target()))
    assert len(found) == 1
    assert told in found[0]


def test_data_that_is_not_there(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    made = tiny_run(tmp_path, tmp_path / "empty", data__validation_url=str(tmp_path / "absent"))
    empty, absent = texts(data(made, Target()))
    assert empty.startswith(
        f"data: file://{tmp_path}/empty: there is no manifest.json, so no finished dataset; build one"
    )
    assert absent == (f"data.validation_url: there is no folder {tmp_path}/absent; build the data, or correct the path")


def test_a_manifest_that_is_no_json(dataset: Path, tmp_path: Path) -> None:
    broken = _broken(dataset, tmp_path / "broken")
    (broken / MANIFEST).write_text("[1, 2")
    told = texts(data(tiny_run(tmp_path, broken), Target()))
    assert len(told) == 1
    assert "damaged (JSONDecodeError" in told[0]


def test_what_an_earlier_job_makes_need_not_be_there(tmp_path: Path) -> None:
    made = tiny_run(tmp_path, tmp_path / "made" / "train", data__validation_url=str(tmp_path / "made-not"))
    told = texts(data(made, Target(produced=[f"file://{tmp_path}/made"])))
    assert len(told) == 1
    assert "made-not" in told[0]
