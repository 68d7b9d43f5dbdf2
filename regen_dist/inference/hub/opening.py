"""Opening and saving, common to all models for diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from regen_dist.config.files import write_text_atomically

_LOADING = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def in_trained_precision(kind: Any, path: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """Add a model's training dtype to the options of `from_pretrained`, unless they name one.

    Args:
        kind: class of the model.
        path: a folder, or a repository on the hub.
        options: options of the call.
    """
    if options.get("torch_dtype") is not None or options.get("dtype") is not None:
        return options
    found = kind.load_config(path, **{name: options[name] for name in _LOADING if name in options})
    dtype = torch.bfloat16 if found.get("precision", "bf16") == "bf16" else torch.float32
    return {name: value for name, value in options.items() if name != "dtype"} | {"torch_dtype": dtype}


def write_code(folder: str | Path, module: tuple[str, str], kind: str) -> dict[str, str]:
    """Write a module of code (its name and text) into a folder; returns the `auto_map` by which diffusers finds the
    class in it."""
    name, text = module
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_text_atomically(Path(folder) / name, text)
    return {"AutoModel": f"{Path(name).stem}.{kind}"}
