"""Ranks that share rows of tokens compute what one rank computes (docs/sequence.md)."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from regen_dist.config.run import EngineConfig
from regen_dist.config.embedder import ModelConfig
from regen_dist.config.t2v import T2VModelConfig
from regen_dist.models.flops import count_flops
from regen_dist.models.flops import count_row_flops
from regen_dist.models.memory import exchanged_bytes
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import clips, tiny_model, tiny_t2v_model, wake

pytestmark = pytest.mark.timeout(1200)

FP32, ELASTIC = 1e-5, 1e-4  # see test_zero3.py and test_resume.py
THREE = 3  # ranks of the tests of gradients: few rows divide by it
WIDE: dict[str, Any] = {"heads": THREE, "width": 36}


class Case(NamedTuple):
    """A model, and the sides of a video of `frames` frames (of latents, where it makes them from text)."""

    model: ModelConfig | T2VModelConfig
    frames: int
    size: tuple[int, int]
    recomputed: bool = False


def _embedder(frames: int, size: tuple[int, int], recomputed: bool = False, **changes: Any) -> Case:
    decoder = {f"decoder__{name}": value for name, value in WIDE.items()}
    return Case(tiny_model(**{**decoder, **changes}), frames, size, recomputed)


def _t2v(frames: int, size: tuple[int, int], recomputed: bool = False) -> Case:
    return Case(tiny_t2v_model(**WIDE), frames, size, recomputed)


WINDOWS: dict[str, Any] = {"decoder__attention": {"pattern": "window", "window": [2, 2, 3]}}
TEXT_TOKENS = 5
MODEL, TEXT_MODEL = tiny_model(), tiny_t2v_model(attention={"backend": "sdpa"})
CASES = {
    "clip": _embedder(5, (32, 24)),
    "recomputed": _embedder(5, (32, 32), recomputed=True),
    "windows": _embedder(5, (32, 40), **WINDOWS),
    "eager": _embedder(5, (24, 40), decoder__attention={"backend": "eager"}),
    "image": _embedder(1, (32, 40)),
    "image_of_two_tokens": _embedder(1, (8, 16)),
    "without_linear_code": _embedder(5, (24, 40), decoder__linear=False),
    "in_context": _embedder(5, (24, 40), conditioning__kind="in_context"),
    "t2v": _t2v(4, (6, 10)),
    "t2v_recomputed": _t2v(4, (4, 4), recomputed=True),
    "t2v_image": _t2v(1, (4, 4)),
    "t2v_image_of_one_token": _t2v(1, (2, 2)),
}


class Compared(NamedTuple):
    """What a rank of three has of a row, beside a rank alone.

    Args:
        shift: largest difference of the predictions.
        gradients: of each weight, the largest difference of the mean over the ranks from the gradient of one rank, over
            the largest of that gradient.
        kept: bytes that autograd kept, over those that it keeps on one rank.
    """

    shift: float
    gradients: dict[str, float]
    kept: float


class Measured(NamedTuple):
    """Bytes that one of two ranks keeps of a sample for the backward pass, and sends for its attention."""

    kept: int
    sent: int


@pytest.fixture(scope="module")
def compared() -> dict[str, list[Compared]]:
    """Of every case, from every rank."""
    told = run_ranks(_compare, THREE, list(CASES.values()))
    return {name: [rank[number] for rank in told] for number, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_predictions_and_gradients_are_those_of_one_rank(compared: dict[str, list[Compared]], name: str) -> None:
    """Three ranks share a row: each has the whole prediction, and the mean of their gradients, which ZeRO-3 takes, is
    the gradient; for every weight, before the cut and behind it."""
    for rank in compared[name]:
        assert rank.shift < FP32
        assert len(rank.gradients) > 20
        assert {weight: error for weight, error in rank.gradients.items() if not error < ELASTIC} == {}


def test_each_rank_keeps_its_part(compared: dict[str, list[Compared]]) -> None:
    """Not the same computation three times: of a transformer's activations a third is kept."""
    for rank in compared["t2v"]:
        assert 0.3 < rank.kept < 0.45


@pytest.fixture(scope="module")
def measured() -> list[Measured]:
    """Of an embedder and of text to video, from one of two ranks."""
    return run_ranks(_measure, 2, [Case(MODEL, 5, (32, 32)), Case(TEXT_MODEL, 4, (8, 8))])[0]  # type: ignore[no-any-return]


def test_estimate_of_activations_is_what_a_rank_keeps(measured: list[Measured]) -> None:
    """What `regen describe` says of a shared row, against what autograd keeps in one of two ranks."""
    kept = [each.kept for each in measured]
    shared: dict[str, Any] = {"precision": "fp32", "sequence_parallel": 2}
    told, alone = (
        [count_flops(MODEL, (32, 32), **how), count_row_flops(TEXT_MODEL, 4, (8, 8), TEXT_TOKENS, **how)]
        for how in (shared, {**shared, "sequence_parallel": 1})
    )
    assert [each.activation_bytes for each in told] == pytest.approx(kept, rel=0.02)
    parts = [ours.activation_bytes / whole.activation_bytes for ours, whole in zip(told, alone, strict=True)]
    assert 0.5 < parts[1] < 0.6
    assert parts[1] < parts[0] < 1  # an embedder's encoder is not shared
    assert [each.forward_flops for each in told] == [each.forward_flops for each in alone]


def test_estimate_of_exchanged_bytes_is_what_a_rank_sends(measured: list[Measured]) -> None:
    """Of one sample, forward and backward."""
    engine = EngineConfig(precision="fp32", sequence_parallel=2)
    sizes = [(MODEL.decoder, 5 * 4 * 4), (TEXT_MODEL, 4 * 4 * 4)]
    assert [each.sent for each in measured] == [
        exchanged_bytes(
            engine, tokens=tokens, width=model.width, blocks=model.blocks, samples=1, local=model is MODEL.decoder
        )
        for model, tokens in sizes
    ]


def test_the_group_reads_as_its_first_rank() -> None:
    """Four ranks in two groups: each item and the error that ends them are those of the group's first rank."""
    assert run_ranks(_read, 4) == [
        ([(0, 0), (0, 1)], "stopped by 0 of 2"), ([(0, 0), (0, 1)], "stopped by 0 of 2"),
        ([(1, 0), (1, 1)], "stopped by 1 of 2"), ([(1, 0), (1, 1)], "stopped by 1 of 2"),
    ]  # fmt: skip


def _compare(cases: list[Case]) -> list[Compared]:
    """Runs in the ranks."""
    from regen_dist.distributed.ranks import process_group
    from regen_dist.distributed.ranks import read_environment
    from regen_dist.distributed.sequence_parallel import join_rows

    ranks = read_environment()
    with process_group(ranks, needed=True):
        rows = join_rows(ranks, THREE)
        return [_compare_one(case, rows) for case in cases]


def _compare_one(case: Case, rows: Any) -> Compared:
    import torch.distributed as dist

    from regen_dist.models.sequence_parallel import Rows
    from regen_dist.models.sequence_parallel import share_rows

    model, inputs = _model(case), _inputs(case)
    found = []
    for each in (Rows(), rows):
        share_rows(model, each)
        model.zero_grad(set_to_none=True)
        prediction, kept = _forward(model, inputs)
        target = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(2))
        (prediction - target).square().mean().backward()
        grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        found.append((prediction.detach(), grads, kept))
    (one, expected, whole), (many, grads, part) = found
    assert grads.keys() == expected.keys()
    errors = {}
    for name, grad in grads.items():
        dist.all_reduce(grad)
        errors[name] = float((grad / THREE - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-6))
    return Compared(float((many - one).abs().max()), errors, part / whole)


def _measure(cases: list[Case]) -> list[Measured]:
    """Runs in the ranks."""
    from regen_dist.distributed.ranks import process_group
    from regen_dist.distributed.ranks import read_environment
    from regen_dist.distributed.sequence_parallel import join_rows
    from regen_dist.models.flops import count_pass
    from regen_dist.models.sequence_parallel import share_rows

    ranks, found = read_environment(), []
    with process_group(ranks, needed=True):
        rows = join_rows(ranks, ranks.world_size)
        for case in cases:
            model, inputs = _model(case), [each[:1] for each in _inputs(case)]
            share_rows(model, rows)
            kept = count_pass(model, lambda m=model, i=inputs: m(*i), False).activation_bytes  # type: ignore[misc]
            with _counting(ranks.rank) as sent:
                _forward(model, inputs)[0].square().mean().backward()
            found.append(Measured(kept, sum(sent)))
    return found


@contextmanager
def _counting(rank: int) -> Iterator[list[int]]:
    """Bytes that this rank sends to others, of each all-to-all."""
    import torch.distributed as dist

    sent: list[int] = []
    exchange = dist.all_to_all_single

    def counted(output: Any, own: Any, received: list[int], sizes: list[int], **how: Any) -> Any:
        sent.append((sum(sizes) - sizes[rank]) * own.element_size())
        return exchange(output, own, received, sizes, **how)

    with mock.patch.object(dist, "all_to_all_single", counted):
        yield sent


def _model(case: Case) -> Any:
    from regen_dist.models.embedder import build_model

    torch.manual_seed(0)
    model = build_model(case.model)
    wake(model)
    model.set_activation_checkpointing(case.recomputed)
    return model


def _inputs(case: Case) -> list[Tensor]:
    """Of two samples: a video and noisy frames, or noisy latents and text."""
    generator, times = torch.Generator().manual_seed(1), torch.tensor([0.3, 0.9])
    if isinstance(case.model, ModelConfig):
        video = clips(2, case.frames, *case.size)
        return [video, torch.randn(video.shape, generator=generator), times]
    latents = torch.randn(2, case.model.latent_channels, case.frames, *case.size, generator=generator)
    text = torch.randn(2, TEXT_TOKENS, case.model.text_width, generator=generator)
    return [latents, times, text, torch.tensor([[True] * 5, [True] * 3 + [False] * 2])]


def _forward(model: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, int]:
    """The prediction, and how many bytes of tensors autograd kept for the backward pass."""
    kept: dict[int, int] = {}
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    alive = []  # no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(*inputs)
    return output[0] if isinstance(output, tuple) else output, sum(kept.values())


def _read() -> tuple[list[Any], str]:
    """What a rank is told by the first of its group; runs in the ranks."""
    from regen_dist.distributed.ranks import process_group
    from regen_dist.distributed.ranks import read_environment
    from regen_dist.distributed.sequence_parallel import join_rows
    from regen_dist.errors import DataError

    ranks = read_environment()

    def source() -> Generator[tuple[int, int]]:
        assert rows.leads
        place = rows.readers
        yield from ((place.rank, number) for number in range(2))
        raise DataError(f"stopped by {place.rank} of {place.world_size}")

    with process_group(ranks, needed=True):
        rows = join_rows(ranks, 2)
        items: list[Any] = []
        try:
            items.extend(rows.read(source))
        except DataError as error:
            return items, str(error)
    raise AssertionError("the error was not told")
