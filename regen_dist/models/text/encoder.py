"""Captions to embeddings, by the encoder of a T5 (Raffel et al., 2020) with its sentencepiece tokenizer.

Legend: L tokens of one caption, its end-of-sentence token included; D width of the encoder.

Each caption is encoded by itself, never beside others: matrix products of other shapes round differently, so that its
embedding would depend, in the last bits, on its neighbours in a batch. Thus the same caption gives the same bytes in
whatever batch, task or order it comes, and there is no padding to mask. Equal captions of one call are encoded once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from regen_dist.config.text import TextConfig
from regen_dist.errors import CheckpointError
from regen_dist.models.text.files import EncoderFiles, find_files, needing, quiet_transformers


class TextEncoder:
    """A frozen T5 encoder. Made by `load`.

    Args:
        model: transformers' `T5EncoderModel`, on its device.
        tokenizer: sentencepiece's processor.
        config: what was asked for.
        files: where model and tokenizer come from.
    """

    def __init__(self, model: Any, tokenizer: Any, config: TextConfig, files: EncoderFiles) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._config, self._files = config, files

    @classmethod
    def load(
        cls, config: TextConfig, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> TextEncoder:
        """The encoder that a config names, without the decoder, without gradients.

        Args:
            config: names a folder or a model on the Hugging Face hub.
            device: where it computes.
            dtype: in which; by default bfloat16 on a GPU, float32 elsewhere. T5 overflows in float16.

        Raises:
            CheckpointError: a file is missing, damaged, or does not fit the others; the hub cannot be reached.
            BackendError: transformers, sentencepiece or huggingface_hub is not installed.
        """
        device = torch.device(device)
        files = find_files(config.encoder)
        tokenizer = _load_tokenizer(files)
        model = _load_model(files, dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32))
        _check_vocabulary(files, tokenizer, model)
        return cls(model.to(device).eval().requires_grad_(False), tokenizer, config, files)

    @property
    def width(self) -> int:
        """D."""
        return int(self._model.config.d_model)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config, tokenizer, weights and `max_tokens`: encoders of one fingerprint mean the same by their
        embeddings. Does not depend on where the files lie."""
        return hashlib.sha256(f"{self._files.digest()} {self._config.max_tokens}".encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What a cache of embeddings says of the encoder; of these, `encoder` is a name only."""
        return {
            "encoder": self._config.encoder,
            "fingerprint": self.fingerprint,
            "width": self.width,
            "max_tokens": self._config.max_tokens,
        }

    def tokens(self, caption: str) -> list[int]:
        """Ids of a caption's L <= max_tokens tokens, as T5's own tokenizer gives them: sentencepiece's, then the end
        of the sentence, which stays when the caption is cut. Names of special tokens in a caption are plain text."""
        kept = self._tokenizer.encode(caption)[: self._config.max_tokens - 1]
        return [*kept, self._tokenizer.eos_id()]

    def cuts(self, caption: str) -> bool:
        """Whether a caption has more than `max_tokens` tokens."""
        return len(self._tokenizer.encode(caption)) >= self._config.max_tokens  # one more is the end of the sentence

    def pieces(self, caption: str) -> list[str]:
        """The same tokens, to look at."""
        return [self._tokenizer.id_to_piece(token) for token in self.tokens(caption)]

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
        embedded: Tensor = self._model(input_ids=ids).last_hidden_state[0]  # [L, D]
        return embedded


def _load_tokenizer(files: EncoderFiles) -> Any:
    with needing("sentencepiece"):
        from sentencepiece import SentencePieceProcessor
    try:
        tokenizer = SentencePieceProcessor(model_file=str(files.tokenizer))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{files.tokenizer} is no sentencepiece model: {error}; fetch or copy it again"
        ) from error
    if tokenizer.eos_id() < 0:
        raise CheckpointError(f"{files.tokenizer} has no token for the end of a sentence: it is not a T5's")
    return tokenizer


def _load_model(files: EncoderFiles, dtype: torch.dtype) -> Any:
    with quiet_transformers() as transformers:
        try:
            model, found = transformers.T5EncoderModel.from_pretrained(
                str(files.folder), use_safetensors=True, local_files_only=True, dtype=dtype, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"the T5 encoder in {files.folder} cannot be loaded: {str(error).strip() or repr(error)}; fetch or "
                "copy its files again"
            ) from error
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"the weights in {files.folder} are not those of a T5 encoder as {files.config.name} describes it: "
            f"{len(missing)} tensors are missing, among them {missing[0]}"
        )
    return model


def _check_vocabulary(files: EncoderFiles, tokenizer: Any, model: Any) -> None:
    """A T5 has rows for more tokens than its tokenizer knows, never for fewer."""
    if len(tokenizer) > model.config.vocab_size:
        raise CheckpointError(
            f"{files.tokenizer} has {len(tokenizer)} tokens, the T5 beside it takes {model.config.vocab_size}: they do "
            "not belong together"
        )
