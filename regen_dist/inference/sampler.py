"""A trained text-to-video model, of a run or an export, and its sampling of the normalised latents of a row of clips
with classifier-free guidance.

Legend: B samples, C channels, F latent frames, h x w latent cells, M text tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regen_dist.checkpoint.export import Weights, build_with_weights, find_t2v
from regen_dist.config.exported import T2VExportConfig
from regen_dist.config.run import SamplerName
from regen_dist.config.t2v import LATENT_PATCH, FlowConfig
from regen_dist.diffusion.path import x0_from
from regen_dist.diffusion.samplers import GivenFrames, sample
from regen_dist.inference.codec import finite
from regen_dist.inference.latent_space import LatentSpace, NormalisedLatents, read_space
from regen_dist.models.embedder import build_model
from regen_dist.models.t2v import TextToVideo
from regen_dist.observe.hardware import choose_device, inference_dtype

# map from x_t [B, C, F, h, w], t [B] or [B, F], text [B, M, D], mask [B, M] to the velocity [B, C, F, h, w]
Predict = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Text(NamedTuple):
    """Text embeddings [B, M, D] and the mask of valid tokens, bool [B, M]."""

    text: Tensor
    mask: Tensor

    @classmethod
    def of(cls, texts: Sequence[Tensor], device: torch.device | None = None) -> Text:
        """Batch embeddings [L, D] of any lengths, padded to the longest."""
        longest = max(map(len, texts))
        padded = torch.stack([F.pad(text.float(), (0, 0, 0, longest - len(text))) for text in texts])
        lengths = torch.tensor([len(text) for text in texts])
        return cls(padded.to(device), (torch.arange(longest) < lengths[:, None]).to(device))

    def padded(self, tokens: int) -> Text:
        """Pad to at least this number of tokens."""
        more = max(0, tokens - self.mask.shape[1])
        return Text(F.pad(self.text, (0, 0, 0, more)), F.pad(self.mask, (0, more)))

    def joined(self, other: Text) -> Text:
        """Concatenate two batches: [2B, M, D]."""
        longest = max(self.mask.shape[1], other.mask.shape[1])
        mine, theirs = self.padded(longest), other.padded(longest)
        return Text(torch.cat([mine.text, theirs.text]), torch.cat([mine.mask, theirs.mask]))

    def where(self, chosen: Tensor, other: Text) -> Text:
        """Take the samples of `other` where `chosen` [B] is True, and the own samples elsewhere."""
        longest = max(self.mask.shape[1], other.mask.shape[1])
        mine, theirs = self.padded(longest), other.padded(longest)
        return Text(
            torch.where(chosen[:, None, None], theirs.text, mine.text),
            torch.where(chosen[:, None], theirs.mask, mine.mask),
        )

    def expanded(self, batch: int) -> Text:
        """Repeat one sample to a batch."""
        return Text(self.text.expand(batch, -1, -1), self.mask.expand(batch, -1))


def row_tokens(latents: Sequence[int]) -> int:
    """Number of tokens in a row of latents (F, h, w)."""
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
    given: GivenFrames | None = None,
) -> NormalisedLatents:
    """Integrate the flow from noise to latents.

    Args:
        predict: the model.
        noise: standard normal noise, [B, C, F, h, w].
        text: text of each sample.
        null: text that guidance leads away from, for each sample: the empty caption, or a negative prompt.
        flow: flow config of the run, which supplies the options that are not given.
        steps: number of sampler steps.
        guidance: g of v = v_null + g (v_text - v_null) (Ho and Salimans, 2022); 1 evaluates the model with
            the text only, and 0 with the null text only, once a step instead of twice.
        sampler: `euler`, `heun` (second order, two evaluations a step) or `dpmpp_2m` (second order, one).
        given: known frames, normalised; they are returned unchanged, and the others are generated to match them.
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


class TextToVideoModel:
    """A text-to-video model with its latent space. Computes in the precision of its training.

    Args:
        model: the module with its weights loaded.
        config: config of the model.
        space: latent space of the caches that it was trained on.
        device: device to compute on.
        origin: facts about the weights for records: run, step and so on.
        dtype: precision to compute in, if different from that of training (`inference_dtype`).
    """

    def __init__(
        self, model: TextToVideo, config: T2VExportConfig, space: LatentSpace, device: torch.device,
        origin: Mapping[str, Any], dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.config, self.space, self.device, self._origin = config, space, device, dict(origin)
        self._dtype = dtype or inference_dtype(config.precision, device)
        self.model = model.to(device, self._dtype).eval()

    @classmethod
    def load(
        cls,
        path: str | Path,
        weights: Weights | None = None,
        device: torch.device | None = None,
        *,
        untrained: bool = False,
    ) -> TextToVideoModel:
        """Load a text-to-video model from a run folder or an export. Nothing is unpickled.

        Args:
            path: a run folder, whose newest good checkpoint is taken; or what `regen checkpoint export` wrote.
            weights: the averaged weights (`ema`) or those of the last step (`plain`); None takes the averaged weights
                of a run, and whichever weights an export holds.
            device: CUDA by default, where it is available.
            untrained: take the initial weights of training instead, as a control.

        Raises:
            CheckpointError: there is no checkpoint, it or the latent space is damaged or missing; an export holds other
                weights than requested, or is an embedder.
            ConfigError: the folder is neither a text-to-video run nor an export.
        """
        found, device = find_t2v(path, weights), device or choose_device()
        space = read_space(found.path)
        if untrained:
            facts = {"run": found.name, "step": 0, "weights": "untrained", "config_hash": found.config_hash}
            with torch.random.fork_rng(devices=[]):  # torch's own generator neither matters nor changes
                torch.manual_seed(found.config.seed)
                return cls(build_model(found.config.model), found.config, space, device, facts)
        model = build_with_weights(found.config.model, found.weights(), found.what)
        return cls(model, found.config, space, device, found.facts())

    @property
    def channels(self) -> int:
        return self.config.model.latent_channels

    def sample(
        self,
        noise: Tensor,
        text: Text,
        null: Text,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: SamplerName | None = None,
        given: GivenFrames | None = None,
    ) -> NormalisedLatents:
        """Sample normalised latents [B, C, F, h, w] from noise of that shape; see `sample_latents`. Options that are
        not given come from the run's config. `space.scale.restore` turns them into latents that a codec decodes."""
        made = sample_latents(
            self.predict, noise, text, null, self.config.diffusion,
            steps=steps, guidance=guidance, sampler=sampler, given=given,
        )  # fmt: skip
        act = f"the model of step {self._origin.get('step', '?')} generates latents"
        return NormalisedLatents(finite(made.frames, self._dtype, act, "the guidance"))

    def predict(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return self.model(x, t, text, mask)  # type: ignore[no-any-return]

    def facts(self) -> dict[str, Any]:
        """Facts about the weights for records. A run and its unrounded export have the same facts."""
        return dict(self._origin)
