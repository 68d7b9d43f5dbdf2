"""The protocol of an evaluation, its hash, frames and refusals; and the costs of the models compared."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from regen_dist.errors import ConfigError, DataError
from regen_dist.evaluation.evaluate_page import identity
from regen_dist.evaluation.evaluated_models import load_models
from regen_dist.evaluation.protocol import ListedVideo, PinnedVideo, Protocol, find_videos, load_protocol
from regen_dist.inference.frames import SourceVideo, write_video
from tests.helpers.checkpoints import saved_run
from tests.helpers.networks import frozen_model, save_autoencoder
from tests.helpers.video import moving_square, numbered_frames


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "videos" / "deep").mkdir(parents=True)
    for seed, name in enumerate(("b.mp4", "a.mp4", "deep/c_1920x1080_30.mp4")):
        write_video(tmp_path / "videos" / name, moving_square(12, 48, 64, seed), 10)
    return tmp_path / "videos"


def test_one_video_of_one_frame_is_not_plural() -> None:
    facts = {"videos": [{"frames": 1}], "protocol": {"name": "a"}, "protocol_hash": "b", "source_hash": "c"}
    assert identity(facts | {"weights": {}})[1] == "- source frames: hash c, 1 frame of 1 video"


def test_every_value_of_the_protocol_changes_its_hash_but_the_name() -> None:
    base = Protocol()
    changes = {
        "short_side": 480, "crop": (64, 64), "frames": 33, "period": 16, "segment_frames": 8, "steps": 2, "overlap": 0,
        "seed": 1, "videos": (ListedVideo(video="a"),),
    }  # fmt: skip
    assert set(changes) == set(Protocol.model_fields) - {"name"}
    hashes = {load_protocol(None, **{name: value}).hash for name, value in changes.items()}
    assert len(hashes | {base.hash}) == len(changes) + 1
    assert load_protocol(None, name="another").hash == base.hash
    assert len({Protocol(videos=(ListedVideo(video="a", first=n),)).hash for n in range(3)}) == 3


def test_frames_are_those_that_are_pinned(tmp_path: Path) -> None:
    path = tmp_path / "numbered.mp4"
    write_video(path, numbered_frames(20, 48, 64), 10, crf=0)
    whole = list(SourceVideo(path).frames())
    protocol, listed = Protocol(frames=5, crop=(24, 32)), ListedVideo(video="numbered", first=7)
    video = PinnedVideo(path, protocol, listed)
    frames = list(video.frames())
    assert (video.num_frames, video.height, video.width) == (5, 24, 32)
    assert all(np.array_equal(frame, whole[7 + n][12:36, 16:48]) for n, frame in enumerate(frames))
    assert video.timestamps.tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert video.sha256() == PinnedVideo(path, protocol, listed).sha256()
    assert video.sha256() != PinnedVideo(path, protocol).sha256()


def test_a_folder_is_taken_in_order_of_name_and_a_list_in_its_own(folder: Path) -> None:
    assert [video.name for video in find_videos(folder, Protocol())] == ["a", "b", "c_1920x1080_30"]
    listed = Protocol(videos=(ListedVideo(video="c_*"), ListedVideo(video="a")))
    assert [video.name for video in find_videos(folder, listed)] == ["c_1920x1080_30", "a"]
    assert [video.name for video in find_videos(folder / "a.mp4", Protocol())] == ["a"]


def test_videos_of_every_ending_that_datasets_are_built_of_are_taken(folder: Path) -> None:
    (folder / "b.mp4").rename(folder / "b.M2TS")
    (folder / "a.mp4").rename(folder / "a.3gp")
    assert [video.name for video in find_videos(folder, Protocol())] == ["a", "b", "c_1920x1080_30"]


def test_hidden_files_and_an_earlier_evaluation_are_no_videos(folder: Path) -> None:
    out = folder / "evaluation"
    (out / "media" / "source").mkdir(parents=True)
    shutil.copy(folder / "a.mp4", out / "media" / "source" / "a.mp4")
    (folder / "._a.mp4").write_bytes(b"of macOS")
    assert [video.name for video in find_videos(folder, Protocol(), out)] == ["a", "b", "c_1920x1080_30"]


def test_what_does_not_fit_is_refused_with_names(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is missing; \\* fits 3 files"):
        find_videos(folder, Protocol(videos=(ListedVideo(video="nowhere"), ListedVideo(video="*"))))
    with pytest.raises(DataError, match=r"has 12 frames, and the list asks for frames 4 to 36"):
        find_videos(folder, Protocol(frames=33, videos=(ListedVideo(video="a", first=4),)))
    with pytest.raises(DataError, match="crop of 64x64 does not fit frames of 48x64"):
        find_videos(folder, Protocol(crop=(64, 64)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no video"):
        find_videos(tmp_path / "empty", Protocol())
    write_video(folder / "deep" / "a.mp4", moving_square(2, 48, 64), 10)
    with pytest.raises(DataError, match="several videos are called a"):
        find_videos(folder, Protocol())
    foreign = tmp_path / os.fsdecode(b"\xe9t\xe9.mp4")
    shutil.copy(folder / "a.mp4", foreign)
    with pytest.raises(DataError, match=r"the name of '\\udce9t\\udce9' is not UTF-8; rename it"):
        find_videos(foreign, Protocol())
    with pytest.raises(ConfigError, match="protocol is not valid"):
        load_protocol(None, frames=0)
    with pytest.raises(ConfigError, match="protocol is not valid"):
        load_protocol(None, seed=2**63)
    with pytest.raises(ConfigError, match="listed twice: a"):
        load_protocol(None, videos=({"video": "a"}, {"video": "a"}))


@pytest.mark.parametrize(("name", "hash_"), [("davis_480p", "8815370f75f982dd"), ("mcl_jcv_360p", "3a5142f7cfe7c89a")])
def test_the_committed_lists_are_pinned(name: str, hash_: str) -> None:
    """A change of a list, or of a measure's version, makes figures of before incomparable: it must be meant."""
    protocol = load_protocol(Path(f"configs/evaluate/{name}.yaml"))
    assert (len(protocol.videos), protocol.frames) == (30, 33)
    assert protocol.hash == hash_


# Costs of the models that are compared.


def test_a_frozen_encoder_is_not_counted_as_free(tmp_path: Path) -> None:
    """Its operations are unknown, not 0; those of our own encoder, and of either decoder, are counted."""
    frozen = saved_run(tmp_path / "frozen", model=frozen_model("wan", save_autoencoder("wan", tmp_path / "vae")))
    own = saved_run(tmp_path / "own")
    given = [f"frozen={frozen.folder}", f"own={own.folder}"]
    first, second = (load() for load in load_models(given, steps=1, clip_frames=9, baselines=False))
    found = first.flops(32, 32)
    assert found is not None
    assert found[0] is None
    assert found[1] > 0
    assert all(second.flops(32, 32) or (None,))


def test_operations_are_counted_at_sides_that_are_filled_up_to_whole_cells(tmp_path: Path) -> None:
    """Cells have 32 pixels a side here."""
    frozen = saved_run(tmp_path / "frozen", model=frozen_model("ltx", save_autoencoder("ltx", tmp_path / "vae")))
    (load,) = load_models([str(frozen.folder)], steps=1, clip_frames=9, baselines=False)
    assert load().flops(40, 56) == load().flops(64, 64)
