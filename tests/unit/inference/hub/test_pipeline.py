"""An exported text-to-video model as diffusers opens it: the videos of `regen generate`."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.errors import CheckpointError
from regen_dist.inference.codec import Codec
from regen_dist.inference.encoder import check_embedder
from regen_dist.inference.export import ExportOptions, export_model
from regen_dist.inference.generate import Prompt, _generated, embed_prompts, load_text_encoder
from regen_dist.inference.generation_settings import resolve_settings
from regen_dist.inference.hub.inlining import own_module, pipeline_module
from regen_dist.inference.sampler import Text, TextToVideoModel
from regen_dist.models.text import make_small_encoder
from tests.helpers.checkpoints import model_state, save_checkpoint, saved_run
from tests.helpers.networks import frozen_model, save_autoencoder
from tests.helpers.t2v import CAPTIONS, Parts, saved_parts, saved_t2v

CPU = torch.device("cpu")
PROMPTS = ["a small red circle", "a blue star stands still and does not move at all"]


def _export(folder: Path, parts: Parts, **options: Any) -> str:
    out = folder / "model"
    export_model(parts.run.folder, out, ExportOptions(**{"embedder": parts.embedder.folder, **options}))
    return str(out)


def _opened(folder: str, **options: Any) -> Any:
    from diffusers import DiffusionPipeline

    found = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
    parts = (found, found.transformer, found.vae, found.text_encoder)
    assert all(type(part).__module__.startswith("diffusers_modules.") for part in parts)
    return found


def _expected(parts: Parts, negative: str | None = None, **asked: Any) -> Any:
    """uint8 [B, T, H, W, 3], by this package, from the runs."""
    model, codec = TextToVideoModel.load(parts.run.folder, device=CPU), Codec.load(parts.embedder.folder, device=CPU)
    prompts = [Prompt(number, text) for number, text in enumerate(PROMPTS)]
    embedded = embed_prompts(load_text_encoder(model.space, None, CPU), model.space, prompts, negative)
    settings = resolve_settings(model, negative=negative, **asked)
    made = _generated(model, codec, prompts, embedded, settings, batch=len(prompts), media_of=lambda prompt: None)
    return np.stack([np.stack([frame for part in frames for frame in part]) for _, frames in made])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_generates_what_regen_generate_does(tmp_path: Path, precision: str) -> None:
    """The same pixels: by default, and with every setting; of images; of several clips at another frame rate; in the
    precisions that they were trained in. The runs may be gone."""
    parts = saved_parts(tmp_path, embedder={"engine__precision": precision}, engine__precision=precision)
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"num_frames": 1}, {"frames": 1}),
        (
            {
                "height": 48, "width": 32, "num_frames": 23, "fps": 20.0, "num_inference_steps": 2,
                "guidance_scale": 3.0, "sampler": "heun", "num_decode_steps": 2, "seed": 5,
                "negative_prompt": CAPTIONS[1],
            },
            {
                "size": (48, 32), "frames": 23, "fps": 20.0, "steps": 2, "guidance": 3.0, "sampler": "heun",
                "decode_steps": 2, "seed": 5, "negative": CAPTIONS[1],
            },
        ),
    ]  # fmt: skip
    expected = [_expected(parts, **theirs) for _, theirs in cases]
    folder = _export(tmp_path, parts)
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(tmp_path / "t5")
    pipeline = _opened(folder)
    for (ours, _), wanted in zip(cases, expected, strict=True):
        found = pipeline(PROMPTS, output_type="uint8", **ours).frames
        assert found.shape == wanted.shape
        np.testing.assert_array_equal(found, wanted)
    assert len(np.unique(expected[0])) > 50  # pictures, not one colour


def test_a_copy_of_a_pipeline_is_one(tmp_path: Path) -> None:
    """With its own embedder and text encoder: those of the training may be gone."""
    folder = _export(tmp_path, saved_parts(tmp_path))
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(tmp_path / "t5")
    export_model(Path(folder), tmp_path / "copy", ExportOptions())
    files = [{str(path.relative_to(each)) for path in Path(each).rglob("*")} for each in (folder, tmp_path / "copy")]
    assert files[0] == files[1]
    frames = [_opened(str(each))(PROMPTS[0], output_type="uint8").frames for each in (folder, tmp_path / "copy")]
    np.testing.assert_array_equal(*frames)


def test_forms_of_frames(tmp_path: Path) -> None:
    """Numbers in [0, 1], tensors, pictures, and a tuple; one prompt is a batch of one; a generator draws the seed."""
    pipeline = _opened(_export(tmp_path, saved_parts(tmp_path)))
    whole = pipeline(PROMPTS[0], output_type="uint8").frames
    made = pipeline(PROMPTS[0])
    assert (made.frames.shape, made.frames.dtype, made.fps) == ((1, 5, 32, 32, 3), np.float32, 8.0)
    np.testing.assert_array_equal((made.frames * 255).round(), whole)
    tensor = pipeline(PROMPTS[0], output_type="pt", return_dict=False)[0]
    assert torch.equal((tensor * 255).round().byte(), torch.from_numpy(whole).movedim(-1, 2))
    np.testing.assert_array_equal(np.asarray(pipeline(PROMPTS[0], output_type="pil").frames[0][2]), whole[0, 2])
    drawn = [
        pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(seed), output_type="uint8").frames
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()
    refused = {"np, uint8, pt, pil": {"output_type": "gif"}, "give both": {"height": 32}, "fps is -1": {"fps": -1.0}}
    refused["it can be euler, heun, dpmpp_2m"] = {"sampler": "ddim"}
    refused["generator is a list; give one torch.Generator"] = {"generator": [torch.Generator()]}
    for said, wrong in refused.items():
        with pytest.raises(Exception, match=said):
            pipeline(PROMPTS[0], **wrong)
    for textless in (["blurred"], 3):
        with pytest.raises(Exception, match="give one text, which all prompts share"):
            pipeline(PROMPTS[0], negative_prompt=textless)
    for textless in ("", " \n", [], None, 3, ["a red circle", ""], ["a red circle", None]):
        with pytest.raises(Exception, match="give a text with words in it"):
            pipeline(textless)
    torch.nn.init.constant_(pipeline.transformer.half().head.weight, 6e4)
    with pytest.raises(Exception, match=r"in float16 the model .* Load it with torch_dtype"):
        pipeline(PROMPTS[0])


def test_a_cut_prompt_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts with more tokens than the training's captions, and none else."""
    pipeline, told = _opened(_export(tmp_path, saved_parts(tmp_path))), list[str]()
    monkeypatch.setattr(logging.getLogger("diffusers"), "warning", told.append)
    pipeline(PROMPTS, num_inference_steps=1)
    assert told == [f"a prompt has more tokens than the text encoder takes and was cut: {PROMPTS[1]}…"]


def test_what_was_saved_opens_again(tmp_path: Path) -> None:
    """The pipeline, with all its parts, in a folder without the export."""
    folder = _export(tmp_path, saved_parts(tmp_path))
    assert 'found("a prompt").frames' in (Path(folder) / "README.md").read_text()
    pipeline = _opened(folder)
    wanted = pipeline(PROMPTS, output_type="uint8").frames
    with pytest.raises(Exception, match="holds an exported model; save into another folder"):
        pipeline.save_pretrained(folder)
    pipeline.save_pretrained(tmp_path / "again")
    shutil.rmtree(tmp_path / "model")
    found = _opened(str(tmp_path / "again"))
    np.testing.assert_array_equal(found(PROMPTS, output_type="uint8").frames, wanted)


def test_the_hub_gives_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub in the form of a folder, of which diffusers fetches what it selects: the tokenizer too."""
    folder = Path(_export(tmp_path, saved_parts(tmp_path)))
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names], sha="1")

    def fetch(repository: str, allow_patterns: Any = "*", ignore_patterns: Any = None, **options: Any) -> str:
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    for place in ("pipelines.pipeline_utils", "utils.dynamic_modules_utils"):
        monkeypatch.setattr(f"diffusers.{place}.model_info", lambda *args, **options: info)
        fetch_one = lambda repository, file, **options: f"{fetch(repository, file)}/{file}"  # noqa: E731
        monkeypatch.setattr(f"diffusers.{place}.hf_hub_download", fetch_one)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.snapshot_download", fetch)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils._resolve_revision", lambda *args, **options: None)
    found = _opened("somebody/model")(PROMPTS, output_type="uint8").frames
    np.testing.assert_array_equal(found, _opened(str(folder))(PROMPTS, output_type="uint8").frames)


def test_the_transformer_alone(tmp_path: Path) -> None:
    """Without an embedder the export is no pipeline; AutoModel opens it, and predicts what the run's model does. Saved
    by our class it opens again."""
    from diffusers import AutoModel

    from regen_dist.inference.hub.pipeline import TextToVideoTransformer

    run = saved_t2v(tmp_path / "runs", saved_run(tmp_path / "runs"))
    export_model(run.folder, tmp_path / "model", ExportOptions())
    assert not (tmp_path / "model" / "model_index.json").exists()
    found = AutoModel.from_pretrained(str(tmp_path / "model"), trust_remote_code=True)
    generator = torch.Generator().manual_seed(0)
    noise, t = torch.randn(2, 8, 4, 4, 4, generator=generator), torch.tensor([0.3, 0.9])
    text = Text.of([torch.randn(length, run.model.text_width, generator=generator) for length in (2, 4)])
    expected = TextToVideoModel.load(run.folder, device=CPU).model(noise, t, *text)
    assert torch.equal(found(noise, t, *text).sample, expected)
    assert not torch.equal(found(noise, t, text.text).sample, expected)  # of the mask all tokens count
    ours = TextToVideoTransformer.from_pretrained(tmp_path / "model")
    ours.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(str(tmp_path / "again"), trust_remote_code=True)
    assert torch.equal(again(noise, t, *text, return_dict=False)[0], expected)
    assert again.config.space["statistics"] == found.config.space["statistics"]


def test_it_is_one_copy_of_the_weights(tmp_path: Path) -> None:
    """The transformer's file is another name of the export's, and the export is still one of this package."""
    parts = saved_parts(tmp_path)
    folder = Path(_export(tmp_path, parts))
    second = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert os.path.samefile(folder / "model.safetensors", second)
    assert TextToVideoModel.load(folder, device=CPU).facts()["step"] == 7
    assert Codec.load(folder / "vae", device=CPU).step == 7
    export_model(folder, tmp_path / "again", ExportOptions(embedder=folder / "vae", text=str(folder / "text_encoder")))
    found = _opened(str(tmp_path / "again"))(PROMPTS, output_type="uint8").frames
    np.testing.assert_array_equal(found, _opened(str(folder))(PROMPTS, output_type="uint8").frames)


def test_the_embedder_of_the_config(tmp_path: Path) -> None:
    """The embedder that a run generates with while it trains is taken where none is given."""
    embedder = saved_run(tmp_path / "runs")
    parts = saved_parts(tmp_path, generation__embedder=str(embedder.folder))
    folder = _export(tmp_path, parts, embedder=None)
    assert (Path(folder) / "model_index.json").is_file()


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    """Another embedder, another text encoder: refused, and nothing is written."""
    parts = saved_parts(tmp_path)
    other = saved_run(tmp_path / "other", model__latent__channels=8, step=9, model__encoder__out_blocks=2)
    with pytest.raises(CheckpointError, match="is not the one that the latents were made with"):
        _export(tmp_path, parts, embedder=other.folder)
    make_small_encoder(["other words"], tmp_path / "t6", width=16)
    with pytest.raises(CheckpointError, match="text encoder is not the one"):
        _export(tmp_path, parts, text=str(tmp_path / "t6"))
    assert not (tmp_path / "model").exists()


def test_an_embedder_on_another_encoder_is_no_part(tmp_path: Path) -> None:
    """Asked for it is refused; that of the run's config is left out."""
    model = frozen_model("wan", save_autoencoder("wan", tmp_path / "wan"), temporal_compression=4)
    at = {"generation__embedder": str(tmp_path / "runs" / "tiny")}
    parts = saved_parts(tmp_path, embedder={"model": model}, model__latent_channels=4, **at)
    with pytest.raises(CheckpointError, match="somebody else's encoder"):
        _export(tmp_path, parts)
    assert not (Path(_export(tmp_path, parts, embedder=None)) / "model_index.json").exists()


def test_a_copy_that_becomes_a_pipeline_says_so(tmp_path: Path) -> None:
    """Its card shows how to open it; what else somebody wrote there stays."""
    parts = saved_parts(tmp_path)
    card = Path(_export(tmp_path, parts, embedder=None)) / "README.md"
    card.write_text(card.read_text() + "My license.\n")
    export_model(card.parent, tmp_path / "copy", ExportOptions(embedder=parts.embedder.folder))
    found = (tmp_path / "copy" / "README.md").read_text()
    assert 'found("a prompt").frames' in found
    assert "AutoModel" not in found
    assert found.endswith("My license.\n")


def test_what_is_checked_is_what_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedder's run goes on training meanwhile; the embedder of the pipeline is that of the latents."""
    parts = saved_parts(tmp_path)

    def slow_check(*args: Any) -> None:
        check_embedder(*args)
        save_checkpoint(CheckpointFolder(parts.embedder.checkpoints), 9, model_state(parts.embedder, seed=9))

    monkeypatch.setattr("regen_dist.inference.export.check_embedder", slow_check)
    assert Codec.load(Path(_export(tmp_path, parts)) / "vae", device=CPU).step == 7


@pytest.mark.parametrize("module", [own_module, pipeline_module], ids=["embedder", "pipeline"])
def test_the_modules_lack_nothing(module: Any, tmp_path: Path) -> None:
    """Every name in them is defined, nothing of this package is imported, and neither is what it alone needs."""
    name, text = module()
    (tmp_path / name).write_text(text)
    program = Path(sys.executable).parent / "ruff"
    command = [program, "check", "--isolated", "--select", "F", tmp_path / name]
    if not program.exists():
        command[:1] = [sys.executable, "-m", "ruff"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    for absent in ("import regen_dist", "from regen_dist", "pydantic import", "import yaml", "deepspeed"):
        assert absent not in text, absent
