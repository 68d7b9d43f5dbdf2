"""What the preflight says of a text-to-video run: the folders that its nodes share, and its estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import ClusterConfig
from launcher.preflight import storage
from launcher.preflight.findings import Estimate, Estimates, Subject
from launcher.submit import train_request
from regen_dist.config import T2VConfig
from tests.helpers.latents import write_cache

MODEL = {"blocks": 1, "heads": 2, "width": 16, "text_width": 16}


def t2v_run(output: Path, *urls: Path, **changes: Any) -> T2VConfig:
    """A text-to-video run on one cache or several; changes are sections, laid over its own."""
    sources = [{"url": str(url)} for url in urls]
    values: dict[str, Any] = {
        "name": "t2v",
        "output": str(output),
        "model": MODEL,
        "data": {"url": str(urls[0])} if len(urls) == 1 else {"mixture": sources},
        "engine": {"kind": "plain", "precision": "fp32"},
        "train": {"steps": 8, "batch_global": 4},
    }
    merged = {name: {**values.get(name, {}), **section} for name, section in changes.items()}
    return T2VConfig.model_validate({**values, **merged})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"), videos=2)


def test_an_embedder_that_nodes_do_not_share(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "common").mkdir()
    monkeypatch.chdir(tmp_path / "common")
    run = t2v_run(tmp_path / "common", Path("cache"), generation={"embedder": str(tmp_path / "model")})
    place = ClusterConfig(time_min=10, signal_lead_s=60, shared=tmp_path / "common")
    found = [finding.text for finding in storage.shared(Subject(train_request(run, place, "test")))]
    assert len(found) == 1
    assert found[0].startswith(f"generation.embedder {tmp_path}/model is not in {tmp_path}/common")


def test_an_estimate_knows_the_clips_in_a_row(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.preflight.findings.describe", lambda config, *_: Estimate(len(config.name), {}))
    known, first = Estimates(), t2v_run(tmp_path, cache)
    longer = t2v_run(tmp_path, cache, data={"clips": [4]}).model_copy(update={"name": "longer"})
    renamed = first.model_copy(update={"name": "renamed"})
    assert [known.of(each, 1).parameters for each in (first, renamed, longer)] == [3, 3, 6]
