"""What a step reads and leaves: whether it is there, and whether it is what it was."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.job import Task
from launcher.pipelines.schema import Step
from launcher.submitting import Order
from regen_dist.checks.data import READING
from regen_dist.checks.findings import side_by_side
from regen_dist.config.composing import compose
from regen_dist.config.urls import parse_url
from regen_dist.data.objects.store import Store
from regen_dist.errors import ConfigError, ObjectMissing
from regen_dist.jsontext import json_text

_MARKS = ("/manifest.json", "/config.yaml")  # of a dataset, of an exported model: the last that is written


def with_inputs(order: Order, inputs: Sequence[Path]) -> Order:
    """The same order, whose fingerprint changes with the content of some files, too.

    Raises:
        ConfigError: one of them is not there.
    """
    if missing := [str(path) for path in inputs if not path.is_file()]:
        raise ConfigError(
            f"inputs: no file {', '.join(missing)}; name what is there before the pipeline runs (what an earlier step "
            "makes is no input: the step waits for it by `after`)"
        )
    if not inputs:
        return order
    told = json_text([order.fingerprint, *map(_content, inputs)])
    return replace(order, whole=hashlib.sha256(told.encode()).hexdigest()[:16])


def _content(path: Path) -> str:
    """Of a config with all that it extends."""
    config = path.suffix in (".yaml", ".yml")
    data = json_text(compose(path).values, sort_keys=True).encode() if config else path.read_bytes()
    return hashlib.sha256(data).hexdigest()


def missing_outputs(order: Order, step: Step) -> dict[str, Sequence[Task]]:
    """The outputs that are not there, and the tasks that make each: one where `{task}` stands in it, or else all.

    Raises:
        DataError: a store does not answer.
    """
    makers: dict[str, Sequence[Task]] = {}
    for output in step.outputs:
        for number, task in enumerate(order.tasks):
            makers[filled(output, number, len(order.tasks))] = [task] if "{task}" in output else order.tasks
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


def made(step: Step, order: Order) -> list[str]:
    """What later steps may count on: outputs, the dataset whose manifest or the model whose config is one of them, and
    the step's folder. A training: its run."""
    outputs = [filled(each, number, step.array) for each in step.outputs for number in range(step.array)]
    wholes = [each.removesuffix(mark) for each in outputs for mark in _MARKS if each.endswith(mark)]
    return list(dict.fromkeys([*outputs, *wholes, str(order.base)]))
