"""Data and encoders of others, as a user types it: WebDataset tars trained on, our decoder on a frozen encoder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from regen_dist.config import to_yaml
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.latents import CacheFacts, unpack_latents
from regen_dist.observe.record import read_record
from tests.helpers.datasets import clip, write_tar
from tests.helpers.networks import KINDS, frozen_model, save_autoencoder
from tests.helpers.ranks import run_regen, run_regen_alone, said
from tests.helpers.tiny import tiny_dataset, tiny_run
from tests.helpers.video import moving_square, write_video


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards by webdataset's own writer: wide and tall videos of 12 frames, and pictures that are no video."""
    folder = tmp_path_factory.mktemp("tars")
    for shard in range(2):
        samples = [
            {
                "__key__": f"{number:04d}",
                "mp4": clip(12, *((48, 96) if number % 2 else (96, 48)), seed=10 * shard + number),
                "txt": f"video {number} of shard {shard}",
            }
            for number in range(6)
        ]
        write_tar(folder / f"{shard:05d}.tar", [*samples, {"__key__": "picture", "jpg.txt": "not a video"}])
    return folder


def test_tars_of_webdataset_train_once_they_are_indexed(tars: Path, tmp_path: Path) -> None:
    """A mixture of them (3/4) and of synthetic clips (1/4) in buckets of two sizes, with images."""
    before = {path.name: path.read_bytes() for path in tars.iterdir()}
    log = tmp_path / "index.log"
    assert run_regen("shards", "index", tars, "--out", tmp_path / "index", log=log) == 0, log.read_text()
    assert "12 samples" in log.read_text()
    assert {path.name: path.read_bytes() for path in tars.iterdir()} == before
    drawn = ("--number", 16, "--seed", 1, "--side", 48, "--frames", 12)
    assert run_regen("shards", "synthetic", "--out", tmp_path / "drawn", *drawn, log=tmp_path / "drawn.log") == 0
    config = tiny_run(
        tmp_path / "runs",
        data={
            "mixture": [{"url": str(tmp_path / "index"), "weight": 3}, {"url": str(tmp_path / "drawn"), "weight": 1}],
            "buckets": [[32, 64], [64, 32], [32, 32]],
            "short_side": "fit",
            "image_fraction": 0.25,
            "workers": 1,
        },
        train__steps=24,
        train__trace_samples=True,
    )
    path, logs = tmp_path / "mixture.yaml", tmp_path / "train"
    path.write_text(to_yaml(config))
    assert run_regen_alone("train", path, logs=logs) == 0, said(logs)
    assert "data: 28 samples in 2 dataset(s), 6 bucket(s)" in said(logs)[0]
    run = tmp_path / "runs" / "tiny"
    assert [line["step"] for line in read_record(run / "metrics.jsonl", "train")] == list(range(1, 25))
    ids = [key for line in read_record(run / "samples" / "rank-00000.jsonl") for key in line["ids"]]
    assert len(ids) == 24 * 4
    assert len(set(ids)) == 28


# Our decoder on somebody else's encoder, as a user types it: train, describe, export, reconstruct, preencode.


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def regen(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    from tools.cli import main

    monkeypatch.setattr(sys, "argv", ["regen", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("kind", ["wan", "ltx", "cosmos"])
def test_every_command_knows_it(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    one, vae = KINDS[kind], save_autoencoder(kind, tmp_path / "vae")
    config = tiny_run(tmp_path, shards, model=frozen_model(kind, vae), train__steps=3, train__validate_every=3)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert regen(monkeypatch, "train", tmp_path / "run.yaml") == 0
    run, model = tmp_path / "tiny", tmp_path / "model"
    capfd.readouterr()
    assert regen(monkeypatch, "describe", tmp_path / "run.yaml", "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["latent_shape"] == [one.channels, 32 // one.cell, 32 // one.cell]
    assert facts["latent_frames"] == 1 + 8 // one.stride

    assert regen(monkeypatch, "checkpoint", "export", run, "--out", model, "--statistics-clips", 2) == 0
    assert not any(name.startswith("encoder") for name in load_file(model / "model.safetensors"))
    assert len(yaml.safe_load((model / "config.yaml").read_text())["origin"]["data"]["encoder"]) == 64
    card = (model / "README.md").read_text()
    assert f"H/{one.cell} x W/{one.cell}" in card
    assert f"multiples of {one.cell}." in card
    assert "from diffusers" not in card  # there is no code for it
    video = write_video(tmp_path / "v.mp4", moving_square(12, 50, 66))
    assert regen(monkeypatch, "reconstruct", video, "--run", model, "--out", tmp_path / "out") == 0
    assert regen(monkeypatch, "reconstruct", video, "--run", run, "--out", tmp_path / "out2") == 0

    (tmp_path / "pre.yaml").write_text(
        yaml.safe_dump({"embedder": str(model), "data": str(shards), "output": str(tmp_path / "cache"), "text": None,
                        "buckets": [[32, 32]]})
    )  # fmt: skip
    assert regen(monkeypatch, "preencode", tmp_path / "pre.yaml") == 0
    assert regen(monkeypatch, "shards", "verify", tmp_path / "cache", "--deep", "--workers", 0) == 0
    cache = open_dataset(tmp_path / "cache")
    entry = unpack_latents(cache.read(cache.row(0)))
    assert entry.content.shape[1:] == (one.channels, 32 // one.cell, 32 // one.cell)
    assert entry.motion.shape[1:] == (one.channels * (8 // one.stride), 32 // one.cell, 32 // one.cell)
    assert CacheFacts.of(cache.manifest, "cache").encoder["cell"] == one.cell

    save_autoencoder(kind, vae, seed=1)  # other weights in the same place
    assert regen(monkeypatch, "train", tmp_path / "run.yaml", "train.steps=4") == 4
    assert "encoder was" in "".join(capfd.readouterr())
    assert regen(monkeypatch, "reconstruct", video, "--run", model, "--out", tmp_path / "out3") == 4
    assert "not the autoencoder" in "".join(capfd.readouterr())
