"""The files of a text encoder, as Hugging Face lays them out, and the packages that read them.

    FOLDER/config.json                       sizes of the T5
    FOLDER/spiece.model                      its sentencepiece tokenizer
    FOLDER/model.safetensors                 its weights; or, in several files:
    FOLDER/model.safetensors.index.json      which tensor is in which of FOLDER/model-….safetensors

Weights that are pickled are not read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from regen_dist.errors import BackendError, CheckpointError

CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE = "config.json", "spiece.model", "model.safetensors"
WEIGHTS_INDEX = f"{WEIGHTS_FILE}.index.json"
_FETCHED = [CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, WEIGHTS_INDEX, "model-*.safetensors"]
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_NEEDED = f"a local folder with {CONFIG_FILE}, {TOKENIZER_FILE} and {WEIGHTS_FILE}"


class EncoderFiles(NamedTuple):
    """The files of one encoder, all there. `weights` is sorted by name."""

    folder: Path
    config: Path
    tokenizer: Path
    weights: tuple[Path, ...]

    def digest(self) -> str:
        """SHA-256 over the files' names and bytes: the same wherever they lie."""
        whole = hashlib.sha256()
        for path in (self.config, self.tokenizer, *self.weights):
            with path.open("rb") as file:
                whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return whole.hexdigest()


def find_files(name: str) -> EncoderFiles:
    """The files of the encoder that a config names: a folder, else a name on the Hugging Face hub, which is fetched
    into Hugging Face's own cache.

    Raises:
        CheckpointError: there is no such encoder, the hub cannot be reached, or a file is missing.
        BackendError: huggingface_hub is not installed.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _fetch(name)
    for file in (CONFIG_FILE, TOKENIZER_FILE):
        if not (folder / file).is_file():
            raise CheckpointError(f"text encoder {name!r} has no {file} in {folder}; text.encoder takes {_NEEDED}")
    return EncoderFiles(folder, folder / CONFIG_FILE, folder / TOKENIZER_FILE, _weights(name, folder))


@contextmanager
def needing(package: str) -> Iterator[None]:
    """Around an import: BackendError with the command that installs the package when it is not there."""
    try:
        yield
    except ImportError as error:
        raise BackendError(f"text encoders need {package} ({error}); run: pip install {package}") from error


@contextmanager
def quiet_transformers() -> Iterator[Any]:
    """transformers, without its progress bars and its talk of weights that an encoder leaves aside."""
    with needing("transformers"):
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
            f"text encoder {name!r} has no {WEIGHTS_FILE} in {folder}; pickled weights (pytorch_model.bin) are not "
            f"read. Convert them once, on a machine where you trust them:\n  {_conversion(name)}\nthen copy "
            f"{TOKENIZER_FILE} into that folder and set text.encoder to it"
        )
    shards = tuple(folder / shard for shard in sorted(_shard_names(folder / WEIGHTS_INDEX)))
    if missing := [path.name for path in shards if not path.is_file()]:
        raise CheckpointError(
            f"text encoder {name!r}: {len(missing)} of {len(shards)} files of weights are missing in {folder}, among "
            f"them {missing[0]}; fetch or copy it again"
        )
    return shards


def _conversion(name: str) -> str:
    load = f"T5EncoderModel.from_pretrained({name!r}, use_safetensors=False, dtype='bfloat16')"
    return f'python -c "from transformers import T5EncoderModel; {load}.save_pretrained({"t5-encoder"!r})"'


def _shard_names(index: Path) -> set[str]:
    """The files that an index of weights names; in its own folder, wherever a foreign index points to."""
    try:
        return {Path(name).name for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}); fetch or copy it again") from error


def _fetch(name: str) -> Path:
    if not _HUB_NAME.fullmatch(name):
        raise CheckpointError(
            f"text encoder {name!r}: there is no such folder; text.encoder takes {_NEEDED} (`regen text make` writes a "
            "small one), or a name on the Hugging Face hub such as google/t5-v1_1-xxl"
        )
    with needing("huggingface-hub"):
        from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, allow_patterns=_FETCHED))
    except Exception as error:  # of one of several network libraries, by version
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"text encoder {name!r}: there is no such folder here, and it could not be fetched from the Hugging Face "
            f"hub ({reason}). Run `hf download {name}` where there is a network, with an HF_HOME that this machine "
            f"sees, or set text.encoder to {_NEEDED} (`regen text make` writes a small one)"
        ) from error
