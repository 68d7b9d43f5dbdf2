"""Documentation of the config from its own types: JSON schemas for editors, and tables of all keys. Imports no torch.

A config file may lack what a file that it `extends` has, and any value may be a reference (`${…}`): the schemas allow
both, and check everything else. They are in JSON Schema draft 7, which every editor's YAML plugin reads.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from regen_dist.errors import ConfigError
from regen_dist.jsontext import json_text
from regen_dist.tables import Table

Node = dict[str, Any]  # a JSON schema, or a part of one

REQUIRED = "required"  # instead of a default
_DIALECT = "http://json-schema.org/draft-07/schema#"
_BESIDE = ("description", "default")  # of a key, whatever its value's type is
_SIGNS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤", "multipleOf": "multiple of"}
_REFERENCE: Node = {"type": "string", "pattern": r"\$\{.+\}"}
_EXTENDS: Node = {
    "description": "File that this one builds on, or a list of them (later ones win), relative to this file.",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}


# --- JSON schema of a kind of file ---


def file_schema(config: type[BaseModel]) -> Node:
    """Return the JSON schema of the files of a config, with descriptions, types, ranges and defaults."""
    schema = config.model_json_schema(ref_template="#/definitions/{model}")
    sections: dict[str, Node] = schema.pop("$defs", {})
    listed = set(_refs_of_lists([schema, *sections.values()]))
    root = _section(schema, sections)
    root.pop("required", None)
    root["properties"] = {"extends": _EXTENDS, **root["properties"]}
    converted = {name: _section(section, sections) for name, section in sections.items()}
    for name in converted.keys() - listed:  # lists are replaced as a whole, other sections are merged key by key
        converted[name].pop("required", None)
    return {"$schema": _DIALECT, "title": config.__name__, **root, "definitions": converted | {"reference": _REFERENCE}}


def schema_text(config: type[BaseModel]) -> str:
    """Format `file_schema` as the text of a file."""
    return json_text(file_schema(config), indent=2, ensure_ascii=False) + "\n"


def _refs_of_lists(node: Any) -> Iterator[str]:
    """Yield the names of sections that are elements of lists."""
    if isinstance(node, Mapping) and "$ref" in node.get("items", ()):
        yield _name(node["items"])
    for each in node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ():
        yield from _refs_of_lists(each)


def _name(reference: Mapping[str, Any]) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _section(section: Node, sections: Mapping[str, Node]) -> Node:
    """Convert the schema of a section."""
    converted = {key: value for key, value in section.items() if key not in ("title", "properties")}
    converted["description"] = " ".join(section.get("description", "").split())
    converted["properties"] = {name: _key(node, sections) for name, node in section["properties"].items()}
    return converted


def _key(node: Node, sections: Mapping[str, Node]) -> Node:
    """Convert the schema of a key: what stands annotations its type, and the type or a reference."""
    annotations = {key: node[key] for key in _BESIDE if key in node}
    kind = _kind({key: value for key, value in node.items() if key not in _BESIDE})
    if "$ref" in kind:
        changes = _changed_defaults(node.get("default"), kind, sections)
        annotations = {"description": _description(node, sections)} | ({"default": changes} if changes else {})
        return {**annotations, "allOf": [kind]}  # draft 7 ignores what stands annotations a $ref
    return {**annotations, **_or_reference(kind)}


def _or_reference(kind: Node) -> Node:
    """Allow a reference instead of a value. Free strings allow it anyway; mappings, sections and lists of sections are
    left alone, so that editors name the key at fault inside them."""
    choices = kind.get("anyOf", [kind])
    nested = "$ref" in kind or kind.get("type") == "object" or "$ref" in kind.get("items", ())
    if nested or {"type": "string"} in choices:
        return kind
    return {"anyOf": [*choices, {"$ref": "#/definitions/reference"}]}


def _description(node: Node, sections: Mapping[str, Node]) -> str:
    """Return the description of a key; pydantic leaves it out where it is that of the section."""
    section = sections[_name(node)] if "$ref" in node else {}
    return " ".join(str(node.get("description") or section["description"]).split())


def _kind(node: Node) -> Node:
    """Convert the schema of a value to draft 7, without titles."""
    converted = {key: value for key, value in node.items() if key not in ("title", "format", "prefixItems")}
    if "prefixItems" in node:
        parts = [_or_reference(_kind(each)) for each in node["prefixItems"]]
        converted |= {"items": parts, "additionalItems": False}
    for key in ("items", "additionalProperties"):
        if isinstance(converted.get(key), dict):
            converted[key] = _or_reference(_kind(converted[key]))
    if "patternProperties" in converted:
        named = {pattern: _kind(each) for pattern, each in converted["patternProperties"].items()}
        converted |= {"patternProperties": named, "additionalProperties": False}
    if "anyOf" in converted:
        converted["anyOf"] = [_kind(each) for each in converted["anyOf"]]
    return converted


def _changed_defaults(value: Any, reference: Node, sections: Mapping[str, Node]) -> Node:
    """Return the part of a section's default that differs from the defaults of its keys."""
    changed: Node = {}
    for name, node in sections[_name(reference)]["properties"].items() if isinstance(value, dict) else ():
        if name not in value:  # a serialiser leaves it out
            continue
        if "$ref" in node:
            if inner := _changed_defaults(value[name], node, sections):
                changed[name] = inner
        elif value[name] != node.get("default"):
            changed[name] = value[name]
    return changed


# --- keys: type, default and description of each ---


class ConfigKey(NamedTuple):
    """A key of a config. `name` is dotted, `[]` stands for an element of a list, `*` for any name."""

    name: str
    type: str
    default: str
    description: str


def config_keys(config: type[BaseModel]) -> list[ConfigKey]:
    """Return every key of a config, sections before their content."""
    schema = config.model_json_schema()
    return list(_keys(schema, schema.get("$defs", {}), "", {}))


def _keys(section: Node, sections: Mapping[str, Node], prefix: str, changed: Node) -> Iterator[ConfigKey]:
    for name, node in section["properties"].items():
        dotted = f"{prefix}{name}"
        default = changed.get(name, node.get("default", {}))  # without one: made by `dict`
        default_text = "" if "$ref" in node else _shown(default)
        required = name in section.get("required", ())
        yield ConfigKey(dotted, _type(node), REQUIRED if required else default_text, _description(node, sections))
        for path, reference in _inner(dotted, node):
            inner = _changed_defaults(default, reference, sections) if reference is node else {}
            yield from _keys(sections[_name(reference)], sections, path, inner)


def _inner(dotted: str, node: Node) -> Iterator[tuple[str, Node]]:
    """Yield the sections inside a key's value, each with the prefix of its keys."""
    for each in node.get("anyOf", [node]):
        for path, inner in (
            (f"{dotted}.", each),
            (f"{dotted}[].", each.get("items", {})),
            *((f"{dotted}.*.", named) for named in each.get("patternProperties", {}).values()),
        ):
            if "$ref" in inner:
                yield path, inner


def _shown(value: Any) -> str:
    return json_text(value, ensure_ascii=False)


def _type(node: Node) -> str:
    """Describe the values that a schema allows."""
    if "anyOf" in node:
        return " or ".join(_type(each) for each in node["anyOf"])
    if "$ref" in node:
        return "section"
    if "const" in node or "enum" in node:
        return " or ".join(_shown(value) for value in node.get("enum", [node.get("const")]))
    kind = node.get("type", "any")
    if kind == "array":
        parts = node.get("prefixItems", [])
        return f"[{', '.join(map(_type, parts))}]" if parts else f"list of {_type(node['items'])}"
    if kind == "object":
        named = [*node.get("patternProperties", {}).values(), node.get("additionalProperties")]
        return f"mapping of {_type(next((each for each in named if isinstance(each, dict)), {}))}"
    bounds = [
        f"{sign} {int(node[key]) if node[key] % 1 == 0 else node[key]}" for key, sign in _SIGNS.items() if key in node
    ]
    return " ".join([str(kind), ", ".join(bounds)]).strip()


def explain(name: str, kinds: Mapping[str, type[BaseModel]]) -> str:
    """Describe a key, or all keys of a section, in every kind of config that has it.

    Raises:
        ConfigError: no kind has it; names the nearest keys.
    """
    found: dict[ConfigKey, list[str]] = {}
    names: dict[str, None] = {}
    for kind, config in kinds.items():
        for key in config_keys(config):
            names[key.name] = None
            if key.name == name or key.name.startswith((f"{name}.", f"{name}[].")):
                found.setdefault(key, []).append(kind)
    if not found:
        near = [each for each in names if each.rpartition(".")[2] == name] or difflib.get_close_matches(name, names)
        hint = f"did you mean {' or '.join(near)}?" if near else "docs/config.md lists all keys"
        raise ConfigError(f"no config has a key {name!r}; {hint}")
    lines = []
    for key, where in found.items():
        facts = [each for each in (key.type, _default(key, "default {}")) if each]
        lines.append(f"{key.name} ({', '.join(where)})\n  {'; '.join(facts)}\n  {key.description}")
    return "\n".join(lines)


def _default(key: ConfigKey, form: str) -> str:
    return form.format(key.default) if key.default not in ("", REQUIRED) else key.default


# --- the page of all keys ---


def keys_page(introduction: str, kinds: Mapping[str, tuple[str, type[BaseModel]]]) -> str:
    """Format the keys of several kinds of config as a Markdown page.

    Args:
        introduction: the page's title and first paragraphs.
        kinds: title and config of each kind. Keys that an earlier kind has in the same form are not repeated.
    """
    parts, seen = [introduction.rstrip()], set[ConfigKey]()
    for kind, (title, config) in kinds.items():
        groups: dict[str, list[ConfigKey]] = {}
        for key in config_keys(config):
            groups.setdefault(key.name.partition(".")[0].removesuffix("[]"), []).append(key)
        parts.append(f"## {title}\n\n`# yaml-language-server: $schema=…/{kind}.json`")
        single = [key for keys in groups.values() if len(keys) == 1 for key in keys]
        same = [f"`{name}`" for name, keys in groups.items() if len(keys) > 1 and seen.issuperset(keys[1:])]
        if same:
            parts.append(f"As above: {', '.join(same)}.")
        parts.append(_table(single))
        for name, keys in groups.items():
            if len(keys) > 1 and f"`{name}`" not in same:
                parts += [f"### {kind}: {name}", keys[0].description, _table(keys[1:])]
        seen |= {key for keys in groups.values() for key in keys}
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(keys: list[ConfigKey]) -> str:
    """Format keys as a table."""
    if not keys:
        return ""
    rows = [[f"`{key.name}`", key.type, _default(key, "`{}`"), key.description] for key in keys]
    return Table(["key", "type", "default", "description"], rows).to_markdown().rstrip("\n")
