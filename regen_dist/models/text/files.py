"""The files of a text encoder, as Hugging Face lays them out, and the packages that read them.

    FOLDER/config.json                       its architecture and sizes
    FOLDER/spiece.model                      the sentencepiece tokenizer of a T5; for others what AutoTokenizer reads
    FOLDER/model.safetensors                 its weights; or, in several files:
    FOLDER/model.safetensors.index.json      which tensor is in which of FOLDER/model-….safetensors

Weights that are pickled are not read: `regen text convert` writes them anew (converting.py).
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from regen_dist.errors import BackendError, CheckpointError

CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE = "config.json", "spiece.model", "model.safetensors"
WEIGHTS_INDEX = f"{WEIGHTS_FILE}.index.json"
TOKENIZER_FILES = (
    "added_tokens.json", "merges.txt", "sentencepiece.bpe.model", "special_tokens_map.json", TOKENIZER_FILE,
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX = f"{PICKLED_FILE}.index.json"
_DESCRIBED = [CONFIG_FILE, *TOKENIZER_FILES]
_FETCHED = [*_DESCRIBED, WEIGHTS_FILE, WEIGHTS_INDEX, "model-*.safetensors"]
_FETCHED_PICKLED = [*_DESCRIBED, PICKLED_FILE, PICKLED_INDEX, "pytorch_model-*.bin"]
_T5_KINDS = ("t5", "mt5")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_NEEDED = f"a local folder with {CONFIG_FILE}, a tokenizer and {WEIGHTS_FILE}"


class EncoderFiles(NamedTuple):
    """The files of one encoder, all there. `tokenizer` and `weights` are sorted by name. A T5 with a sentencepiece
    tokenizer (`is_t5`) has that one file alone."""

    folder: Path
    config: Path
    tokenizer: tuple[Path, ...]
    weights: tuple[Path, ...]
    is_t5: bool

    def digest(self) -> str:
        """SHA-256 over the files' names and bytes: the same wherever they lie."""
        whole = hashlib.sha256()
        for path in (self.config, *self.tokenizer, *self.weights):
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
        folder = _fetch(name, _FETCHED)
    tokenizer, is_t5 = described_by(name, folder)
    return EncoderFiles(folder, folder / CONFIG_FILE, tokenizer, _weights(name, folder), is_t5)


def find_pickled(name: str) -> tuple[Path, tuple[Path, ...]]:
    """Folder and pickled weights of an encoder, for a conversion; the weights are fetched, not read.

    Raises:
        CheckpointError: there are none, or the encoder has safetensors and needs no conversion.
        BackendError: huggingface_hub is not installed.
    """
    folder = Path(name).expanduser()
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


def described_by(name: str, folder: Path) -> tuple[tuple[Path, ...], bool]:
    """The files of a folder's tokenizer, and whether they are a T5's; CheckpointError when something is missing."""
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"text encoder {name!r} has no {CONFIG_FILE} in {folder}; text.encoder takes {_NEEDED}")
    kind = _kind(folder / CONFIG_FILE)
    found = tuple(folder / file for file in TOKENIZER_FILES if (folder / file).is_file())
    if kind in _T5_KINDS and (folder / TOKENIZER_FILE).is_file():
        return (folder / TOKENIZER_FILE,), True
    if not found:
        raise CheckpointError(
            f"text encoder {name!r} has no {TOKENIZER_FILE} in {folder}, nor another tokenizer "
            f"({', '.join(TOKENIZER_FILES)}); text.encoder takes {_NEEDED}"
        )
    return found, False


def _kind(config: Path) -> str:
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
    """The files that an index of weights names; in its own folder, wherever a foreign index points to."""
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
    with needing("huggingface-hub"):
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
