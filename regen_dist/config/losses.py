"""Config of the losses beside an embedder's reconstruction loss, off by default (docs/losses.md). Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from regen_dist.config.run import Beta, Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Rate, Section

SSIM_WINDOW = 11  # pixels, as in `regen_dist.pixels`
Weight = Annotated[float, Field(ge=0.0)]  # of a term, beside the reconstruction's 1; 0 leaves the term out


class PerceptualConfig(Section):
    """Distance between features of a frozen image network (LPIPS; Zhang et al., 2018)."""

    weight: Weight = Field(default=0.0, description="Weight beside the reconstruction's 1; 0: off.")
    network: str | None = Field(
        default=None,
        description="Path of the network's weights, a safetensors file in the format of docs/losses.md; required above "
        "weight 0.",
    )
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        default=None, description="SHA-256 that the file must have, in hexadecimal; null: any."
    )
    frames: PositiveInt | None = Field(
        default=4, description="Frames of each clip that are compared in a step, drawn per sample; null: all."
    )

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        if self.weight > 0 and self.network is None:
            raise ValueError(
                f"weight {self.weight:g} needs a feature network, and network is not set; give the path of a "
                "safetensors file (its format: docs/losses.md), or set weight to 0"
            )
        return self


class AdversarialConfig(Section):
    """Loss of a 3D patch discriminator that learns to distinguish source and output (MAGVIT-v2, Yu et al., 2024;
    VidTok, Tang et al., 2024), and how the discriminator is trained."""

    weight: Weight = Field(default=0.0, description="Weight beside the reconstruction's 1; 0: off.")
    start_step: NonNegativeInt = Field(
        default=0, description="Optimizer steps of the model before the term and the discriminator's training begin."
    )
    loss: Literal["hinge", "non_saturating"] = Field(default="hinge", description="Form of the adversarial loss.")
    regularisation: Literal["none", "r1", "lecam"] = Field(
        default="lecam",
        description="Regularisation of the discriminator: R1 (Mescheder et al., 2018), LeCAM (Tseng et al., 2021) or "
        "none.",
    )
    regularisation_weight: Weight = Field(
        default=0.001, description="Weight of the regularisation; 0.001 suits lecam, r1 commonly takes 1 to 10."
    )
    channels: int = Field(
        default=64,
        ge=16,
        multiple_of=8,
        description="Channels of the discriminator's first layer; each further one has twice as many, up to 8 times.",
    )
    layers: PositiveInt = Field(
        default=3, description="Layers behind the first, each of half the frames, rows and columns."
    )
    lr: Rate = Field(default=1e-4, description="Learning rate of the discriminator, constant.")
    betas: tuple[Beta, Beta] = Field(
        default=(0.5, 0.9), description="Decay of AdamW's averages of the discriminator's gradient and of its square."
    )
    weight_decay: Weight = Field(default=0.0, description="Decoupled weight decay of the discriminator.")
    clip_norm: PositiveFloat = Field(default=1.0, description="Largest norm of the discriminator's gradient.")


class SsimConfig(Section):
    """Structural dissimilarity: 1 - SSIM of the frames' colours (Wang et al., 2004), as it is evaluated."""

    weight: Weight = Field(default=0.0, description="Weight beside the reconstruction's 1; 0: off.")


class LossesConfig(Section):
    """Terms beside the reconstruction's loss. A weight of 0 is off: nothing is built, and nothing is computed."""

    perceptual: PerceptualConfig = Field(
        default=PerceptualConfig(), description="Distance of features of a frozen image network."
    )
    adversarial: AdversarialConfig = Field(default=AdversarialConfig(), description="Loss of a 3D patch discriminator.")
    ssim: SsimConfig = Field(default=SsimConfig(), description="Structural dissimilarity of the frames.")
    signal_floor: Fraction = Field(
        default=0.25,
        description="REGEN's terms count with floor + (1 - floor) * alpha^2 / (alpha^2 + sigma^2); 0 leaves pure noise "
        "out, 1 counts all fully.",
    )

    @property
    def any(self) -> bool:
        """Return true if any term is enabled."""
        return self.perceptual.weight > 0 or self.adversarial.weight > 0 or self.ssim.weight > 0

    @model_serializer(mode="wrap")
    def _omit_default_ssim(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the default out, so that configs saved before there was this term keep their text and hash."""
        values: dict[str, Any] = serialize(self)
        if self.ssim == SsimConfig():
            del values["ssim"]
        return values
