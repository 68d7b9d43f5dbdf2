"""Composes a config from a file, the files it extends, and overrides; remembers who set each key.

`extends: ../base/embedder.yaml` (or a list, later ones win) is relative to the file that says it. Mappings are merged,
lists and scalars replaced. `${train.steps}` refers to another key, `${oc.env:NAME}` or `${oc.env:NAME,default}` to the
environment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from regen_dist.config.yamlfile import parse_value, read_yaml, shown
from regen_dist.errors import ConfigError

COMMAND_LINE = "command line"
_CHECKOUT = Path(__file__).resolve().parents[2]
_RESOLVER = re.compile(r"\$\{\s*([\w.]+)\s*:\s*([^,}]*)")
_SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|PRIVATE|ACCESS_KEY", re.IGNORECASE)


@dataclass
class Composed:
    """Plain values, where each dotted key was set last, and what was wrong on the way (origin, key, problem)."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, str, str]] = field(default_factory=list)

    def origin(self, dotted: str) -> str | None:
        """Where the key, or the closest key above it, was set; None when no source mentions it."""
        while dotted:
            if dotted in self.origins:
                return self.origins[dotted]
            dotted = dotted.rpartition(".")[0]
        return None

    def merge(self, values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
        """Lay `values` over what is there."""
        for dotted in _replaced(values):
            self._forget_below(dotted)
        self.values = _merged(self.values, dict(values))
        self.origins.update(origins)

    def _forget_below(self, dotted: str) -> None:
        for each in [key for key in self.origins if key.startswith(f"{dotted}.")]:
            del self.origins[each]


def find_preset(path: Path) -> Path:
    """A path as it stands; where there is no such file, `configs/…` is looked for in this checkout."""
    ours = _CHECKOUT / path
    return ours if path.parts[:1] == ("configs",) and not path.exists() and ours.is_file() else path


def inherited(path: Path) -> dict[str, Any]:
    """The values of a config and of all that it extends, as they are written: nothing is interpolated.

    Raises:
        ConfigError: a file of the chain cannot be read, or the chain is a cycle.
    """
    composed = Composed()
    _add_file(composed, find_preset(path), ())
    return composed.values


def compose(path: Path, overrides: Sequence[str] = ()) -> Composed:
    """The config in `path` with everything it extends, then the overrides `a.b=c` (typed as YAML), then interpolation.

    Raises:
        ConfigError: a file of the chain cannot be read, or the chain is a cycle. What is wrong with single keys and
            overrides is gathered in `problems` instead.
    """
    composed = Composed()
    _add_file(composed, find_preset(Path(path)), ())
    for override in overrides:
        _add_override(composed, override)
    refused = [dotted for origin, dotted, _ in composed.problems if composed.origins.get(dotted) == origin]
    _resolve(composed)
    for dotted in refused:
        _put(composed.values, dotted, Unresolved(""))
    return composed


def _add_file(composed: Composed, path: Path, chain: tuple[Path, ...]) -> None:
    resolved = path.resolve()
    if resolved in chain:
        circle = " -> ".join(shown(each) for each in (*chain, resolved))
        raise ConfigError(f"{shown(path)}: configs that extend each other in a circle: {circle}")
    values, lines, refused = read_yaml(path)
    for dotted, problem in refused.items():
        composed.problems.append((f"{shown(path)}:{lines[dotted]}", dotted, problem))
    for parent in _parents(values.pop("extends", None), f"{shown(path)}:{lines.get('extends', 1)}"):
        _add_file(composed, path.parent / parent, (*chain, resolved))
    origins = {key: f"{shown(path)}:{line}" for key, line in lines.items() if key.split(".")[0] != "extends"}
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
    """`{a: {b: value}}` for the keys a, b; a list on the way is copied, with one element changed.

    The second value says what is wrong, or "".
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
    """A text whose problem is reported already; validation says nothing more about its key."""

    __slots__ = ()


def _resolve(composed: Composed) -> None:
    """Replace every `${…}` by its value, and gather those that have none."""
    texts = _texts(composed.values, "")
    problems = {dotted: problem for dotted, text in texts if (problem := _refusal(text))}
    for dotted in problems:
        _put(composed.values, dotted, "")
    config = OmegaConf.create(composed.values)
    for dotted, text in texts:
        if dotted not in problems:
            try:
                value = OmegaConf.select(config, dotted, throw_on_missing=True)
                plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
                _put(composed.values, dotted, plain)
            except OmegaConfBaseException as error:
                problems[dotted] = f"{text!r} cannot be resolved: {str(error).splitlines()[0]}"
    for dotted, problem in problems.items():
        composed.problems.append((composed.origin(dotted) or COMMAND_LINE, dotted, problem))
        _put(composed.values, dotted, Unresolved(""))


def _refusal(text: str) -> str:
    """Why a text with `${…}` may not be resolved, or ""."""
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


def _texts(values: object, prefix: str) -> list[tuple[str, str]]:
    """Dotted key and text of every string that refers to something."""
    if isinstance(values, str):
        return [(prefix, values)] if "${" in values or values == "???" else []
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [each for key, value in pairs for each in _texts(value, f"{prefix}.{key}" if prefix else str(key))]


def _put(values: Any, dotted: str, value: object) -> None:
    *sections, last = dotted.split(".")
    for name in sections:
        values = values[int(name)] if isinstance(values, list) else values[name]
    values[int(last) if isinstance(values, list) else last] = value


def _replaced(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose value is not a mapping, and so replaces whatever stood there."""
    found: list[str] = []
    for key, value in values.items():
        found += _replaced(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]
    return found


def _merged(below: object, above: object) -> Any:
    """`above` laid over `below`: mappings key by key, anything else replaced."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}
