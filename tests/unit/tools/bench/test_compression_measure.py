"""Measures of a compression arm: clips that are tested on, sizes, times between frames, and kept results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regen_dist.config.embedder import EmbedderConfig
from regen_dist.errors import ConfigError, DataError
from regen_dist.inference.codec import Codec
from regen_dist.models.embedder import build_model
from regen_dist.models.encoder import Latents
from tests.helpers.checkpoints import saved_run
from tests.helpers.tiny import tiny_model, tiny_run
from tests.helpers.video import frame_numbers, moving_square, numbered_frames, write_video
from tools.bench import compression_measure
from tools.bench.compression_measure import (
    LEAST_FRAMES,
    MOST_FRAMES,
    ClipSpan,
    Decoded,
    TestSet,
    cut,
    find_clips,
    load_clips,
    mean_psnr_db,
    quality,
    read_stretch,
)


def _config(**changes: Any) -> EmbedderConfig:
    return tiny_run(data__short_side=48, **changes)


def _codec(kind: str = "regen") -> Codec:
    config = _config(model=tiny_model(kind=kind).model_dump(mode="json"))
    torch.manual_seed(0)
    return Codec(build_model(config.model), config, torch.device("cpu"))


def test_sizes_follow_the_training_crop() -> None:
    sizes = compression_measure.sizes_of(_config(data__size=[48, 48]))
    assert sizes == {"training": ((48, 48), 48), "double": ((96, 96), 96), "other aspect": ((32, 72), 48)}
    assert compression_measure.sizes_of(_config())["other aspect"].crop == (24, 40)
    with pytest.raises(ConfigError, match=r"data\.short_side is None"):
        compression_measure.sizes_of(tiny_run())


def test_quality_is_of_all_stretches_and_says_what_it_lacks() -> None:
    video = moving_square(9, 32, 32)
    worse = np.clip(video.astype(int) + 8, 0, 255).astype(np.uint8)
    found = quality([Decoded(video, worse), Decoded(video, video)])
    one = mean_psnr_db([Decoded(video, worse)])
    assert found["psnr_of_stretches_db"] == pytest.approx([one, 100.0])
    assert found["psnr_db"] == pytest.approx((one + 100) / 2)
    assert found["psnr_pooled_db"] == pytest.approx(one + 10 * np.log10(2), abs=1e-6)
    assert 0.5 < found["ssim"] < 1
    assert found["frames"] == 18
    assert [name for name in ("vmaf", "frechet") if found[name] is None] == [
        {"VMAF": "vmaf"}.get(note.split(":")[0], "frechet") for note in found["notes"]
    ]
    assert found["frechet"] is None
    assert "Fréchet video distance: not measured, for no network was given (--fvd FILE" in found["notes"][-1]


class Brightness(torch.nn.Module):
    """Mean of each colour: a shift of all pixels by s is at a distance of 3 s^2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3, 4))


def test_the_distance_is_by_the_network_that_is_given(tmp_path: Path) -> None:
    torch.jit.script(Brightness()).save(str(tmp_path / "network.pt"))
    video = moving_square(3 * compression_measure.SEGMENT_FRAMES + 1, 32, 32) // 2
    shifted = video + np.uint8(4)
    found = quality([Decoded(video, shifted)], fvd=tmp_path / "network.pt")
    assert found["frechet"] == pytest.approx(48, rel=1e-3)
    assert not any("Fréchet" in note for note in found["notes"])
    short = quality([Decoded(video[:20], shifted[:20])], fvd=tmp_path / "network.pt")
    assert short["frechet"] is None
    assert "at least two features" in short["notes"][-1]


def test_small_frames_have_no_ssim() -> None:
    video = moving_square(3, 8, 8)
    found = quality([Decoded(video, video)])
    assert found["ssim"] is None
    assert any(note.startswith("SSIM: ") for note in found["notes"])


def test_between_frames_are_the_held_out_ones() -> None:
    """Of a picture that brightens evenly, blending neighbours is exact."""
    ramp = np.broadcast_to(np.arange(40, 76, 4, dtype=np.uint8)[:, None, None, None], (9, 32, 32, 3))
    found = compression_measure.between(_codec(), [ramp, ramp[:8]])
    assert found.keys() == {"clips", "decoded_db", "decoded_then_blended_db", "blended_db"}
    assert (found["clips"], found["blended_db"]) == (1, 100.0)
    assert compression_measure.between(_codec("magvit2"), [ramp]).keys() == {
        "clips",
        "decoded_then_blended_db",
        "blended_db",
    }
    assert compression_measure.between(_codec(), [ramp[:8]]) == {"clips": 0}


def test_decoding_at_half_times_is_what_is_compared() -> None:
    """A codec that blends its two frames linearly is exact on such a picture, between the frames as on them."""

    class Linear:
        """With the interface of a codec."""

        kind, temporal_compression, num_frames = "regen", 4, 5

        def encode(self, clips: torch.Tensor) -> Latents:
            return Latents(clips[:, :, 0], clips[:, :, -1])

        def decode(self, latents: Latents, times: torch.Tensor, **_: Any) -> torch.Tensor:
            along = (times / 4).float()[:, None, None]
            return torch.lerp(latents.content[:, :, None], latents.motion[:, :, None], along)

    codec: Any = Linear()
    ramp = np.broadcast_to(np.arange(40, 76, 4, dtype=np.uint8)[:, None, None, None], (9, 16, 16, 3))
    found = compression_measure.between(codec, [ramp])
    assert found == {"clips": 1, "decoded_db": 100.0, "decoded_then_blended_db": 100.0, "blended_db": 100.0}


def test_measures_are_kept_until_weights_or_clips_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "videos" / "a.mp4", moving_square(20, 48, 64))
    tests = TestSet(tmp_path / "videos", (ClipSpan(video="a.mp4", first=0, frames=11),), "by hand")
    config = saved_run(tmp_path, data__short_side=48)
    sizes, kept = {"training": compression_measure.sizes_of(config)["training"]}, tmp_path / "kept.json"
    found = compression_measure.measure_arm(config.folder, tests, sizes, kept, (1, 2))
    assert found["training"].keys() == {"1", "2"}
    assert found["training"]["1"]["frames"] == 10
    with np.load(kept.with_suffix(".npz")) as frames:
        assert {name: frames[name].shape for name in frames.files} == {
            "training/0/source": (10, 32, 32, 3),
            "training/0/made": (10, 32, 32, 3),
        }
    measured: list[Path] = []
    monkeypatch.setattr(compression_measure.Codec, "load", lambda run: measured.append(run) or _codec())
    assert compression_measure.measure_arm(config.folder, tests, sizes, kept, (1, 2)) == found
    assert not measured
    compression_measure.measure_arm(config.folder, tests, sizes, kept, (1, 2), fresh=True)
    compression_measure.measure_arm(config.folder, tests, sizes, kept, (1,))
    assert len(measured) == 2


# Which frames are tested on: listed, or found by the rule; and how stretches become clips.


LIST = Path(__file__).parents[4] / "configs" / "bench" / "compression_clips.yaml"


def test_the_committed_list_needs_its_videos(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lacks bikes.mp4, carphone.mp4, .* run `regen fetch-videos`"):
        load_clips(LIST, tmp_path)
    for name in ("bikes.mp4", "carphone.mp4"):
        (tmp_path / name).touch()
    found = load_clips(LIST, tmp_path)
    assert {each.video for each in found.stretches} == {"bikes.mp4", "carphone.mp4"}
    assert all(each.frames >= LEAST_FRAMES for each in found.stretches), "a clip of every k"
    assert len(found.facts()["stretches"]) == len(found.stretches)


def test_an_unknown_key_in_a_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clips.yaml").write_text("stretches:\n  - {video: a.mp4, first: 0, frames: 40, crop: 1}\n")
    with pytest.raises(ConfigError, match=r"stretches.0.crop"):
        load_clips(tmp_path / "clips.yaml", tmp_path)


def test_the_rule_takes_the_middle_of_long_shots_and_names_what_it_leaves_out(tmp_path: Path) -> None:
    moving = [moving_square(90, 48, 64, seed=3), moving_square(40, 48, 64, seed=4)[:, ::-1] // 4]
    write_video(tmp_path / "a.mp4", np.concatenate(moving))
    write_video(tmp_path / "sub" / "short.mp4", moving_square(20, 48, 64))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "notes.txt").write_text("no video either")
    found = find_clips(tmp_path)
    places = [(each.video, each.first, each.frames) for each in found.stretches]
    assert places == [("a.mp4", 12, MOST_FRAMES), ("a.mp4", 90, 40)]
    assert [text.split(":")[0] for text in found.left_out] == ["broken.mp4", "sub/short.mp4"]


def test_a_folder_without_a_test_video_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are none"):
        find_clips(tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        find_clips(tmp_path / "none")


def test_a_stretch_is_its_frames_at_any_scale(tmp_path: Path) -> None:
    write_video(tmp_path / "numbers.mp4", numbered_frames(60), crf=8)
    stretch = ClipSpan(video="numbers.mp4", first=7, frames=40)
    for side in (48, 96):
        frames = read_stretch(tmp_path, stretch, (side, side * 64 // 48), side)
        assert frames.shape == (40, side, side * 64 // 48, 3)
        assert frame_numbers(frames.transpose(3, 0, 1, 2)) == list(range(7, 47))


def test_a_crop_lies_where_the_list_says(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(40), crf=8)
    whole = read_stretch(tmp_path, ClipSpan(video="a.mp4", first=0, frames=34), (48, 64), 48)
    for crop_x, left in ((0.0, 0), (0.5, 16), (1.0, 32)):
        part = read_stretch(tmp_path, ClipSpan(video="a.mp4", first=0, frames=34, crop_x=crop_x), (48, 32), 48)
        assert np.array_equal(part, whole[:, :, left : left + 32])


def test_frames_that_are_not_there_are_told_with_the_file(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(40))
    with pytest.raises(DataError, match=r"a\.mp4: frames 30 to 49 were asked for, the video has 40"):
        read_stretch(tmp_path, ClipSpan(video="a.mp4", first=30, frames=20), (32, 32), 48)


def test_stretches_are_cut_into_whole_clips() -> None:
    frames = np.arange(34)[:, None, None, None]
    assert [len(cut(frames, k + 1)) for k in (4, 8, 16, 32)] == [6, 3, 2, 1]
    assert [clip.ravel().tolist() for clip in cut(frames[:11], 3, stride=2)] == [[0, 2, 4], [5, 7, 9]]
    assert cut(frames[:4], 5) == []
