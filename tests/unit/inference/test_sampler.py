"""Sampling latents: guidance, padding, and solvers of the order that they promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regen_dist.config.t2v import FlowConfig
from regen_dist.diffusion.samplers import GivenFrames
from regen_dist.inference.sampler import Predict, Text, row_tokens, sample_latents
from regen_dist.models.embedder import build_model
from regen_dist.models.t2v import TextToVideo
from tests.helpers.tiny import tiny_t2v_model, wake

FLOW = FlowConfig(shift_tokens=8, steps=3, guidance=4.0)


@pytest.fixture(scope="module")
def model() -> TextToVideo:
    torch.manual_seed(0)
    model = build_model(tiny_t2v_model())
    wake(model)
    return model.eval()


def _noise(batch: int = 2) -> Tensor:
    return torch.randn(batch, 8, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def _texts(*lengths: int, seed: int = 1) -> Text:
    generator = torch.Generator().manual_seed(seed)
    return Text.of([torch.randn(length, 12, generator=generator) for length in lengths])


def _sample(predict: Predict, text: Text, null: Text, **changes: Any) -> Tensor:
    return sample_latents(predict, _noise(len(text.mask)), text, null, FLOW, **changes).frames


class TestGuidance:
    """v = v_null + g (v_text - v_null)."""

    def test_1_is_no_guidance(self, model: TextToVideo) -> None:
        """Exactly what the text alone gives, whatever the null text; the model is asked once a step."""
        calls: list[int] = []

        def counted(x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            calls.append(len(x))
            velocity: Tensor = model(x, t, text, mask)
            return velocity

        text = _texts(3, 5)
        one = _sample(counted, text, _texts(1, 1, seed=2), guidance=1.0)
        assert calls == [2, 2, 2]
        assert torch.equal(one, _sample(model, text, _texts(4, 4, seed=3), guidance=1.0))
        close = _sample(model, text, _texts(1, 1, seed=2), guidance=1.0 + 1e-6)
        torch.testing.assert_close(close, one, atol=1e-4, rtol=1e-4)

    def test_0_is_the_null_text_alone(self, model: TextToVideo) -> None:
        text, null = _texts(3, 5), _texts(1, 1, seed=2)
        zero = _sample(model, text, null, guidance=0.0)
        assert torch.equal(zero, _sample(model, null, text, guidance=1.0))

    def test_it_leads_away_from_the_null_text(self) -> None:
        """With a model whose velocity is the mean of its text, one step ends at noise - (n + g (t - n))."""

        def mean_of_text(x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            mean = (text * mask[..., None]).sum((1, 2)) / mask.sum(1)
            return mean.view(-1, 1, 1, 1, 1).expand_as(x)

        text, null = (Text.of([torch.full((1, 1), value)] * 2) for value in (2.0, 0.5))
        for guidance in (0.0, 1.0, 3.0):
            found = _sample(mean_of_text, text, null, guidance=guidance, steps=1)
            torch.testing.assert_close(found, _noise() - (0.5 + guidance * 1.5))

    def test_the_default_is_the_run_s(self, model: TextToVideo) -> None:
        text, null = _texts(3, 5), _texts(1, 1, seed=2)
        given = {"guidance": 4.0, "steps": 3, "sampler": "euler"}
        assert torch.equal(_sample(model, text, null), _sample(model, text, null, **given))
        for other in ({"guidance": 2.0}, {"steps": 2}, {"sampler": "heun"}):
            assert not torch.equal(_sample(model, text, null), _sample(model, text, null, **(given | other)))


class TestText:
    """Texts of different lengths in one batch."""

    def test_padding_changes_nothing(self, model: TextToVideo) -> None:
        """More room than any text needs, and whatever lies in it."""
        text, null = _texts(3, 5), _texts(1, 1, seed=2)
        padded = text.padded(9)
        assert padded.mask.shape == (2, 9)
        filled = Text(torch.where(padded.mask[..., None], padded.text, 100.0), padded.mask)
        expected = _sample(model, text, null)
        for other in (padded, filled):
            torch.testing.assert_close(_sample(model, other, null), expected, atol=1e-5, rtol=1e-5)

    def test_samples_do_not_see_each_other(self, model: TextToVideo) -> None:
        """Each with its own text and noise: alone as in the batch."""
        text, null = _texts(3, 5), _texts(1, 1, seed=2)
        both = _sample(model, text, null)
        first = Text(text.text[:1, :3], text.mask[:1, :3])
        alone = _sample(model, first, null.expanded(2)._replace(text=null.text[:1], mask=null.mask[:1]))
        torch.testing.assert_close(alone, both[:1], atol=1e-5, rtol=1e-5)

    def test_choosing_joining_expanding(self) -> None:
        text, other = _texts(3, 5), _texts(7, 2, seed=2)
        chosen = text.where(torch.tensor([True, False]), other)
        assert chosen.mask.sum(1).tolist() == [7, 5]
        assert torch.equal(chosen.text[0], other.text[0])
        assert torch.equal(chosen.text[1, :5], text.text[1])
        assert text.joined(other).mask.sum(1).tolist() == [3, 5, 7, 2]
        assert Text(text.text[1:], text.mask[1:]).expanded(3).mask.sum(1).tolist() == [5, 5, 5]


def test_heun_is_nearer_than_euler() -> None:
    """On a flow whose end is known, to data of one Gaussian (mean 0.7, std 0.6): at equal steps by far, and both come
    nearer with more."""

    def exact(x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        t = t.view(-1, 1, 1, 1, 1)
        gain = (1 - t) * 0.36 / ((1 - t) ** 2 * 0.36 + t**2)
        x0 = 0.7 + gain * (x - (1 - t) * 0.7)
        return (x - x0) / t

    text = _texts(1, 1)
    wanted = 0.7 + 0.6 * _noise()

    def error(sampler: str, steps: int) -> float:
        found = _sample(exact, text, text, guidance=1.0, steps=steps, sampler=sampler)
        return float((found - wanted).abs().max())

    assert error("heun", 10) < error("euler", 10) / 5
    assert error("euler", 40) < error("euler", 10) / 2.5
    assert error("heun", 40) < error("heun", 10) / 8


def test_longer_rows_are_shifted_towards_noise() -> None:
    """Times of sampling are those of training: s sqrt(n / n0) for a row of n tokens."""
    seen: list[float] = []

    def told(x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return torch.zeros_like(x)

    text = _texts(1)
    for frames, shift in ((2, 1.0), (8, 2.0)):
        seen.clear()
        noise = torch.zeros(1, 8, frames, 4, 4)
        assert row_tokens(noise.shape[2:]) == 4 * frames
        sample_latents(told, noise, text, text, FLOW, steps=2, guidance=1.0)
        assert seen == pytest.approx([1.0, shift * 0.5 / (1 + (shift - 1) * 0.5)])


class TestGivenFrames:
    """Frames that are known come out as they are; the others are generated to them."""

    @pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
    @pytest.mark.parametrize("guidance", [1.0, 4.0])
    def test_they_stay(self, model: TextToVideo, sampler: str, guidance: float) -> None:
        """Bit for bit, by every sampler; what is not given changes with them, and what noise stood there does not
        matter."""
        text, null = _texts(3, 5), _texts(1, 1, seed=2)
        clean, mask = torch.ones(2, 8, 2, 4, 4), torch.tensor([[True, False]] * 2)
        options: dict[str, Any] = {"sampler": sampler, "guidance": guidance}
        free = _sample(model, text, null, **options)
        found = _sample(model, text, null, given=GivenFrames(clean, mask), **options)
        assert torch.equal(found[:, :, 0], clean[:, :, 0])
        assert (found[:, :, 1] - free[:, :, 1]).abs().max() > 1e-3
        other = clean.clone()
        other[:, :, 1] = 7.0  # not given, so of no weight
        assert torch.equal(_sample(model, text, null, given=GivenFrames(other, mask), **options), found)
        noise = _noise()
        noise[:, :, 0] = 5.0
        assert torch.equal(
            sample_latents(model, noise, text, null, FLOW, given=GivenFrames(clean, mask), **options).frames, found
        )

    def test_the_model_is_told_that_they_are_clean(self) -> None:
        seen: list[tuple[Tensor, Tensor]] = []

        def told(x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            seen.append((x, t))
            return torch.zeros_like(x)

        clean, mask = torch.full((1, 8, 4, 4, 4), 2.0), torch.tensor([[True, True, False, False]])
        text = _texts(1)
        sample_latents(
            told, torch.zeros_like(clean), text, text, FLOW, steps=2, guidance=1.0, given=GivenFrames(clean, mask)
        )
        for x, t in seen:
            assert t[0, :2].tolist() == [0.0, 0.0]
            assert (t[0, 2:] > 0).all()
            assert torch.equal(x[:, :, :2], clean[:, :, :2])
