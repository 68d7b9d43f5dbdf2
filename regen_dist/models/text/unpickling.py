"""One file of pickled weights written as safetensors: `python -I -m regen_dist.models.text.unpickling JOB`, a process
of its own, for nothing from outside is unpickled in ours.

PyTorch's restricted unpickler (`weights_only=True`) makes tensors and plain containers, and calls nothing that the file
names. JOB is JSON: `source`, `target`, `dtype` (or null), `leave` (beginnings of names that are left out). The answer,
one line on the standard output, is JSON too: `tensors`, or `problem`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from regen_dist.jsontext import json_text


def convert_file(source: Path, target: Path, dtype: torch.dtype | None, leave: Sequence[str]) -> dict[str, int]:
    """Write the tensors of a pickled file as safetensors; their names, with the bytes of each.

    Raises:
        ValueError: there is something else than tensors in it.
    """
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:  # of before PyTorch 1.6: not a zip, cannot be mapped
        if "mmap" not in str(error):
            raise
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}, not tensors by name")
    other = [str(name) for name, value in loaded.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"{other[0]} is no tensor")
    kept = {str(name): each for name, each in loaded.items() if not str(name).startswith(tuple(leave))}
    tensors = {name: _own(each, dtype) for name, each in kept.items()}  # tied weights become equal ones
    save_file(tensors, target, {"format": "pt"})
    return {name: each.numel() * each.element_size() for name, each in tensors.items()}


def _own(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(wanted).contiguous().clone()


def main() -> None:
    """Do the job that the command line names."""
    job = json.loads(sys.argv[1])
    dtype = None if job["dtype"] is None else getattr(torch, job["dtype"])
    try:
        answer: dict[str, object] = {
            "tensors": convert_file(Path(job["source"]), Path(job["target"]), dtype, job["leave"])
        }
    except Exception as error:  # noqa: BLE001 - of the unpickler, of the disk: told to the process that asked
        answer = {"problem": next(iter(str(error).strip().splitlines()), type(error).__name__)}
    print(json_text(answer))


if __name__ == "__main__":
    main()
