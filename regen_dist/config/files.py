"""Loading, validation, saving and hashing of run configs. Imports no torch."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from regen_dist.config.embedder import EmbedderConfig
from regen_dist.config.run import CommonConfig
from regen_dist.config.t2v import T2VConfig
from regen_dist.config.version import fill_later_fields
from regen_dist.config.yaml_files import display, dump_yaml, parse_value, read_yaml
from regen_dist.errors import ConfigError
from regen_dist.jsontext import json_text
from regen_dist.shared_files import temporary_beside

# --- composition of a config from a file, the files it extends, and overrides, with the origin of each key ---
#
# `extends: ../base/embedder.yaml` (or a list, later ones win) is relative to the file that contains it. Mappings are
# merged, lists and scalars replaced. `${train.steps}` refers to another key, `${oc.env:NAME}` or
# `${oc.env:NAME,default}` to the environment.

COMMAND_LINE = "command line"
_CHECKOUT = Path(__file__).resolve().parents[2]
_RESOLVER = re.compile(r"\$\{\s*([\w.]+)\s*:\s*([^,}]*)")
_SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|PRIVATE|ACCESS_KEY", re.IGNORECASE)


@dataclass
class Composed:
    """Composed config: plain values, the origin of each dotted key, and the problems found (origin, key, problem)."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, str, str]] = field(default_factory=list)

    def origin(self, dotted: str) -> str | None:
        """Return where the key, or its closest parent, was set; None if no source mentions it."""
        while dotted:
            if dotted in self.origins:
                return self.origins[dotted]
            dotted = dotted.rpartition(".")[0]
        return None

    def merge(self, values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
        """Merge `values` over the existing ones."""
        for dotted in _replaced(values):
            self._forget_below(dotted)
        self.values = _merged(self.values, dict(values))
        self.origins.update(origins)

    def _forget_below(self, dotted: str) -> None:
        for each in [key for key in self.origins if key.startswith(f"{dotted}.")]:
            del self.origins[each]


def find_preset(path: Path) -> Path:
    """Return the path; if there is no such file, `configs/…` is resolved in this checkout."""
    ours = _CHECKOUT / path
    return ours if path.parts[:1] == ("configs",) and not path.exists() and ours.is_file() else path


def inherited(path: Path) -> dict[str, Any]:
    """Return the values of a config and all that it extends, without interpolation.

    Raises:
        ConfigError: a file of the chain cannot be read, or the chain is a cycle.
    """
    composed = Composed()
    _add_file(composed, find_preset(path), ())
    return composed.values


def compose(path: Path, overrides: Sequence[str] = ()) -> Composed:
    """Compose the config in `path` with everything it extends, the overrides `a.b=c` (typed as YAML), and
    interpolation.

    Raises:
        ConfigError: a file of the chain cannot be read, or the chain is a cycle. Problems of single keys and overrides
            are collected in `problems` instead.
    """
    composed = Composed()
    _add_file(composed, find_preset(Path(path)), ())
    for override in overrides:
        _add_override(composed, override)
    refused = [dotted for origin, dotted, _ in composed.problems if composed.origins.get(dotted) == origin]
    _resolve(composed)
    for dotted in refused:
        _put(composed.values, _path_of(composed.values, dotted), Unresolved(""))
    return composed


def _add_file(composed: Composed, path: Path, chain: tuple[Path, ...]) -> None:
    resolved = path.resolve()
    if resolved in chain:
        circle = " -> ".join(display(each) for each in (*chain, resolved))
        raise ConfigError(
            f"{display(path)}: configs that extend each other in a circle: {circle}; remove one `extends`"
        )
    values, lines, refused = read_yaml(path)
    for dotted, problem in refused.items():
        composed.problems.append((f"{display(path)}:{lines[dotted]}", dotted, problem))
    for parent in _parents(values.pop("extends", None), f"{display(path)}:{lines.get('extends', 1)}"):
        _add_file(composed, path.parent / parent, (*chain, resolved))
    origins = {key: f"{display(path)}:{line}" for key, line in lines.items() if key.split(".")[0] != "extends"}
    composed.merge(values, origins)


def _parents(extends: object, origin: str) -> list[str]:
    parents = [extends] if isinstance(extends, str) else [] if extends is None else extends
    if not isinstance(parents, list) or not all(isinstance(each, str) for each in parents):
        raise ConfigError(
            f"{origin}: extends is {extends!r}; allowed: a path, or a list of paths, relative to this file"
        )
    return parents


def _add_override(composed: Composed, override: str) -> None:
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    if not equals or not all(dotted.split(".")):
        composed.problems.append((COMMAND_LINE, override, "not an override; allowed: a.b=value, like train.steps=100"))
        return
    try:
        value = parse_value(text)
    except ConfigError as error:
        composed.problems.append((COMMAND_LINE, dotted, str(error)))
        return
    except yaml.YAMLError as error:
        problem = (
            f"the value {text!r} is not valid YAML ({str(error).splitlines()[0]}); quote it, like '{dotted}=\"…\"'"
        )
        composed.problems.append((COMMAND_LINE, dotted, problem))
        return
    nested, problem = _nest(composed.values, dotted.split("."), value)
    if problem:
        composed.problems.append((COMMAND_LINE, dotted, problem))
        return
    composed.merge(nested, {dotted: COMMAND_LINE})


def _nest(values: Any, keys: Sequence[str], value: object) -> tuple[Any, str]:
    """Build `{a: {b: value}}` for the keys a, b; a list on the path is copied, with one element changed.

    The second return value is the problem, or "".
    """
    if not keys:
        return value, ""
    name, rest = keys[0], keys[1:]
    if not isinstance(values, list):
        inner, problem = _nest(values.get(name) if isinstance(values, dict) else None, rest, value)
        return {name: inner}, problem
    if not name.isdigit() or int(name) >= len(values):
        return {}, f"{name!r} is no element of a list of {len(values)}; allowed: 0 to {len(values) - 1}"
    index = int(name)
    inner, problem = _nest(values[index], rest, value)
    return [*values[:index], _merged(values[index], inner), *values[index + 1 :]], problem


class Unresolved(str):
    """String whose problem is already reported, so that validation ignores its key."""

    __slots__ = ()


def _resolve(composed: Composed) -> None:
    """Replace every `${…}` by its value, and collect those without one."""
    texts = _texts(composed.values)
    problems = {path: problem for path, text in texts if (problem := _refusal(text))}
    for path in problems:
        _put(composed.values, path, "")
    config = OmegaConf.create(composed.values)
    for path, text in texts:
        if path not in problems:
            try:
                value = reduce(getitem, path, config)
                plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
                _put(composed.values, path, plain)
            except OmegaConfBaseException as error:
                problems[path] = f"{text!r} cannot be resolved: {str(error).splitlines()[0]}"
    for path, problem in problems.items():
        dotted = ".".join(map(str, path))
        composed.problems.append((composed.origin(dotted) or COMMAND_LINE, dotted, problem))
        _put(composed.values, path, Unresolved(""))


def _refusal(text: str) -> str:
    """Explain why a text with `${…}` must not be resolved; empty if it may."""
    try:
        OmegaConf.create({"text": text})
    except OmegaConfBaseException as error:
        return f"{text!r} is no valid reference ({str(error).splitlines()[0]}); allowed: ${{key}} and ${{oc.env:NAME}}"
    for resolver, argument in _RESOLVER.findall(text):
        if resolver != "oc.env" or "$" in argument:
            return f"{text!r} asks for more than a reference; allowed: ${{key}} and ${{oc.env:NAME}}"
        if _SECRET.search(argument):
            return (
                f"{text!r} looks like a secret, and the resolved config is saved with the run; "
                "leave it in the environment, where the libraries that need it look for it"
            )
    return ""


KeyPath = tuple[str | int, ...]


def _texts(values: object, path: KeyPath = ()) -> list[tuple[KeyPath, str]]:
    """List the path of keys to every string with a reference, and the string."""
    if isinstance(values, str):
        return [(path, values)] if "${" in values or values == "???" else []
    return [each for key, value in _pairs(values) for each in _texts(value, (*path, key))]


def _pairs(values: object) -> Iterable[tuple[str | int, Any]]:
    return values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()


def _path_of(values: object, dotted: str) -> KeyPath:
    """Return the path of keys that a dotted key stands for. A name may hold dots itself, as that of a step may."""
    for key, value in _pairs(values):
        if dotted == str(key):
            return (key,)
        if dotted.startswith(f"{key}.") and (inner := _path_of(value, dotted.removeprefix(f"{key}."))):
            return (key, *inner)
    return ()


def _put(values: Any, path: KeyPath, value: object) -> None:
    reduce(getitem, path[:-1], values)[path[-1]] = value


def _replaced(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the dotted keys whose value is not a mapping and so replaces the existing value."""
    found: list[str] = []
    for key, value in values.items():
        found += _replaced(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]
    return found


def _merged(below: object, above: object) -> Any:
    """Merge `above` over `below`: mappings key by key, anything else replaced."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}


# Problem reports: file and line (or "command line"), key, found and allowed values, nearest key for unknown ones.

_SHOWN_CHARACTERS = 60


def describe_problem(
    error: ValidationError, composed: Composed, schema: type[BaseModel], file: str
) -> list[tuple[str, str, str]]:
    """List (origin, dotted key, problem) of all errors that pydantic found, in its order."""
    found = []
    for each in error.errors():
        if isinstance(each["input"], Unresolved):
            continue
        dotted = ".".join(str(part) for part in each["loc"])
        origin = file if each["type"] == "missing" else composed.origin(dotted) or file
        found.append((origin, dotted or "(the whole config)", _problem(each, schema)))
    return found


def problem_message(title: str, problems: Sequence[tuple[str, str, str]]) -> str:
    """Format a message with a line for each problem."""
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
    return "\n".join([f"{title}: {count}", *(f"  {origin}: {key}: {problem}" for origin, key, problem in problems)])


def known_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of the schema, sections before their content, without keys of list elements."""
    for name, info in schema.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from known_keys(info.annotation, f"{prefix}{name}.")


def nearest_key(dotted: str, schema: type[BaseModel]) -> str | None:
    """Return the known key nearest to an unknown one: in its own section, or else one of the same name in another."""
    section, _, name = dotted.rpartition(".")
    inside = _section(schema, section.split(".") if section else [])
    here = difflib.get_close_matches(name, inside.model_fields, n=1, cutoff=0.6) if inside else []
    if here:
        return f"{section}.{here[0]}" if section else here[0]
    known = list(known_keys(schema))
    same_name = [key for key in known if key.rpartition(".")[2] == name]
    guesses = same_name or [key for key in difflib.get_close_matches(dotted, known, n=1, cutoff=0.6) if key != section]
    return guesses[0] if guesses else None


def _problem(error: ErrorDetails, schema: type[BaseModel]) -> str:
    dotted = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        if "." in str(error["loc"][-1]):
            return "a file has its sections nested, as in `train: {steps: 100}`; dots are for the command line"
        guess = nearest_key(dotted, schema)
        inside = _section(schema, [str(part) for part in error["loc"][:-1]])
        known = ", ".join(inside.model_fields) if inside else "none"
        return f"unknown key; {f'did you mean {guess}?' if guess else 'nothing like it is known.'} Known here: {known}"
    if error["type"] == "missing":
        return "is required and not set"
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    if error["type"] == "model_type":
        return f"found {_shown(error['input'])}; allowed: a section, its keys indented below; without any, no such line"
    allowed = error["msg"].replace("Input should be ", "").replace("Input should have ", "")
    hint = "; quote it to make it one, as in name='\"7\"'" if error["type"] == "string_type" else ""
    return f"found {_shown(error['input'])}; allowed: {allowed}{hint}"


def _shown(value: object) -> str:
    text = repr(value)
    text = text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
    return f"{text} ({type(value).__name__})"


def _section(schema: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    """Return the class of the section at `path`; None if there is none."""
    annotation: Any = schema
    for name in path:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = annotation.model_fields.get(name)
            annotation = field.annotation if field else None
        else:  # the number of an element of tuple[Section, ...], or a name of dict[str, Section]
            arguments = typing.get_args(annotation)
            named = typing.get_origin(annotation) is dict
            annotation = arguments[-1] if named else arguments[0] if arguments and name.isdigit() else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8: to a new name in the same folder, synced, then moved over `path`."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Write `data`: to a new name in the same folder, synced, then moved over `path`.

    Raises:
        OSError: the disk refuses; it names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk names no file, or another
            raise type(error)(error.errno, error.strerror or str(error), str(path)) from error
        raise


AnyRunConfig = EmbedderConfig | T2VConfig
TASKS: dict[str, type[EmbedderConfig] | type[T2VConfig]] = {"embedder": EmbedderConfig, "t2v": T2VConfig}
CONFIG_FILE = "config.yaml"
HASH_FILE = "config.hash"
Schema = TypeVar("Schema", bound=BaseModel)
ValueCheck = Callable[[dict[str, Any]], Iterable[tuple[str, str]]]  # dotted key and problem


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> AnyRunConfig:
    """Load and validate the config in `path`, with the files it extends and the overrides; its `task` selects the
    schema.

    Args:
        path: a YAML file; `extends` in it names the files that it builds on.
        overrides: `a.b=c`, the value typed as YAML; later ones win.

    Raises:
        ConfigError: one error with every problem found, each with its file and line or "command line".
    """
    composed = compose(Path(path), overrides)
    return _validate(_schema_of(composed), composed, Path(path))


def load_embedder_config(path: str | Path, overrides: Sequence[str] = ()) -> EmbedderConfig:
    """Load the config of an embedder; raise ConfigError for another task."""
    return embedder_only(load_config(path, overrides), display(Path(path)))


def embedder_only(config: AnyRunConfig, what: str) -> EmbedderConfig:
    """Return the config if it is that of an embedder.

    Raises:
        ConfigError: it is not; `what` describes it in the message.
    """
    if not isinstance(config, EmbedderConfig):
        raise ConfigError(f"{what} is a config of task '{config.task}'; this needs one of an embedder (task: embedder)")
    return config


def t2v_only(config: AnyRunConfig, what: str) -> T2VConfig:
    """Return the config if it is that of text to video.

    Raises:
        ConfigError: it is not; `what` describes it in the message.
    """
    if not isinstance(config, T2VConfig):
        raise ConfigError(f"{what} is a config of task '{config.task}'; this needs one of text to video (task: t2v)")
    return config


def load_section(
    schema: type[Schema], path: str | Path, overrides: Sequence[str] = (), check: ValueCheck | None = None
) -> Schema:
    """Load a file of another kind (a cluster, a pipeline) by the rules of a run's config.

    Args:
        schema: schema of the file.
        path: path of the file.
        overrides: changes `a.b=c`, as for `load_config`.
        check: finds further problems in the composed, not yet validated values.

    Raises:
        ConfigError: as `load_config`.
    """
    composed, file = compose(Path(path), overrides), display(Path(path))
    for dotted, problem in check(composed.values) if check else ():
        composed.problems.append((composed.origin(dotted) or file, dotted, problem))
    return _validate(schema, composed, Path(path))


def load_saved_config(folder: str | Path) -> AnyRunConfig:
    """Load the config that `save_config` wrote to a run folder; equal to the saved one.

    Raises:
        ConfigError: there is none, or it does not validate (a run of another version).
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"{display(Path(folder))}: no {CONFIG_FILE} in it, so it is not a run folder; give runs/NAME")
    values, lines, _ = read_yaml(path)
    fill_later_fields(values)
    where = display(path)
    composed = Composed(values, {key: f"{where}:{line}" for key, line in lines.items()})
    return _validate(_schema_of(composed), composed, path)


def save_config(config: CommonConfig, folder: str | Path) -> None:
    """Write the resolved config and its hash into `folder`, each atomically, the hash last."""
    write_text_atomically(Path(folder) / CONFIG_FILE, to_yaml(config))
    write_text_atomically(Path(folder) / HASH_FILE, config_hash(config) + "\n")


def to_yaml(config: CommonConfig) -> str:
    """Format the complete config as YAML, with every default."""
    return dump_yaml(config.model_dump(mode="json"))


def config_hash(config: CommonConfig) -> str:
    """Return the hex SHA-256 of the resolved config as canonical JSON, independent of key order and file location."""
    canonical = json_text(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _schema_of(composed: Composed) -> type[EmbedderConfig] | type[T2VConfig]:
    """Choose the schema by the task; an unknown task is reported with the other problems."""
    task = composed.values.get("task", "embedder")
    if not isinstance(task, str) or task not in TASKS:
        problem = f"found {task!r}; allowed: {' or '.join(TASKS)}"
        composed.problems.append((composed.origin("task") or "command line", "task", problem))
        composed.values["task"] = "embedder"
        return EmbedderConfig
    return TASKS[task]


def _validate(schema: type[Schema], composed: Composed, path: Path) -> Schema:
    problems = list(composed.problems)
    config = None
    try:
        config = schema.model_validate(composed.values)
    except ValidationError as error:
        problems += describe_problem(error, composed, schema, display(path))
    if config is None or problems:
        raise ConfigError(problem_message(display(path), problems))
    return config
