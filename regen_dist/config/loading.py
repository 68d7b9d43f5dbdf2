"""Loads, validates, saves and fingerprints the config of a run. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from regen_dist.config.composing import Composed, compose
from regen_dist.config.files import write_text_atomically
from regen_dist.config.job import CommonConfig
from regen_dist.config.problems import describe, message
from regen_dist.config.schema import RunConfig
from regen_dist.config.t2v import T2VConfig
from regen_dist.config.version import fill_later_fields
from regen_dist.config.yamlfile import dump_yaml, read_yaml, shown
from regen_dist.errors import ConfigError
from regen_dist.jsontext import json_text

AnyRunConfig = RunConfig | T2VConfig
TASKS: dict[str, type[RunConfig] | type[T2VConfig]] = {"embedder": RunConfig, "t2v": T2VConfig}
CONFIG_FILE = "config.yaml"
HASH_FILE = "config.hash"
Schema = TypeVar("Schema", bound=BaseModel)
Look = Callable[[dict[str, Any]], Iterable[tuple[str, str]]]  # dotted key and problem


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> AnyRunConfig:
    """The validated config in `path`, with the files it extends and the overrides laid over it; `task` in it says of
    which kind of run it is.

    Args:
        path: a YAML file; `extends` in it names the files that it builds on.
        overrides: `a.b=c`, the value typed as YAML; later ones win.

    Raises:
        ConfigError: one error with every problem found, each with its file and line or "command line".
    """
    composed = compose(Path(path), overrides)
    return _validate(_schema_of(composed), composed, Path(path))


def load_embedder_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The same for a config of an embedder; ConfigError when it is of another task."""
    return embedder_only(load_config(path, overrides), shown(Path(path)))


def embedder_only(config: AnyRunConfig, what: str) -> RunConfig:
    """The config, if it is of an embedder.

    Raises:
        ConfigError: it is not; `what` says whose it is.
    """
    if not isinstance(config, RunConfig):
        raise ConfigError(f"{what} is a config of task '{config.task}'; this needs one of an embedder (task: embedder)")
    return config


def t2v_only(config: AnyRunConfig, what: str) -> T2VConfig:
    """The config, if it is of text to video.

    Raises:
        ConfigError: it is not; `what` says whose it is.
    """
    if not isinstance(config, T2VConfig):
        raise ConfigError(f"{what} is a config of task '{config.task}'; this needs one of text to video (task: t2v)")
    return config


def load_section(
    schema: type[Schema], path: str | Path, overrides: Sequence[str] = (), look: Look | None = None
) -> Schema:
    """A file of another kind (a cluster, a pipeline), read by the same rules as a run's config.

    Args:
        schema: of the file.
        path: to it.
        overrides: as of `load_config`.
        look: finds what else is wrong in the composed values, of which nothing is checked yet.

    Raises:
        ConfigError: as `load_config`.
    """
    composed, file = compose(Path(path), overrides), shown(Path(path))
    for dotted, problem in look(composed.values) if look else ():
        composed.problems.append((composed.origin(dotted) or file, dotted, problem))
    return _validate(schema, composed, Path(path))


def load_saved_config(folder: str | Path) -> AnyRunConfig:
    """The config that `save_config` left in a run folder; equal to the one that was saved.

    Raises:
        ConfigError: there is none, or it does not validate (a run of another version).
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"{shown(Path(folder))}: no {CONFIG_FILE} in it, so it is not a run folder; give runs/NAME")
    values, lines, _ = read_yaml(path)
    fill_later_fields(values)
    where = shown(path)
    composed = Composed(values, {key: f"{where}:{line}" for key, line in lines.items()})
    return _validate(_schema_of(composed), composed, path)


def save_config(config: CommonConfig, folder: str | Path) -> None:
    """Write the resolved config and its hash into `folder`, each atomically, the hash last."""
    write_text_atomically(Path(folder) / CONFIG_FILE, to_yaml(config))
    write_text_atomically(Path(folder) / HASH_FILE, config_hash(config) + "\n")


def to_yaml(config: CommonConfig) -> str:
    """The whole config as YAML, every default written out."""
    return dump_yaml(config.model_dump(mode="json"))


def config_hash(config: CommonConfig) -> str:
    """Hex SHA-256 of the resolved config as canonical JSON: neither key order nor the file's place changes it."""
    canonical = json_text(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _schema_of(composed: Composed) -> type[RunConfig] | type[T2VConfig]:
    """By the task; one that is not known is told with the others."""
    task = composed.values.get("task", "embedder")
    if not isinstance(task, str) or task not in TASKS:
        problem = f"found {task!r}; allowed: {' or '.join(TASKS)}"
        composed.problems.append((composed.origin("task") or "command line", "task", problem))
        composed.values["task"] = "embedder"
        return RunConfig
    return TASKS[task]


def _validate(schema: type[Schema], composed: Composed, path: Path) -> Schema:
    problems = list(composed.problems)
    config = None
    try:
        config = schema.model_validate(composed.values)
    except ValidationError as error:
        problems += describe(error, composed, schema, shown(path))
    if config is None or problems:
        raise ConfigError(message(shown(path), problems))
    return config
