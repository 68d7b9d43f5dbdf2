"""An exported model is the checkpoint's weights, whole or not at all, and loads without DeepSpeed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from regen_dist.checkpoint import export as exporting
from regen_dist.checkpoint.export import check_shapes, model_shapes
from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.config.embedder import EmbedderConfig
from regen_dist.config.exported import load_export_config, load_t2v_export_config
from regen_dist.errors import CheckpointError, ConfigError, DataError
from regen_dist.inference import export as exporting_folders
from regen_dist.inference.codec import Codec
from regen_dist.inference.export import ExportOptions, export_model
from regen_dist.inference.hub.inlining import own_module, pipeline_module
from tests.helpers.checkpoints import model_state, save_checkpoint, saved_run
from tests.helpers.t2v import saved_t2v
from tests.helpers.tiny import clips, tiny_run

CPU = torch.device("cpu")
BARE = ExportOptions(statistics_clips=0)
FILES = {"model.safetensors", "config.yaml", "README.md"}
BY_DIFFUSERS = {"config.json", "diffusion_pytorch_model.safetensors.index.json"}


@pytest.fixture
def run(tmp_path: Path) -> EmbedderConfig:
    return saved_run(tmp_path / "runs")


def _files() -> set[str]:
    """Files of an exported embedder; diffusers' module among them takes seconds to make, so not on import."""
    return {*FILES, *BY_DIFFUSERS, own_module()[0]}


def _export(run: EmbedderConfig, **options: Any) -> Path:
    out = run.folder.parent.parent / "model"
    export_model(run.folder, out, ExportOptions(**{"statistics_clips": 0, **options}))
    return out


def _expected(run: EmbedderConfig, kind: str) -> dict[str, Tensor]:
    prefix = f"{kind}/"
    return {key.removeprefix(prefix): t for key, t in model_state(run).items() if key.startswith(prefix)}


def _frames(codec: Codec) -> Tensor:
    latents = codec.encode(clips(1))
    return codec.decode(latents, torch.tensor([0.0, 1.0, 4.0]))


@pytest.mark.parametrize(("weights", "kind"), [("ema", "ema"), ("plain", "master")])
def test_the_weights_are_those_of_the_checkpoint(run: EmbedderConfig, weights: str, kind: str) -> None:
    """Every parameter that two ranks saved in halves, whole, bit for bit; EMA and last ones are not mixed up."""
    out = _export(run, weights=weights)
    found, expected = load_file(out / "model.safetensors"), _expected(run, kind)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {path.name for path in out.iterdir()} == _files()


@pytest.mark.parametrize("changes", [{}, {"model__kind": "magvit2"}, {"engine__precision": "bf16"}])
def test_an_export_decodes_as_its_run_does(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The same frames, bit for bit, from the run and from the export; both codecs say what they are."""
    run = saved_run(tmp_path / "runs", **changes)
    one, other = Codec.load(run.folder, device=CPU), Codec.load(_export(run), device=CPU)
    assert torch.equal(_frames(one), _frames(other))
    assert (one.step, one.weights, one.kind, one.config.precision) == (7, "ema", run.model.kind, run.engine.precision)
    assert (other.step, other.weights, other.kind, other.config.precision) == (7, "ema", one.kind, one.config.precision)
    assert other.statistics is None


@pytest.mark.parametrize(
    "changes", [{"model__conditioning__kind": "in_context"}, {"model__conditioning__time": "learned"}], ids=str
)
def test_an_export_is_of_its_runs_variant(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The config that is stored says of which; there is no linear code here. Frames are close and not equal: where
    weights lie in a file decides how their rows are aligned, and that how products are summed."""
    run = saved_run(tmp_path / "runs", model__decoder__linear=False, **changes)
    one, other = Codec.load(run.folder, device=CPU), Codec.load(_export(run), device=CPU)
    assert one.config.model == other.config.model == run.model
    assert {*one.model.state_dict()} == {*other.model.state_dict()}
    torch.testing.assert_close(_frames(one), _frames(other), rtol=0, atol=1e-4)


def test_it_can_be_stored_in_bfloat16(run: EmbedderConfig) -> None:
    """Half the size; the values are the rounded ones, and it loads into the precision that it was trained in."""
    out = _export(run, dtype="bfloat16")
    found, expected = load_file(out / "model.safetensors"), _expected(run, "ema")
    assert all(torch.equal(found[name], expected[name].to(torch.bfloat16)) for name in expected)
    assert next(Codec.load(out, device=CPU).model.parameters()).dtype == torch.float32


def test_an_export_has_one_kind_of_weights(run: EmbedderConfig) -> None:
    """Whoever asks for the other kind is told, and does not silently get this one."""
    out = _export(run, weights="plain")
    assert Codec.load(out, device=CPU).weights == Codec.load(out, "plain", device=CPU).weights == "plain"
    with pytest.raises(CheckpointError, match="holds the plain weights alone; export the run again with --weights ema"):
        Codec.load(out, "ema", device=CPU)


def test_a_step_can_be_chosen(run: EmbedderConfig) -> None:
    """An earlier one by its number; the newest by default; one that is not there is an error that lists those that
    are."""
    newer = model_state(run, seed=9)
    save_checkpoint(CheckpointFolder(run.checkpoints), 9, newer)
    name = next(iter(_expected(run, "ema")))
    earlier = load_file(_export(run, step=7) / "model.safetensors")
    assert torch.equal(earlier[name], _expected(run, "ema")[name])
    newest = load_file(_export(run, force=True) / "model.safetensors")
    assert torch.equal(newest[name], newer[f"ema/{name}"])
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 8; there are: 7, 9"):
        _export(run, step=8, force=True)


def test_the_card_says_what_it_is(run: EmbedderConfig) -> None:
    """k, parameters, step, samples, data, metrics, weights, how to load it, and that the license is the user's to
    choose; the config rebuilds the model."""
    out = _export(run)
    card = (out / "README.md").read_text()
    count = sum(tensor.numel() for tensor in _expected(run, "ema").values())
    for text in (
        f"{count:,} in", "temporal compression k | 4: a clip is 5 frames", "step 7, after 28 clips",
        "data fingerprint | `f1`", "psnr_db 21.5", "moving average (EMA)", "Codec.load(", "No license was chosen yet",
        "--no-statistics",
    ):  # fmt: skip
        assert text in card, text
    config = load_export_config(out)
    assert (config.model, config.diffusion) == (run.model, run.diffusion)
    assert config.origin is not None
    assert config.origin.metrics == {"psnr_db": 21.5}


def test_the_snippet_of_the_card_runs(run: EmbedderConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """The card's snippet, as it stands but for the folder: ten lines at most. (tests/e2e/test_export.py runs it where
    DeepSpeed cannot be imported.)"""
    out = _export(run)
    found = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert found is not None
    assert len(found[1].splitlines()) <= 10
    exec(found[1].replace("PATH/OF/THIS/FOLDER", str(out)), {})
    assert capsys.readouterr().out.strip() == "(1, 8, 4, 4) (1, 3, 3, 32, 32)"


def test_a_damaged_checkpoint_is_not_exported(run: EmbedderConfig) -> None:
    """A flipped byte that no size shows: the step that was asked for is refused; by default the one before is taken."""
    folder = CheckpointFolder(run.checkpoints)
    save_checkpoint(folder, 9, model_state(run, seed=9))
    shard = next((run.folder / "checkpoints" / "step-00000009").glob("rank-*"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"step 9 .* is damaged: rank-00000-of-00001"):
        _export(run, step=9)
    assert load_export_config(_export(run)).origin.step == 7  # type: ignore[union-attr]


def test_a_run_that_cannot_be_exported(run: EmbedderConfig, tmp_path: Path) -> None:
    """No run and no checkpoint are told apart; a checkpoint of another model than the config's is named. Nothing is
    written."""
    with pytest.raises(ConfigError, match="not a run folder"):
        export_model(tmp_path, tmp_path / "out", BARE)
    folder, other = CheckpointFolder(run.checkpoints), tiny_run(model__decoder__width=48)
    save_checkpoint(folder, 9, model_state(other))
    with pytest.raises(CheckpointError, match=r"do not fit the config's model: .*decoder"):
        export_model(run.folder, tmp_path / "out", BARE)
    shutil.rmtree(run.folder / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        export_model(run.folder, tmp_path / "out", BARE)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_overwritten(run: EmbedderConfig, tmp_path: Path) -> None:
    """An export is replaced with --force alone; anything else never is; an empty folder is used."""
    (tmp_path / "model").mkdir()
    out = _export(run)
    before = (out / "model.safetensors").stat().st_ino
    with pytest.raises(CheckpointError, match="--force to replace it"):
        _export(run)
    assert (out / "model.safetensors").stat().st_ino == before
    (out / "old").touch()
    _export(run, force=True)
    assert {path.name for path in out.iterdir()} == _files()
    with pytest.raises(CheckpointError, match="holds something else"):
        export_model(run.folder, run.folder, ExportOptions(statistics_clips=0, force=True))
    (out / "config.yaml").unlink()  # as in a model of transformers, whose weights are called model.safetensors, too
    with pytest.raises(CheckpointError, match="holds something else"):
        _export(run, force=True)
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize("force", [False, True])
def test_a_link_leads_to_the_folder(run: EmbedderConfig, tmp_path: Path, force: bool) -> None:
    """The export lies where the link leads, often to a larger disk; the link stays."""
    (tmp_path / "disk" / "models").mkdir(parents=True)
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "models")
    if force:
        _export(run)
    out = _export(run, force=force)
    assert out.is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["models"]
    assert {path.name for path in (tmp_path / "disk" / "models").iterdir()} == _files()


@pytest.mark.parametrize("at_once", [False, True])
def test_an_older_export_is_replaced_at_once(
    run: EmbedderConfig, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """There is no moment without an export, where the disk can exchange two folders; it is whole where it cannot."""
    out, parent, replace = _export(run, weights="plain"), run.folder.parent.parent, os.replace
    if not at_once:
        monkeypatch.setattr(exporting_folders, "_exchange", lambda *_: False)

    def rename(source: Path, target: Path) -> None:
        assert source != out or not at_once
        replace(source, target)

    monkeypatch.setattr(os, "replace", rename)
    assert Codec.load(_export(run, force=True), device=CPU).weights == "ema"
    assert {path.name for path in parent.iterdir()} == {"runs", "model"}


def test_leftovers_of_a_killed_export_are_removed(run: EmbedderConfig) -> None:
    """And nothing of a process that runs."""
    parent, gone = run.folder.parent.parent, subprocess.Popen(["true"])
    gone.wait()
    dead, alive = (parent / f".model.0a1b2c3d.{number}.tmp" for number in (gone.pid, os.getppid()))
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "model.safetensors").touch()
        os.utime(folder, (0, 0))
    _export(run)
    assert {path.name for path in parent.iterdir()} == {"runs", "model", alive.name}


def test_the_place_of_an_export_can_be_taken(run: EmbedderConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a disk, nor of the folder in which the command runs: its shell would be in a deleted one."""
    out = run.folder.parent.parent / "model"
    out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: path == out)
        with pytest.raises(CheckpointError, match=f"model is a mount point, .* give a folder in it: {out}/model"):
            _export(run)
    monkeypatch.chdir(out)
    with pytest.raises(CheckpointError, match=r"^\. is the working folder, .* give a folder in it: \./model"):
        export_model(run.folder, Path(), BARE)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("force", [False, True])
def test_an_export_that_fails_leaves_nothing(run: EmbedderConfig, monkeypatch: pytest.MonkeyPatch, force: bool) -> None:
    """When the disk is full half way, there is no half export and no debris, and an older export is as it was."""
    if force:
        _export(run, weights="plain")

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "save_file", full)
    with pytest.raises(DataError, match="is full"):
        _export(run, force=force)
    parent = run.folder.parent.parent
    assert {path.name for path in parent.iterdir()} == ({"runs", "model"} if force else {"runs"})
    if force:
        assert Codec.load(parent / "model", device=CPU).weights == "plain"


class TestDamage:
    """A damaged export is an error that says what is wrong, never other weights."""

    def test_a_flipped_byte(self, run: EmbedderConfig) -> None:
        """The file's checksum is compared; whoever changed it on purpose can say so."""
        out = _export(run)
        data = bytearray((out / "model.safetensors").read_bytes())
        data[-5] ^= 1
        (out / "model.safetensors").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"SHA-256 .* remove the line `sha256`"):
            Codec.load(out, device=CPU)
        text = (out / "config.yaml").read_text()
        (out / "config.yaml").write_text(re.sub(r"sha256: .*\n", "", text))
        assert Codec.load(out, device=CPU).step == 7

    def test_a_file_that_was_cut(self, run: EmbedderConfig) -> None:
        """Also without a checksum."""
        out = _export(run)
        (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-3])
        (out / "config.yaml").write_text(re.sub(r"sha256: .*\n", "", (out / "config.yaml").read_text()))
        with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
            Codec.load(out, device=CPU)

    def test_another_model(self, run: EmbedderConfig) -> None:
        """Parameters that are missing, too many or of another shape are named."""
        out = _export(run)
        tensors = load_file(out / "model.safetensors")
        first, second, *_ = tensors
        tensors["extra"] = torch.zeros(1)
        tensors[second] = tensors[second].flatten()[:1].clone()
        del tensors[first]
        save_file(tensors, out / "model.safetensors")
        (out / "config.yaml").write_text(re.sub(r"sha256: .*\n", "", (out / "config.yaml").read_text()))
        with pytest.raises(CheckpointError) as caught:
            Codec.load(out, device=CPU)
        for text in (f"{first} is missing", "extra is not in the model", f"{second} has the shape [1]"):
            assert text in str(caught.value)

    def test_no_config(self, run: EmbedderConfig) -> None:
        """A safetensors file alone cannot be rebuilt; an unknown key names the version."""
        out = _export(run)
        text = (out / "config.yaml").read_text()
        (out / "config.yaml").write_text(text.replace("precision: fp32", "precision: fp32\nprecisoin: fp32"))
        with pytest.raises(CheckpointError, match="did you mean precision"):
            Codec.load(out, device=CPU)
        (out / "config.yaml").unlink()
        with pytest.raises(CheckpointError, match="is no exported model"):
            Codec.load(out, device=CPU)


class TestTextToVideo:
    """A text-to-video model: its weights, and the latent space without which they say nothing."""

    @pytest.mark.parametrize(("weights", "kind"), [("ema", "ema"), ("plain", "master")])
    def test_what_is_in_it(self, tmp_path: Path, weights: str, kind: str) -> None:
        """The weights bit for bit, the run's own latent space byte for byte; no clips are read for statistics."""
        run = saved_t2v(tmp_path / "runs")
        out = tmp_path / "model"
        exported = export_model(run.folder, out, ExportOptions(weights=weights))  # type: ignore[arg-type]
        assert {path.name for path in out.iterdir()} == {*FILES, *BY_DIFFUSERS, pipeline_module()[0], "latent_space"}
        found, state = load_file(out / "model.safetensors"), model_state(run)
        assert all(torch.equal(found[name], state[f"{kind}/{name}"]) for name in found)
        for name in ("facts.json", "null_text.safetensors"):
            assert (out / "latent_space" / name).read_bytes() == (run.folder / "latent_space" / name).read_bytes()
        assert load_t2v_export_config(out) == exported
        assert (exported.model, exported.diffusion) == (run.model, run.diffusion)
        assert (exported.clips, exported.seed, exported.precision) == ((1,), 3, "fp32")  # type: ignore[union-attr]

    def test_the_card(self, tmp_path: Path) -> None:
        run = saved_t2v(tmp_path / "runs", saved_run(tmp_path / "runs"), data__clips=(2, 1))
        export_model(run.folder, tmp_path / "model", BARE)
        card = (tmp_path / "model" / "README.md").read_text()
        for text in (
            "# tiny_t2v, a text-to-video model", "trained on | 5 frames, 10 frames at 8 frames a second",
            "2 blocks, width 32, 2 heads", "step 7, after 28 rows", "loss 0.5", "regen generate", "stand-in",
            "embedder: run tiny, step 7", "No license was chosen yet",
        ):  # fmt: skip
            assert text in card, text

    def test_a_run_without_its_latent_space(self, tmp_path: Path) -> None:
        """Nothing is written."""
        run = saved_t2v(tmp_path / "runs")
        shutil.rmtree(run.folder / "latent_space")
        with pytest.raises(CheckpointError, match="is not there or not whole"):
            export_model(run.folder, tmp_path / "model", BARE)
        assert [path.name for path in tmp_path.iterdir()] == ["runs"]

    def test_it_is_no_embedder(self, tmp_path: Path) -> None:
        """Neither the run nor its export decodes videos: one clear error each."""
        run = saved_t2v(tmp_path / "runs")
        export_model(run.folder, tmp_path / "model", BARE)
        with pytest.raises(ConfigError, match="config of task 't2v'; this needs one of an embedder"):
            Codec.load(run.folder, device=CPU)
        with pytest.raises(CheckpointError, match="is a text-to-video model; this needs an embedder"):
            Codec.load(tmp_path / "model", device=CPU)

    def test_a_config_of_neither_kind(self, tmp_path: Path) -> None:
        """Problems are told by the schema of the kind that it says it is."""
        run = saved_t2v(tmp_path / "runs")
        export_model(run.folder, tmp_path / "model", BARE)
        config = tmp_path / "model" / "config.yaml"
        config.write_text(config.read_text().replace("blocks: 2", "bloks: 2"))
        with pytest.raises(CheckpointError, match=r"did you mean model\.blocks"):
            load_t2v_export_config(tmp_path / "model")
        config.write_text("model: 3\n")
        with pytest.raises(CheckpointError, match="no exported model of this version"):
            load_t2v_export_config(tmp_path / "model")


def test_many_problems_are_counted() -> None:
    """Four are named, and how many more there are."""
    wanted = {f"p{n}": [n] for n in range(9)}
    with pytest.raises(CheckpointError, match=r"p3 is missing, and 5 more"):
        check_shapes({}, wanted, "the parameters")
    check_shapes(wanted, dict(reversed(wanted.items())), "the parameters")


def test_shapes_cost_nothing(run: EmbedderConfig) -> None:
    """A model's shapes are known without building it: those of the parameters that it would have."""
    assert model_shapes(run.model) == {name: list(t.shape) for name, t in _expected(run, "ema").items()}


def test_a_run_that_was_moved_is_found(run: EmbedderConfig, tmp_path: Path) -> None:
    """The checkpoints in the folder that is named count, wherever the config says that the run once was."""
    moved = tmp_path / "elsewhere"
    os.rename(run.folder, moved)
    assert Codec.load(moved, device=CPU).step == 7


def test_checkpoints_that_lie_elsewhere_are_found(tmp_path: Path) -> None:
    """A run whose config has a URL for its checkpoints is loaded and exported from there."""
    run = saved_run(tmp_path / "runs", checkpoint__url=str(tmp_path / "store"))
    assert (tmp_path / "store" / "tiny" / "latest").exists()
    assert not (run.folder / "checkpoints").exists()
    assert Codec.load(run.folder, device=CPU).step == Codec.load(_export(run), device=CPU).step == 7


class TestStatistics:
    """Measured on the run's data with the weights as they are stored."""

    def test_they_are_of_the_exported_weights(self, tiny_shards: Path, tmp_path: Path) -> None:
        """They equal what counting the codec's own latents of the same clips gives; EMA and plain weights differ."""
        run = saved_run(tmp_path / "runs", tiny_shards)
        codec = Codec.load(_export(run, statistics_clips=3), device=CPU)
        assert codec.statistics is not None
        assert codec.statistics.clips is not None
        assert codec.statistics.images is None
        assert codec.statistics.clips.num_clips == 3
        assert bool((codec.statistics.clips.content.std > 0).all())
        card = (run.folder.parent.parent / "model" / "README.md").read_text()
        assert "statistics.json" in card
        means = codec.statistics.clips.content.mean
        assert f"- 3 clips; content: means {means.min():.3f} to {means.max():.3f}, std " in card
        plain = Codec.load(_export(run, statistics_clips=3, weights="plain", force=True), device=CPU)
        assert plain.statistics is not None
        assert plain.statistics.to_text() != codec.statistics.to_text()

    def test_data_out_of_reach(self, tiny_shards: Path, tmp_path: Path) -> None:
        """One error that names both ways out, and nothing is written; with --data it works."""
        run = saved_run(tmp_path / "runs", tmp_path / "gone")
        with pytest.raises(DataError, match=r"give --data URL, .* or --no-statistics: .*gone"):
            _export(run, statistics_clips=2)
        assert not (tmp_path / "model").exists()
        out = _export(run, statistics_clips=2, data=str(tiny_shards))
        assert {path.name for path in out.iterdir()} == {*_files(), "statistics.json"}
