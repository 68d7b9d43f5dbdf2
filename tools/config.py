"""`regen config`: resolved configs, the documentation of their keys and their JSON schemas; `regen init`: a project
folder of the user."""

from __future__ import annotations

from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel

    from regen_dist.config import AnyRunConfig

app = typer.Typer(no_args_is_help=True, help="Show resolved configs, compare two, and explain their keys.")


class ConfigKind(StrEnum):
    """Kind of a file in `configs/`."""

    EMBEDDER = "embedder"
    T2V = "t2v"
    PREENCODE = "preencode"
    CLUSTER = "cluster"
    PIPELINE = "pipeline"
    PROTOCOL = "protocol"
    TEST_CLIPS = "test_clips"


SOURCES = {  # title of each kind, module and class of its schema
    ConfigKind.EMBEDDER: ("Training of an embedder", "regen_dist.config.embedder", "EmbedderConfig"),
    ConfigKind.T2V: ("Training of a text-to-video model", "regen_dist.config.t2v", "T2VConfig"),
    ConfigKind.PREENCODE: ("Latent caches", "regen_dist.config.preencode", "PreencodeConfig"),
    ConfigKind.CLUSTER: ("Clusters", "launcher.cluster", "ClusterConfig"),
    ConfigKind.PIPELINE: ("Pipelines", "launcher.pipelines.schema", "Pipeline"),
    ConfigKind.PROTOCOL: ("Evaluation protocols", "regen_dist.evaluation.protocol", "Protocol"),
    ConfigKind.TEST_CLIPS: ("Test clips of `regen bench compression`", "tools.bench.compression_measure", "ClipList"),
}


def schema_class(kind: ConfigKind) -> type[BaseModel]:
    """Import the schema of a kind."""
    _, module, name = SOURCES[kind]
    found: type[BaseModel] = getattr(import_module(module), name)
    return found


INTRODUCTION = """# All config keys

Written by `regen config keys --out docs/config.md` from the descriptions in the code; a test keeps it current.
`regen config explain KEY` prints a key or a section.

A key is set in a file, or behind a command as `a.b=c`. Types and ranges are checked when a file is read, and by an
editor that knows YAML schemas (VS Code with the YAML extension, for example): the first line of each file in `configs/`
names its schema in `configs/schema/`, which `regen config schema KIND` prints. Any value may be a reference, `${key}`
or `${oc.env:NAME}`, and any file may begin with `extends: FILE`. *Paper* marks what the paper states; everything else
is this project's choice.
"""


@app.command()
def show(
    config: Annotated[Path, typer.Argument(help="A YAML file, or the folder of a run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Config overrides, as a.b=value.")] = None,
) -> None:
    """Print the whole config, defaults and inherited keys included, and its hash.

    Example: regen config show configs/embedder/nano.yaml train.steps=200
    """
    from regen_dist.config import config_hash, to_yaml

    loaded = _load(config, overrides)
    print(f"# config hash {config_hash(loaded)}")
    print(to_yaml(loaded), end="")


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A YAML file, or the folder of a run.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Print the keys in which two resolved configs differ; exit code 1 when there are any.

    Example: regen config diff configs/embedder/regen_k8.yaml configs/embedder/regen_k32.yaml
    """
    left, right = (_flat(_load(path, None).model_dump(mode="json")) for path in (first, second))
    differing = [key for key in dict.fromkeys([*left, *right]) if left.get(key) != right.get(key)]
    for key in differing:
        print(f"{key}: {_shown(left, key)} -> {_shown(right, key)}")
    raise typer.Exit(1 if differing else 0)


@app.command()
def schema(
    kind: Annotated[ConfigKind, typer.Argument(help="Kind of the config.")] = ConfigKind.EMBEDDER,
    out: Annotated[Path | None, typer.Option(help="File to write instead.", metavar="FILE")] = None,
) -> None:
    """Print the JSON schema of a kind of config file: descriptions, types, ranges and defaults, for editors.

    Example: regen config schema t2v --out configs/schema/t2v.json
    """
    from regen_dist.config.schema import schema_text

    _write(schema_text(schema_class(kind)), out)


@app.command()
def explain(
    key: Annotated[str, typer.Argument(help="Dotted key, or section.", metavar="KEY")],
) -> None:
    """Print type, default and description of a config key, or of all keys of a section.

    Example: regen config explain optimizer.lr
    """
    from regen_dist.config.schema import explain as explained

    print(explained(key, {str(kind): schema_class(kind) for kind in ConfigKind}))


@app.command()
def keys(
    out: Annotated[Path | None, typer.Option(help="File to write instead.", metavar="FILE")] = None,
) -> None:
    """Print all keys of all kinds of config as a Markdown page (docs/config.md).

    Example: regen config keys --out docs/config.md
    """
    from regen_dist.config.schema import keys_page

    _write(keys_page(INTRODUCTION, {str(kind): (SOURCES[kind][0], schema_class(kind)) for kind in ConfigKind}), out)


def _write(text: str, out: Path | None) -> None:
    from regen_dist.config.files import write_text_atomically

    if out is None:
        print(text, end="")
    else:
        write_text_atomically(out, text)


def _load(path: Path, overrides: list[str] | None) -> AnyRunConfig:
    from regen_dist.config import load_config, load_saved_config

    return load_saved_config(path) if path.is_dir() and not overrides else load_config(path, overrides or [])


def _shown(flat: dict[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "(absent)"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves by dotted key; list elements by index."""
    if not isinstance(value, (dict, list)) or not value:
        return {prefix: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    flat: dict[str, Any] = {}
    for key, inner in pairs:
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def init(
    folder: Annotated[Path, typer.Argument(help="New or empty folder.", metavar="DIR")],
    embedder: Annotated[str, typer.Option(help="Preset of configs/embedder/ to start from.")] = "nano",
    t2v: Annotated[str, typer.Option(help="Preset of configs/t2v/ to start from.")] = "nano",
) -> None:
    """Create a project folder: configs to edit, a cluster file, and a README with the commands.

    Example: regen init my_project --embedder regen_k16
    """
    from regen_dist.config.project import lay_out

    for path in lay_out(folder, embedder, t2v):
        typer.echo(path)
    typer.echo(f"Next: cd {folder}, and read README.md")
