"""The file of a pipeline: named steps, each a training or a command."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from launcher.job import JobTask
from launcher.submit import SubmissionRequest
from regen_dist.checks.data import READING
from regen_dist.checks.findings import side_by_side
from regen_dist.config.files import compose, find_preset, load_section
from regen_dist.config.run import HomePath, PositiveInt, Section
from regen_dist.config.urls import checked_url, expand_home, parse_url
from regen_dist.data.storage.store import Store
from regen_dist.errors import ConfigError, ObjectMissing
from regen_dist.jsontext import json_text

# Which step waits for which: what is wrong with it, and an order in which steps can run.

After = Mapping[str, Sequence[str] | None]  # None: the step above


def predecessors(after: After) -> dict[str, tuple[str, ...]]:
    """The steps that each waits for."""
    names = list(after)
    above = dict(zip(names[1:], names, strict=False))
    found = {}
    for name, asked in after.items():
        default = [above[name]] if name in above else []
        found[name] = tuple(dict.fromkeys(default if asked is None else asked))
    return found


def in_order(after: After) -> list[str]:
    """Every step behind those that it waits for; otherwise as they stand in the file.

    Raises:
        CycleError: there is no such order.
    """
    before = predecessors(after)
    TopologicalSorter(before).prepare()
    ordered: list[str] = []
    while len(ordered) < len(before):
        ordered.append(next(each for each in before if each not in ordered and {*before[each]} <= {*ordered}))
    return ordered


def problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Dotted key and text of what is wrong with `steps.*.after` in a file of which nothing has been checked yet."""
    steps = values.get("steps")
    if not isinstance(steps, dict):
        return
    after = {name: _asked(step) for name, step in steps.items()}
    for name, asked in after.items():
        for other in asked or ():
            if other not in after:
                yield f"steps.{name}.after", _unknown(other, [each for each in after if each != name])
    known = {
        name: asked if asked is None else [each for each in asked if each in after] for name, asked in after.items()
    }
    try:
        in_order(known)
    except CycleError as error:
        circle = error.args[1][::-1]
        yield f"steps.{circle[0]}", f"these steps wait for each other: {' -> '.join(circle)}; take one `after` out"


def _asked(step: object) -> list[str] | None:
    """What a step says itself; that it is no list of names is told by the schema."""
    asked = step.get("after") if isinstance(step, dict) else None
    return [each for each in asked if isinstance(each, str)] if isinstance(asked, list) else None


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"there is no step {name!r}; {hint}Allowed: {', '.join(known) or 'none, it is the only one'}"


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

    @field_validator("command", "train", "inputs")
    @classmethod
    def _homes_are_expanded(cls, value: Any) -> Any:
        """As the shell does before a word that a user types; a pipeline's words pass through none."""
        if isinstance(value, Path):
            return Path(expand_home(str(value)))
        if isinstance(value, tuple):
            return tuple(type(each)(expand_home(str(each))) if str(each).startswith("~/") else each for each in value)
        return value

    @field_validator("outputs")
    @classmethod
    def _outputs_are_places(cls, outputs: tuple[str, ...]) -> tuple[str, ...]:
        for each in outputs:
            checked_url(each)
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
    output: HomePath = "runs"
    variables: dict[str, str | int | float] = Field(default_factory=dict)  # for ${variables.NAME} elsewhere in the file
    steps: Annotated[dict[Annotated[str, Field(pattern=NAME)], Step], Field(min_length=1)]

    @property
    def folder(self) -> Path:
        """Of all its traces."""
        return (Path(self.output) / self.name).absolute()

    @property
    def before(self) -> dict[str, tuple[str, ...]]:
        """The steps that each waits for."""
        return predecessors(self._after)

    @property
    def ordered(self) -> list[str]:
        """The steps, each behind those that it waits for."""
        return in_order(self._after)

    @property
    def _after(self) -> dict[str, tuple[str, ...] | None]:
        return {name: step.after for name, step in self.steps.items()}


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """A pipeline's file, read as every config is.

    Raises:
        ConfigError: with all that is wrong in it.
    """
    return load_section(Pipeline, path, overrides, problems)


# What a step reads and leaves: whether it is there, and whether it is what it was.

_MARKS = ("/manifest.json", "/config.yaml")  # of a dataset, of an exported model: the last that is written


def with_inputs(request: SubmissionRequest, inputs: Sequence[Path]) -> SubmissionRequest:
    """The same order, whose fingerprint changes with the content of some files, too.

    Raises:
        ConfigError: one of them is not there.
    """
    inputs = [find_preset(path) for path in inputs]
    if missing := [str(path) for path in inputs if not path.is_file()]:
        raise ConfigError(
            f"inputs: no file {', '.join(missing)}; name what is there before the pipeline runs (what an earlier step "
            "makes is no input: the step waits for it by `after`)"
        )
    if not inputs:
        return request
    told = json_text([request.fingerprint, *map(_content, inputs)])
    return replace(request, parent_fingerprint=hashlib.sha256(told.encode()).hexdigest()[:16])


def _content(path: Path) -> str:
    """Of a config with all that it extends."""
    config = path.suffix in (".yaml", ".yml")
    data = json_text(compose(path).values, sort_keys=True).encode() if config else path.read_bytes()
    return hashlib.sha256(data).hexdigest()


def missing_outputs(request: SubmissionRequest, step: Step) -> dict[str, Sequence[JobTask]]:
    """The outputs that are not there, and the tasks that make each: one where `{task}` stands in it, or else all.

    Raises:
        DataError: a store does not answer.
    """
    makers: dict[str, Sequence[JobTask]] = {}
    for output in step.outputs:
        for number, task in enumerate(request.tasks):
            makers[filled(output, number, len(request.tasks))] = [task] if "{task}" in output else request.tasks
    there = side_by_side(exists, makers)
    return {place: tasks for (place, tasks), is_there in zip(makers.items(), there, strict=True) if not is_there}


def filled(text: str, number: int, tasks: int) -> str:
    """A text with `{task}` and `{tasks}` in it, for one task."""
    return text.replace("{task}", str(number)).replace("{tasks}", str(tasks))


def exists(url: str) -> bool:
    """Whether there is an object, a file, or a folder with something in it.

    Raises:
        DataError: the store does not answer.
    """
    place = parse_url(url)
    if place.folder is not None:
        return place.folder.is_file() or (place.folder.is_dir() and any(place.folder.iterdir()))
    parent, _, name = place.url.rpartition("/")
    try:
        is_object = not parent.endswith("/") and Store(parent, READING).size(name) is not None
        return is_object or bool(Store(place.url, READING).list())
    except ObjectMissing:
        return False


def made(step: Step, request: SubmissionRequest) -> list[str]:
    """What later steps may count on: outputs, the dataset whose manifest or the model whose config is one of them, and
    the step's folder. A training: its run."""
    outputs = [filled(each, number, step.array) for each in step.outputs for number in range(step.array)]
    wholes = [each.removesuffix(mark) for each in outputs for mark in _MARKS if each.endswith(mark)]
    return list(dict.fromkeys([*outputs, *wholes, str(request.base)]))
