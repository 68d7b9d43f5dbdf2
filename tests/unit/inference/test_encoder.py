"""The encoder alone: loading, fingerprint; and the embedder that the package carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from regen_dist.checkpoint.shards import ShardReader
from regen_dist.config import save_config
from regen_dist.config.embedder import EmbedderConfig
from regen_dist.errors import CheckpointError, ConfigError
from regen_dist.inference.codec import PACKAGED_EMBEDDER, Codec
from regen_dist.inference.encoder import FrozenEncoder, check_embedder
from regen_dist.inference.export import ExportOptions, export_model
from regen_dist.models.decoder import GenerativeDecoder
from regen_dist.models.embedder import ConvDecoder, Regen
from tests.helpers.checkpoints import saved_run
from tests.helpers.tiny import clips
from tests.helpers.video import moving_square

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> EmbedderConfig:
    """A run with one checkpoint, saved by two ranks."""
    return saved_run(tmp_path_factory.mktemp("runs"))


def _exported(run: EmbedderConfig, out: Path, **options: Any) -> Path:
    export_model(run.folder, out, ExportOptions(statistics_clips=0, **options))
    return out


@pytest.mark.parametrize("weights", ["ema", "plain"])
@pytest.mark.parametrize("frames", [5, 1])
def test_it_encodes_as_the_whole_model_does(run: EmbedderConfig, weights: Any, frames: int) -> None:
    encoder, codec = FrozenEncoder.load(run.folder, weights, CPU), Codec.load(run.folder, weights, CPU)
    latents, expected = encoder.encode(clips(2, frames)), codec.encode(clips(2, frames))
    assert torch.equal(latents.content, expected.content)
    assert torch.equal(latents.motion, expected.motion)
    assert (encoder.num_frames, encoder.channels) == (5, 8)


def test_nothing_of_the_decoder_is_built_or_read(
    run: EmbedderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither out of a run nor out of an export; the decoders cannot even be made here."""
    export = _exported(run, tmp_path / "export")
    read: list[str] = []
    slices = ShardReader._slices

    def watched(self: ShardReader, key: str, *rest: Any) -> Any:
        read.append(key)
        return slices(self, key, *rest)

    def refuse(self: object, *arguments: object) -> None:
        raise AssertionError("a decoder was built")

    monkeypatch.setattr(ShardReader, "_slices", watched)
    for decoder in (GenerativeDecoder, ConvDecoder):
        monkeypatch.setattr(decoder, "__init__", refuse)
    for folder in (run.folder, export):
        parameters = dict(FrozenEncoder.load(folder, device=CPU).encoder.named_parameters())
        assert all(parameter.device == CPU for parameter in parameters.values())
    assert read
    assert all(key.startswith("ema/encoder.") for key in read)


def test_a_run_and_its_exports_have_one_fingerprint(run: EmbedderConfig, tmp_path: Path) -> None:
    fingerprint = FrozenEncoder.load(run.folder, device=CPU).fingerprint
    assert FrozenEncoder.load(_exported(run, tmp_path / "ema"), device=CPU).fingerprint == fingerprint
    plain = FrozenEncoder.load(run.folder, "plain", CPU).fingerprint
    assert plain != fingerprint
    assert FrozenEncoder.load(_exported(run, tmp_path / "plain", weights="plain"), device=CPU).fingerprint == plain


def test_of_a_bf16_run_even_the_export_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is the weights in the precision of the training, whatever this machine computes in."""
    run = saved_run(tmp_path / "runs", engine__precision="bf16")
    fingerprints = set()
    for is_native in (True, False):
        monkeypatch.setattr("regen_dist.observe.hardware.has_native_bf16", lambda native=is_native: native)
        encoder = FrozenEncoder.load(run.folder, device=CPU)
        check_embedder(Codec.load(run.folder, device=CPU), encoder.facts(), "the run")
        assert encoder.encode(clips(1)).content.dtype == (torch.bfloat16 if is_native else torch.float32)
        fingerprints.add(encoder.fingerprint)
    for dtype in ("float32", "bfloat16"):
        fingerprints.add(FrozenEncoder.load(_exported(run, tmp_path / dtype, dtype=dtype), device=CPU).fingerprint)
    assert len(fingerprints) == 1
    other = saved_run(tmp_path / "fp32")
    assert FrozenEncoder.load(other.folder, device=CPU).fingerprint not in fingerprints


def test_the_decoder_does_not_change_the_fingerprint_and_the_encoder_does(run: EmbedderConfig, tmp_path: Path) -> None:
    """Built from the same seed, the encoder comes first: its weights are the same beside other decoders."""
    fingerprint = FrozenEncoder.load(run.folder, "plain", CPU).fingerprint
    baseline = saved_run(tmp_path / "baseline", model__kind="magvit2")
    deeper = saved_run(tmp_path / "deeper", model__decoder__blocks=1)
    wider = saved_run(tmp_path / "wider", model__encoder__out_blocks=2)
    found = [FrozenEncoder.load(each.folder, "plain", CPU).fingerprint for each in (baseline, deeper, wider)]
    assert found[:2] == [fingerprint, fingerprint]
    assert found[2] != fingerprint


def test_what_cannot_be_loaded_is_told(run: EmbedderConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder"):
        FrozenEncoder.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds the ema weights alone"):
        FrozenEncoder.load(_exported(run, tmp_path / "export"), "plain")
    other = EmbedderConfig.model_validate(run.model_dump() | {"name": "other"})
    save_config(other, other.folder)
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        FrozenEncoder.load(other.folder)


# The embedder that the package carries: small, whole, and better than the linear code that it began from.


LARGEST_BYTES = 8_000_000


def test_the_packaged_embedder_beats_its_linear_code() -> None:
    assert (PACKAGED_EMBEDDER / "model.safetensors").stat().st_size <= LARGEST_BYTES
    codec = Codec.load(PACKAGED_EMBEDDER)
    assert isinstance(codec.model, Regen)
    assert codec.model.linear is not None
    clip = torch.from_numpy(moving_square(17)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    latents, times = codec.encode(clip), torch.arange(17)
    made = codec.decode(latents, times)
    linear = codec.model.linear(*latents, times[None].float())
    errors = [float((each.clamp(-1, 1) - clip).square().mean()) for each in (made, linear)]
    assert errors[0] < 0.8 * errors[1]


def test_its_card_names_the_film_and_its_licence() -> None:
    card = (PACKAGED_EMBEDDER / "README.md").read_text()
    assert "Big Buck Bunny" in card
    assert "CC BY 3.0" in card
