"""Sections on losses beside the reconstruction's, all off by default (docs/losses.md). Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from regen_dist.config.run import Beta, Fraction, PositiveFloat, PositiveInt, Rate, Section, TrainConfig

Weight = Annotated[float, Field(ge=0.0)]  # of a term, beside the reconstruction's 1; 0 leaves the term out


class PerceptualConfig(Section):
    """Distance between features of a frozen image network (LPIPS; Zhang et al., 2018)."""

    weight: Weight = 0.0
    network: str | None = None  # path of its weights, a safetensors file in the format of docs/losses.md
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None  # that the file must have; None: any
    frames: PositiveInt | None = 4  # of each clip that are compared in a step, drawn for each sample; None: all

    @model_validator(mode="after")
    def _the_term_has_a_network(self) -> Self:
        if self.weight > 0 and self.network is None:
            raise ValueError(
                f"weight {self.weight:g} needs a feature network, and network is not set; give the path of a "
                "safetensors file (its format: docs/losses.md), or set weight to 0"
            )
        return self


class AdversarialConfig(Section):
    """Loss of a 3D patch discriminator that learns to tell source from reconstruction (MAGVIT-v2, Yu et al., 2024;
    VidTok, Tang et al., 2024), and how the discriminator is trained."""

    weight: Weight = 0.0
    start_step: Annotated[int, Field(ge=0)] = 0  # optimizer steps of the model before the term and its training begin
    loss: Literal["hinge", "non_saturating"] = "hinge"
    # Of the discriminator: R1 (Mescheder et al., 2018), LeCAM (Tseng et al., 2021), or none.
    regularisation: Literal["none", "r1", "lecam"] = "lecam"
    regularisation_weight: Weight = 0.001
    channels: Annotated[int, Field(ge=16, multiple_of=8)] = 64  # of the first layer; each further one has twice as many
    layers: PositiveInt = 3  # behind the first one, each of half the frames, rows and columns
    lr: Rate = 1e-4
    betas: tuple[Beta, Beta] = (0.5, 0.9)
    weight_decay: Weight = 0.0
    clip_norm: PositiveFloat = 1.0


class LossesConfig(Section):
    """Terms beside the reconstruction's loss. A weight of 0 is off: nothing is built, and nothing is computed."""

    perceptual: PerceptualConfig = PerceptualConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    # REGEN's prediction at diffusion time t counts with floor + (1 - floor) * alpha^2 / (alpha^2 + sigma^2): the share
    # of signal in its input. At the floor 0, what is decoded from pure noise in one step is left out of the terms.
    signal_floor: Fraction = 0.25

    @property
    def any(self) -> bool:
        """Return true if any term is enabled."""
        return self.perceptual.weight > 0 or self.adversarial.weight > 0


class EmbedderTrainConfig(TrainConfig):
    """`TrainConfig` of an embedder's run."""

    losses: LossesConfig = LossesConfig()

    @model_serializer(mode="wrap")
    def _leave_out_what_is_off(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the defaults out, so that configs saved before there were such losses keep their text and hash."""
        values: dict[str, Any] = serialize(self)
        if self.losses == LossesConfig():
            del values["losses"]
        return values
