"""An exported embedder as diffusers opens it: the pixels of `Codec`, whatever the variant, precision and length."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from regen_dist.config import load_config
from regen_dist.config.embedder import EmbedderConfig
from regen_dist.errors import ConfigError, DataError
from regen_dist.inference.codec import PACKAGED_EMBEDDER, Codec
from regen_dist.inference.export import ExportOptions, export_model
from regen_dist.inference.hub.inlining import own_module
from regen_dist.inference.latent_space import read_statistics
from regen_dist.models.encoder import Latents
from regen_dist.observe.hardware import inference_dtype
from tests.helpers.checkpoints import saved_run
from tests.helpers.tiny import clips, tiny_dataset

CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "regen": {},
    "baseline": {"model__kind": "magvit2", "diffusion": {"steps": 4}},  # which it takes nothing from
    "bf16": {"engine__precision": "bf16"},
    "in_context": {"model__conditioning__kind": "in_context"},
    "learned": {"model__conditioning__time": "learned", "model__decoder__linear": False},
    "windows": {"model__decoder__attention": {"pattern": "window", "window": [3, 2, 2], "backend": "eager"}},
    "velocity": {"diffusion": {"target": "velocity", "path": "cosine_vp", "sampler": "heun", "steps": 2}},
}


def _exported(folder: Path, *, export: dict[str, Any] | None = None, **changes: Any) -> Path:
    run = saved_run(folder / "runs", **changes)
    export_model(run.folder, folder / "model", ExportOptions(**{"statistics_clips": 0, **(export or {})}))
    return folder / "model"


def _ours(folder: Path) -> Any:
    """Load an export by the class in this package."""
    from regen_dist.inference.hub.embedder import VideoEmbedder

    return VideoEmbedder.from_pretrained(folder)


def _opened(folder: Path, **options: Any) -> Any:
    """Open a folder by the module of code in it, as diffusers does; not by our class."""
    from diffusers import AutoModel

    found = AutoModel.from_pretrained(str(folder), trust_remote_code=True, **options)
    assert type(found).__module__.startswith("diffusers_modules.")
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_gives_the_pixels_of_the_codec(tmp_path: Path, variant: str) -> None:
    """Latents and frames, of two clips and of images, bit for bit, in the precision that it was trained in."""
    folder = _exported(tmp_path, **VARIANTS[variant])
    model, codec = _opened(folder), Codec.load(folder, device=CPU)
    steps = 1 if variant == "baseline" else codec.config.diffusion.steps
    times = torch.tensor([0.0, 2.0, 4.0] if variant == "baseline" else [0.0, 0.5, 4.25])
    for frames in (5, 1):
        video = clips(2, frames)
        latents = codec.encode(video)
        found = model.encode(video).latent_dist.mode()
        expected = torch.stack(latents, 2) if frames > 1 else latents.content.unsqueeze(2)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        at = times if frames > 1 else torch.zeros(1)
        torch.testing.assert_close(
            model.decode(expected, times=at, seed=3).sample, codec.decode(latents, at, steps=steps, seed=3),
            rtol=0, atol=0,
        )  # fmt: skip


def test_long_videos_are_rows_of_clips(tmp_path: Path) -> None:
    """Twelve frames are three clips of five, the last filled up; each decodes as by itself, with the noise of its own
    times, in full or for the first frames alone; slicing changes nothing."""
    folder = _exported(tmp_path)
    model, codec = _opened(folder), Codec.load(folder, device=CPU)
    video = clips(2, 12)
    rows = model.encode(video).latent_dist.mode()
    assert rows.shape == (2, 8, 6, 4, 4)
    filled = torch.cat([video, video[:, :, -1:].expand(-1, -1, 3, -1, -1)], 2)
    for clip in range(3):
        latents = codec.encode(filled[:, :, 5 * clip : 5 * clip + 5])
        torch.testing.assert_close(rows[:, :, 2 * clip : 2 * clip + 2], torch.stack(latents, 2), rtol=0, atol=1e-5)
        own = Latents(rows[:, :, 2 * clip], rows[:, :, 2 * clip + 1])
        expected = codec.decode(own, torch.arange(5), starts=[5.0 * clip] * 2)
        made = model.decode(rows).sample
        torch.testing.assert_close(made[:, :, 5 * clip : 5 * clip + 5], expected, rtol=0, atol=1e-5)
    assert torch.equal(model.decode(rows, num_frames=12).sample, made[:, :, :12])
    decoded: list[int] = []
    model.decoder.register_forward_hook(lambda *args: decoded.append(1))
    assert torch.equal(model.decode(rows[:1], num_frames=7).sample, made[:1, :, :7])
    assert len(decoded) == 2, "clips that were not asked for"
    with pytest.raises(Exception, match="hold 15 frames, asked for 16"):
        model.decode(rows, num_frames=16)
    model.enable_slicing()
    torch.testing.assert_close(model.encode(video).latent_dist.mode(), rows, rtol=0, atol=1e-5)
    assert model(video).sample.shape == video.shape


def test_tiles(tmp_path: Path) -> None:
    """Windows give the same frames in tiles; full attention refuses them; they can be left again."""
    windows = _opened(_exported(tmp_path / "windows", **VARIANTS["windows"]))
    video = clips(1, 5, 96, 160)
    latents = windows.encode(video).latent_dist.mode()
    whole = windows.decode(latents).sample
    windows.enable_tiling(64)
    torch.testing.assert_close(windows.encode(video).latent_dist.mode(), latents, rtol=0, atol=1e-5)
    seen = []
    windows._inner.decoder.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-2:]))
    torch.testing.assert_close(windows.decode(latents).sample, whole, rtol=0, atol=1e-4)
    assert len(seen) > 1
    windows.disable_tiling()
    windows.decode(latents)
    assert seen[-1] == whole.shape[-2:]
    full = _opened(_exported(tmp_path / "full"))
    with pytest.raises(Exception, match="attends over whole frames"):
        full.enable_tiling()


def test_types_and_moves(tmp_path: Path) -> None:
    """The dtype that is asked for; then another one; latents come in it, frames in float32."""
    folder = _exported(tmp_path, engine__precision="bf16")
    assert _opened(folder).dtype == inference_dtype("bf16", torch.device("cpu"))
    model = _opened(folder, torch_dtype=torch.float32)
    assert model.dtype == torch.float32
    exact = model.encode(clips(1)).latent_dist.mode()
    made = model.decode(exact).sample
    half = model.to(torch.bfloat16)
    rounded = half.encode(clips(1)).latent_dist.mode()
    assert (exact.dtype, rounded.dtype, half.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert half.decode(rounded).sample.dtype == torch.float32
    assert 0 < float((half.decode(rounded).sample - made).abs().mean()) < 0.1


def test_float16_is_too_small(tmp_path: Path) -> None:
    """Activations of the packaged embedder exceed it: said as such, and not as broken weights."""
    export_model(PACKAGED_EMBEDDER, tmp_path / "model", ExportOptions())
    with pytest.raises(Exception, match=r"in float16 .* Load it with torch_dtype=torch.bfloat16"):
        _opened(tmp_path / "model", torch_dtype=torch.float16).encode(clips(1, 17))


def test_the_latents_have_a_distribution(tmp_path: Path) -> None:
    """The noise that the decoder was trained to bear, drawn by the generator that is given; none where there was
    none."""
    noisy = _opened(_exported(tmp_path / "noisy", model__latent__noise_std=0.25)).encode(clips(4)).latent_dist
    drawn = noisy.sample(torch.Generator().manual_seed(1))
    assert torch.equal(drawn, noisy.sample(torch.Generator().manual_seed(1)))
    assert float((drawn - noisy.mode()).std()) == pytest.approx(0.25, rel=0.1)
    quiet = _opened(_exported(tmp_path / "quiet")).encode(clips(1)).latent_dist
    assert torch.equal(quiet.sample(), quiet.mode())


def test_statistics(tmp_path: Path) -> None:
    """Means and stds of content and motion as they were measured, and one factor that makes the std of all latents
    1."""
    shards = tiny_dataset(tmp_path / "data")
    folder = _exported(tmp_path, export={"statistics_clips": 6, "data": str(shards)})
    config, measured = _opened(folder).config, read_statistics(folder / "statistics.json")
    assert measured is not None
    assert measured.clips is not None
    assert measured.clips.motion is not None
    for kind, part in enumerate((measured.clips.content, measured.clips.motion)):
        assert config.latents_mean[kind] == part.mean.tolist()
        assert config.latents_std[kind] == part.std.tolist()
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(getattr(config, f"latents_{name}"))[..., None] for name in ("mean", "std"))
    values = mean + std * torch.randn(2, 8, 10_000, generator=generator)
    assert float((values * config.scaling_factor).std()) == pytest.approx(1.0, rel=0.01)
    bare = _opened(_exported(tmp_path / "bare")).config
    assert (bare.latents_mean, bare.latents_std, bare.scaling_factor) == (None, None, 1.0)


@pytest.mark.parametrize("saved_by", ["package", "module"])
def test_what_was_saved_opens_again(tmp_path: Path, saved_by: str) -> None:
    """Our class and that of the exported module both save code, config and weights, with which diffusers gets the same
    pixels, and the statistics as they were."""
    folder = _exported(tmp_path)
    model = _ours(folder) if saved_by == "package" else _opened(folder)
    model.save_pretrained(tmp_path / "again")
    again = _opened(tmp_path / "again")
    assert torch.equal(again(clips(1)).sample, model(clips(1)).sample)
    hidden = ("_name_or_path", "_diffusers_version", "_use_default_values")
    one, other = ({name: value for name, value in each.config.items() if name not in hidden} for each in (model, again))
    assert one == other
    shutil.rmtree(folder)
    assert torch.equal(_ours(tmp_path / "again")(clips(1)).sample, again(clips(1)).sample)


def test_an_export_is_not_saved_over(tmp_path: Path) -> None:
    """diffusers would go on to open the weights that its index names, so that the saved ones were lost."""
    model = _opened(_exported(tmp_path))
    with pytest.raises(Exception, match="holds an exported model; save into another folder"):
        model.save_pretrained(str(tmp_path / "model"))
    assert not (tmp_path / "model" / "diffusion_pytorch_model.safetensors").exists()


def test_what_was_pushed_opens_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub in the form of a folder: what is uploaded is a model that opens."""
    place = tmp_path / "hub"

    def upload(repo_id: str, folder_path: str, **options: Any) -> str:
        shutil.copytree(folder_path, place / repo_id)
        return repo_id

    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    hub: dict[str, Any] = {
        "create_repo": lambda name, **options: SimpleNamespace(repo_id=name),
        "load_or_create_model_card": lambda *args, **options: card,
        "populate_model_card": lambda found: found,
        "upload_folder": upload,
    }
    for name, function in hub.items():
        monkeypatch.setattr(f"diffusers.utils.hub_utils.{name}", function)
    model = _ours(_exported(tmp_path))
    model.push_to_hub("somebody/embedder")
    found = _opened(place / "somebody" / "embedder")
    assert torch.equal(found(clips(1)).sample, model(clips(1)).sample)


def test_models_of_one_process_do_not_disturb_each_other(tmp_path: Path) -> None:
    """diffusers runs the module again for the second, which leaves the first as it was."""
    baseline, regen = (_exported(tmp_path / name, **VARIANTS[name]) for name in ("baseline", "regen"))
    first = _opened(baseline)
    latents = first.encode(clips(1)).latent_dist.mode()
    before = first.decode(latents).sample
    second = _opened(regen)
    assert type(second) is type(first)
    assert torch.equal(first.decode(latents).sample, before)
    assert torch.equal(first.encode(clips(1)).latent_dist.mode(), latents)


def test_an_export_of_before_gets_what_diffusers_needs(tmp_path: Path) -> None:
    """Exported again, with its weights, card and statistics as they are; other weights, steps or types are refused."""
    folder = _exported(tmp_path)
    wanted = _opened(folder)(clips(1)).sample
    for path in folder.iterdir():
        if path.name not in ("config.yaml", "model.safetensors", "README.md"):
            path.unlink()
    export_model(folder, tmp_path / "again", ExportOptions())
    for name in ("config.yaml", "model.safetensors", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert torch.equal(_opened(tmp_path / "again")(clips(1)).sample, wanted)
    for options in ({"step": 7}, {"dtype": "bfloat16"}, {"data": "x"}, {"weights": "plain"}):
        with pytest.raises(Exception, match="export"):
            export_model(folder, tmp_path / "third", ExportOptions(**options))  # type: ignore[arg-type]
    assert not (tmp_path / "third").exists()


def test_exporting_needs_no_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same folder, where it cannot be imported; which modules do so at once a contract of imports says."""
    wanted = _exported(tmp_path)
    own_module.cache_clear()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    export_model(tmp_path / "runs" / "tiny", tmp_path / "other", ExportOptions(statistics_clips=0))
    for path in wanted.iterdir():
        assert (tmp_path / "other" / path.name).read_bytes() == path.read_bytes()


def test_the_snippet_of_the_card_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _exported(tmp_path)
    card = (folder / "README.md").read_text()
    assert "| data fingerprint | `f1` |" in card
    (_, found) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(found.replace("PATH/OF/THIS/FOLDER", str(folder)), {})
    assert capsys.readouterr().out.strip() == "(1, 3, 5, 32, 32)"


def _module(folder: Path) -> ModuleType:
    name, text = own_module()
    (folder / name).write_text(text)
    spec = importlib.util.spec_from_file_location("exported_here", folder / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["exported_here"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "preset", sorted(Path(__file__).parents[4].glob("configs/embedder/*.yaml")), ids=lambda path: path.stem
)
def test_its_config_is_that_of_the_package(preset: Path, tmp_path: Path) -> None:
    """Without pydantic: every value and property of the presets' models, and what does not fit is refused."""
    real = load_config(preset)
    assert isinstance(real, EmbedderConfig)
    module = _module(tmp_path)
    model = module.ModelConfig(**real.model.model_dump(mode="json"))
    _same(model, real.model)
    _same(module.DiffusionConfig(**real.diffusion.model_dump(mode="json")), real.diffusion)
    assert (model.num_frames, model.encoder.spatial) == (real.model.num_frames, real.model.encoder.spatial)
    with pytest.raises(ValueError, match="must multiply to temporal_compression"):
        module.ModelConfig(**real.model.model_dump(mode="json") | {"temporal_compression": 5})
    with pytest.raises(ValueError, match="has no colour"):
        module.ModelConfig(**real.model.model_dump(mode="json"), colour=1)
    with pytest.raises(ValueError, match="needs encoder"):
        module.ModelConfig()
    with pytest.raises(AttributeError, match="frozen"):
        model.kind = "magvit2"


def _same(found: Any, real: Any) -> None:
    if hasattr(real, "model_dump"):
        for name in type(real).model_fields:
            _same(getattr(found, name), getattr(real, name))
    elif isinstance(real, tuple):
        assert len(found) == len(real)
        for one, other in zip(found, real, strict=True):
            _same(one, other)
    else:
        assert found == real


def test_videos_that_do_not_fit(tmp_path: Path) -> None:
    model = _ours(_exported(tmp_path))
    for shape in [(2, 3, 5, 32), (1, 3, 5, 30, 32), (1, 4, 5, 32, 32), (1, 3, 0, 32, 32)]:
        with pytest.raises(DataError):
            model.encode(torch.zeros(shape))


def test_latents_that_do_not_fit(tmp_path: Path) -> None:
    model = _ours(_exported(tmp_path, **VARIANTS["baseline"]))
    for wrong in (torch.zeros(1, 8, 3, 4, 4), torch.zeros(1, 4, 2, 4, 4), torch.zeros(1, 8, 4, 4)):
        with pytest.raises(DataError, match="two for each clip"):
            model.decode(wrong)
    latents: Tensor = torch.rand(1, 8, 2, 4, 4) / 4
    with pytest.raises(DataError, match="hold 5 frames, asked for 0"):
        model.decode(latents, num_frames=0)
    with pytest.raises(ConfigError, match="not times between"):
        model.decode(latents, times=torch.tensor([0.5]))
