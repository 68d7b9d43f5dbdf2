"""Our decoder on somebody else's encoder, as a user types it: train, describe, export, reconstruct, preencode."""

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
from tests.helpers.autoencoders import KINDS, frozen_model, save_autoencoder
from tests.helpers.tiny import tiny_dataset, tiny_run
from tests.helpers.video import moving_square, write_video


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
