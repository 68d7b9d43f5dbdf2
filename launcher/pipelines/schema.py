"""Pipeline files: named steps, each a training or a command."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from launcher.job import JobTask
from launcher.submit import SubmissionRequest, fill_placeholders
from regen_dist.checks.data import READING
from regen_dist.checks.findings import run_concurrently
from regen_dist.config.files import compose, find_preset, load_section
from regen_dist.config.run import HomePath, PositiveInt, Section
from regen_dist.config.urls import checked_url, expand_home, parse_url
from regen_dist.data.storage.store import Store
from regen_dist.errors import ConfigError, ObjectMissing
from regen_dist.jsontext import json_text

# Dependencies between steps: validation, and an order in which the steps can run.

After = Mapping[str, Sequence[str] | None]  # None: the previous step


def predecessors(after: After) -> dict[str, tuple[str, ...]]:
    """Return the predecessors of each step."""
    names = list(after)
    above = dict(zip(names[1:], names, strict=False))
    found = {}
    for name, asked in after.items():
        default = [above[name]] if name in above else []
        found[name] = tuple(dict.fromkeys(default if asked is None else asked))
    return found


def in_order(after: After) -> list[str]:
    """Return the steps in topological order, otherwise in file order.

    Raises:
        CycleError: the dependencies contain a cycle.
    """
    before = predecessors(after)
    TopologicalSorter(before).prepare()
    ordered: list[str] = []
    while len(ordered) < len(before):
        ordered.append(next(each for each in before if each not in ordered and {*before[each]} <= {*ordered}))
    return ordered


def problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield dotted key and text of each problem in `steps.*.after` of an unvalidated file."""
    steps = values.get("steps")
    if not isinstance(steps, dict):
        return
    after = {name: _dependencies_of(step) for name, step in steps.items()}
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


def _dependencies_of(step: object) -> list[str] | None:
    """Return a step's `after`; the schema reports values that are no lists of names."""
    after = step.get("after") if isinstance(step, dict) else None
    return [each for each in after if isinstance(each, str)] if isinstance(after, list) else None


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"there is no step {name!r}; {hint}Allowed: {', '.join(known) or 'none, it is the only one'}"


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Word = Annotated[str, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number"}]})]  # numbers become text


class PipelineStep(Section):
    """One job: a training, or a command of `regen`."""

    train: Path | None = Field(default=None, description="Config of a training; give either this or `command`.")
    overrides: tuple[Word, ...] = Field(default=(), description="Changes to the config of a training, as a.b=value.")
    command: tuple[Word, ...] | None = Field(
        default=None, description="Command of regen and its arguments, as a list of words."
    )
    array: PositiveInt = Field(
        default=1, description="Tasks of a command; {task} and {tasks} in its arguments are replaced."
    )
    after: tuple[str, ...] | None = Field(
        default=None, description="Steps that this one waits for; null: the one above; []: none."
    )
    inputs: tuple[Path, ...] = Field(
        default=(), description="Local files that count as part of a command, such as a config that it is given."
    )
    outputs: tuple[Word, ...] = Field(
        default=(), description="Paths or URLs that must exist for a command to be complete; with {task}: one per task."
    )
    cluster: dict[str, Any] = Field(
        default_factory=dict, description="Keys of the cluster file for this step, such as nodes or time_min."
    )

    @field_validator("command", "overrides", "outputs", mode="before")
    @classmethod
    def _convert_numbers(cls, values: object) -> object:
        plain = (str, int, float)
        return (
            [str(each) if isinstance(each, plain) else each for each in values] if isinstance(values, list) else values
        )

    @field_validator("command", "train", "inputs")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        """Expand a leading `~`, as the shell does for typed words; the words of a pipeline pass through no shell."""
        if isinstance(value, Path):
            return Path(expand_home(str(value)))
        if isinstance(value, tuple):
            return tuple(type(each)(expand_home(str(each))) if str(each).startswith("~/") else each for each in value)
        return value

    @field_validator("outputs")
    @classmethod
    def _check_outputs(cls, outputs: tuple[str, ...]) -> tuple[str, ...]:
        for each in outputs:
            checked_url(each)
        return outputs

    @model_validator(mode="after")
    def _check_kind(self) -> PipelineStep:
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
    """A pipeline: steps by name. Commands write to OUTPUT/NAME/STEP, trainings to their run folders."""

    name: str = Field(pattern=NAME, description="Name of the pipeline, and of its folder in `output`.")
    output: HomePath = Field(
        default="runs", description="Folder of the pipelines' folders: commands write to OUTPUT/NAME/STEP."
    )
    variables: dict[str, str | int | float] = Field(
        default_factory=dict, description="Values for ${variables.NAME} elsewhere in the file."
    )
    steps: dict[Annotated[str, Field(pattern=NAME)], PipelineStep] = Field(
        min_length=1, description="Steps by name; each waits for the one above unless it has `after`."
    )

    @property
    def folder(self) -> Path:
        """Folder of all its files."""
        return (Path(self.output) / self.name).absolute()

    @property
    def before(self) -> dict[str, tuple[str, ...]]:
        """Predecessors of each step."""
        return predecessors(self._after)

    @property
    def ordered(self) -> list[str]:
        """Steps in topological order."""
        return in_order(self._after)

    @property
    def _after(self) -> dict[str, tuple[str, ...] | None]:
        return {name: step.after for name, step in self.steps.items()}


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Load a pipeline file.

    Raises:
        ConfigError: lists everything that is wrong in it.
    """
    return load_section(Pipeline, path, overrides, problems)


# Inputs and outputs of a step: whether they exist and whether they have changed.

_MARKS = ("/manifest.json", "/config.yaml")  # written last: of a dataset, of an exported model


def with_inputs(request: SubmissionRequest, inputs: Sequence[Path]) -> SubmissionRequest:
    """Return the request with a fingerprint that also depends on the content of some files.

    Raises:
        ConfigError: a file does not exist.
    """
    inputs = [find_preset(path) for path in inputs]
    if missing := [str(path) for path in inputs if not path.is_file()]:
        raise ConfigError(
            f"inputs: no file {', '.join(missing)}; name what is there before the pipeline runs (what an earlier step "
            "makes is no input: the step waits for it by `after`)"
        )
    if not inputs:
        return request
    identity = json_text([request.fingerprint, *map(_content, inputs)])
    return replace(request, parent_fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:16])


def _content(path: Path) -> str:
    """Return the content of a file; for a config, with everything that it extends."""
    config = path.suffix in (".yaml", ".yml")
    data = json_text(compose(path).values, sort_keys=True).encode() if config else path.read_bytes()
    return hashlib.sha256(data).hexdigest()


def missing_outputs(request: SubmissionRequest, step: PipelineStep) -> dict[str, Sequence[JobTask]]:
    """Return the missing outputs and the tasks that make each: one task if it contains `{task}`, otherwise all.

    Raises:
        DataError: a store does not answer.
    """
    makers: dict[str, Sequence[JobTask]] = {}
    for output in step.outputs:
        for task in request.tasks:
            number = int(task.folder.name) if step.array > 1 else 0  # the request may be a part of the array
            makers[fill_placeholders(output, number, step.array)] = [task] if "{task}" in output else request.tasks
    there = run_concurrently(exists, makers)
    return {place: tasks for (place, tasks), is_there in zip(makers.items(), there, strict=True) if not is_there}


def exists(url: str) -> bool:
    """Return whether an object, a file or a non-empty folder exists.

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


def expected_products(step: PipelineStep, request: SubmissionRequest) -> list[str]:
    """Return the products that later steps may expect: outputs, the dataset or model whose manifest or config is an
    output, and the step's folder; for a training, its run."""
    outputs = [fill_placeholders(each, number, step.array) for each in step.outputs for number in range(step.array)]
    wholes = [each.removesuffix(mark) for each in outputs for mark in _MARKS if each.endswith(mark)]
    return list(dict.fromkeys([*outputs, *wholes, str(request.base)]))
