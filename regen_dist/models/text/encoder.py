"""Captions to embeddings, by the encoder of a T5 (Raffel et al., 2020) with its sentencepiece tokenizer, or by any
other model that transformers' AutoModel and AutoTokenizer load: the last layer's hidden states.

Legend: L tokens of one caption, with the special tokens that its tokenizer adds; D width of the encoder.

Each caption is encoded by itself, never beside others: matrix products of other shapes round differently, so that its
embedding would depend, in the last bits, on its neighbours in a batch. Thus the same caption gives the same bytes in
whatever batch, task or order it comes, and there is no padding to mask. Equal captions of one call are encoded once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from regen_dist.config.t2v import TextConfig
from regen_dist.errors import CheckpointError, needing_extra
from regen_dist.models.text.files import WEIGHTS_INDEX, EncoderFiles, find_files, quiet_transformers
from regen_dist.registry import Entry, Registry, Site

# Captions to token ids: by sentencepiece for a T5, by transformers' own tokenizer for every other encoder.


_NO_LIMIT = 1 << 30  # tokenizers without a longest text name a larger number


class Tokens(Protocol):
    """Tokenizer. `size`: rows of embeddings that its ids need; `longest`: tokens that it allows, if limited."""

    size: int
    longest: int | None

    def ids(self, caption: str, most: int) -> list[int]:
        """Return at most `most` ids of a caption, and at least one, with its special tokens."""
        ...

    def count(self, caption: str) -> int:
        """Return the number of ids of the whole caption."""
        ...

    def pieces(self, ids: list[int]) -> list[str]:
        """Return the ids as text."""
        ...


class SentencePieces:
    """A T5's tokenizer: sentencepiece's ids, then the end of the sentence, which stays when the caption is cut."""

    longest: int | None = None

    def __init__(self, files: EncoderFiles) -> None:
        (path,) = files.tokenizer
        with needing_extra("a text encoder"):
            from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path} is no sentencepiece model: {error}; fetch or copy it again") from error
        if self._model.eos_id() < 0:
            raise CheckpointError(f"{path} has no token for the end of a sentence: it is not a T5's")
        self.size = len(self._model)

    def ids(self, caption: str, most: int) -> list[int]:
        """Implement `Tokens.ids`."""
        return [*self._model.encode(caption)[: most - 1], self._model.eos_id()]

    def count(self, caption: str) -> int:
        """Implement `Tokens.count`."""
        return len(self._model.encode(caption)) + 1

    def pieces(self, ids: list[int]) -> list[str]:
        """Implement `Tokens.pieces`."""
        return [self._model.id_to_piece(token) for token in ids]


class AutoTokens:
    """Tokenizer of a folder, by transformers. No code from the folder is run."""

    def __init__(self, files: EncoderFiles) -> None:
        with quiet_transformers() as transformers:
            try:
                self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                    str(files.folder), local_files_only=True, trust_remote_code=False
                )
            except Exception as error:  # of one of several libraries, by the kind of the tokenizer
                raise CheckpointError(
                    f"the tokenizer in {files.folder} cannot be loaded: {_first_line(error)}; fetch or copy its files "
                    "again, all that AutoTokenizer needs"
                ) from error
        self.size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        longest = int(self._tokenizer.model_max_length)
        self.longest = longest if longest < _NO_LIMIT else None

    def ids(self, caption: str, most: int) -> list[int]:
        """Implement `Tokens.ids`. Names of special tokens in a caption are plain text."""
        found = self._encode(caption, truncation=True, max_length=most)
        return found or [self._filler()]

    def count(self, caption: str) -> int:
        """Implement `Tokens.count`."""
        return max(1, len(self._encode(caption)))

    def pieces(self, ids: list[int]) -> list[str]:
        """Implement `Tokens.pieces`."""
        return [str(each) for each in self._tokenizer.convert_ids_to_tokens(ids)]

    def _encode(self, caption: str, **more: Any) -> list[int]:
        with quiet_transformers():  # it warns of long texts
            return [int(each) for each in self._tokenizer(caption, split_special_tokens=True, **more)["input_ids"]]

    def _filler(self) -> int:
        """The token of an empty caption, where the tokenizer adds none of its own."""
        tokenizer = self._tokenizer
        for found in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
            if found is not None:
                return int(found)
        raise CheckpointError(
            "the text encoder's tokenizer makes no token of an empty caption, and has none for a text's end, beginning "
            "or padding; name one in its tokenizer_config.json"
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# The part of a pretrained model that reads text, whatever the architecture: weights out of safetensors, no foreign
# code.
_PARTS = ("text_model", "language_model")  # of models that read something else, too
_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


def load_model(files: EncoderFiles, dtype: torch.dtype) -> nn.Module:
    """The text encoder of a folder, in `dtype`, on the CPU: of an encoder and decoder the encoder, of a model of text
    and images the text's part; a causal language model as it is.

    Raises:
        CheckpointError: it cannot be loaded, or lacks weights.
    """
    with quiet_transformers() as transformers:
        try:
            model_class = TEXT_ENCODERS[files.kind].build.model_class(transformers, files)
            model, found = model_class.from_pretrained(
                str(files.folder), use_safetensors=True, local_files_only=True, trust_remote_code=False, dtype=dtype,
                output_loading_info=True,
            )  # fmt: skip
        except (OSError, ValueError, KeyError, RuntimeError, AttributeError, ImportError, SafetensorError) as error:
            raise CheckpointError(
                f"the text encoder in {files.folder} cannot be loaded: {str(error).strip() or repr(error)}; fetch or "
                "copy its files again"
            ) from error
    part, prefix = _text_part(model)
    missing = sorted(name for name in found["missing_keys"] if name.startswith(prefix) and "pooler" not in name)
    if missing:
        raise CheckpointError(
            f"the weights in {files.folder} are not those of a text encoder as {files.config.name} describes it: "
            f"{len(missing)} tensors are missing, among them {missing[0]}"
        )
    return part


def most_positions(model: nn.Module) -> int | None:
    """Return the number of positions that the model has learned; None if positions are relative or computed."""
    found = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS
    ]
    return min(found, default=None)


def auto_class(transformers: Any, files: EncoderFiles) -> Any:
    """Class of transformers for any other encoder: that of its text part, where it has one of its own."""
    config = transformers.AutoConfig.from_pretrained(str(files.folder), local_files_only=True, trust_remote_code=False)
    known = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
    return transformers.AutoModelForTextEncoding if type(config) in known else transformers.AutoModel


class EncoderParts(NamedTuple):
    """One kind of text encoder: the class of transformers that reads its weights, and its tokenizer."""

    model_class: Callable[[Any, EncoderFiles], Any]
    tokens: Callable[[EncoderFiles], Tokens]


# By the kind that `files.described_by` finds. A frozen encoder adds nothing to a checkpoint.
TEXT_ENCODERS: Registry[Entry[EncoderParts]] = Registry(
    "text.encoder",
    {
        "t5": Entry(EncoderParts(lambda transformers, _: transformers.T5EncoderModel, SentencePieces)),
        "auto": Entry(EncoderParts(auto_class, AutoTokens)),
    },
)


def _text_part(model: Any) -> tuple[nn.Module, str]:
    """The module that takes token ids and gives hidden states, and what the names of its weights begin with."""
    if getattr(model.config, "is_encoder_decoder", False):
        part = model.get_encoder()
        if part is not model:
            return part, _prefix(model, part)
    for name in _PARTS if hasattr(model.config, "text_config") else ():
        if isinstance(part := getattr(model, name, None), nn.Module):
            return part, f"{name}."
    return model, ""


def _prefix(model: nn.Module, part: nn.Module) -> str:
    return next((f"{name}." for name, module in model.named_modules() if module is part and name), "")


class TextEncoder:
    """A frozen text encoder. Made by `load`.

    Args:
        model: model of transformers, on its device.
        tokens: its tokenizer.
        config: the config that names it.
        files: files of model and tokenizer.
    """

    def __init__(self, model: Any, tokens: Tokens, config: TextConfig, files: EncoderFiles) -> None:
        self._model, self._tokens = model, tokens
        self._config, self._files = config, files
        limits = (config.max_tokens, tokens.longest, most_positions(model))
        self._most = min(limit for limit in limits if limit is not None)

    @classmethod
    def load(
        cls, config: TextConfig, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> TextEncoder:
        """The encoder that a config names, without the decoder, without gradients.

        Args:
            config: names a folder or a model on the Hugging Face hub.
            device: device of the computation.
            dtype: precision; by default bfloat16 on a GPU, float32 elsewhere. T5 overflows in float16.

        Raises:
            CheckpointError: a file is missing, damaged, or does not fit the others; the hub cannot be reached.
            BackendError: transformers, sentencepiece or huggingface_hub is not installed.
        """
        device = torch.device(device)
        files = find_files(config.encoder)
        tokens = TEXT_ENCODERS.available(files.kind, Site(device.type)).build.tokens(files)
        model = load_model(files, dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32))
        _check_vocabulary(files, tokens, model)
        return cls(model.to(device).eval().requires_grad_(False), tokens, config, files)

    @property
    def model(self) -> torch.nn.Module:
        """The model of transformers; moving it moves the encoder."""
        return self._model  # type: ignore[no-any-return]

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that it was loaded from: config, tokenizer, weights and, if the weights are in several files, their
        index."""
        index = self._files.folder / WEIGHTS_INDEX
        return (self._files.config, *self._files.tokenizer, *self._files.weights, *([index] if index.is_file() else []))

    def cut_at(self, max_tokens: int) -> TextEncoder:
        """Return the same encoder for captions of at most this many tokens."""
        config = TextConfig(encoder=self._config.encoder, max_tokens=max_tokens)
        return TextEncoder(self._model, self._tokens, config, self._files)

    @cached_property
    def width(self) -> int:
        """Width D of the embeddings."""
        return int(self.null().shape[1])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config, tokenizer, weights and `max_tokens`: encoders of one fingerprint mean the same by their
        embeddings. Does not depend on where the files lie."""
        return hashlib.sha256(f"{self._files.digest()} {self._config.max_tokens}".encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """Return the facts of the encoder that a cache of embeddings records; `encoder` is a mere name."""
        return {
            "encoder": self._config.encoder,
            "fingerprint": self.fingerprint,
            "width": self.width,
            "max_tokens": self._config.max_tokens,
        }

    def tokens(self, caption: str) -> list[int]:
        """Ids of a caption's L <= max_tokens tokens, fewer where the encoder takes no more, as its own tokenizer gives
        them. Special tokens stay when the caption is cut; their names in a caption are plain text."""
        return self._tokens.ids(caption, self._most)

    def cuts(self, caption: str) -> bool:
        """Return whether a caption has more than `max_tokens` tokens, or more than the encoder takes."""
        return self._tokens.count(caption) > self._most

    def pieces(self, caption: str) -> list[str]:
        """Return the same tokens as text, for inspection."""
        return self._tokens.pieces(self.tokens(caption))

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Embeddings [L, D] of each caption, on the encoder's device and in its dtype. The same bytes in any batch;
        equal captions share one tensor."""
        rows = [tuple(self.tokens(caption)) for caption in captions]
        made = {row: self._encode(row) for row in dict.fromkeys(rows)}
        return [made[row] for row in rows]

    def null(self) -> Tensor:
        """Embedding [1, D] of the empty caption, for guidance."""
        return self.encode([""])[0]

    @torch.no_grad()
    def _encode(self, row: tuple[int, ...]) -> Tensor:
        ids = torch.tensor([row], device=self._model.device)  # [1, L]
        found = self._model(input_ids=ids, attention_mask=torch.ones_like(ids))
        embedded: Tensor = found.last_hidden_state[0]  # [L, D]
        return embedded


def _check_vocabulary(files: EncoderFiles, tokens: Tokens, model: Any) -> None:
    """Check that an encoder has no fewer rows than its tokenizer knows tokens; more are allowed."""
    rows = model.get_input_embeddings().num_embeddings
    if tokens.size > rows:
        raise CheckpointError(
            f"the tokenizer in {files.folder} has {tokens.size} tokens, the encoder beside it takes {rows}: they do "
            "not belong together"
            "; copy the tokenizer of this model there"
        )
