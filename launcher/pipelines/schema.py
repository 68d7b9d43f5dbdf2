"""The file of a pipeline: named steps, each a training or a command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from launcher.pipelines import graph
from regen_dist.config.loading import load_section
from regen_dist.config.section import PositiveInt, Section
from regen_dist.config.urls import parse_url

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Step(Section):
    """One job. `train` names a config, and `overrides` change it; or `command` is one of regen's with its arguments."""

    train: Path | None = None
    overrides: tuple[str, ...] = ()
    command: tuple[str, ...] | None = None
    array: PositiveInt = 1  # tasks of a command; {task} and {tasks} in its arguments are filled in
    after: tuple[str, ...] | None = None  # the steps that it waits for; None: the one above
    inputs: tuple[Path, ...] = ()  # files that a command reads and that count as part of it, as a config
    outputs: tuple[str, ...] = ()  # paths or URLs that must be there for a command to be complete; {task}: of each task
    cluster: dict[str, Any] = Field(default_factory=dict)  # keys of the cluster's file, as nodes or time_min

    @field_validator("command", "overrides", "outputs", mode="before")
    @classmethod
    def _numbers_are_text(cls, values: object) -> object:
        plain = (str, int, float)
        return (
            [str(each) if isinstance(each, plain) else each for each in values] if isinstance(values, list) else values
        )

    @field_validator("outputs")
    @classmethod
    def _outputs_are_places(cls, outputs: tuple[str, ...]) -> tuple[str, ...]:
        for each in outputs:
            parse_url(each)
        return outputs

    @model_validator(mode="after")
    def _is_one_of_the_two(self) -> Step:
        if (self.train is None) == (not self.command):
            raise ValueError("give either train (a config) or command (a list: a command of regen and its arguments)")
        if self.train is None and self.overrides:
            raise ValueError("overrides change the config of a training; put a command's options into its list")
        if self.train is not None and self.array > 1:
            raise ValueError("a training is one task; runs of different values are a sweep")
        if self.train is not None and (self.inputs or self.outputs):
            raise ValueError("inputs and outputs are a command's; a training is complete at its last step")
        return self


class Pipeline(Section):
    """Steps by their names. Commands keep their traces in OUTPUT/NAME/STEP; a training in its run folder."""

    name: Annotated[str, Field(pattern=NAME)]
    output: str = "runs"
    variables: dict[str, str | int | float] = Field(default_factory=dict)  # for ${variables.NAME} elsewhere in the file
    steps: Annotated[dict[Annotated[str, Field(pattern=NAME)], Step], Field(min_length=1)]

    @property
    def folder(self) -> Path:
        """Of all its traces."""
        return (Path(self.output) / self.name).absolute()

    @property
    def before(self) -> dict[str, tuple[str, ...]]:
        """The steps that each waits for."""
        return graph.predecessors(self._after)

    @property
    def ordered(self) -> list[str]:
        """The steps, each behind those that it waits for."""
        return graph.in_order(self._after)

    @property
    def _after(self) -> dict[str, tuple[str, ...] | None]:
        return {name: step.after for name, step in self.steps.items()}


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """A pipeline's file, read as every config is.

    Raises:
        ConfigError: with all that is wrong in it.
    """
    return load_section(Pipeline, path, overrides, graph.problems)
