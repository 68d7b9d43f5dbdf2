"""Captions to token ids: by sentencepiece for a T5, by transformers' own tokenizer for every other encoder."""

from __future__ import annotations

from typing import Any, Protocol

from regen_dist.errors import CheckpointError, needing_extra
from regen_dist.models.text.files import EncoderFiles, quiet_transformers

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
