"""A model on its way out of one run and into the next, as a user types it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from regen_dist.checkpoint.export import build_with_weights
from regen_dist.config import EmbedderConfig, load_saved_config, to_yaml
from regen_dist.data.loading.clip_loader import clip_batches
from regen_dist.data.loading.datasets import TrainingSet
from regen_dist.distributed.engine import PlainEngine
from regen_dist.distributed.ranks import Ranks
from regen_dist.inference.codec import Codec
from regen_dist.inference.frames import SourceVideo
from regen_dist.observe.record import read_record
from regen_dist.training.run import build_task
from tests.helpers.checkpoints import newest, tensors
from tests.helpers.ranks import run_regen_alone, run_regen_ranks, said
from tests.helpers.tiny import tiny_dataset, tiny_run
from tests.helpers.video import moving_square, write_video

STEPS = 6
KINDS = {"ema": "ema", "plain": "master"}


def _regen(*arguments: object, logs: Path, code: int = 0) -> str:
    """The command line in a process that begins with everything imported; returns what it printed."""
    assert run_regen_alone(*arguments, logs=logs) == code, said(logs)
    return said(logs)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    write_video(folder / "held_out.mp4", moving_square(23, 50, 66, seed=5))
    return folder


@pytest.fixture(scope="module")
def shards(folder: Path) -> Path:
    return tiny_dataset(folder)


@pytest.fixture(scope="module")
def run(folder: Path, shards: Path) -> Path:
    """A few steps by two ranks under ZeRO-3, in bf16."""
    made = tiny_run(
        folder / "runs", shards, engine__kind="zero3", engine__precision="bf16", train__steps=STEPS,
        train__validate_every=STEPS,
    )  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(to_yaml(made))
    assert run_regen_ranks("train", path, logs=folder / "train-log") == [0, 0], said(folder / "train-log")
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def exports(run: Path, folder: Path) -> dict[str, Path]:
    """Both kinds of weights; statistics of the averaged ones alone."""
    found = {kind: folder / f"model-{kind}" for kind in KINDS}
    arguments = ("checkpoint", "export", run, "--out", found["ema"], "--statistics-clips", 4)
    _regen(*arguments, logs=folder / "ema-log")
    arguments = ("checkpoint", "export", run, "--out", found["plain"], "--no-statistics", "--weights", "plain")
    _regen(*arguments, logs=folder / "plain-log")
    return found


@pytest.mark.parametrize("weights", KINDS)
def test_the_weights_are_the_checkpoints(run: Path, exports: dict[str, Path], weights: str) -> None:
    """Masters, or their averages, bit for bit as the two ranks hold them in halves; and the two differ."""
    manifest = newest(run)
    assert (manifest.step, manifest.world_size) == (STEPS, 2)
    state, found = tensors(run, STEPS), load_file(exports[weights] / "model.safetensors")
    assert found.keys() == manifest.shapes.keys()
    assert all(torch.equal(tensor, state[f"{KINDS[weights]}/{name}"]) for name, tensor in found.items())
    assert any(not torch.equal(state[f"ema/{name}"], state[f"master/{name}"]) for name in found)


def test_the_statistics_and_the_card(run: Path, exports: dict[str, Path]) -> None:
    """Measured on the run's own data; the card tells the step, the data and the validation."""
    statistics = Codec.load(exports["ema"], device=torch.device("cpu")).statistics
    assert statistics is not None
    assert statistics.clips is not None
    assert statistics.clips.num_clips == 4
    assert statistics.clips.motion is not None
    identity = newest(run).state["data"]
    assert statistics.measured_on["dataset fingerprint"] == identity["dataset fingerprint"]
    card = (exports["ema"] / "README.md").read_text()
    for text in (f"step {STEPS}, after {4 * STEPS} clips", identity["dataset fingerprint"].strip("[']"), "psnr_db"):
        assert text in card
    assert Codec.load(exports["plain"]).statistics is None


def test_the_snippet_runs_where_deepspeed_cannot_be_imported(exports: dict[str, Path]) -> None:
    """The ten lines of the card, in a process of its own where importing deepspeed or wandb raises, and so does
    unpickling by torch."""
    found = re.search(r"```python\n(.*?)```", (exports["ema"] / "README.md").read_text(), re.DOTALL)
    assert found is not None
    before = (
        "import sys\nsys.modules['deepspeed'] = sys.modules['wandb'] = None\nimport torch\n"
        "def refuse(*a, **k): raise AssertionError('unpickled')\ntorch.load = refuse\n"
    )
    code = before + found[1].replace("PATH/OF/THIS/FOLDER", str(exports["ema"]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 8, 4, 4) (1, 3, 3, 32, 32)"


def test_an_export_reconstructs_as_its_run_does(run: Path, exports: dict[str, Path], folder: Path) -> None:
    """The same video, frame for frame, and the same measures, told to be of the same run and step."""
    measures = []
    for name, place in (("run", run), ("export", exports["ema"])):
        out = folder / f"out-{name}"
        arguments = ("reconstruct", folder / "held_out.mp4", "--run", place, "--out", out, "--steps", 2)
        _regen(*arguments, logs=folder / "reconstruct-log")
        measures.append(json.loads((out / "metrics.json").read_text()))
        frames = [torch.from_numpy(frame) for frame in SourceVideo(out / "reconstruction.mp4").frames()]
        measures[-1]["frames"] = torch.stack(frames)
    one, other = measures
    assert torch.equal(one["frames"], other["frames"])
    assert {name: one[name] for name in ("psnr_db", "ssim")} == {name: other[name] for name in ("psnr_db", "ssim")}
    same = ("config_hash", "weights", "step", "kind")
    assert [one["model"][name] for name in same] == [other["model"][name] for name in same]


class TestImport:
    """A new run begins from the exported weights."""

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls, folder: Path, shards: Path) -> Path:
        """Another seed, batch and precision than the run that was exported; one process, no DeepSpeed."""
        made = tiny_run(folder / "runs", shards, name="next", train__steps=3, train__seed=11, train__batch_global=2)
        path = folder / "next.yaml"
        path.write_text(to_yaml(made))
        return path

    def test_training_goes_on_from_the_weights(self, exports: dict[str, Path], config: Path, folder: Path) -> None:
        """The first loss is that of the exported weights on the new run's first batch, and not that of fresh ones."""
        shown = _regen("checkpoint", "import", exports["ema"], config, logs=folder / "import-log")
        assert "step 0 has the weights of" in shown
        _regen("train", config, logs=folder / "next-log")
        run = folder / "runs" / "next"
        (first, *_, last) = read_record(run / "metrics.jsonl", "train")
        made = load_saved_config(run)
        weights = load_file(exports["ema"] / "model.safetensors")
        assert first["loss"] == pytest.approx(_loss(made, weights), rel=1e-6)
        assert abs(first["loss"] - _loss(made, None)) > 1e-3 * first["loss"]
        assert last["step"] == newest(run).step == 3
        again = _regen("checkpoint", "import", exports["ema"], config, logs=folder / "again-log", code=4)
        assert "give the run another name" in again

    def test_two_ranks_take_it_up(self, exports: dict[str, Path], config: Path, folder: Path) -> None:
        """Under ZeRO-3, by two ranks: the same first loss as one process has."""
        changes = ("name=two", "engine.kind=zero3", "train.steps=1")
        _regen("checkpoint", "import", exports["ema"], config, *changes, logs=folder / "import2-log")
        assert run_regen_ranks("train", config, *changes, logs=folder / "two-log") == [0, 0]
        run = folder / "runs" / "two"
        (first,) = read_record(run / "metrics.jsonl", "train")
        weights = load_file(exports["ema"] / "model.safetensors")
        assert first["loss"] == pytest.approx(_loss(load_saved_config(run), weights), rel=1e-4)

    def test_a_config_of_another_model_is_refused(self, exports: dict[str, Path], config: Path, folder: Path) -> None:
        """Exit code 4, one message that names the parameters, and no run."""
        changes = ("name=wrong", "model.decoder.width=48")
        shown = _regen("checkpoint", "import", exports["ema"], config, *changes, logs=folder / "wrong-log", code=4)
        assert shown.count("error:") == 1
        assert "decoder." in shown
        assert "Traceback" not in shown
        assert not (folder / "runs" / "wrong").exists()


def _loss(config: EmbedderConfig, weights: dict[str, torch.Tensor] | None) -> float:
    """The loss of a run's first batch at these weights; None: those that the run would begin with."""
    cpu = torch.device("cpu")
    task = build_task(config, cpu)
    module = task.build() if weights is None else build_with_weights(config.model, weights, "the parameters")
    plain = config.model_copy(update={"engine": config.engine.model_copy(update={"kind": "plain"})})
    engine = PlainEngine(plain, Ranks(), lambda: module)
    data = TrainingSet(
        config.data, num_frames=config.model.num_frames, batch_global=config.train.batch_global, seed=config.train.seed
    )
    batches = clip_batches(data, accumulation=1, rank=0, world_size=1, cursor=0)
    try:
        return float(task.loss(engine, next(batches), 0).value.detach())
    finally:
        batches.close()
