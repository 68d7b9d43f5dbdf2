"""The files of a text encoder, as Hugging Face lays them out, and the packages that read them.

    FOLDER/config.json                       its architecture and sizes
    FOLDER/spiece.model                      the sentencepiece tokenizer of a T5; for others what AutoTokenizer reads
    FOLDER/model.safetensors                 its weights; or, in several files:
    FOLDER/model.safetensors.index.json      which tensor is in which of FOLDER/model-….safetensors

In a pipeline of diffusers they are in FOLDER/encoder/ (`ENCODER_FOLDER`).

Weights that are pickled are not read: `regen text convert` writes them anew (`convert_encoder`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from regen_dist.errors import CheckpointError, needing_extra
from regen_dist.jsontext import json_text
from regen_dist.shared_files import IDLE_S, remove_leftovers, sync, temporary_beside

CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE = "config.json", "spiece.model", "model.safetensors"
WEIGHTS_INDEX = f"{WEIGHTS_FILE}.index.json"
TOKENIZER_FILES = (
    "added_tokens.json", "merges.txt", "sentencepiece.bpe.model", "special_tokens_map.json", TOKENIZER_FILE,
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
# diffusers fetches from the hub all files of a pipeline's folder only if no weights lie in the folder itself.
ENCODER_FOLDER = "encoder"
PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX = f"{PICKLED_FILE}.index.json"
_DESCRIBED = [CONFIG_FILE, *TOKENIZER_FILES]
_FETCHED = [*_DESCRIBED, WEIGHTS_FILE, WEIGHTS_INDEX, "model-*.safetensors"]
_FETCHED_PICKLED = [*_DESCRIBED, PICKLED_FILE, PICKLED_INDEX, "pytorch_model-*.bin"]
_T5_TYPES = ("t5", "mt5")
EncoderKind = Literal["t5", "auto"]  # values of the registry in encoder.py
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_NEEDED = f"a local folder with {CONFIG_FILE}, a tokenizer and {WEIGHTS_FILE}"


class EncoderFiles(NamedTuple):
    """The files of one encoder, all there. `tokenizer` and `weights` are sorted by name. A T5 with a sentencepiece
    tokenizer (kind `t5`) has that one file alone."""

    folder: Path
    config: Path
    tokenizer: tuple[Path, ...]
    weights: tuple[Path, ...]
    kind: EncoderKind

    def digest(self) -> str:
        """SHA-256 over the files' names and bytes: the same wherever they lie."""
        whole = hashlib.sha256()
        for path in (self.config, *self.tokenizer, *self.weights):
            with path.open("rb") as file:
                whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return whole.hexdigest()


def find_files(name: str) -> EncoderFiles:
    """The files of the encoder that a config names: a folder (also that of an exported pipeline), else a name on the
    Hugging Face hub, which is fetched into Hugging Face's own cache.

    Raises:
        CheckpointError: there is no such encoder, the hub cannot be reached, or a file is missing.
        BackendError: huggingface_hub is not installed.
    """
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        folder = _fetch(name, _FETCHED)
    if not (folder / CONFIG_FILE).is_file() and (folder / ENCODER_FOLDER / CONFIG_FILE).is_file():
        folder /= ENCODER_FOLDER
    tokenizer, kind = described_by(name, folder)
    return EncoderFiles(folder, folder / CONFIG_FILE, tokenizer, _weights(name, folder), kind)


def find_pickled(name: str) -> tuple[Path, tuple[Path, ...]]:
    """Folder and pickled weights of an encoder, for a conversion; the weights are fetched, not read.

    Raises:
        CheckpointError: there are none, or the encoder has safetensors and needs no conversion.
        BackendError: huggingface_hub is not installed.
    """
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        folder = _fetch(name, _FETCHED_PICKLED)
    described_by(name, folder)
    if (folder / WEIGHTS_FILE).is_file() or (folder / WEIGHTS_INDEX).is_file():
        raise CheckpointError(f"text encoder {name!r} has {WEIGHTS_FILE} in {folder}: use it as it is")
    if (folder / PICKLED_INDEX).is_file():
        return folder, _shards(name, folder, PICKLED_INDEX)
    if not (folder / PICKLED_FILE).is_file():
        raise CheckpointError(f"text encoder {name!r} has no {PICKLED_FILE} in {folder}: there is nothing to convert")
    return folder, (folder / PICKLED_FILE,)


def described_by(name: str, folder: Path) -> tuple[tuple[Path, ...], EncoderKind]:
    """Return the files of a folder's tokenizer, and the encoder's kind; CheckpointError if one is missing."""
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"text encoder {name!r} has no {CONFIG_FILE} in {folder}; text.encoder takes {_NEEDED}")
    model_type = _model_type(folder / CONFIG_FILE)
    found = tuple(folder / file for file in TOKENIZER_FILES if (folder / file).is_file())
    if model_type in _T5_TYPES and (folder / TOKENIZER_FILE).is_file():
        return (folder / TOKENIZER_FILE,), "t5"
    if not found:
        raise CheckpointError(
            f"text encoder {name!r} has no {TOKENIZER_FILE} in {folder}, nor another tokenizer "
            f"({', '.join(TOKENIZER_FILES)}); text.encoder takes {_NEEDED}"
        )
    return found, "auto"


def _model_type(config: Path) -> str:
    """The model type that a config names; CheckpointError when it cannot be read."""
    try:
        found = json.loads(config.read_bytes())
        return str(found["model_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the text encoder in {config.parent} cannot be loaded: {config.name} names no model_type "
            f"({type(error).__name__}); fetch or copy it again"
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[Any]:
    """Import transformers without its progress bars and its messages on weights that an encoder does not use."""
    with needing_extra("a text encoder"):
        import transformers
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _weights(name: str, folder: Path) -> tuple[Path, ...]:
    if (folder / WEIGHTS_FILE).is_file():
        return (folder / WEIGHTS_FILE,)
    if not (folder / WEIGHTS_INDEX).is_file():
        raise CheckpointError(
            f"text encoder {name!r} has no {WEIGHTS_FILE} in {folder}; pickled weights ({PICKLED_FILE}) are not read, "
            "for unpickling may run what somebody put there. Convert them once:\n  regen text convert "
            f"{shlex.quote(name)} --out t5-encoder\nand set text.encoder to that folder"
        )
    return _shards(name, folder, WEIGHTS_INDEX)


def _shards(name: str, folder: Path, index: str) -> tuple[Path, ...]:
    shards = tuple(folder / shard for shard in sorted(_shard_names(folder / index)))
    if missing := [path.name for path in shards if not path.is_file()]:
        raise CheckpointError(
            f"text encoder {name!r}: {len(missing)} of {len(shards)} files of weights are missing in {folder}, among "
            f"them {missing[0]}; fetch or copy it again"
        )
    return shards


def _shard_names(index: Path) -> set[str]:
    """Return the files that an index of weights names, always in its own folder, wherever a foreign index points to."""
    try:
        return {Path(name).name for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}); fetch or copy it again") from error


def _fetch(name: str, patterns: list[str]) -> Path:
    if not _HUB_NAME.fullmatch(name):
        raise CheckpointError(
            f"text encoder {name!r}: there is no such folder; text.encoder takes {_NEEDED} (`regen text make` writes a "
            "small one), or a name on the Hugging Face hub such as google/t5-v1_1-xxl"
        )
    with needing_extra(f"text encoder {name!r}, fetched from the hub,"):
        from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # of one of several network libraries, by version
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"text encoder {name!r}: there is no such folder here, and it could not be fetched from the Hugging Face "
            f"hub ({reason}). Run `hf download {name}` where there is a network, with an HF_HOME that this machine "
            f"sees, or set text.encoder to {_NEEDED} (`regen text make` writes a small one)"
        ) from error


# One file of pickled weights written as safetensors: `python -I -m regen_dist.models.text.files JOB`, a process
# of its own, because nothing from outside is unpickled in ours.
#
# PyTorch's restricted unpickler (`weights_only=True`) makes tensors and plain containers, and calls nothing that the
# file names. JOB is JSON: `source`, `target`, `dtype` (or null), `leave` (beginnings of names that are left out). The
# answer, one line on the standard output, is JSON too: `tensors`, or `problem`.
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
    except Exception as error:  # noqa: BLE001 - of the unpickler, of the disk: reported to the process that asked
        answer = {"problem": next(iter(str(error).strip().splitlines()), type(error).__name__)}
    print(json_text(answer))


# Folders of an encoder that appear whole or not at all.
@contextmanager
def atomic_folder(folder: Path, is_present: Callable[[], bool]) -> Iterator[Path]:
    """A new folder beside `folder` that is renamed to it when the block ends well, and removed when it does not; by the
    next one beside it where this process is killed.

    Args:
        folder: not there yet, or empty.
        is_present: true if another process has made the same meanwhile; raises when it holds something else.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent, idle_s=IDLE_S)
        made = temporary_beside(folder)
        made.mkdir()
        try:
            yield made
            for path in (*made.iterdir(), made):
                sync(path)
            _move_into_place(made, folder, is_present)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"the text encoder cannot be written to {folder}: {error.strerror or error}"
            "; choose another folder, or make room"
        ) from error


def _move_into_place(made: Path, folder: Path, is_present: Callable[[], bool]) -> None:
    try:
        os.rename(made, folder)
    except OSError:
        if not is_present():
            raise
    sync(folder.parent)


# Conversion of encoders whose weights are published as pickles to safetensors.
#
# The pickles are read by a process of its own (the main program of files.py) that loads tensors only. Of an encoder
# and decoder the encoder is kept.


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
    if _is_present(folder, recipe):
        return False
    config = json.loads((source / CONFIG_FILE).read_bytes())
    leave = _DECODER if config.get("is_encoder_decoder") or config["model_type"] in ("t5", "mt5", "umt5") else ()
    with atomic_folder(folder, lambda: _is_present(folder, recipe)) as made:
        for file in (CONFIG_FILE, *TOKENIZER_FILES):
            if (source / file).is_file():
                shutil.copyfile(source / file, made / file)
        _write_weights(weights, made, dtype, leave)
        (made / CONVERSION_FILE).write_text(json_text(recipe, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return True


def _is_present(folder: Path, recipe: dict[str, Any]) -> bool:
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
        raise CheckpointError(
            f"{weights[0].parent}: there is no weight of an encoder in its pickled files; give the encoder's own folder"
        )
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
        raise CheckpointError(
            f"{source}: its conversion ended with code {done.returncode} ({last})"
            "; copy the file again, or make more memory available"
        ) from None
    if "problem" in answer:
        raise CheckpointError(
            f"{source} is not converted: {answer['problem']}. Only tensors are taken out of a pickle, nothing in it is "
            "executed; fetch the file again, or another copy of the encoder that has safetensors"
        )
    return dict(answer["tensors"])


if __name__ == "__main__":
    main()
