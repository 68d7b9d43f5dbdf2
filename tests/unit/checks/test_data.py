"""Checks of the data before a run starts: clips that cannot be read, caches that do not fit the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from regen_dist.checkpoint.export import model_shapes
from regen_dist.checkpoint.manifest import CheckpointManifest, to_text
from regen_dist.checks import data as checked
from regen_dist.checks.data import data, frozen_encoder, latents
from regen_dist.checks.findings import Target
from regen_dist.checks.kernels import decoding_embedder, kernels
from regen_dist.checks.resume import resume
from regen_dist.checks.run import CHECKS
from regen_dist.config import AnyRunConfig, T2VConfig, save_config
from regen_dist.config.identity import latent_identity
from regen_dist.data.format.index import SCHEMA_VERSION
from regen_dist.data.format.manifest import MANIFEST
from regen_dist.errors import DataError
from regen_dist.training.run import build_task
from tests.helpers.checkpoints import saved_run
from tests.helpers.latents import write_cache
from tests.helpers.networks import frozen_model
from tests.helpers.t2v import t2v_run
from tests.helpers.tiny import tiny_model, tiny_run


def texts(found: Any) -> list[str]:
    return [each.text for each in found]


@pytest.fixture(scope="module")
def dataset(tiny_shards: Path) -> Path:
    return tiny_shards


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


# What is said of the data of a text-to-video run before it starts: caches of one kind, which its model fits.


def told(config: AnyRunConfig, produced: tuple[str, ...] = ()) -> list[str]:
    return [finding.text for finding in latents(config, Target(produced=produced)) if finding.level == "error"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"), videos=2)


@pytest.fixture(scope="module")
def videos(tiny_shards: Path) -> Path:
    return tiny_shards


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


@pytest.mark.parametrize(
    ("part", "facts", "takes"),
    [
        ("encoder", {"cell": 32}, "cells of 8 pixels and 2 latent frames"),
        ("encoder", {"latent_frames": 3}, "cells of 8 pixels and 2 latent frames"),
        ("preprocessing", {"buckets": [[32, 32], [40, 32]]}, "sides that are multiples of 16"),
    ],
)
def test_a_cache_of_other_latents(tmp_path: Path, part: str, facts: dict[str, Any], takes: str) -> None:
    """Generated videos would be cut to a corner of the frame, or no batch could be made, or not one of a size."""
    foreign = write_cache(tmp_path / "foreign", videos=2)
    manifest = json.loads((foreign / "manifest.json").read_text())
    manifest["options"][part] |= facts
    (foreign / "manifest.json").write_text(json.dumps(manifest))
    run = t2v_run(tmp_path, foreign)
    (wrong,) = told(run)
    assert f"text to video takes {takes}" in wrong
    with pytest.raises(DataError, match=f"text to video takes {takes}"):
        _ = build_task(run, torch.device("cpu")).data


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


def test_an_embedder_that_was_not_trained(cache: Path, tmp_path: Path) -> None:
    """A run that has begun, or whose checkpoints are gone. One that is no embedder is told of by `latents`."""
    embedder = tiny_run(tmp_path)
    run = t2v_run(tmp_path, cache, generation={"embedder": str(embedder.folder)})
    assert texts(decoding_embedder(run, Target())) == []
    save_config(embedder, embedder.folder)
    assert texts(decoding_embedder(run, Target())) == [
        f"generation.embedder: file://{embedder.folder}/checkpoints has no checkpoint yet; train it with `regen "
        "train`, or wait for its first checkpoint.every"
    ]
    assert texts(decoding_embedder(run, Target(produced=(str(embedder.folder),)))) == []
    saved_run(tmp_path)
    assert texts(decoding_embedder(run, Target())) == []
    assert decoding_embedder in CHECKS


def test_flash_attention_without_gpus(cache: Path, tmp_path: Path) -> None:
    run = t2v_run(tmp_path, cache, model={"attention": {"backend": "flash"}})
    found = [finding.text for finding in kernels(run, Target(has_gpus=False, packages=False))]
    assert found == ["model.attention.backend=flash needs a CUDA device, found cpu; set model.attention.backend=sdpa"]


def committed(config: T2VConfig, step: int) -> None:
    """A checkpoint of a run, as far as its manifest goes."""
    train = config.train
    data = latent_identity(config.data, ["abc"], batch_global=train.batch_global, seed=train.seed)
    folder = Path(config.checkpoints) / f"step-{step:08d}"
    folder.mkdir(parents=True)
    manifest = CheckpointManifest(
        step=step, samples=0, config_hash="", version="", topology={"world_size": 1}, state={"data": data}, metrics={},
        rollbacks=[], shapes=model_shapes(config.model),
    )  # fmt: skip
    (folder / "manifest.json").write_text(to_text(manifest))
    (folder.parent / "latest").write_text(folder.name)
    save_config(config, config.folder)


def stands(config: T2VConfig) -> list[str]:
    return [finding.text for finding in resume(config, Target()) if finding.level == "error"]


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
