"""The file of a pipeline: named steps, each a training or a command, in the order in which they may run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from regen_dist.config.loading import load_section
from regen_dist.config.section import PositiveInt, Section

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Step(Section):
    """One job. `train` names a config, and `overrides` change it; or `command` is one of regen's with its arguments."""

    train: Path | None = None
    overrides: tuple[str, ...] = ()
    command: tuple[str, ...] | None = None
    array: PositiveInt = 1  # tasks of a command; {task} and {tasks} in its arguments are filled in
    after: tuple[str, ...] | None = None  # steps above; None: the one before
    outputs: tuple[str, ...] = ()  # paths or URLs that must be there for the step to be complete
    cluster: dict[str, Any] = Field(default_factory=dict)  # keys of the cluster's file, as nodes or time_min

    @field_validator("command", "overrides", "outputs", mode="before")
    @classmethod
    def _numbers_are_text(cls, values: object) -> object:
        return [str(each) for each in values] if isinstance(values, list) else values

    @model_validator(mode="after")
    def _is_one_of_the_two(self) -> Step:
        if (self.train is None) == (not self.command):
            raise ValueError("give either train (a config) or command (a list: a command of regen and its arguments)")
        if self.train is None and self.overrides:
            raise ValueError("overrides change the config of a training; put a command's options into its list")
        if self.train is not None and self.array > 1:
            raise ValueError("a training is one task; runs of different values are a sweep")
        return self


class Pipeline(Section):
    """Steps by their names. Commands keep their traces in OUTPUT/NAME/STEP; a training in its run folder."""

    name: Annotated[str, Field(pattern=NAME)]
    output: str = "runs"
    variables: dict[str, str | int | float] = Field(default_factory=dict)  # for ${variables.NAME} elsewhere in the file
    steps: dict[Annotated[str, Field(pattern=NAME)], Step]

    @model_validator(mode="after")
    def _steps_come_after_what_they_need(self) -> Pipeline:
        if not self.steps:
            raise ValueError("steps is empty; a pipeline has at least one")
        above: list[str] = []
        for name, step in self.steps.items():
            if unknown := [each for each in step.after or () if each not in above]:
                allowed = f"steps above it ({', '.join(above) or 'none'})"
                raise ValueError(f"steps.{name}.after names {', '.join(unknown)}; allowed: {allowed}")
            above.append(name)
        return self

    def before(self, name: str) -> tuple[str, ...]:
        """The steps that this one waits for."""
        after = self.steps[name].after
        if after is not None:
            return after
        names = list(self.steps)
        return tuple(names[: names.index(name)][-1:])


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """A pipeline's file, read as every config is.

    Raises:
        ConfigError: with all that is wrong in it.
    """
    return load_section(Pipeline, path, overrides)
