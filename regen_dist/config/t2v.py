"""Config of a text-to-video run: a diffusion transformer on cached latents. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from regen_dist.config.embedder import AttentionConfig, DensityConfig
from regen_dist.config.run import (
    CommonConfig,
    Fraction,
    HomePath,
    MixtureConfig,
    PositiveFloat,
    PositiveInt,
    SamplerName,
    Section,
)
from regen_dist.config.urls import parse_url

LATENT_PATCH = 2  # latent cells a side of one token (paper: patch 2x2)


class T2VModelConfig(Section):
    """Diffusion transformer on latent frames with cross-attention to text. `latent_channels` and `text_width` are those
    of the cache."""

    kind: Literal["t2v"] = "t2v"
    blocks: PositiveInt = 32
    heads: PositiveInt = 24
    width: PositiveInt = 3072
    mlp_ratio: PositiveFloat = 4.0
    latent_channels: PositiveInt = 8
    text_width: PositiveInt = 4096
    attention: AttentionConfig = AttentionConfig()

    @model_validator(mode="after")
    def _heads_fit(self) -> T2VModelConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; choose a width that is")
        if self.width // self.heads % 2 or self.width // self.heads < 6:
            raise ValueError(
                f"heads of width {self.width // self.heads}: rotary positions over three axes need an even width of at "
                "least 6"
            )
        if self.attention.pattern != "full":
            raise ValueError("attention.pattern: text to video attends to all latent frames; set it to full")
        return self


class FlowConfig(Section):
    """Rectified flow with velocity prediction. `shift` s moves times towards noise at a row of `shift_tokens` tokens;
    a row of n tokens is shifted by s * sqrt(n / shift_tokens) (Esser et al., 2024, Eq. 23)."""

    density: DensityConfig = DensityConfig(pure_noise=0.0)
    shift: PositiveFloat = 1.0
    shift_tokens: PositiveInt = 256
    # Of each channel's std, how much normalisation takes out: 1 makes all channels equally strong; below it the weak
    # ones, which hold detail, stay weaker (std^(1 - whitening)) and drown in noise first, as they do in pixels.
    whitening: Fraction = 1.0
    # Shares of the rows that are trained with frames given clean (`regen generate --image`, `--continue`): the content
    # latent of the first clip; and, of rows of several clips, one clip or more, but not the last.
    given_content: Fraction = 0.0
    given_clips: Fraction = 0.0
    sampler: SamplerName = "euler"
    steps: PositiveInt = 30
    guidance: Annotated[float, Field(ge=0.0)] = 6.0  # 1 is no guidance

    @model_validator(mode="after")
    def _shares_are_of_one_whole(self) -> FlowConfig:
        if self.given_content + self.given_clips > 1:
            raise ValueError(
                f"given_content {self.given_content:g} + given_clips {self.given_clips:g} is more than all rows; lower "
                "one, so that their sum is 1 at most"
            )
        return self

    def shift_at(self, tokens: int) -> float:
        """Return the shift of a row of this many tokens."""
        return float(self.shift * (tokens / self.shift_tokens) ** 0.5)


class LatentDataConfig(MixtureConfig):
    """Sources of cached latents, and how rows of clips are cut from them."""

    clips: tuple[PositiveInt, ...] = (1,)  # clips in a row; several: each is a bucket of its own
    text_dropout: Fraction = 0.1  # share of the samples that are trained with the null embedding, for guidance

    @field_validator("clips")
    @classmethod
    def _clips_stand_once(cls, clips: tuple[int, ...]) -> tuple[int, ...]:
        if not clips or len(set(clips)) < len(clips):
            raise ValueError(f"clips {list(clips)}: give at least one number, and none twice")
        return clips


class GenerationConfig(Section):
    """Generation at every validation of a run."""

    embedder: HomePath | None = None  # a run or an exported model that decodes; None: only the loss is validated
    prompts: PositiveInt = 4  # the captions of so many samples of the validation data
    decode_steps: PositiveInt = 1

    @field_validator("embedder")
    @classmethod
    def _embedder_is_local(cls, embedder: str | None) -> str | None:
        if embedder is not None and parse_url(embedder).folder is None:
            raise ValueError(f"embedder {embedder}: must be a local folder")
        return embedder


class T2VConfig(CommonConfig):
    """Config of a text-to-video run."""

    task: Literal["t2v"] = "t2v"
    model: T2VModelConfig = T2VModelConfig()
    diffusion: FlowConfig = FlowConfig()
    data: LatentDataConfig
    generation: GenerationConfig = GenerationConfig()

    @model_validator(mode="after")
    def _ranks_can_share_rows(self) -> T2VConfig:
        self.engine.check_heads("model.heads", self.model.heads)
        return self

    @model_validator(mode="after")
    def _the_best_is_by_what_is_measured(self) -> T2VConfig:
        kept = self.checkpoint
        if kept.keep_best and (kept.best_metric, kept.best_is) != ("loss", "min"):
            raise ValueError(
                f"checkpoint.keep_best={kept.keep_best} by {kept.best_metric} ({kept.best_is}): the validation of text "
                "to video measures the loss alone; set checkpoint.best_metric=loss and checkpoint.best_is=min"
            )
        return self


class TextConfig(Section):
    """A text encoder and its tokenizer, such as a T5 or whatever else transformers loads: a folder (`regen text make`
    writes a small one, `regen text convert` one of pickled weights), or a name on the Hugging Face hub."""

    encoder: str = "google/t5-v1_1-xxl"
    max_tokens: PositiveInt = 256  # longer captions are cut


__all__ = ["TextConfig"]
