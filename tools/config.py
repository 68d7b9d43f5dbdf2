"""`regen config`: resolved configs as a run would see them; and `regen init`: a project folder of the user."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from regen_dist.config import AnyRunConfig

app = typer.Typer(no_args_is_help=True, help="Show a resolved config, or the difference between two.")


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
