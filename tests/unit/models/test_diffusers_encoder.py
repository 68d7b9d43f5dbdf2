"""Somebody else's encoder, frozen, and what our decoder is told of its latents."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from regen_dist.config.embedder import ModelConfig
from regen_dist.errors import CheckpointError, ConfigError, DataError
from regen_dist.models.conditioning import FrameConditioning
from regen_dist.models.diffusers_encoder import DiffusersEncoder, latent_frames
from regen_dist.models.embedder import Regen, build_model
from regen_dist.models.encoder import Latents
from regen_dist.models.flops import count_flops
from tests.helpers.networks import KINDS, frozen_model, save_autoencoder
from tests.helpers.tiny import tiny_model, wake


def config_of(kind: str, folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(frozen_model(kind, folder, **changes))


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_autoencoder("wan", tmp_path_factory.mktemp("wan"))


@pytest.mark.parametrize("kind", list(KINDS))
def test_its_latents_stay_and_nothing_of_it_is_in_the_model(tmp_path: Path, kind: str) -> None:
    import diffusers

    one, folder = KINDS[kind], save_autoencoder(kind, tmp_path / "vae")
    model = build_model(config_of(kind, folder))
    assert isinstance(model, Regen)
    wake(model)
    video = torch.rand(2, 3, 9, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    prediction, latents = model(video, video, torch.ones(2))
    prediction.square().mean().backward()
    assert prediction.shape == video.shape
    assert not any(name.startswith("encoder.") for name in model.state_dict())
    theirs = getattr(diffusers, one.name).from_pretrained(folder)
    with torch.no_grad():
        z = theirs.encode(video).latent_dist.mode()
    config = theirs.config
    mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
    mean = torch.tensor(mean or 0.0).view(1, -1, 1, 1, 1)
    z = (z - mean) / torch.tensor(std or 1.0).view(1, -1, 1, 1, 1) * (config.get("scaling_factor") or 1.0)
    torch.testing.assert_close(latent_frames(latents, one.channels), z.transpose(1, 2))
    counted = count_flops(model.config, (64, 96))
    assert counted.latent_shape == tuple(z.shape[1:2]) + tuple(z.shape[3:])
    assert counted.num_latent_values == z[0].numel()
    assert counted.num_parameters == sum(each.numel() for each in model.parameters())


def test_an_image_is_conditioned_as_the_first_frame_of_a_clip_and_time_is_continuous(wan: Path) -> None:
    told = FrameConditioning(config_of("wan", wan))
    generator = torch.Generator().manual_seed(0)
    content, rest = torch.randn(1, 4, 2, 3, generator=generator), torch.randn(1, 8, 2, 3, generator=generator)
    first = told(Latents(content, torch.zeros_like(rest)), torch.zeros(1, 1))
    torch.testing.assert_close(told(Latents(content, rest), torch.zeros(1, 1)), first)
    for middle in (0.0, 2.5, 6.5, 8.0):  # of the latent frames, and the end
        near = told(Latents(content, rest), torch.tensor([[middle - 1e-4, middle + 1e-4]]))
        assert (near[:, 0] - near[:, 1]).abs().max() < 5e-3
    assert told.positions(torch.tensor([0.0, 2.5, 6.5, 8.0])).tolist() == [0.0, 1.0, 2.0, 2.375]
    at = told(Latents(content, rest), torch.tensor([[2.5]]))
    changed = rest.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(told(Latents(content + 1, changed), torch.tensor([[2.5]])), at)


def test_a_large_cell_becomes_tokens_in_place(tmp_path: Path) -> None:
    told = FrameConditioning(config_of("ltx", tmp_path))
    content = torch.zeros(1, 8, 2, 3)
    before = told(Latents(content, torch.zeros(1, 8, 2, 3)), torch.zeros(1, 1))
    assert before.shape == (1, 1, 8, 12, 32)
    content[0, :, 1, 2] = 1
    after = told(Latents(content, torch.zeros(1, 8, 2, 3)), torch.zeros(1, 1))
    moved = (after - before).abs().sum(-1)[0, 0] > 0
    assert moved[4:, 8:].all()
    assert moved.sum() == 16


def test_what_does_not_fit_is_told_with_the_values_that_do(wan: Path, tmp_path: Path) -> None:
    wrong = frozen_model("wan", wan)
    wrong["latent"] = {"channels": 8}
    with pytest.raises(ConfigError, match=r"latent\.channels=4"):
        DiffusersEncoder(ModelConfig.model_validate(wrong))(torch.zeros(1, 3, 9, 32, 32))
    wrong = frozen_model("wan", wan)
    wrong["encoder"] |= {"cell": 16, "stride": 8}
    with pytest.raises(ConfigError, match=r"cell=8 and model\.encoder\.stride=4"):
        DiffusersEncoder(ModelConfig.model_validate(wrong))(torch.zeros(1, 3, 9, 32, 32))
    with pytest.raises(ConfigError, match="hf download"):
        DiffusersEncoder(config_of("wan", tmp_path / "none"))(torch.zeros(1, 3, 9, 32, 32))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet"}')
    with pytest.raises(ConfigError, match="no autoencoder"):
        DiffusersEncoder(config_of("wan", tmp_path))(torch.zeros(1, 3, 9, 32, 32))
    encoder = DiffusersEncoder(config_of("wan", wan))
    for shape in ((1, 3, 8, 32, 32), (1, 3, 9, 30, 32)):
        with pytest.raises(DataError):
            encoder(torch.zeros(shape))
    encoder.expected = "another"
    with pytest.raises(CheckpointError, match="not the autoencoder"):
        encoder(torch.zeros(1, 3, 1, 32, 32))


@pytest.mark.parametrize("damage", ["no weights", "a pickle alone", "cut off", "some missing", "another's", "no JSON"])
def test_folders_that_hold_no_whole_autoencoder_are_refused(wan: Path, tmp_path: Path, damage: str) -> None:
    """Not loaded with what is missing at random, and never unpickled."""
    folder = tmp_path / "vae"
    shutil.copytree(wan, folder)
    weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    tensors, written = load_file(weights), json.loads(config.read_text())
    if damage in ("no weights", "a pickle alone"):
        weights.unlink()
    if damage == "a pickle alone":
        torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    elif damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "some missing":
        save_file({name: value for name, value in tensors.items() if "conv_in" not in name}, weights)
    elif damage == "another's":
        config.write_text(json.dumps(written | {"base_dim": 16}))
    elif damage == "no JSON":
        config.write_text("{")
    with pytest.raises(ConfigError, match=str(folder)):
        DiffusersEncoder(config_of("wan", folder))(torch.zeros(1, 3, 9, 32, 32))
    with pytest.raises(ConfigError, match=str(folder)):
        _ = DiffusersEncoder(config_of("wan", folder)).fingerprint


def test_the_fingerprint_follows_the_weights_and_not_the_place(wan: Path, tmp_path: Path) -> None:
    print_of = DiffusersEncoder(config_of("wan", wan)).fingerprint
    assert DiffusersEncoder(config_of("wan", save_autoencoder("wan", tmp_path / "same"))).fingerprint == print_of
    assert DiffusersEncoder(config_of("wan", save_autoencoder("wan", tmp_path / "b", 1))).fingerprint != print_of


def test_it_crosses_to_another_process_without_its_weights(wan: Path) -> None:
    encoder = DiffusersEncoder(config_of("wan", wan))
    video = torch.rand(1, 3, 9, 16, 16)
    made, size = encoder(video), len(pickle.dumps(encoder))
    assert size < 20_000
    torch.testing.assert_close(pickle.loads(pickle.dumps(encoder))(video).motion, made.motion)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "magvit2"}, {"conditioning": {"kind": "in_context"}}, {"linear_start": "pca"},
        {"latent": {"channels": 4, "noise_std": 0.1}}, {"encoder": {"kind": "diffusers"}},
        {"temporal_compression": 4, "encoder": {"kind": "diffusers", "path": "x", "stride": 8}},
    ],
)  # fmt: skip
def test_what_a_frozen_encoder_cannot_have_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="diffusers"):
        ModelConfig.model_validate(frozen_model("wan", Path("x")) | change)


def test_configs_of_before_are_told_as_they_were() -> None:
    saved = tiny_model().model_dump(mode="json")
    assert set(saved["encoder"]) == {"stem_patch", "stages", "out_blocks"}
    assert ModelConfig.model_validate(saved) == tiny_model()
    with pytest.raises(ValidationError, match="stages is required"):
        ModelConfig.model_validate(saved | {"encoder": {}})
    frozen = ModelConfig.model_validate(frozen_model("wan", Path("x")))
    assert set(frozen.model_dump()["encoder"]) == {"kind", "path", "cell", "stride", "precision"}
    assert ModelConfig.model_validate(frozen.model_dump(mode="json")) == frozen
