"""Text to video trains from a cache as embedders train from videos: on two ranks as on one, resumed bit for bit; and
its validation generates videos."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from regen_dist.config import T2VConfig
from regen_dist.inference.frames import SourceVideo
from regen_dist.observe.record import read_record
from tests.dist.conftest import START_S, Runs
from tests.helpers.ranks import Job, run_ranks, train_jobs
from tests.helpers.saved import saved_run
from tests.helpers.t2v import WordEncoder, cache_for
from tests.helpers.tiny import tiny_t2v

pytestmark = pytest.mark.timeout(1200)

STEPS, STOP, SHORT = 14, 6, 4
FP32, ELASTIC = 1e-5, 1e-4  # see test_zero3.py and test_resume.py
COMMON: dict[str, Any] = {
    "train__steps": STEPS,
    "engine__kind": "zero3",
    "engine__persistence_threshold": 500,  # some parameters are gathered, some stay
    "model__text_width": WordEncoder.width,
    "data__clips": (1, 2),
    "data__image_fraction": 0.3,
    "data__text_dropout": 0.3,
    "diffusion__given_content": 0.3,
    "diffusion__given_clips": 0.3,
    "train__trace_samples": True,
}
PLAIN: dict[str, Any] = {"engine__kind": "plain"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every run of this file, in few starts of ranks; the names say what they are."""
    folder = tmp_path_factory.mktemp("t2v")
    embedder = saved_run(folder)
    cache = cache_for(embedder, folder / "cache", videos=12, clips=[1, 2, 3], size=(32, 48))

    def made(name: str, **changes: Any) -> T2VConfig:
        return tiny_t2v(folder, cache, name=name, **{**COMMON, **changes})

    looked_at: dict[str, Any] = {
        "train__steps": SHORT, "train__validate_every": SHORT, "generation__embedder": str(embedder.folder),
        "generation__prompts": 2,
    }  # fmt: skip
    by_two = [
        Job(made("zero3")),
        Job(made("halted"), stop_after=STOP),
        Job(made("accumulated", train__accumulation=2, train__steps=SHORT)),
        Job(made("recomputed", engine__activation_checkpointing=True, train__steps=SHORT)),
        Job(made("looked_at", **looked_at)),
    ]
    by_one = [Job(made("plain", **PLAIN)), Job(made("plain_looked_at", **PLAIN, **looked_at))]
    with ThreadPoolExecutor() as pool:  # a single rank leaves a core idle, and two wait for each other
        list(pool.map(_run, (2, 1), (by_two, by_one)))
    for copy in ("two_to_two", "two_to_one"):
        shutil.copytree(folder / "halted", folder / copy)
    with ThreadPoolExecutor() as pool:
        list(pool.map(_run, (2, 1), ([Job(made("two_to_two"))], [Job(made("two_to_one"))])))
    return Runs(folder, {}, {})


def _run(world_size: int, jobs: list[Job]) -> list[Any]:
    return run_ranks(train_jobs, world_size, jobs, timeout_s=START_S)


def test_two_ranks_and_one_process_give_the_same_losses(runs: Runs) -> None:
    """Rows of one and two clips and images, some without their text: ZeRO-3 on two ranks and plain PyTorch in one
    process compute the same, from the same global batches."""
    two, one = runs.losses("zero3"), runs.losses("plain")
    assert len(two) == len(one) == STEPS
    assert runs.batches("zero3") == runs.batches("plain")
    torch.testing.assert_close(two, one, rtol=0, atol=FP32)
    assert two.diff().abs().median() > 100 * FP32


def test_weights_agree(runs: Runs) -> None:
    """Masters and their average end at the same place."""
    two, one = runs.tensors("zero3", STEPS), runs.tensors("plain", STEPS)
    for name in two:
        if name.startswith(("master/", "ema/")):
            torch.testing.assert_close(
                two[name], one[name], rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("name", ["accumulated", "recomputed"])
def test_how_the_step_is_computed_changes_nothing(runs: Runs, name: str) -> None:
    """Two micro-batches a step; activations that are made again."""
    torch.testing.assert_close(runs.losses(name), runs.losses("zero3")[:SHORT], rtol=0, atol=2e-5)


def test_resuming_is_bit_exact(runs: Runs) -> None:
    """Stopped after six steps, gone on by new processes: every loss, batch, weight, moment and average is that of one
    go, bit for bit."""
    assert torch.equal(runs.losses("two_to_two"), runs.losses("zero3"))
    assert runs.batches("two_to_two") == runs.batches("zero3")
    after, expected = runs.tensors("two_to_two", STEPS), runs.tensors("zero3", STEPS)
    assert after.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(after[name], expected[name])]
    starts = [line["step"] for line in _events(runs, "two_to_two") if line.get("event") == "start"]
    assert starts == [0, STOP]


def test_resuming_at_another_number_of_ranks(runs: Runs) -> None:
    """Saved by two ranks, gone on by one: the same batches, losses as near as float32 sums in another order."""
    assert runs.batches("two_to_one") == runs.batches("zero3")
    torch.testing.assert_close(runs.losses("two_to_one"), runs.losses("zero3"), rtol=0, atol=ELASTIC)


def test_validation_generates_videos(runs: Runs) -> None:
    """From the captions of validation samples, by two ranks as by one; the loss of fixed rows is in the record, the
    videos and a picture in the run folder."""
    found = {}
    for name in ("looked_at", "plain_looked_at"):
        (line,) = read_record(runs.folder / name / "metrics.jsonl", "validation")
        assert line["step"] == SHORT
        found[name] = line["loss"]
        folder = runs.folder / name / "generated" / f"step-{SHORT:08d}"
        assert sorted(path.name for path in folder.iterdir()) == ["00.mp4", "01.mp4", "captions.txt"]
        assert len((folder / "captions.txt").read_text().splitlines()) == 2
        video = SourceVideo(folder / "01.mp4")
        assert (video.num_frames, video.height, video.width, float(video.rate)) == (10, 32, 48, 8.0)
        assert (runs.folder / name / "pictures" / f"step-{SHORT:08d}.png").is_file()
    assert found["looked_at"] == pytest.approx(found["plain_looked_at"], abs=ELASTIC)


def test_the_run_keeps_its_latent_space(runs: Runs) -> None:
    """What generating takes beside the weights, the same from all of them."""
    texts = {(runs.folder / name / "latent_space" / "facts.json").read_bytes() for name in ("zero3", "plain")}
    assert len(texts) == 1


def _events(runs: Runs, name: str) -> list[dict[str, Any]]:
    return read_record(runs.folder / name / "metrics.jsonl", "event")
