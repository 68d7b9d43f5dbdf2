"""A run begins from an exported model: the weights are its checkpoint 0, and nothing else is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from regen_dist.checkpoint.claims import Claims
from regen_dist.checkpoint.export import find_embedder, find_t2v, import_model
from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.config.embedder import EmbedderConfig
from regen_dist.distributed.engine import PlainEngine
from regen_dist.distributed.ranks import Ranks, chunk
from regen_dist.errors import CheckpointError, ConfigError, RunBusy
from regen_dist.inference.export import ExportOptions, export_model
from regen_dist.models.embedder import build_model
from tests.helpers.checkpoints import KINDS, model_state, newest, saved_run, tensors
from tests.helpers.t2v import saved_t2v
from tests.helpers.tiny import tiny_run, tiny_t2v

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> EmbedderConfig:
    return saved_run(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def export(source: EmbedderConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "model"
    export_model(source.folder, out, ExportOptions(statistics_clips=0))
    return out


def _new(tmp_path: Path, **changes: Any) -> EmbedderConfig:
    return tiny_run(tmp_path / "runs", **{"name": "new", **changes})


def test_what_is_in_checkpoint_0(source: EmbedderConfig, export: Path, tmp_path: Path) -> None:
    """Masters and averages are the exported (averaged) weights, the moments zero; no step, sample or data was seen;
    where the weights come from is told."""
    run = _new(tmp_path)
    assert import_model(export, run) == []
    manifest, state = newest(run.folder), model_state(source)
    found = tensors(run.folder, 0)
    for name in manifest.shapes:
        assert torch.equal(found[f"master/{name}"], state[f"ema/{name}"])
        assert torch.equal(found[f"ema/{name}"], state[f"ema/{name}"])
        assert not found[f"exp_avg/{name}"].any()
        assert not found[f"exp_avg_sq/{name}"].any()
    assert (manifest.step, manifest.samples, manifest.state["num_updates"], manifest.state["data"]) == (0, 0, 0, None)
    assert manifest.state["imported"]["origin"]["step"] == 7
    assert manifest.state["imported"]["weights"] == "ema"


def test_an_engine_takes_it_up(export: Path, source: EmbedderConfig, tmp_path: Path) -> None:
    """The working weights of an engine that restores checkpoint 0 are the exported ones."""
    run = _new(tmp_path)
    import_model(export, run)
    folder, manifest = CheckpointFolder(run.checkpoints), newest(run.folder)
    engine = PlainEngine(run, Ranks(), lambda: build_model(run.model))
    engine.restore(folder.reader(manifest), manifest.state["num_updates"])
    state = model_state(source)
    assert all(torch.equal(param, state[f"ema/{name}"]) for name, param in engine.module.named_parameters())


def test_any_number_of_ranks_reads_it(export: Path, tmp_path: Path) -> None:
    """Written as one rank's shard: the chunks of three ranks are the slices of the whole."""
    run = _new(tmp_path)
    import_model(export, run)
    reader, manifest = CheckpointFolder(run.checkpoints).reader(newest(run.folder)), newest(run.folder)
    for key in (f"{kind}/{name}" for kind in KINDS for name in list(manifest.shapes)[:5]):
        whole = reader.whole(key).flatten()
        for rank in range(3):
            low, high = chunk(whole.numel(), 3, rank)
            assert torch.equal(reader.read(key, low, high), whole[low:high])


def test_bfloat16_becomes_float32(source: EmbedderConfig, tmp_path: Path) -> None:
    """Masters are float32 whatever the export was stored in."""
    out, run = tmp_path / "half", _new(tmp_path)
    export_model(source.folder, out, ExportOptions(statistics_clips=0, dtype="bfloat16", weights="plain"))
    import_model(out, run)
    state = model_state(source)
    name, tensor = next((key, each) for key, each in tensors(run.folder, 0).items() if key.startswith("master/"))
    assert torch.equal(tensor, state[name].to(torch.bfloat16).float())


def test_a_model_that_does_not_fit_is_refused(export: Path, tmp_path: Path) -> None:
    """Names the first parameters that differ, and how many more; the run's folder is not made."""
    run = _new(tmp_path, model__decoder__width=48)
    with pytest.raises(CheckpointError, match=r"do not fit the config's model: .*has the shape .*, and \d+ more"):
        import_model(export, run)
    assert not run.folder.exists()
    deeper = _new(tmp_path, model__decoder__blocks=3)
    with pytest.raises(CheckpointError, match=r"decoder\.blocks\.2\.\S+ is missing"):
        import_model(export, deeper)


def test_a_run_that_has_checkpoints_is_refused(export: Path, source: EmbedderConfig) -> None:
    """An import never takes the place of training that was done."""
    with pytest.raises(CheckpointError, match=r"holds 1 checkpoints, the newest of step 7; give the run another name"):
        import_model(export, source)
    assert newest(source.folder).step == 7


def test_an_import_that_ends_early_can_be_repeated(export: Path, tmp_path: Path) -> None:
    """The rest of the run folder is written before the commit: a full disk there leaves no checkpoint."""
    run = _new(tmp_path)
    (run.folder / "config.yaml").mkdir(parents=True)  # refuses a file
    with pytest.raises(OSError, match="config"):
        import_model(export, run)
    (run.folder / "config.yaml").rmdir()
    with pytest.raises(CheckpointError, match="no latent space"):
        import_model(export, run, lambda: _refuse("no latent space"))
    assert CheckpointFolder(run.checkpoints).steps() == []
    import_model(export, run)
    assert newest(run.folder).step == 0


def _refuse(text: str) -> None:
    raise CheckpointError(text)


def test_a_run_that_trains_is_refused(export: Path, tmp_path: Path) -> None:
    """Before its first checkpoint, too: what it is saving would be deleted, and its config replaced."""
    run = _new(tmp_path)
    claims, folder = Claims(run), CheckpointFolder(run.checkpoints)
    claims.take()
    folder.write_shard(10, "rank-00000-of-00001.safetensors", {"master/weight": torch.ones(6)})
    with pytest.raises(RunBusy, match="already being trained by rank 0"):
        import_model(export, run)
    assert list(folder.debris()) == ["step-00000010.tmp"]
    claims.release()


def test_settings_that_shapes_do_not_show_are_told(export: Path, tmp_path: Path) -> None:
    """The same shapes can mean another model: what differs is named; what changes no number is not."""
    run = _new(
        tmp_path, model__conditioning__omega=20.0, model__decoder__heads=4, model__decoder__attention__backend="eager",
        diffusion={"target": "velocity"},
    )  # fmt: skip
    assert import_model(export, run) == [
        "model.conditioning.omega is 20.0, the weights were trained with 10.0",
        "model.decoder.heads is 4, the weights were trained with 2",
        "diffusion.target is velocity, the weights were trained with x0",
    ]


def test_text_to_video(tmp_path: Path) -> None:
    """Its weights become checkpoint 0, too; defaults of generation and kernels are no difference, the shift is."""
    source = saved_t2v(tmp_path / "source")
    export_model(source.folder, tmp_path / "model", ExportOptions())
    run = saved_t2v(tmp_path / "other", name="other")  # has checkpoints
    with pytest.raises(CheckpointError, match="give the run another name"):
        import_model(tmp_path / "model", run)
    run = tiny_t2v(
        tmp_path / "runs", model__text_width=4, model__attention__backend="sdpa", diffusion__guidance=9.0,
        diffusion__shift=2.0,
    )  # fmt: skip
    assert import_model(tmp_path / "model", run) == ["diffusion.shift is 2.0, the weights were trained with 1.0"]
    state, found = model_state(source), tensors(run.folder, 0)
    assert all(torch.equal(found[f"master/{name}"], state[f"ema/{name}"]) for name in newest(run.folder).shapes)


def test_kinds_of_models_are_not_mixed(export: Path, tmp_path: Path) -> None:
    """An embedder's weights for a text-to-video run, and the other way round: told by their kinds."""
    with pytest.raises(CheckpointError, match="holds a model of kind regen, the config is of task t2v"):
        import_model(export, tiny_t2v(tmp_path))
    export_model(saved_t2v(tmp_path).folder, tmp_path / "model", ExportOptions())
    with pytest.raises(CheckpointError, match="holds a model of kind t2v, the config is of task embedder"):
        import_model(tmp_path / "model", _new(tmp_path))


def test_a_damaged_export_is_refused(source: EmbedderConfig, tmp_path: Path) -> None:
    """Checksums are compared before anything is committed."""
    out, run = tmp_path / "damaged", _new(tmp_path)
    export_model(source.folder, out, ExportOptions(statistics_clips=0))
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-9] ^= 4
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256"):
        import_model(out, run)
    assert CheckpointFolder(run.checkpoints).steps() == []
    (out / "config.yaml").write_text(re.sub("format: 1", "format: 2", (out / "config.yaml").read_text()))
    with pytest.raises(CheckpointError, match="no exported model of this version"):
        import_model(out, run)


def test_a_run_and_what_was_exported_from_it_are_the_same_model(source: EmbedderConfig, export: Path) -> None:
    trained, exported = find_embedder(source.folder), find_embedder(export)
    assert trained.facts() == exported.facts()
    assert (trained.name, trained.step, trained.config_hash) == (exported.name, exported.step, exported.config_hash)
    ours, theirs = trained.weights("encoder."), exported.weights("encoder.")
    assert ours.keys() == theirs.keys()
    assert ours
    assert all(name.startswith("encoder.") and torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_that_an_export_does_not_hold(source: EmbedderConfig, export: Path) -> None:
    assert find_embedder(source.folder, "plain").config.weights == "plain"
    with pytest.raises(CheckpointError, match="--weights plain"):
        find_embedder(export, "plain")


def test_a_model_of_the_other_task(source: EmbedderConfig, tmp_path: Path) -> None:
    t2v = saved_t2v(tmp_path / "t2v")
    with pytest.raises(ConfigError, match="task 'embedder'; this needs one of text to video"):
        find_t2v(source.folder)
    with pytest.raises(ConfigError, match="this needs one of an embedder"):
        find_embedder(getattr(t2v, "folder", t2v))
    with pytest.raises(ConfigError, match="not a run folder"):
        find_embedder(tmp_path)
