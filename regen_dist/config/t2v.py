"""Config of a text-to-video run: a diffusion transformer on cached latents. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from regen_dist.config.datasets import MixtureConfig
from regen_dist.config.embedder import AttentionConfig, DensityConfig
from regen_dist.config.run import (
    SPATIAL_COMPRESSION,
    CommonConfig,
    Fraction,
    HomePath,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SamplerName,
    Section,
)

LATENT_PATCH = 2  # latent cells a side of one token (paper: patch 2x2)
SIDE_MULTIPLE = LATENT_PATCH * SPATIAL_COMPRESSION  # pixels a side of one token


class T2VModelConfig(Section):
    """Diffusion transformer on latent frames with cross-attention to text."""

    kind: Literal["t2v"] = Field(default="t2v", description="Kind of the model.")
    blocks: PositiveInt = Field(
        default=32, description="Transformer blocks; the defaults make 4.9B parameters (paper: 5B)."
    )
    heads: PositiveInt = Field(
        default=24, description="Attention heads; must divide `width` into even parts of at least 6 (rotary positions)."
    )
    width: PositiveInt = Field(default=3072, description="Channels of a token.")
    mlp_ratio: PositiveFloat = Field(default=4.0, description="Hidden width of the feed-forward layers over `width`.")
    latent_channels: PositiveInt = Field(
        default=8, description="Channels of a latent frame; those of the cache (paper: 8)."
    )
    text_width: PositiveInt = Field(
        default=4096, description="Channels of a text embedding; those of the cache (4096: T5 v1.1 XXL)."
    )
    attention: AttentionConfig = Field(
        default=AttentionConfig(), description="Self-attention; its pattern must be full."
    )

    @model_validator(mode="after")
    def _check_heads(self) -> T2VModelConfig:
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
    """Rectified flow with velocity prediction."""

    density: DensityConfig = Field(
        default=DensityConfig(pure_noise=0.0),
        description="Density of the training timesteps; by default without a share at pure noise.",
    )
    shift: PositiveFloat = Field(
        default=1.0, description="Moves timesteps towards noise at a row of `shift_tokens` tokens; 1: not at all."
    )
    shift_tokens: PositiveInt = Field(
        default=256,
        description="Tokens of that row; one of n is shifted by shift * sqrt(n / shift_tokens) (Esser et al., 2024, "
        "Eq. 23).",
    )
    whitening: Fraction = Field(
        default=1.0,
        description="Share of the channels' differences in std that normalisation removes; below 1 weak channels, "
        "which hold detail, stay weaker.",
    )
    given_content: Fraction = Field(
        default=0.0,
        description="Share of the rows with the first clip's content latent given clean (`regen generate --image`).",
    )
    given_clips: Fraction = Field(
        default=0.0,
        description="Share of the rows of several clips with one or more of them, not the last, given clean "
        "(`--continue`).",
    )
    sampler: SamplerName = Field(default="euler", description="Sampler used by default.")
    steps: PositiveInt = Field(default=30, description="Sampling steps used by default.")
    guidance: NonNegativeFloat = Field(default=6.0, description="Classifier-free guidance used by default; 1: none.")

    @model_validator(mode="after")
    def _check_given_shares(self) -> FlowConfig:
        if self.given_content + self.given_clips > 1:
            raise ValueError(
                f"given_content {self.given_content:g} + given_clips {self.given_clips:g} is more than all rows; lower "
                "one, so that their sum is 1 at most"
            )
        return self

    @property
    def gives_frames(self) -> bool:
        """Return whether a share of the rows is trained with given frames."""
        return self.given_content + self.given_clips > 0

    def shift_at(self, tokens: int) -> float:
        """Return the shift of a row of this many tokens."""
        return float(self.shift * (tokens / self.shift_tokens) ** 0.5)


class LatentDataConfig(MixtureConfig):
    """Sources of cached latents, and how rows of clips are cut from them."""

    clips: tuple[PositiveInt, ...] = Field(
        default=(1,), description="Clips in a row; several numbers: each is a bucket of its own."
    )
    text_dropout: Fraction = Field(
        default=0.1, description="Share of the samples trained with the empty caption's embedding, for guidance."
    )

    @field_validator("clips")
    @classmethod
    def _check_clips(cls, clips: tuple[int, ...]) -> tuple[int, ...]:
        if not clips or len(set(clips)) < len(clips):
            raise ValueError(f"clips {list(clips)}: give at least one number, and none twice")
        return clips


class GenerationConfig(Section):
    """Generation at every validation of a run."""

    embedder: HomePath | None = Field(
        default=None, description="Run folder or exported model that decodes; null: only the loss is validated."
    )
    prompts: PositiveInt = Field(
        default=4, description="Captions of the validation data that videos are generated from."
    )
    decode_steps: PositiveInt = Field(default=1, description="Sampling steps of the embedder's decoder.")


class T2VConfig(CommonConfig):
    """Config of a text-to-video run."""

    task: Literal["t2v"] = Field(default="t2v", description="What is trained: a text-to-video model.")
    model: T2VModelConfig = Field(default=T2VModelConfig(), description="Diffusion transformer on latent frames.")
    diffusion: FlowConfig = Field(default=FlowConfig(), description="Rectified flow with velocity prediction.")
    data: LatentDataConfig = Field(description="Latent caches.")
    generation: GenerationConfig = Field(default=GenerationConfig(), description="Generation at every validation.")

    @model_validator(mode="after")
    def _check_sequence_parallel(self) -> T2VConfig:
        self.engine.check_heads("model.heads", self.model.heads)
        return self

    @model_validator(mode="after")
    def _check_best_metric(self) -> T2VConfig:
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

    encoder: str = Field(
        default="google/t5-v1_1-xxl",
        description="Folder of a text encoder with its tokenizer, or its name on the Hugging Face hub.",
    )
    max_tokens: PositiveInt = Field(default=256, description="Tokens of a caption; longer ones are cut.")


__all__ = ["TextConfig"]
