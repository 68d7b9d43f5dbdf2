"""From noise to normalised latents of a row of clips, by a text-to-video model, with classifier-free guidance.

Legend: B samples, C channels, F latent frames, h x w latent cells, M text tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regen_dist.config.section import SamplerName
from regen_dist.config.t2v import LATENT_PATCH, FlowConfig
from regen_dist.diffusion.given import Given
from regen_dist.diffusion.path import x0_from
from regen_dist.diffusion.samplers import sample
from regen_dist.inference.latent_space import NormalisedLatents

# x_t [B, C, F, h, w], t [B] or [B, F], text [B, M, D], mask [B, M] to the velocity [B, C, F, h, w]
Predict = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Text(NamedTuple):
    """Text embeddings [B, M, D] and which of their tokens count, bool [B, M]."""

    text: Tensor
    mask: Tensor

    @classmethod
    def of(cls, texts: Sequence[Tensor], device: torch.device | None = None) -> Text:
        """Embeddings [L, D] of any lengths, padded to the longest."""
        longest = max(map(len, texts))
        padded = torch.stack([F.pad(text.float(), (0, 0, 0, longest - len(text))) for text in texts])
        lengths = torch.tensor([len(text) for text in texts])
        return cls(padded.to(device), (torch.arange(longest) < lengths[:, None]).to(device))

    def padded(self, tokens: int) -> Text:
        """The same with room for at least so many tokens."""
        more = max(0, tokens - self.mask.shape[1])
        return Text(F.pad(self.text, (0, 0, 0, more)), F.pad(self.mask, (0, more)))

    def joined(self, other: Text) -> Text:
        """Both, one after the other: [2B, M, D]."""
        longest = max(self.mask.shape[1], other.mask.shape[1])
        mine, theirs = self.padded(longest), other.padded(longest)
        return Text(torch.cat([mine.text, theirs.text]), torch.cat([mine.mask, theirs.mask]))

    def where(self, chosen: Tensor, other: Text) -> Text:
        """The samples of `other` where `chosen` [B] is True, else one's own."""
        longest = max(self.mask.shape[1], other.mask.shape[1])
        mine, theirs = self.padded(longest), other.padded(longest)
        return Text(
            torch.where(chosen[:, None, None], theirs.text, mine.text),
            torch.where(chosen[:, None], theirs.mask, mine.mask),
        )

    def expanded(self, batch: int) -> Text:
        """One sample as a batch of equal ones."""
        return Text(self.text.expand(batch, -1, -1), self.mask.expand(batch, -1))


def row_tokens(latents: Sequence[int]) -> int:
    """Tokens of a row of latents (F, h, w)."""
    return prod(latents) // LATENT_PATCH**2


@torch.no_grad()
def sample_latents(
    predict: Predict,
    noise: Tensor,
    text: Text,
    null: Text,
    flow: FlowConfig,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: SamplerName | None = None,
    given: Given | None = None,
) -> NormalisedLatents:
    """Integrate the flow from noise to latents.

    Args:
        predict: the model.
        noise: standard normal, [B, C, F, h, w].
        text: of each sample.
        null: what guidance leads away from, for each sample: the empty caption, or a negative prompt.
        flow: of the run; what is not given comes from it.
        steps: of the sampler.
        guidance: g of v = v_null + g (v_text - v_null) (Ho and Salimans, 2022); 1 asks the model for the text alone,
            and 0 for the null text alone, once a step instead of twice.
        sampler: `euler`, `heun` (second order, two evaluations a step) or `dpmpp_2m` (second order, one).
        given: frames that are known, normalised; they come out as they are, the others are generated to them.
    """
    scale = flow.guidance if guidance is None else guidance
    velocity = _guided(predict, text, null, scale)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        t = t.to(x.device)
        if given is None:
            return x0_from("rectified_flow", "velocity", velocity(x, t), x, t)
        x = given.put_into(x)
        return given.put_into(x0_from("rectified_flow", "velocity", velocity(x, given.times(t)), x, t))

    return NormalisedLatents(
        sample(
            denoise, noise, path="rectified_flow", steps=steps or flow.steps, method=sampler or flow.sampler,
            shift=flow.shift_at(row_tokens(noise.shape[2:])),
        )
    )  # fmt: skip


def _guided(predict: Predict, text: Text, null: Text, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    if scale in (0.0, 1.0):
        alone = text if scale else null
        return lambda x, t: predict(x, t, *alone)
    both = text.joined(null)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        with_text, without = predict(torch.cat([x, x]), torch.cat([t, t]), *both).chunk(2)
        return without + scale * (with_text - without)

    return velocity
