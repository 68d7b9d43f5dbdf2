"""`regen evaluate` from videos to the page: a run, a diffusers autoencoder, trivial decoders, networks of the user."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from regen_dist.errors import ConfigError, DataError
from regen_dist.evaluation.evaluate import MEASURES, bootstrap_interval, summarise
from regen_dist.evaluation.evaluated_models import DiffusersCodec, load_models
from regen_dist.evaluation.metrics import VideoMeter
from regen_dist.inference.codec import Window
from regen_dist.inference.frames import SourceVideo, write_video
from regen_dist.observe.hardware import describe_machine
from tests.helpers.checkpoints import saved_run
from tests.helpers.video import moving_square
from tools.cli import app

diffusers = pytest.importorskip("diffusers")
FRAMES, HEIGHT, WIDTH = 9, 48, 64
WAN = {
    "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
    "temperal_downsample": [False, True, True], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
}  # fmt: skip


class Lpips(nn.Module):
    """The mean absolute difference, so that its figure can be told beforehand."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean((1, 2, 3))


class Features(nn.Module):
    """Mean and deviation of each colour, of frames or of video."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        return torch.cat([flat.mean(2), flat.std(2)], 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "videos").mkdir()
    for seed, name in enumerate(("one", "two", "three")):
        write_video(folder / "videos" / f"{name}.mp4", moving_square(FRAMES + 3, HEIGHT, WIDTH, seed), 10)
    saved_run(folder / "runs")
    torch.manual_seed(0)
    diffusers.AutoencoderKLWan(**WAN).save_pretrained(folder / "wan")
    torch.jit.script(Lpips()).save(str(folder / "lpips.pt"))
    torch.jit.script(Features()).save(str(folder / "features.pt"))
    return folder


def evaluate(place: Path, *options: object) -> Any:
    result = CliRunner().invoke(app, ["evaluate", str(place / "videos"), *map(str, options)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def facts(place: Path) -> dict[str, Any]:
    networks = ["--lpips", place / "lpips.pt", "--fvd", place / "features.pt", "--fid", place / "features.pt"]
    options = ["--frames", FRAMES, "--clip-frames", 5, "--segment-frames", 4, "--no-vmaf", *networks]
    models = ["--model", f"trained={place / 'runs' / 'tiny'}", "--model", place / "wan"]
    first = evaluate(place, *models, *options, "--out", place / "out")
    found: dict[str, Any] = json.loads((place / "out" / "evaluation.json").read_text())
    assert f"hash {found['protocol_hash']}" in first.output
    assert f"hash {found['source_hash']}" in first.output
    again = evaluate(place, *models, *options, "--out", place / "out")
    assert "9 frames of" in first.output
    assert "9 frames of" not in again.output, "what was measured is measured again"
    return found


def test_features_are_kept_whole_or_not_at_all(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file that was cut off beside whole measures ended every later evaluation in its folder."""

    def cut(file: Any, **_: object) -> None:
        (file if hasattr(file, "write") else open(file, "wb")).write(b"PK")  # noqa: SIM115
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", cut)
    options = ["--frames", 3, "--clip-frames", 3, "--no-vmaf", "--no-baselines", "--model", "mean"]
    with pytest.raises(OSError, match="No space left"):
        evaluate(place, *options, "--out", tmp_path / "out")
    assert list((tmp_path / "out").rglob("*.npz")) == []


def test_every_model_is_measured_on_every_video(facts: dict[str, Any]) -> None:
    assert [model["name"] for model in facts["models"]] == ["trained", "wan", "repeat_first", "blend", "mean"]
    for model in facts["models"]:
        assert [video["video"] for video in model["videos"]] == ["one", "three", "two"]
        summary = model["summary"]
        missing = {measure.key for measure in MEASURES if summary[measure.key]["mean"] is None}
        allowed = {"vmaf", "ms_ssim", *(["seam_ratio"] if model["costs"]["parameters"] == 0 else [])}
        assert missing <= allowed, model["name"]
        for key in ("psnr_db", "lpips", "flicker"):
            assert summary[key]["low"] <= summary[key]["mean"] <= summary[key]["high"]
    trained, wan = facts["models"][:2]
    assert trained["costs"]["encode_flops_per_frame"] > 0 < wan["costs"]["decode_flops_per_frame"]
    assert trained["costs"]["parameters"] > 0 < wan["costs"]["parameters"]
    # Two windows of 5 frames, each two latents of 8 channels at 6x8 cells of 16 bits; of Wan two latents of 4 channels.
    for model, channels in ((trained, 8), (wan, 4)):
        bits = 2 * 2 * channels * (HEIGHT // 8) * (WIDTH // 8) * 16 / (FRAMES * HEIGHT * WIDTH)
        assert model["summary"]["bits_per_pixel"]["mean"] == pytest.approx(bits)


def test_figures_of_a_decoder_that_is_known(place: Path, facts: dict[str, Any]) -> None:
    """`repeat_first` cuts nine frames into two clips that share the fifth, which both give by half."""
    repeat, blend = facts["models"][2], facts["models"][3]
    assert repeat["summary"]["bits_per_pixel"]["mean"] == pytest.approx(2 * 24 / FRAMES)
    assert blend["summary"]["bits_per_pixel"]["mean"] == pytest.approx(4 * 24 / FRAMES)
    for video in repeat["videos"]:
        frames = list(SourceVideo(place / "videos" / f"{video['video']}.mp4", max_frames=FRAMES).frames())
        shared = np.round((frames[0].astype(np.float64) + frames[4]) / 2)
        decoded = [frames[0]] * 4 + [shared] + [frames[4]] * 4
        meter, lpips = VideoMeter(), []
        for source, made in zip(frames, decoded, strict=True):
            meter.add(source, made.astype(np.uint8))
            lpips.append(np.abs(source.astype(np.float64) - made).mean() / 127.5)
        assert video["values"]["psnr_db"] == pytest.approx(meter.psnr_db, abs=0.02)
        assert video["values"]["lpips"] == pytest.approx(np.mean(lpips), abs=1e-3)
        assert video["curves"]["psnr_db"][0] == 100
        numbers = [frame["frame"] for frame in video["worst"]]
        assert video["worst"][0]["psnr_db"] == min(video["curves"]["psnr_db"])
        assert [frame["psnr_db"] for frame in video["worst"]] == sorted(frame["psnr_db"] for frame in video["worst"])
        assert len({number // 8 for number in numbers}) == len(numbers)


def test_the_page_holds_all_that_it_shows(place: Path, facts: dict[str, Any]) -> None:
    page = (place / "out" / "index.html").read_text()
    files = set(re.findall(r'"(media/[^"]+)"', page))
    assert len([name for name in files if name.endswith(".mp4")]) == 3 * (1 + 5)
    assert [name for name in sorted(files) if not (place / "out" / name).is_file()] == []
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page) == []
    assert facts["protocol_hash"] in page
    assert "<h1>Evaluation: videos</h1>" in page
    assert "MS-SSIM: its five scales take 161 pixels a side" in page
    embedded = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert [len(model["curves"]["psnr_db"]) for model in embedded["videos"][0]["models"]] == [FRAMES] * 5


def test_without_weights_it_says_so(place: Path) -> None:
    options = ["--model", "mean", "--no-baselines", "--no-vmaf", "--frames", 4, "--clip-frames", 5]
    result = evaluate(place, *options, "--out", place / "bare")
    for key, option in (("LPIPS", "--lpips"), ("rFVD", "--fvd"), ("rFID", "--fid")):
        assert f"{key}: not measured, for no weights were given ({option} FILE" in result.output
    found = json.loads((place / "bare" / "evaluation.json").read_text())
    assert found["models"][0]["summary"]["lpips"]["mean"] is None


def test_a_diffusers_autoencoder_decodes_as_by_itself(place: Path) -> None:
    codec = DiffusersCodec(place / "wan", 5)
    clip = torch.rand(1, 3, 5, 48, 64) * 2 - 1
    found = codec.decode_windows([Window(codec.encode(clip), 0.0, 5)], torch.arange(5.0))
    with torch.no_grad():
        expected = codec.model.decode(codec.model.encode(clip).latent_dist.mode()).sample.clamp(-1, 1)
    assert torch.equal(found, expected)
    other = DiffusersCodec(place / "wan", 7)
    window = Window(other.encode(torch.zeros(1, 3, 7, 48, 64)), 0.0, 7)
    with pytest.raises(DataError, match=r"n r \+ 1 frames"):
        other.decode_windows([window], torch.arange(7.0))


def test_what_changes_the_figures_is_measured_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other clips of the same weights; a deleted video of the page; another machine. Nothing else."""
    out = place / "again"
    fixed = ["--model", place / "wan", "--no-baselines", "--no-vmaf", "--frames", 5, "--out", out]
    assert evaluate(place, *fixed, "--clip-frames", 5).output.count("wan: ") == 3
    (out / "media" / "wan" / "two.mp4").unlink()
    assert evaluate(place, *fixed, "--clip-frames", 5).output.count("wan: ") == 1
    assert evaluate(place, *fixed, "--clip-frames", 1).output.count("wan: ") == 3
    assert "wan: " not in evaluate(place, *fixed, "--clip-frames", 1).output
    another = {**describe_machine(), "device": "another"}
    monkeypatch.setattr("regen_dist.evaluation.evaluate.describe_machine", lambda: another)
    assert evaluate(place, *fixed, "--clip-frames", 1).output.count("wan: ") == 3, "its times are another machine's"


@pytest.mark.parametrize(("folder", "file"), [("wan", "config.json"), ("tiny", "config.yaml")])
def test_settings_of_a_model_are_part_of_its_fingerprint(place: Path, tmp_path: Path, folder: str, file: str) -> None:
    source = place / folder if folder == "wan" else place / "runs" / folder
    shutil.copytree(source, tmp_path / folder)
    text = (tmp_path / folder / file).read_text()
    other = {
        "wan": ('"num_res_blocks": 1', '"num_res_blocks": 1, "clip_output": false'),
        "tiny": ("omega: 10.0", "omega: 20.0"),
    }[folder]
    (tmp_path / folder / file).write_text(text.replace(*other))
    before, after = (
        load_models([str(each)], steps=1, clip_frames=5, baselines=False)[0]() for each in (source, tmp_path / folder)
    )
    assert before.fingerprint != after.fingerprint


def test_vmaf_is_measured_once_it_can_be(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command, after the extra with ffmpeg was installed."""
    fixed = ["--model", "mean", "--no-baselines", "--frames", 3, "--clip-frames", 3, "--out", tmp_path]

    def score() -> object:
        return json.loads((tmp_path / "evaluation.json").read_text())["models"][0]["summary"]["vmaf"]["mean"]

    with monkeypatch.context() as without:
        without.setitem(sys.modules, "imageio_ffmpeg", None)
        evaluate(place, *fixed)
        assert score() is None
    evaluate(place, *fixed)
    assert score() is not None
    assert "mean: " not in evaluate(place, *fixed).stderr


def test_videos_with_the_longest_names(tmp_path: Path) -> None:
    """Titles, as downloaders name files: 251 bytes and an ending leave no room in longer names built from it."""
    (tmp_path / "videos").mkdir()
    name = "é" * 125 + "x"
    write_video(tmp_path / "videos" / f"{name}.mp4", moving_square(3, HEIGHT, WIDTH), 10)
    only = ["--no-vmaf", "--no-baselines", "--model", "mean", "--clip-frames", 5, "--out", tmp_path / "out"]
    for _ in range(2):
        evaluate(tmp_path, *only)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["videos"][0]["name"] == name


def test_models_that_are_not_there_or_have_one_name_are_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model at .*nowhere: expected the folder of a run"):
        load_models(["nowhere"], steps=1, clip_frames=5, baselines=False)
    with pytest.raises(ConfigError, match="several models are called wan"):
        load_models([str(place / "wan"), f"wan={place / 'runs' / 'tiny'}"], steps=1, clip_frames=5, baselines=False)
    with pytest.raises(ConfigError, match="HEIGHTxWIDTH"):
        evaluate(place, "--crop", "256", "--out", place / "bad")
    (place / "other").mkdir(exist_ok=True)
    (place / "other" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ConfigError, match="'UNet2DModel' is no autoencoder"):
        load_models([str(place / "other")], steps=1, clip_frames=5, baselines=False)[0]()


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    """95% of the intervals of 30 videos' normal values hold the true mean, within what 200 draws can tell."""
    random = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        low, high = bootstrap_interval(random.normal(3, 1, 30).tolist())
        held += low <= 3 <= high  # type: ignore[operator]
    assert 0.88 <= held / 200 <= 0.99
    assert bootstrap_interval([1.0]) == (None, None)
    assert bootstrap_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_frechet_distances_are_of_all_videos_together() -> None:
    random = torch.Generator().manual_seed(0)
    source = [torch.randn(8, 3, generator=random) for _ in range(4)]
    features = [{"frames_source": each, "frames_decoded": each + 0.5} for each in source]
    values = {measure.key: None for measure in MEASURES}
    summary = summarise([{"values": values}] * 4, features)
    assert summary["rfid"]["mean"] == pytest.approx(0.75, rel=1e-4)
    assert summary["rfid"]["low"] == pytest.approx(summary["rfid"]["high"], rel=1e-3)  # the shift is equal in all
    assert (summary["rfid"]["count"], summary["rfvd"]["mean"]) == (32, None)
