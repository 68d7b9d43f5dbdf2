"""The text-to-video task: a rectified flow on cached latents, with text from the cache. No video is decoded and no text
encoded, except for the logged samples.

Legend: B rows, n clips, C channels, F latent frames, h x w latent cells, M text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import cached_property, reduce
from operator import add

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from regen_dist.checks.data import embedder, fits
from regen_dist.checks.findings import Target, refuse
from regen_dist.config.t2v import T2VConfig
from regen_dist.data.loading.datasets import LatentSet, sizes_of
from regen_dist.data.loading.latent_loader import LatentBatch, latent_batches
from regen_dist.data.loading.validation import ValidationRows, validation_rows
from regen_dist.diffusion.noise import NoiseStream, latent_gaussian, uniforms
from regen_dist.diffusion.path import noisy, target_of, timesteps
from regen_dist.diffusion.samplers import draw_given_frames, error_without_given
from regen_dist.distributed.engine import Engine
from regen_dist.distributed.ranks import Ranks
from regen_dist.inference.codec import Codec
from regen_dist.inference.encoder import check_embedder
from regen_dist.inference.latent_space import LatentScale, LatentSpace, NormalisedLatents, parse_statistics
from regen_dist.inference.long_video import decode_row
from regen_dist.inference.sampler import Text, row_tokens, sample_latents
from regen_dist.models.embedder import build_model
from regen_dist.models.flops import training_flops_per_row
from regen_dist.training.task import Loss, Validation, on_device

_VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


class TextToVideoTask:
    """Text to video on the frozen embedder's latents (paper, Sec. 4). An image is a row of one content latent."""

    def __init__(self, config: T2VConfig, device: torch.device) -> None:
        self.config, self.device = config, device

    @cached_property
    def data(self) -> LatentSet:
        """The caches; refused where model or embedder do not fit them, as `regen check` does beforehand."""
        config = self.config
        data = LatentSet(config.data, batch_global=config.train.batch_global, seed=config.train.seed)
        facts = data.facts
        refuse(fits(config, facts.url, facts))
        refuse(embedder(config, {facts.url: facts}, Target()))
        return data

    def build(self, ranks: Ranks = Ranks(), *, resumes: bool = False) -> nn.Module:  # noqa: B008 - frozen
        torch.manual_seed(self.config.train.seed)
        model = build_model(self.config.model)
        model.set_activation_checkpointing(self.config.engine.activation_checkpointing)
        return model

    def batches(self, ranks: Ranks, cursor: int) -> Generator[LatentBatch]:
        if ranks.is_main:
            self._space.write(self.config.folder)
        accumulation = self.config.train.accumulation
        return latent_batches(
            self.data, accumulation=accumulation, rank=ranks.rank, world_size=ranks.world_size, cursor=cursor
        )

    def loss(self, engine: Engine, batch: LatentBatch, step: int) -> Loss:
        batch = on_device(batch, self.device)
        seed, ids = self.config.train.seed, batch.keys
        x0, flow = self._normalised(batch).frames, self.config.diffusion
        chances = uniforms(seed, ids, step, NoiseStream.TIMESTEP)
        t = timesteps(flow.density, chances, flow.shift_at(row_tokens(x0.shape[2:])))
        noise = latent_gaussian(seed, ids, x0.shape[2], x0.shape[1], (x0.shape[3], x0.shape[4]), draw=step)
        text = self._with_dropout(self._text(batch), uniforms(seed, ids, step, NoiseStream.TEXT)[:, 0])
        x, given = noisy("rectified_flow", x0, noise, t), draw_given_frames(flow, seed, ids, step, x0)
        if given is None:
            velocity = engine(x, t, *text)
            return Loss(F.mse_loss(velocity, target_of("rectified_flow", "velocity", x0, noise, t)), {})
        velocity = engine(given.put_into(x), given.times(t), *text)
        return Loss(error_without_given(velocity, target_of("rectified_flow", "velocity", x0, noise, t), given), {})

    def flops(self, batch: LatentBatch) -> float:
        """Operations that training on a micro-batch needs; rows differ in length."""
        rows, clips, _, height, width = batch.content.shape
        frames = 1 if batch.motion.shape[1] == 0 else 2 * clips
        assert batch.mask is not None, "the caches were checked for text"
        given, tokens = self.config.diffusion.gives_frames, batch.mask.shape[1]
        return rows * training_flops_per_row(self.config.model, frames, (height, width), tokens, given_frames=given)

    def read_validation(self, ranks: Ranks) -> None:
        _ = self._validation
        if self.config.generation.embedder is not None:
            ranks.on_main(lambda: self._codec is not None)

    @torch.no_grad()
    def validate(self, engine: Engine, meet: Callable[[], None] = lambda: None) -> Validation:
        """The loss of fixed rows at fixed times, and videos generated from their captions by the weights of this step,
        where the config names an embedder that decodes them on rank 0."""
        batch = on_device(self._rows, self.device)
        x0, text = self._normalised(batch).frames, self._text(batch)
        noise = self._noise(batch, x0)
        losses = [self._loss_at(engine, x0, noise, text, time) for time in _VALIDATION_TIMES]
        figures = {"loss": sum(losses) / len(losses)}
        if self.config.generation.embedder is None:
            return Validation(figures)
        made = self._generated(engine, noise, text)
        both = [NormalisedLatents(x0[: len(made.frames)]), made]
        if not engine.ranks.is_main or not bool(torch.isfinite(made.frames).all()):  # nothing to show
            for _ in range(sum(len(rows.frames) for rows in both)):
                meet()
            return Validation(figures)
        videos = [self._decoded(rows, meet) for rows in both]
        loss = f"loss {figures['loss']:.4f}"
        return Validation(figures, videos[0], videos[1], loss, "generated", self._captions, self._validation.fps[0])

    def _loss_at(self, engine: Engine, x0: Tensor, noise: Tensor, text: Text, time: float) -> float:
        t = torch.full((len(x0),), time, device=self.device)
        velocity = engine(noisy("rectified_flow", x0, noise, t), t, *text)
        return float(F.mse_loss(velocity, target_of("rectified_flow", "velocity", x0, noise, t)))

    def _generated(self, engine: Engine, noise: Tensor, text: Text) -> NormalisedLatents:
        """Generate videos from the captions. A collective: every rank computes the same."""
        count = len(self._captions)
        wanted = Text(text.text[:count], text.mask[:count])
        return sample_latents(engine, noise[:count], wanted, self._null.expanded(count), self.config.diffusion)

    def _decoded(self, rows: NormalisedLatents, meet: Callable[[], None]) -> Tensor:
        steps = self.config.generation.decode_steps
        return decode_row(self._codec, self._scale.restore(rows), steps=steps, after_each=meet)

    def _noise(self, batch: LatentBatch, x0: Tensor) -> Tensor:
        size, seed = (x0.shape[3], x0.shape[4]), self.config.train.seed
        return latent_gaussian(seed, batch.sample_ids, x0.shape[2], x0.shape[1], size)

    def _normalised(self, batch: LatentBatch) -> NormalisedLatents:
        """Latents in float32, in which noise is added to them."""
        return self._scale.normalise(batch.content, batch.motion)

    def _text(self, batch: LatentBatch) -> Text:
        assert batch.text is not None, "the caches were checked for text"
        assert batch.mask is not None, "the caches were checked for text"
        return Text(*(each.to(self.device, non_blocking=True) for each in (batch.text, batch.mask)))

    def _with_dropout(self, text: Text, chances: Tensor) -> Text:
        """Replace a share of the captions by the empty caption, for guidance (Ho and Salimans, 2022)."""
        dropped = chances < self.config.data.text_dropout
        null = self._null.expanded(len(chances))
        return text.where(dropped, Text(null.text.to(text.text.dtype), null.mask))

    @cached_property
    def _space(self) -> LatentSpace:
        """Latent space of all caches together."""
        data, null = self.data, self.data.null_text()
        assert null is not None, "the caches were checked for text"
        parsed = [parse_statistics(each, data.facts.url) for each in data.statistics]
        sizes, whitening = sizes_of(data.datasets), self.config.diffusion.whitening
        return LatentSpace.of(data.facts, reduce(add, parsed), null, sizes, whitening)

    @cached_property
    def _scale(self) -> LatentScale:
        return self._space.scale

    @cached_property
    def _null(self) -> Text:
        null = self._space.null_text
        return Text(null.text[None].to(self.device), null.mask[None].to(self.device))

    @cached_property
    def _validation(self) -> ValidationRows:
        return validation_rows(self.config.data, self.data.facts, rows=max(4, self.config.generation.prompts))

    @property
    def _rows(self) -> LatentBatch:
        return self._validation.batch

    @property
    def _captions(self) -> tuple[str, ...]:
        return self._validation.captions[: self.config.generation.prompts]

    @cached_property
    def _codec(self) -> Codec:
        """Codec that decodes samples, for rank 0; the one that encoded the caches."""
        embedder = self.config.generation.embedder
        assert embedder is not None, "nothing is generated without one"
        codec = Codec.load(embedder, device=self.device)
        check_embedder(codec, self.data.facts.encoder, embedder)
        return codec
