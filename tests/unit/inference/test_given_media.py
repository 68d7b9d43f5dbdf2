"""Videos that begin with a given image, or continue a given video."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from typer.testing import CliRunner

from regen_dist.config import T2VConfig
from regen_dist.config.exported import EXPORT_CONFIG_FILE
from regen_dist.config.t2v import FlowConfig
from regen_dist.data.format.latents import TextEmbedding
from regen_dist.diffusion.samplers import GivenFrames
from regen_dist.errors import ConfigError, DataError
from regen_dist.inference import generate as prompts_module
from regen_dist.inference.codec import PACKAGED_EMBEDDER, Codec
from regen_dist.inference.encoder import FrozenEncoder
from regen_dist.inference.frames import SourceVideo, num_frames_at
from regen_dist.inference.generate import Prompt, embed_prompts, generate, sample_rows
from regen_dist.inference.generation_settings import resolve_settings
from regen_dist.inference.given_media import (
    fitted,
    given_row,
    notes,
    read_image,
    read_images,
    read_video,
    read_videos,
)
from regen_dist.inference.latent_space import LatentSpace
from regen_dist.inference.sampler import TextToVideoModel
from regen_dist.pixels import to_video
from tests.helpers.t2v import CPU, FPS, WordEncoder, saved_t2v
from tests.helpers.video import frame_numbers, moving_square, numbered_frames, write_video
from tools.cli import app

PROMPTS = [Prompt(0, "a red square"), Prompt(1, "a dog")]
LENGTH, SIDE = 17, 64  # of the packaged embedder's clips


class Made(NamedTuple):
    """The packaged embedder in float32, which any CPU computes quickly, and a run of random weights on its latents."""

    run: T2VConfig
    model: TextToVideoModel
    codec: Codec
    embedder: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    embedder = tmp_path_factory.mktemp("embedder") / PACKAGED_EMBEDDER.name
    shutil.copytree(PACKAGED_EMBEDDER, embedder)
    settings = (embedder / EXPORT_CONFIG_FILE).read_text()
    (embedder / EXPORT_CONFIG_FILE).write_text(settings.replace("precision: bf16", "precision: fp32"))
    codec = Codec.load(embedder, device=CPU)
    assert codec.statistics is not None
    run = saved_t2v(
        tmp_path_factory.mktemp("given"), data__clips=(1, 2), diffusion__given_content=0.2, diffusion__given_clips=0.1
    )
    facts: dict[str, Any] = {
        "fingerprint": "cache", "num_frames": LENGTH, "channels": 8, "fps": FPS,
        "encoder": FrozenEncoder.load(embedder, device=CPU).facts(),
        "preprocessing": {"buckets": [[SIDE, SIDE]], "stride": 1}, "text": WordEncoder().facts(),
    }  # fmt: skip
    null = TextEmbedding(WordEncoder().null(), torch.ones(1, dtype=torch.bool))
    LatentSpace(facts, codec.statistics, null).write(run.folder)
    return Made(run, TextToVideoModel.load(run.folder, device=CPU), codec, embedder)


def _psnr(one: Any, other: Any) -> float:
    return 10 * math.log10(255**2 / float(np.square(one.astype(float) - other.astype(float)).mean()))


def _picture(path: Path, frame: Any) -> Path:
    Image.fromarray(frame).save(path)
    return path


def _reconstructed(codec: Codec, frame: Any) -> Any:
    made = codec.decode(codec.encode(to_video([frame])[None]), torch.zeros(1))
    return ((made[0, :, 0].permute(1, 2, 0).numpy() + 1) * 127.5).round()


def _generate(made: Made, out: Path, given: Any, **changes: Any) -> list[SourceVideo]:
    settings = resolve_settings(made.model, **{"steps": 2, "frames": LENGTH, **changes})
    generate(made.model, made.codec, WordEncoder, PROMPTS, out, settings, given=given)
    return [SourceVideo(out / f"{prompt.number:05d}.mp4") for prompt in PROMPTS]


class TestImage:
    """The content latent of the first clip is the image's; motion and all that follows is sampled."""

    def test_videos_begin_with_it(self, made: Made, tmp_path: Path) -> None:
        """As near as the embedder's own reconstruction of the image, within 1 dB, in the file that is written; then
        they move, each in its own way. Without it they begin with something else."""
        frame = moving_square(3, SIDE, SIDE, seed=1)[0]
        image = read_image(_picture(tmp_path / "first.png", frame), (SIDE, SIDE))
        own = _psnr(frame, _reconstructed(made.codec, frame))
        videos = [np.stack(list(each.frames())) for each in _generate(made, tmp_path / "out", image)]
        for video in videos:
            assert video.shape == (LENGTH, SIDE, SIDE, 3)
            assert _psnr(frame, video[0]) > own - 2  # the motion is that of an untrained generator
        assert _psnr(videos[0][-1], videos[1][-1]) < 30
        free = list(_generate(made, tmp_path / "free", None)[0].frames())
        assert _psnr(frame, free[0]) < own - 10

    def test_the_content_comes_out_as_it_went_in(self, made: Made, tmp_path: Path) -> None:
        """By every sampler, with and without guidance, for every prompt of a batch."""
        image = read_image(_picture(tmp_path / "first.png", moving_square(1, SIDE, SIDE)[0]), (SIDE, SIDE))
        content = image.encoded(made.codec).content.float()
        found = embed_prompts(WordEncoder(), made.model.space, PROMPTS)
        row = GivenFrames.joined([given_row(image, made.codec, made.model.space.scale, 1)] * 2)
        for sampler, guidance in (("euler", 1.0), ("heun", 2.0), ("dpmpp_2m", 2.0)):
            settings = resolve_settings(made.model, frames=LENGTH, steps=3, sampler=sampler, guidance=guidance)  # type: ignore[arg-type]
            (latents,) = sample_rows(made.model, PROMPTS, found.texts, found.null, settings, row)
            torch.testing.assert_close(latents.content, content.expand(2, -1, -1, -1), rtol=1e-4, atol=1e-5)
            assert (latents.motion[0] - latents.motion[1]).abs().max() > 0.1

    def test_it_is_not_replaced_by_what_is_made_from_it(self, made: Made, tmp_path: Path) -> None:
        """As where an image was generated into the folder that is still --out: a prompt has one file of its number."""
        (tmp_path / "linked").symlink_to(tmp_path)
        image = read_image(_picture(tmp_path / "00001.png", moving_square(1, SIDE, SIDE)[0]), (SIDE, SIDE))
        path = write_video(tmp_path / "00000.mp4", moving_square(LENGTH, SIDE, SIDE), fps=int(FPS))
        video = read_video(path, (SIDE, SIDE), most_clips=1, length=LENGTH, fps=FPS)
        for given, number in ((image, 1), (video, 0)):
            with pytest.raises(ConfigError, match=f"would be replaced .* prompt {number}; choose another --out"):
                _generate(made, tmp_path / "linked", given)
        assert sorted(each.name for each in tmp_path.iterdir()) == ["00000.mp4", "00001.png", "linked"]

    def test_one_image_for_all_is_encoded_once(
        self, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        image = read_image(_picture(tmp_path / "first.png", moving_square(1, SIDE, SIDE)[0]), (SIDE, SIDE))
        counted = Mock(side_effect=made.codec.encode)
        monkeypatch.setattr(made.codec, "encode", counted)
        settings = resolve_settings(made.model, frames=2, steps=1)
        generate(made.model, made.codec, WordEncoder, PROMPTS, tmp_path, settings, batch=1, given=image)
        assert counted.call_count == 1

    def test_an_image_of_another_size_covers_and_is_cropped(self) -> None:
        """Proportions are kept; of what lies over, both sides lose alike."""
        wide = np.zeros((64, 192, 3), np.uint8)
        wide[:, 64:128] = 200
        assert (fitted(wide, (64, 64)) == 200).all()
        assert (fitted(wide.transpose(1, 0, 2).copy(), (32, 32))[3:-3] == 200).all()
        assert fitted(wide[:16, :20], (64, 64)).shape == (64, 64, 3)
        small = fitted(np.arange(90 * 101 * 3, dtype=np.uint8).reshape(90, 101, 3), (48, 80))
        assert small.shape == (48, 80, 3)

    @pytest.mark.parametrize("mode", ["L", "P", "I;16", "CMYK", "RGBA", "LA", "1"])
    def test_kinds_of_images(self, tmp_path: Path, mode: str) -> None:
        """Grey, palettes, 16 bits, print colours, transparency: all become RGB of the same grey."""
        grey = Image.new("L", (20, 10), 255 if mode == "1" else 128)
        path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
        made = Image.fromarray(np.full((10, 20), 128 << 8, np.uint16)) if mode == "I;16" else grey.convert(mode)
        made.save(path)
        frame = read_image(path, (10, 20)).frame
        assert frame.shape == (10, 20, 3)
        assert np.abs(frame.astype(int) - (255 if mode == "1" else 128)).max() <= 1

    def test_deep_values_keep_their_brightness_and_floats_are_refused(self, tmp_path: Path) -> None:
        """A dark picture of 16 bits is dark; floating point from 0 to 1 became black."""
        dark, floats = tmp_path / "dark.png", tmp_path / "floats.tif"
        Image.fromarray(np.full((8, 8), 200, np.uint16)).save(dark)
        assert (read_image(dark, (8, 8)).frame == 0).all()
        Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(floats)
        with pytest.raises(DataError, match=r"its values, 0 to 0\.5 \(F\)"):
            read_image(floats, (8, 8))

    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    def test_a_colour_profile_is_applied(self, tmp_path: Path, mode: str) -> None:
        """By a profile whose red and blue are exchanged, red is blue; so the P3 of a phone becomes sRGB."""
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        exchanged = profile.replace(b"rXYZ", b"....", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"....", b"bXYZ", 1)
        path = tmp_path / "a.png"
        Image.new("RGB", (8, 8), (200, 60, 40)).convert(mode).save(path, icc_profile=exchanged)
        assert np.abs(read_image(path, (8, 8)).frame.astype(int) - [40, 60, 200]).max() <= 3

    def test_transparent_parts_are_white_and_cameras_turned(self, tmp_path: Path) -> None:
        Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
        assert (read_image(tmp_path / "clear.png", (8, 8)).frame == 255).all()
        upright = Image.fromarray(np.repeat(np.arange(0, 160, 8, dtype=np.uint8)[:, None], 10, 1))
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees to show
        upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
        found = read_image(tmp_path / "turned.png", (20, 10)).frame
        assert (found[..., 0] == np.asarray(upright)).all()

    @pytest.mark.parametrize(
        ("name", "data", "message"),
        [
            ("text.png", b"hello", "is not an image that can be read"),
            ("empty.png", b"", "is not an image that can be read"),
            ("none.png", None, "there is no such file"),
            ("cut.png", "cut", "is not an image that can be read"),
            ("film.mp4", "film", "A video is continued with --continue"),
        ],
    )
    def test_wrong_files(self, tmp_path: Path, name: str, data: Any, message: str) -> None:
        """One error that names the file, whatever is wrong with it."""
        path = tmp_path / name
        if data == "cut":
            _picture(path, moving_square(1, 64, 64)[0])
            path.write_bytes(path.read_bytes()[:300])
        elif data == "film":
            write_video(path, moving_square(4, 32, 32))
        elif data is not None:
            path.write_bytes(data)
        with pytest.raises(DataError, match=message) as found:
            read_image(path, (32, 32))
        assert str(path) in str(found.value)
        with pytest.raises(DataError, match="it is a folder"):
            read_image(tmp_path, (32, 32))

    def test_an_image_for_each_prompt(self, made: Made, tmp_path: Path) -> None:
        """A folder of images by number: each video begins with its own. One too few is told of before anything is
        made."""
        (tmp_path / "first").mkdir()
        frames = [moving_square(3, SIDE, SIDE, seed=seed)[0] for seed in (1, 2)]
        for number, frame in enumerate(frames):
            _picture(tmp_path / "first" / f"{number:05d}.png", frame)
        images = read_images(tmp_path / "first", (SIDE, SIDE))
        for number, video in enumerate(_generate(made, tmp_path / "out", images)):
            found = next(iter(video.frames()))
            assert _psnr(frames[number], found) > _psnr(frames[1 - number], found) + 5
        del images[1]
        with pytest.raises(ConfigError, match=r"no image for 1 of the prompts, .* name it 00001\.png"):
            _generate(made, tmp_path / "less", images)
        assert not (tmp_path / "less").exists()
        (tmp_path / "first" / "00000.txt").write_text("its caption")
        assert len(read_images(tmp_path / "first", (SIDE, SIDE))) == 2
        _picture(tmp_path / "first" / "0.jpg", frames[0])
        with pytest.raises(DataError, match=r"two files for prompt 0: 0\.jpg, 00000\.png; keep one"):
            read_images(tmp_path / "first", (SIDE, SIDE))
        (tmp_path / "none").mkdir()
        with pytest.raises(DataError, match="holds no image named by a prompt's number"):
            read_images(tmp_path / "none", (SIDE, SIDE))

    def test_an_image_is_no_video(self, made: Made, tmp_path: Path) -> None:
        image = read_image(_picture(tmp_path / "first.png", moving_square(1, SIDE, SIDE)[0]), (SIDE, SIDE))
        with pytest.raises(ConfigError, match="ask for more frames"):
            _generate(made, tmp_path / "out", image, frames=1)


class TestContinue:
    """The latents of a video's last clips are clamped, new clips follow them."""

    def test_new_frames_are_appended(self, made: Made, tmp_path: Path) -> None:
        """The video itself, then the frames that were asked for."""
        source = moving_square(2 * LENGTH + 3, SIDE, SIDE, seed=2)
        path = tmp_path / "source.mp4"
        write_video(path, source, fps=int(FPS))
        given = read_video(path, (SIDE, SIDE), most_clips=1, length=LENGTH, fps=FPS)
        for video in _generate(made, tmp_path / "out", given, frames=20):
            frames = np.stack(list(video.frames()))
            assert len(frames) == len(source) + 20
            before = np.stack(list(SourceVideo(path).frames()))
            assert _psnr(before, frames[: len(source)]) > 33
        record = json.loads((tmp_path / "out" / "00000.json").read_text())
        assert (record["clips"], record["given"]["kind"], record["given"]["clips"]) == (3, "video", 1)

    def test_the_clips_stay_as_they_are(self, made: Made, tmp_path: Path) -> None:
        """Content and motion of both given clips; what follows depends on them and on the prompt."""
        rows = []
        for seed in (2, 3):
            path = tmp_path / f"{seed}.mp4"
            write_video(path, moving_square(2 * LENGTH, SIDE, SIDE, seed=seed), fps=int(FPS))
            given = read_video(path, (SIDE, SIDE), most_clips=2, length=LENGTH, fps=FPS)
            known = given.encoded(made.codec)
            found = embed_prompts(WordEncoder(), made.model.space, PROMPTS)
            settings = resolve_settings(made.model, frames=LENGTH, steps=2)
            row = GivenFrames.joined([given_row(given, made.codec, made.model.space.scale, 3)] * 2)
            rows.append(sample_rows(made.model, PROMPTS, found.texts, found.null, settings, row, 2))
            assert len(rows[-1]) == 3
            for number in range(2):
                for part, wanted in zip(rows[-1][number], known, strict=True):
                    torch.testing.assert_close(part[0], wanted[number].float(), rtol=1e-4, atol=1e-5)
        assert (rows[0][2].content - rows[1][2].content).abs().max() > 1e-3
        assert (rows[0][2].content[0] - rows[0][2].content[1]).abs().max() > 0.1

    def test_the_last_frames_are_taken(self, tmp_path: Path) -> None:
        """The given clips end with the video's last frame; at half the rate every second frame is taken."""
        path = tmp_path / "numbered.mp4"
        write_video(path, numbered_frames(23), fps=16)
        for fps, numbers in ((16.0, list(range(13, 23))), (8.0, list(range(4, 23, 2)))):
            given = read_video(path, (48, 64), most_clips=2, length=5, fps=fps)
            assert given.clips == 2
            frames = [frame for part in given._frames(fps, 10) for frame in part]
            assert frame_numbers(np.stack(frames).transpose(3, 0, 1, 2)) == numbers
        assert num_frames_at(given.source.timestamps, 8.0) == 12
        assert [len(part) for part in given.before(32.0)] == [16, 16, 13]

    def test_every_frame_counts_where_times_are_rounded(self, tmp_path: Path) -> None:
        """Matroska has milliseconds: the 17th frame at 30 a second is noted a third of one before its time."""
        path = write_video(tmp_path / "numbered.mkv", numbered_frames(17), fps=30)
        given = read_video(path, (48, 64), most_clips=1, length=17, fps=30.0)
        frames = [frame for part in given._frames(30.0, 17) for frame in part]
        assert frame_numbers(np.stack(frames).transpose(3, 0, 1, 2)) == list(range(17))

    def test_short_videos_give_fewer_clips_or_none(self, tmp_path: Path) -> None:
        path = tmp_path / "short.mp4"
        write_video(path, numbered_frames(9), fps=8)
        assert read_video(path, (48, 64), most_clips=3, length=4, fps=8.0).clips == 2
        with pytest.raises(DataError, match=r"short.mp4 has 9 frames at the 8 a second .* a clip of 17 at least"):
            read_video(path, (48, 64), most_clips=1, length=17, fps=8.0)

    def test_a_video_for_each_prompt(self, made: Made, tmp_path: Path) -> None:
        """By number; all give as many clips as the shortest, and every video goes on with its own."""
        folder = tmp_path / "videos"
        folder.mkdir()
        for number, length in ((0, 2 * LENGTH), (1, LENGTH)):
            write_video(folder / f"0000{number}.mp4", moving_square(length, SIDE, SIDE, seed=number), fps=int(FPS))
        given = read_videos(folder, (SIDE, SIDE), most_clips=2, length=LENGTH, fps=FPS)
        assert [video.clips for video in given.values()] == [1, 1]
        for number, video in enumerate(_generate(made, tmp_path / "out", given)):
            before = np.stack(list(SourceVideo(folder / f"0000{number}.mp4").frames()))
            frames = np.stack(list(video.frames()))
            assert len(frames) == len(before) + LENGTH
            assert _psnr(before, frames[: len(before)]) > 33
        (folder / "00001.mp4").unlink()
        few = read_videos(folder, (SIDE, SIDE), most_clips=2, length=LENGTH, fps=FPS)
        with pytest.raises(ConfigError, match=r"no video for 1 of the prompts, the first is number 1: name it 00001\."):
            _generate(made, tmp_path / "few", few)
        (folder / "00000.mp4").unlink()
        with pytest.raises(DataError, match=r"holds no video named by a prompt's number, as 00000\.mp4"):
            read_videos(folder, (SIDE, SIDE), most_clips=2, length=LENGTH, fps=FPS)

    def test_wrong_files(self, tmp_path: Path) -> None:
        (tmp_path / "text.mp4").write_text("hello")
        for name, message in (("text.mp4", "cannot be used as a video"), ("none.mp4", "there is no such file")):
            with pytest.raises(DataError, match=message):
                read_video(tmp_path / name, (32, 32), most_clips=1, length=5, fps=8.0)


class TestCommand:
    """`regen generate --image` and `--continue`."""

    @pytest.fixture(autouse=True)
    def words(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(prompts_module, "load_text_encoder", lambda space, path, device: WordEncoder())

    def _regen(self, made: Made, out: Path, *arguments: object) -> str:
        given = ["generate", "a dog", "--run", made.run.folder, "--embedder", made.embedder, "--out", out]
        result = CliRunner().invoke(app, [*map(str, [*given, "--steps", 1, *arguments])])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    def test_image(self, made: Made, tmp_path: Path) -> None:
        """Another image is another video, the same one is not made again."""
        first, other = (_picture(tmp_path / f"{seed}.png", moving_square(1, 80, 100, seed=seed)[0]) for seed in (1, 2))
        shown = self._regen(made, tmp_path / "out", "--image", first, "--frames", LENGTH)
        assert "1 generated" in shown
        assert "Note" not in shown
        assert "0 generated; 1 were there" in self._regen(made, tmp_path / "out", "--image", first, "--frames", LENGTH)
        assert "1 generated" in self._regen(made, tmp_path / "out", "--image", other, "--frames", LENGTH)
        record = json.loads((tmp_path / "out" / "00000.json").read_text())
        assert (record["given"]["kind"], record["paths"]["image"]) == ("image", str(other))

    def test_continue(self, made: Made, tmp_path: Path) -> None:
        """By default as many clips as the longest trained row has room for; a longer row is told of."""
        path = tmp_path / "source.mp4"
        write_video(path, moving_square(20, 48, 96), fps=int(FPS))
        shown = self._regen(made, tmp_path / "out", "--continue", path)
        assert SourceVideo(tmp_path / "out" / "00000.mp4").num_frames == 20 + LENGTH
        assert "Note" not in shown
        shown = self._regen(made, tmp_path / "out", "--continue", path, "--frames", 2 * LENGTH)
        assert "rows of 3 clips are sampled, the model was trained on 2 at most" in shown

    def test_both_are_refused(self, made: Made, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="give only one of them"):
            self._regen(made, tmp_path, "--image", "a.png", "--continue", "b.mp4")


def test_what_a_model_was_not_trained_for_is_told(tmp_path: Path) -> None:
    image = read_image(_picture(tmp_path / "a.png", moving_square(1, 32, 32)[0]), (32, 32))
    assert notes(image, FlowConfig().given_content, 0.1, 1, 1) == [
        "this model was not trained with given images (diffusion.given_content is 0)"
    ]
    write_video(tmp_path / "a.mp4", numbered_frames(9), fps=8)
    video = read_video(tmp_path / "a.mp4", (32, 32), most_clips=1, length=5, fps=8.0)
    assert len(notes(replace(video), 0.2, 0.0, 2, 1)) == 2
    assert notes(None, 0.0, 0.0, 1, 1) == []
    assert notes(None, 0.0, 0.0, 3, 1) == ["rows of 3 clips are sampled, the model was trained on 1 at most"]
