"""What the preflight says of the data of a text-to-video run: caches of one kind, which its model and embedder fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.cluster import ClusterConfig
from launcher.preflight import latents, places, runs
from launcher.preflight.estimates import Estimate, Estimates
from launcher.preflight.findings import Subject
from launcher.preflight.settings import kernels
from launcher.submitting import train_order
from launcher.sweeps import sweep_order
from regen_dist.checkpoint.manifest import Manifest, to_text
from regen_dist.config import AnyRunConfig, T2VConfig, save_config
from regen_dist.config.identity import latent_identity
from regen_dist.config.t2v import T2VModelConfig
from regen_dist.models import build_model
from tests.helpers.latents import write_cache
from tests.helpers.tiny import tiny_dataset, tiny_model, tiny_run

LOCAL = ClusterConfig(kind="local")
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


def told(config: AnyRunConfig, produced: tuple[str, ...] = ()) -> list[str]:
    return problems(Subject(train_order(config, LOCAL, "test"), produced))


def problems(subject: Subject) -> list[str]:
    return [finding.text for finding in latents.latents(subject) if finding.forbids]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"), videos=2)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def export(folder: Path, temporal_compression: int = 4) -> Path:
    """An exported embedder, as far as its config goes."""
    save_config(tiny_run(folder, model=tiny_model(temporal_compression).model_dump(mode="json")), folder)
    return folder


def test_a_cache_that_fits(cache: Path, tmp_path: Path) -> None:
    embedder = str(export(tmp_path / "model"))
    run = t2v_run(tmp_path, cache, data={"validation_url": str(cache)}, generation={"embedder": embedder})
    assert told(run) == []


def test_videos_are_no_latents_and_latents_no_videos(cache: Path, videos: Path, tmp_path: Path) -> None:
    run = t2v_run(tmp_path, cache, data={"validation_url": str(videos)})
    assert told(run) == [
        f"{videos} holds videos, not latents; make a cache of it with `regen preencode`, and give that cache"
    ]
    wrong = told(tiny_run(tmp_path, cache, data__validation_url=str(videos)))
    assert len(wrong) == 1
    assert wrong[0].startswith(f"{cache} holds latents that `regen preencode` made, not videos")
    assert told(tiny_run(tmp_path, videos)) == []


def test_caches_that_were_not_made_alike(cache: Path, tmp_path: Path) -> None:
    alike = write_cache(tmp_path / "alike", videos=2, seed=1)
    assert told(t2v_run(tmp_path, cache, alike)) == []
    other = write_cache(tmp_path / "other", videos=2, fingerprint="another")
    for run in (t2v_run(tmp_path, cache, other), t2v_run(tmp_path, cache, data={"validation_url": str(other)})):
        wrong = told(run)
        assert len(wrong) == 1
        assert f"{cache} (test), {other} (another)" in wrong[0]


def test_a_model_that_does_not_fit_its_cache(cache: Path, tmp_path: Path) -> None:
    run = t2v_run(tmp_path, cache, model={"latent_channels": 4, "text_width": 32})
    assert told(run) == [
        f"model.latent_channels is 4, the latents in {cache} have 8 channels; set model.latent_channels=8",
        f"model.text_width is 32, the text embeddings in {cache} have a width of 16; set model.text_width=16",
    ]


def test_a_cache_without_text(tmp_path: Path) -> None:
    silent = write_cache(tmp_path / "silent", videos=2, text_width=None)
    wrong = told(t2v_run(tmp_path, silent))
    assert len(wrong) == 1
    assert f"{silent} holds no text embeddings; run `regen preencode` with a text encoder" in wrong[0]


def test_a_manifest_that_does_not_say_what_the_latents_are(tmp_path: Path) -> None:
    damaged = write_cache(tmp_path / "damaged", videos=2)
    manifest = json.loads((damaged / "manifest.json").read_text())
    del manifest["options"]["channels"]
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    assert told(t2v_run(tmp_path, damaged)) == [
        f"{damaged}: its manifest does not say what the latents are (KeyError: 'channels'); run `regen preencode` again"
    ]


def test_what_cannot_be_read_is_told_by_another_check(tmp_path: Path) -> None:
    assert told(t2v_run(tmp_path, tmp_path / "nowhere")) == []


def test_an_embedder_that_is_not_there(cache: Path, tmp_path: Path) -> None:
    """Unless an earlier job makes it."""
    gone = t2v_run(tmp_path, cache, generation={"embedder": str(tmp_path / "model")})
    wrong = told(gone)
    assert len(wrong) == 1
    assert wrong[0].startswith(f"generation.embedder: {tmp_path}/model is neither a run nor an exported model")
    assert told(gone, (str(tmp_path / "model"),)) == []
    as_its_own = t2v_run(tmp_path, cache, generation={"embedder": str(tmp_path / "t2v")})
    save_config(as_its_own, tmp_path / "t2v")
    assert "is neither a run" in told(as_its_own)[0]


def test_an_embedder_that_did_not_make_the_cache(cache: Path, tmp_path: Path) -> None:
    embedder = export(tmp_path / "model", 8)
    assert told(t2v_run(tmp_path, cache, generation={"embedder": str(embedder)})) == [
        f"generation.embedder: {embedder} has clips of 9 frames and 8 channels, the latents in {cache} are of 5 frames "
        "and 8 channels; give the embedder that made them"
    ]


def test_runs_of_a_sweep_that_share_a_problem_are_told_once(videos: Path, tmp_path: Path) -> None:
    swept = [(t2v_run(tmp_path, videos).model_copy(update={"name": name}), "t2v") for name in ("a", "b")]
    assert len(problems(Subject(sweep_order(swept, LOCAL, "test")))) == 1


def test_an_embedder_that_nodes_do_not_share(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "common").mkdir()
    monkeypatch.chdir(tmp_path / "common")
    run = t2v_run(tmp_path / "common", Path("cache"), generation={"embedder": str(tmp_path / "model")})
    place = ClusterConfig(time_min=10, signal_lead_s=60, shared=tmp_path / "common")
    found = [finding.text for finding in places.shared(Subject(train_order(run, place, "test")))]
    assert len(found) == 1
    assert found[0].startswith(f"generation.embedder {tmp_path}/model is not in {tmp_path}/common")


def test_flash_attention_without_gpus(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.preflight.settings._is_installed", lambda *_: True)
    run = t2v_run(tmp_path, cache, model={"attention": {"backend": "flash"}})
    found = [finding.text for finding in kernels(Subject(train_order(run, LOCAL, "test")))]
    assert found == ["model.attention.backend=flash needs GPUs, and the job has none; set model.attention.backend=sdpa"]


def test_an_estimate_knows_the_clips_in_a_row(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.preflight.estimates.describe", lambda config, *_: Estimate(len(config.name), {}))
    known, first = Estimates(), t2v_run(tmp_path, cache)
    longer = t2v_run(tmp_path, cache, data={"clips": [4]}).model_copy(update={"name": "longer"})
    renamed = first.model_copy(update={"name": "renamed"})
    assert [known.of(each, 1).parameters for each in (first, renamed, longer)] == [3, 3, 6]


# What it has done already


def committed(config: T2VConfig, step: int) -> None:
    """A checkpoint of a run, as far as its manifest goes."""
    train = config.train
    data = latent_identity(config.data, ["abc"], batch_global=train.batch_global, seed=train.seed)
    folder = Path(config.checkpoints) / f"step-{step:08d}"
    folder.mkdir(parents=True)
    manifest = Manifest(
        step=step, samples=0, config_hash="", version="", topology={"world_size": 1}, state={"data": data}, metrics={},
        rollbacks=[], shapes={},
    )  # fmt: skip
    (folder / "manifest.json").write_text(to_text(manifest))
    (folder.parent / "latest").write_text(folder.name)
    save_config(config, config.folder)


def stands(config: T2VConfig) -> list[str]:
    return [finding.text for finding in runs.standing(Subject(train_order(config, LOCAL, "test"))) if finding.forbids]


def test_rows_in_another_order(tmp_path: Path) -> None:
    committed(t2v_run(tmp_path, Path("none")), 4)
    assert stands(t2v_run(tmp_path, Path("none"))) == []
    changed = stands(t2v_run(tmp_path, Path("none"), data={"clips": [2], "text_dropout": 0.5}))
    assert len(changed) == 1
    assert "data.clips was [1], is [2]; data.text_dropout was 0.1, is 0.5. Restore that" in changed[0]


def test_another_model(tmp_path: Path) -> None:
    committed(t2v_run(tmp_path, Path("none")), 4)
    changed = stands(t2v_run(tmp_path, Path("none"), model={"blocks": 2}))
    assert len(changed) == 1
    assert "was saved by another model (model.blocks of" in changed[0]


def _shapes(model: T2VModelConfig) -> dict[str, Any]:
    with torch.device("meta"):
        return {name: tuple(param.shape) for name, param in build_model(model).named_parameters()}


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": {"backend": "eager"}},
        {"heads": 1},
        {"width": 32},
        {"blocks": 2},
        {"mlp_ratio": 2.0},
        {"latent_channels": 4},
        {"text_width": 8},
    ],
    ids=str,
)
def test_a_model_is_another_where_its_parameters_are(changes: dict[str, Any]) -> None:
    plain, changed = (T2VModelConfig.model_validate(values) for values in (MODEL, {**MODEL, **changes}))
    same = _shapes(plain) == _shapes(changed)
    assert (runs.parameter_keys(plain) == runs.parameter_keys(changed)) == same
