"""YAML files as plain values, with the line of each key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from regen_dist.errors import ConfigError
from regen_dist.jsontext import json_text

# libyaml is ten times faster; wheels of PyYAML include it, some distributions' builds do not.
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]
    """YAML loader that reads `1e-4` as a number, as all other formats do."""


_Loader.yaml_implicit_resolvers = {  # dates stay strings
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_EXPONENT: Any = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver(*_EXPONENT)


_WORDS = {
    word: hint
    for words, hint in (
        ("yes on", "write true, or '\"{0}\"' for the word"),
        ("no off", "write false, or '\"{0}\"' for the word"),
        ("none nil undefined", "write null for no value, or '\"{0}\"' for the word"),
    )
    for word in words.split()
}
_PATTERNS = (
    (re.compile(r"[-+]?0[0-9_]+"), "YAML may read leading zeros as octal; leave them out, or quote it: '\"{0}\"'"),
    (re.compile(r"[-+]?[0-9][0-9_]*(:[0-9]+)+(\.[0-9_]*)?"), "YAML counts it in sixties; write a plain number, or "
     "quote it: '\"{0}\"'"),
)  # fmt: skip


def yaml_surprise(text: str) -> str:
    """Explain why an unquoted value is refused, because YAML 1.1 reads it unexpectedly; empty if it is not."""
    hint = _WORDS.get(text.lower()) or next((hint for form, hint in _PATTERNS if form.fullmatch(text)), "")
    return f"found {text!r} without quotes: {hint.format(text)}" if hint else ""


def _surprises(node: yaml.Node | None, dotted: str = "") -> dict[str, str]:
    """Return the dotted keys of refused values in a document, with the reasons."""
    found: dict[str, str] = {}
    below: list[tuple[str, yaml.Node]] = []
    if isinstance(node, yaml.ScalarNode) and not node.style and (problem := yaml_surprise(node.value)):
        found[dotted] = problem
    elif isinstance(node, yaml.MappingNode):
        below = [(key.value, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        below = [(str(index), value) for index, value in enumerate(node.value)]
    for name, value in below:
        found |= _surprises(value, f"{dotted}.{name}" if dotted else name)
    return found


_NESTED = "nested too deeply, or an alias (`*name`) within its own anchor (`&name`); write the values out"


def parse_yaml(text: str) -> Any:
    """Parse one YAML document; raise yaml.YAMLError if it is invalid."""
    return yaml.load(text, Loader=_Loader)


def parse_value(text: str) -> Any:
    """Parse the value of an override. Unquoted text is taken literally: a command line has no comments.

    Raises:
        yaml.YAMLError: it cannot be parsed.
        ConfigError: YAML would read it unexpectedly, it is not UTF-8, or it is nested without end.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        refused = _surprises(node)
    except UnicodeEncodeError:
        raise ConfigError(f"{text!r} is not UTF-8, as configs are; rename the file, or give a link to it") from None
    except RecursionError:
        raise ConfigError(_NESTED) from None
    for problem in refused.values():
        raise ConfigError(problem)
    plain = isinstance(node, yaml.ScalarNode) and not node.style and node.tag == "tag:yaml.org,2002:str"
    return text.strip() if plain else parse_yaml(text)


class _Dumper(yaml.SafeDumper):
    """YAML dumper that quotes the strings that `read_yaml` refuses, or takes for numbers, without quotes."""


_Dumper.add_implicit_resolver(*_EXPONENT)
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if yaml_surprise(text) else None
    ),
)


def dump_yaml(values: object) -> str:
    """Format plain values as a YAML document that `read_yaml` reads back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def shown_value(value: object) -> str:
    """Format a plain value as the text of an override that `parse_value` reads back."""
    return json_text(value)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int], dict[str, str]]:
    """Read the mapping in a file; the line (from 1) of every dotted key, list elements included; and the dotted keys
    with refused values (`yaml_surprise`), each with the reason.

    Raises:
        ConfigError: the file is missing, is not UTF-8, not YAML, not a mapping, nested without end, or has a key twice.
    """
    text = _read_text(path)
    try:
        node = yaml.compose(text, Loader=_Loader)
        values = parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{display(path)}:{mark.line + 1}" if mark else display(path)
        raise ConfigError(
            f"{where}: not valid YAML: {error.problem or error.context}; correct the file there"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{display(path)}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or node is None:
        kind = "nothing" if values is None else f"a {type(values).__name__}"
        raise ConfigError(
            f"{display(path)}: found {kind} at the top; a config is a mapping of sections, like `train: …`"
        )
    lines: dict[str, int] = {}
    try:
        _walk(node, "", lines, path)
        return values, lines, _surprises(node)
    except RecursionError:
        raise ConfigError(f"{display(path)}: {_NESTED}") from None


def display(path: Path) -> str:
    """Format a path as a user would type it: relative to the current directory if it is below it."""
    path = Path(path)
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{display(path)}: no such file{_neighbours(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{display(path)}: is a folder; give the YAML file inside it") from None
    except OSError as error:
        raise ConfigError(f"{display(path)}: cannot be read: {error.strerror}; check its owner and mode") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{display(path)}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder {display(path.parent)} either"
    names = sorted(each.name for each in path.parent.glob("*.yaml"))
    return f"; {display(path.parent)} has: {', '.join(names)}" if names else "; check the path"


def _walk(node: yaml.Node, prefix: str, lines: dict[str, int], path: Path) -> None:
    """Record the lines of keys; refuse keys that are not strings or occur twice (YAML silently keeps the last)."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                found = getattr(key, "value", "a list or a mapping")
                hint = "; `<<` is not supported: write the keys out, or `extends` another file" * (found == "<<")
                where = f"{display(path)}:{key.start_mark.line + 1}"
                raise ConfigError(f"{where}: a key must be a name; found {found!r}{hint}")
            _record(key.value, key, value, prefix, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _record(str(index), value, value, prefix, lines, path)


def _record(name: str, at: yaml.Node, value: yaml.Node, prefix: str, lines: dict[str, int], path: Path) -> None:
    dotted = f"{prefix}{name}"
    line = at.start_mark.line + 1
    if dotted in lines:
        raise ConfigError(f"{display(path)}:{line}: {dotted} stands twice (first on line {lines[dotted]}); keep one")
    lines[dotted] = line
    _walk(value, f"{dotted}.", lines, path)
