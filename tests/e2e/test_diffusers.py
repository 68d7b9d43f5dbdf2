"""Exported models where this project is not installed: a virtual environment with torch, diffusers and transformers,
and nothing of ours, opens them by diffusers and gets the same pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from regen_dist.inference.codec import PACKAGED_EMBEDDER, Codec
from regen_dist.observe.hardware import inference_dtype
from tests.helpers.machine import clean_python, run_clean
from tests.helpers.ranks import run_regen
from tests.helpers.t2v import saved_parts
from tests.helpers.tiny import clips

EMBEDDER = """
import json
import numpy as np
import torch
from diffusers import AutoModel

folder, video, out = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
latents = model.encode(torch.from_numpy(np.load(video))).latent_dist.mode()
frames = model.decode(latents, num_frames=17).sample
between = model.decode(latents, times=torch.tensor([0.5, 7.25, 16.5])).sample
np.savez(out, latents=latents.float().numpy(), frames=frames.numpy(), between=between.numpy())
print(json.dumps({"class": type(model).__name__, "dtype": str(model.dtype), "scale": model.config.scaling_factor}))
"""
PIPELINE = """
import json
import numpy as np
import torch
from diffusers import AutoModel, DiffusionPipeline

folder, out = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
found = pipeline(["a blue star", "a red square"], num_frames=7, guidance_scale=3.0, output_type="uint8", seed=2)
np.save(out, found.frames)
transformer = AutoModel.from_pretrained(folder, trust_remote_code=True)
print(json.dumps({"fps": found.fps, "class": type(transformer).__name__, "shape": found.frames.shape}))
"""


def _regen(*arguments: object, log: Path) -> str:
    found = run_regen(*arguments, log=log, timeout_s=240)
    assert found == 0, log.read_text()
    return log.read_text()


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clean_python(tmp_path_factory.mktemp("clean") / "venv")


def test_the_packaged_embedder(python: Path, tmp_path: Path) -> None:
    """`regen checkpoint export --out FOLDER` and five lines of diffusers: latents and frames bit for bit, at times
    between frames too; in bfloat16, where this machine has it."""
    _regen("checkpoint", "export", "--out", tmp_path / "pocket", log=tmp_path / "export.log")
    video = clips(2, 17, 64, 96)
    np.save(tmp_path / "video.npy", video.numpy())
    arguments = (tmp_path / "pocket", tmp_path / "video.npy", tmp_path / "made.npz")
    said = run_clean(python, EMBEDDER, *arguments, home=tmp_path)
    assert (said["class"], said["dtype"]) == ("VideoEmbedder", str(inference_dtype("bf16", torch.device("cpu"))))
    assert 1.0 < float(str(said["scale"])) < 10.0
    codec = Codec.load(PACKAGED_EMBEDDER, device=torch.device("cpu"))
    latents = codec.encode(video)
    made = np.load(tmp_path / "made.npz")
    np.testing.assert_array_equal(made["latents"], torch.stack(latents, 2).float().numpy())
    np.testing.assert_array_equal(made["frames"], codec.decode(latents, torch.arange(17)).numpy())
    between = codec.decode(latents, torch.tensor([0.5, 7.25, 16.5]))
    np.testing.assert_array_equal(made["between"], between.numpy())


def test_text_to_video(python: Path, tmp_path: Path) -> None:
    """The pipeline makes the very frames of which `regen generate` makes its files."""
    parts = saved_parts(tmp_path)
    arguments = ("checkpoint", "export", parts.run.folder, "--embedder", parts.embedder.folder)
    said = _regen(*arguments, "--out", tmp_path / "model", log=tmp_path / "export.log")
    assert "model_index.json" in said
    shown = run_clean(python, PIPELINE, tmp_path / "model", tmp_path / "made.npy", home=tmp_path)
    assert (shown["class"], shown["fps"], shown["shape"]) == ("TextToVideoTransformer", 8.0, [2, 7, 32, 32, 3])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue star\na red square\n")
    fixed = ("--prompts", prompts, "--frames", 7, "--guidance", 3.0, "--seed", 2)
    _regen(
        "generate", "--run", parts.run.folder, "--embedder", parts.embedder.folder, *fixed, "--out", tmp_path / "ours",
        log=tmp_path / "generate.log",
    )  # fmt: skip
    _write_theirs(np.load(tmp_path / "made.npy"), tmp_path / "theirs")
    for number in range(2):
        ours, theirs = (tmp_path / name / f"{number:05d}.mp4" for name in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()


def _write_theirs(videos: np.ndarray, folder: Path) -> None:  # type: ignore[type-arg]
    """Encode frames as `regen generate` does, so that equal frames are equal files."""
    from regen_dist.inference.frames import write_video

    folder.mkdir()
    for number, frames in enumerate(videos):
        write_video(folder / f"{number:05d}.mp4", list(frames), 8.0)
