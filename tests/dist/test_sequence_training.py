"""Training with shared rows is training without them (docs/sequence.md)."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from regen_dist.config import AnyRunConfig
from regen_dist.observe.record import read_record
from tests.dist.conftest import START_S, Runs
from tests.helpers.checkpoints import saved_run
from tests.helpers.ranks import Job, run_ranks, train_jobs
from tests.helpers.t2v import WordEncoder, cache_for
from tests.helpers.tiny import tiny_dataset, tiny_run, tiny_t2v

pytestmark = pytest.mark.timeout(1200)

STEPS, STOP = 8, 4
FP32, ELASTIC, BF16 = 1e-5, 1e-4, 2e-3  # see test_zero3.py and test_resume.py
ZERO3: dict[str, Any] = {"engine__kind": "zero3", "engine__persistence_threshold": 500}
ROWS: dict[str, Any] = {**ZERO3, "engine__sequence_parallel": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Training by two and four ranks that share rows in pairs, and by one process; the names say what is trained."""
    folder = tmp_path_factory.mktemp("sequence")
    data, embedder = tiny_dataset(folder / "data"), saved_run(folder)
    cache = cache_for(embedder, folder / "cache", videos=12, clips=[1, 2, 3], size=(32, 48))
    common: dict[str, Any] = {"train__steps": STEPS, "train__trace_samples": True}
    noisy: dict[str, Any] = {**common, "model__latent__noise_std": 0.1}
    mixed: dict[str, Any] = {
        **noisy, "data__size": [24, 40], "data__image_fraction": 0.5, "train__accumulation": 2, "train__steps": STOP,
        "model__decoder__attention": {"pattern": "window", "window": [2, 2, 2]}, "train__validate_every": STOP,
    }  # fmt: skip
    rows: dict[str, Any] = {
        **common, "model__text_width": WordEncoder.width, "data__clips": (1, 2), "data__image_fraction": 0.3,
        "data__text_dropout": 0.3, "train__validate_every": STEPS, "generation__embedder": str(embedder.folder),
        "generation__prompts": 1,
    }  # fmt: skip

    def clip_run(name: str, **changes: Any) -> AnyRunConfig:
        return tiny_run(folder, data, name=name, **changes)

    def text_run(name: str, **changes: Any) -> AnyRunConfig:
        return tiny_t2v(folder, cache, name=name, **changes)

    low: dict[str, Any] = {"engine__precision": "bf16", "engine__partitioned_init": True, "train__steps": STOP}
    by_two = [
        Job(clip_run("clips", **noisy, **ROWS)),
        Job(clip_run("halted", **noisy, **ROWS), stop_after=STOP),
        Job(clip_run("mixed", engine__activation_checkpointing=True, **mixed, **ROWS)),
        Job(clip_run("bf16", **{**noisy, **ROWS, **low})),
        Job(clip_run("unshared_bf16", **{**noisy, **ZERO3, **low})),
        Job(text_run("rows", **rows, **ROWS)),
    ]
    by_one = [
        Job(clip_run("plain_clips", **noisy)),
        Job(clip_run("plain_mixed", **mixed)),
        Job(text_run("plain_rows", **rows)),
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(_run, (2, 1), (by_two, by_one)))
    for copy in ("alone", "back"):
        shutil.copytree(folder / "halted", folder / copy)
    _run(4, [Job(clip_run("four", **noisy, **ROWS)), Job(text_run("four_rows", **rows, **ROWS))])
    with ThreadPoolExecutor() as pool:
        jobs = [Job(clip_run("back", **noisy, **ROWS))], [Job(clip_run("alone", **noisy, **ZERO3))]
        list(pool.map(_run, (2, 1), jobs))
    return Runs(folder, {}, {})


def _run(world_size: int, jobs: list[Job]) -> list[Any]:
    return run_ranks(train_jobs, world_size, jobs, timeout_s=START_S)


TRAINED = [("clips", "plain_clips"), ("mixed", "plain_mixed"), ("rows", "plain_rows"), ("four", "plain_clips"),
           ("four_rows", "plain_rows")]  # fmt: skip


@pytest.mark.parametrize(("shared", "plain"), TRAINED)
def test_training_is_that_of_one_process(runs: Runs, shared: str, plain: str) -> None:
    """Losses, norms of gradients, weights, averages and moments: of clips, of clips and images of an odd number of
    tokens by windows in two micro-batches with recomputation, of rows of latents; and where two groups of two ranks
    read samples of their own. Moments are means of gradients, which AdamW's steps do not show the scale of."""
    torch.testing.assert_close(runs.losses(shared), runs.losses(plain), rtol=0, atol=FP32)
    assert _norms(runs, shared) == pytest.approx(_norms(runs, plain), rel=1e-3)
    steps = len(runs.losses(plain))
    many, one = runs.tensors(shared, steps), runs.tensors(plain, steps)
    assert many.keys() == one.keys()
    for name, expected in one.items():
        margin = ELASTIC if name.startswith(("master/", "ema/")) else 1e-2 * float(expected.abs().max()) + 1e-9
        torch.testing.assert_close(
            many[name], expected, rtol=0, atol=margin, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("shared", "plain"), TRAINED)
def test_samples_are_read_and_counted_once(runs: Runs, shared: str, plain: str) -> None:
    """The same global batches in the same steps, each sample noted by one rank."""
    assert runs.batches(shared) == runs.batches(plain)
    last = read_record(runs.folder / shared / "metrics.jsonl", "train")[-1]
    assert last["clips"] == 4


def test_bf16_and_weights_that_are_built_sharded(runs: Runs) -> None:
    """As without shared rows, to the rounding of gradients (see test_zero3.py)."""
    torch.testing.assert_close(runs.losses("bf16"), runs.losses("unshared_bf16"), rtol=0, atol=BF16)


def test_a_checkpoint_knows_nothing_of_shared_rows(runs: Runs) -> None:
    """Saved by two ranks that share rows and gone on with by them: bit for bit as in one go; by one rank alone: the
    same batches, losses as near as float32 sums in another order."""
    assert torch.equal(runs.losses("back"), runs.losses("clips"))
    back, clips = runs.tensors("back", STEPS), runs.tensors("clips", STEPS)
    assert not [name for name in clips if not torch.equal(back[name], clips[name])]
    assert runs.batches("alone") == runs.batches("clips")
    torch.testing.assert_close(runs.losses("alone"), runs.losses("clips"), rtol=0, atol=ELASTIC)


@pytest.mark.parametrize(
    ("shared", "plain", "figure"), [("mixed", "plain_mixed", "psnr_db"), ("rows", "plain_rows", "loss")]
)
def test_validation_is_that_of_one_process(runs: Runs, shared: str, plain: str, figure: str) -> None:
    """Its figures, and where videos are generated from text, these too."""
    (many,), (one,) = (read_record(runs.folder / name / "metrics.jsonl", "validation") for name in (shared, plain))
    assert many[figure] == pytest.approx(one[figure], abs=1e-3)
    made = [sorted(path.name for path in (runs.folder / name / "generated").rglob("*")) for name in (shared, plain)]
    assert made[0] == made[1]


def _norms(runs: Runs, name: str) -> list[float]:
    return [line["grad_norm"] for line in read_record(runs.folder / name / "metrics.jsonl", "train")]
