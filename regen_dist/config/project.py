"""A project folder for a user of this system: configs to edit, a cluster's file, and the commands. Imports no torch.

The configs are presets with all that these extend, in one file each, so that they stand alone with every key in sight.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from regen_dist.config.files import find_preset, inherited, write_text_atomically
from regen_dist.errors import ConfigError

_DATA = {"url": "data/train", "validation_url": "data/held_out"}
_LATENTS = {"url": "data/latents_train", "validation_url": "data/latents_held_out"}
_SCHEMAS = Path("configs/schema")  # of this checkout, and of a project
_KINDS = ("embedder", "t2v", "preencode", "cluster")
_HEADS = {
    "embedder": "The embedder of this project.\n#   regen train configs/embedder.yaml --ranks 2",
    "preencode": "Latents of the videos and embeddings of their captions.\n#   regen preencode configs/preencode.yaml",
    "t2v": "Text to video on the latents of the embedder.\n#   regen train configs/t2v.yaml --ranks 2",
}
_README = """# {name}

Run everything from this folder. `regen COMMAND --help` explains each command; `regen config show configs/embedder.yaml`
prints a config as a run would see it. Changes can be made in the files, or behind a command: `train.steps=200`.

    # 1. Videos to shards, some of them kept apart for validation. Captions: see `regen shards build --help`
    regen shards build VIDEOS --out data/train
    regen shards build OTHER_VIDEOS --out data/held_out

    # 2. The embedder. The same command goes on after a stop. On a CPU without bf16 instructions: engine.precision=fp32
    regen train configs/embedder.yaml --ranks 2
    regen reconstruct VIDEO --run runs/embedder --out runs/reconstructed

    # 3. Latents and text embeddings. {text}
    regen preencode configs/preencode.yaml
    regen preencode configs/preencode.yaml data=data/held_out output=data/latents_held_out

    # 4. Text to video
    regen train configs/t2v.yaml --ranks 2
    regen generate "a prompt" --run runs/t2v --embedder runs/embedder --out runs/generated

## On a cluster

Edit `cluster.yaml`: partition, account, GPUs, time. `regen submit` writes the batch script, checks everything first
and resubmits what is preempted; no script of your own is needed.

    # Show what would be submitted, then submit it; without --cluster it runs on this machine, in the background
    regen submit train configs/embedder.yaml --cluster cluster.yaml --nodes 1 --dry-run
    regen submit train configs/embedder.yaml --cluster cluster.yaml --nodes 1
    regen submit train configs/embedder.yaml --tasks-per-node 2
    regen jobs

## Files

| path | what it is |
| --- | --- |
| `configs/embedder.yaml`, `configs/t2v.yaml` | what is trained: {embedder} and {t2v}, with every key that these set |
| `configs/preencode.yaml` | which embedder and text encoder make the latents |
| `cluster.yaml` | the cluster that `--cluster cluster.yaml` submits to |
| `configs/schema/` | what an editor with a YAML extension completes and checks these files by |
| `data/`, `runs/` | shards and latents; run folders. Not for version control |
"""
# How the text encoder comes, by whether the small one's embeddings are as wide as what the model takes.
_TEXT = {
    True: """The small text encoder is made of the captions; or name one of your own
    regen text make data/train --out runs/text""",
    False: """The text encoder is published as pickles, which are converted once; or name one of your own
    regen text convert google/t5-v1_1-xxl --out runs/text --dtype bfloat16""",
}
_SMALL_TEXT_WIDTH = 64  # of `regen text make`


def lay_out(folder: Path, embedder: str = "nano", t2v: str = "nano") -> list[Path]:
    """Write a project folder.

    Args:
        folder: a new one, or one that is empty.
        embedder: a preset of `configs/embedder/`, by its name.
        t2v: a preset of `configs/t2v/`.

    Returns:
        The files, in the order in which to read them.

    Raises:
        ConfigError: there is something in the folder, it cannot be written, or there is no such preset.
    """
    presets = {"embedder": _preset("embedder", embedder), "t2v": _preset("t2v", t2v)}
    model = _t2v(presets["t2v"])
    small = model.get("model", {}).get("text_width") == _SMALL_TEXT_WIDTH
    name = os.fsencode(folder.resolve().name).decode("utf-8", "replace")
    texts = {
        "README.md": _README.format(
            name=name, text=_TEXT[small], **{key: f"`{path}`" for key, path in presets.items()}
        ),
        "configs/embedder.yaml": _text("embedder", _embedder(presets["embedder"])),
        "configs/preencode.yaml": _text("preencode", _preencode("nano" if small else "paper")),
        "configs/t2v.yaml": _text("t2v", model),
        "cluster.yaml": _cluster(),
        ".gitignore": "/data/\n/runs/\n",
        **{f"{_SCHEMAS}/{kind}.json": find_preset(_SCHEMAS / f"{kind}.json").read_text("utf-8") for kind in _KINDS},
    }
    _check_empty(folder)
    try:
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(folder / name, text)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}; give a folder that you may write to") from error
    return [folder / name for name in texts]


def schema_comment(path: str) -> str:
    """Return the line that names a file's schema to editors; `path` is relative to the file."""
    return f"# yaml-language-server: $schema={path}"


def _check_empty(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a new folder")
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ConfigError(
            f"{folder} is not empty ({', '.join(found[:3])}{more}); give a new folder, nothing is overwritten"
        )


def _preset(kind: str, name: str) -> Path:
    path = Path("configs") / kind / f"{name}.yaml"
    if not find_preset(path).is_file():
        known = sorted(each.stem for each in find_preset(Path("configs") / kind / "nano.yaml").parent.glob("*.yaml"))
        raise ConfigError(f"there is no preset {path}; known are {', '.join(known)}")
    return path


def _embedder(preset: Path) -> dict[str, Any]:
    values = inherited(preset)
    values["data"] = {key: each for key, each in values["data"].items() if key != "mixture"} | _DATA
    return values | {"name": "embedder", "output": "runs"}


def _t2v(preset: Path) -> dict[str, Any]:
    values = inherited(preset)
    values["data"] = values["data"] | _LATENTS
    values["generation"] = values.get("generation", {}) | {"embedder": "runs/embedder"}
    return values | {"name": "t2v", "output": "runs"}


def _preencode(text: str) -> dict[str, Any]:
    """Return the pre-encoding of nano, with captions as in the preset `text`."""
    values = inherited(Path("configs/preencode/nano.yaml"))
    values["text"] = inherited(Path(f"configs/preencode/{text}.yaml"))["text"] | {"encoder": "runs/text"}
    return values | {"embedder": "runs/embedder", "data": _DATA["url"], "output": _LATENTS["url"]}


def _cluster() -> str:
    """The general Slurm cluster, with its comments."""
    _, _, _, *rest = find_preset(Path("configs/cluster/slurm.yaml")).read_text(encoding="utf-8").splitlines()
    head = "# The cluster of `--cluster cluster.yaml`: set what your site asks for."
    return "\n".join([schema_comment(f"{_SCHEMAS}/cluster.json"), head, *rest]) + "\n"


def _text(name: str, values: dict[str, Any]) -> str:
    return f"{schema_comment(f'schema/{name}.json')}\n# {_HEADS[name]}\n" + yaml.safe_dump(
        values, sort_keys=False, allow_unicode=True, width=120
    )
