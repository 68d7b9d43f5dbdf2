"""The linear code fitted to data: better than cosines on these data, the same for all who fit it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regen_dist.data.loading.clip_loader import ClipBatch, clip_batches
from regen_dist.data.loading.datasets import TrainingSet
from regen_dist.data.synthetic.shapes import SyntheticOptions
from regen_dist.errors import DataError
from regen_dist.models.embedder import Baseline, Regen, build_model
from regen_dist.training import linear_start
from regen_dist.training.linear_start import first_cells, fit_linear_code, frames_to_cells
from tests.helpers.datasets import draw_shapes, render_scene, single
from tests.helpers.tiny import tiny_model

K = 8


@pytest.fixture(scope="module")
def shapes() -> Tensor:
    """Drawn clips [48, 3, k+1, 32, 32] in [-1, 1]."""
    options = SyntheticOptions(number=48, seed=1, side=32, frames=K + 1)
    frames = torch.stack([torch.from_numpy(render_scene(number, options)[0]) for number in range(48)])
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def _model(**changes: Any) -> Regen | Baseline:
    torch.manual_seed(0)
    return build_model(tiny_model(K, **changes))


def _fitted(clips: Tensor, **changes: Any) -> Regen | Baseline:
    model = _model(**changes)
    fit_linear_code(model, frames_to_cells(clips))
    return model


@torch.no_grad()
def _psnr_db(model: Regen | Baseline, video: Tensor) -> float:
    arguments = (video, torch.zeros_like(video), torch.ones(len(video))) if isinstance(model, Regen) else (video,)
    return float(10 * torch.log10(4 / (model(*arguments)[0] - video).square().mean()))


@pytest.mark.parametrize("kind", ["regen", "magvit2"])
def test_it_reconstructs_other_clips_of_the_kind_better_than_cosines(shapes: Tensor, kind: str) -> None:
    fitted, unseen = _fitted(shapes[:36], kind=kind), shapes[36:]
    assert _psnr_db(fitted, unseen) > _psnr_db(_model(kind=kind), unseen) + 1


def test_the_same_cells_give_the_same_weights(shapes: Tensor) -> None:
    """On every rank, and again after a restart: but for how sums are rounded."""
    once, again = (_fitted(shapes[:36]).state_dict() for _ in range(2))
    for name in once:
        torch.testing.assert_close(once[name], again[name], rtol=1e-5, atol=1e-6)
    fresh = _model().state_dict()
    assert {name for name in once if not torch.equal(once[name], fresh[name])} == {
        f"{part}.{kind}" for part in ("encoder.linear.content", "encoder.linear.motion", "linear")
        for kind in ("weight", "bias")
    }  # fmt: skip


@torch.no_grad()
def test_latents_lie_well_inside_the_ball(shapes: Tensor) -> None:
    latents = _fitted(shapes[:36]).encode(shapes)
    for latent in latents:
        assert 0.1 < float(latent.square().mean().sqrt()) < 0.5


@torch.no_grad()
def test_the_first_frame_is_still_told_by_the_content_alone(shapes: Tensor) -> None:
    model = _fitted(shapes[:36])
    content, motion = model.encode(shapes[:2])
    first = torch.zeros(2, 1)
    assert torch.equal(model.linear(content, motion, first), model.linear(content, torch.zeros_like(motion), first))
    assert torch.equal(model.encode(shapes[:2, :, :1]).content, content)


def test_without_a_decoder_of_its_own_the_encoder_alone_is_fitted(shapes: Tensor) -> None:
    model = _fitted(shapes[:36], decoder__linear=False)
    assert model.linear is None
    assert not torch.equal(model.encoder.linear.content.weight, _model().encoder.linear.content.weight)


def test_too_few_cells_are_refused(shapes: Tensor) -> None:
    with pytest.raises(DataError, match=r"16 cells .* too few .*linear_start=dct"):
        _fitted(shapes[:1])


def _training_set(tmp_path: Path, batch_global: int) -> TrainingSet:
    """Squares of which the first global batch is of images."""
    config = single(draw_shapes(tmp_path / "shapes"))
    for seed in range(50):
        data = TrainingSet(config, num_frames=K + 1, batch_global=batch_global, seed=seed)
        if data.order.global_batch(0).bucket.is_image:
            return data
    raise AssertionError("no seed of 50 begins with images")


def test_a_global_batch_of_hundreds_of_ranks_is_not_read_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process fits the code: of a batch for all ranks it decodes no more clips than it looks at."""
    decoded: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Iterator[ClipBatch]:
        for batch in clip_batches(*args, **kwargs):
            decoded.append(len(batch.video))
            yield batch

    monkeypatch.setattr(linear_start, "clip_batches", counted)
    monkeypatch.setattr(linear_start, "MOST_CELLS", 60)
    cells = first_cells(_training_set(tmp_path, 64))
    assert cells.shape == (60, K + 1, 192)  # 20 of each of the first three clips
    assert sum(decoded) == 3


def test_images_before_the_first_clips_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a global batch of them is more than is read in all."""
    monkeypatch.setattr(linear_start, "MOST_CLIPS", 8)
    assert len(first_cells(_training_set(tmp_path, 16))) == 8 * 20
