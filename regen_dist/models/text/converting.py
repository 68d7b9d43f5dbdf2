"""Conversion of encoders whose weights are published as pickles to safetensors.

The pickles are read by a process of its own (the main program of files.py) that loads tensors only. Of an encoder
and decoder the encoder is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from regen_dist.errors import CheckpointError
from regen_dist.jsontext import json_text
from regen_dist.models.text.files import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    WEIGHTS_INDEX,
    atomic_folder,
    find_pickled,
)

Kept = Literal["same", "bfloat16", "float32"]
CONVERSION_FILE = "conversion.json"
_DECODER = ("decoder.", "lm_head.", "model.decoder.")


def convert_encoder(name: str, folder: Path, dtype: Kept = "same") -> bool:
    """Write an encoder of pickled weights with safetensors, whole or not at all, for `TextEncoder.load`.

    Args:
        name: a folder, or a name on the Hugging Face hub.
        folder: empty, not there yet, or with this same encoder.
        dtype: type of floating-point weights; "same" leaves them as they are.

    Returns:
        False when the folder held this same encoder already.

    Raises:
        CheckpointError: there are no pickled weights, they hold more than tensors, or the folder holds something else.
        BackendError: huggingface_hub is not installed.
    """
    source, weights = find_pickled(name)
    folder = Path(os.path.abspath(folder))
    recipe = {"dtype": dtype, "files": {path.name: path.stat().st_size for path in weights}}
    if _is_there(folder, recipe):
        return False
    config = json.loads((source / CONFIG_FILE).read_bytes())
    leave = _DECODER if config.get("is_encoder_decoder") or config["model_type"] in ("t5", "mt5", "umt5") else ()
    with atomic_folder(folder, lambda: _is_there(folder, recipe)) as made:
        for file in (CONFIG_FILE, *TOKENIZER_FILES):
            if (source / file).is_file():
                shutil.copyfile(source / file, made / file)
        _write_weights(weights, made, dtype, leave)
        (made / CONVERSION_FILE).write_text(json_text(recipe, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return True


def _is_there(folder: Path, recipe: dict[str, Any]) -> bool:
    """Return whether the folder holds this conversion already; raise CheckpointError if it holds something else."""
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        if json.loads((folder / CONVERSION_FILE).read_bytes()) == recipe:
            return True
    except (OSError, ValueError):
        pass
    raise CheckpointError(f"{folder} holds something else than this encoder converted so; give another --out")


def _write_weights(weights: Sequence[Path], folder: Path, dtype: Kept, leave: Sequence[str]) -> None:
    """Write a safetensors file for each pickle, and an index if there are several."""
    index: dict[str, str] = {}
    total = 0
    for number, path in enumerate(weights, 1):
        file = WEIGHTS_FILE if len(weights) == 1 else f"model-{number:05d}-of-{len(weights):05d}.safetensors"
        tensors = _converted(path, folder / file, dtype, leave)
        index |= dict.fromkeys(tensors, file)
        total += sum(tensors.values())
    if not index:
        raise CheckpointError(f"{weights[0].parent}: there is no weight of an encoder in its pickled files")
    if len(weights) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / WEIGHTS_INDEX).write_text(json_text(content, indent=1, sort_keys=True), encoding="utf-8")


def _converted(source: Path, target: Path, dtype: Kept, leave: Sequence[str]) -> dict[str, int]:
    """Convert a file in another process; names and bytes of its tensors."""
    job = {"source": str(source), "target": str(target), "dtype": None if dtype == "same" else dtype, "leave": leave}
    done = subprocess.run(
        [sys.executable, "-I", "-m", "regen_dist.models.text.files", json_text(job)],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "no word")
        raise CheckpointError(f"{source}: its conversion ended with code {done.returncode} ({last})") from None
    if "problem" in answer:
        raise CheckpointError(
            f"{source} is not converted: {answer['problem']}. Only tensors are taken out of a pickle, nothing in it is "
            "executed; fetch the file again, or another copy of the encoder that has safetensors"
        )
    return dict(answer["tensors"])
