"""What every section of the config is made of. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

SPATIAL_COMPRESSION = 8  # paper: one latent cell per 8x8 pixels

Rate = Annotated[float, Field(gt=0.0, le=1.0)]  # AdamW moves every weight by about so much in a step
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
SamplerName = Literal["euler", "heun", "dpmpp_2m"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, and no number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
