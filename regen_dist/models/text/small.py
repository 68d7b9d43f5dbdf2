"""A small T5 encoder for tests and for captions of few words: a tokenizer trained on the captions, and random weights.

A random T5 keeps words apart, which is what a generator needs of so small a language, with two choices (measured by the
tests). The tokenizer is BPE, which has a token for every frequent word; sentencepiece's unigram model, T5's own, learns
no whole words of so few, and would spell them. And the biases by distance start larger than T5's: at their width^-0.5
they hardly reach the attention, and the order of words was lost.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from regen_dist.config.run import check_seed
from regen_dist.errors import CheckpointError, ConfigError, needing_extra
from regen_dist.jsontext import json_text
from regen_dist.models.text.files import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    atomic_folder,
    quiet_transformers,
)

RECIPE_FILE = "recipe.json"
_BIAS_STD = 0.5  # of the attention's biases by distance, beside scores of about 1
_LONGEST_BYTES = 1 << 20  # of a caption; sentencepiece leaves out longer ones
_MOST_CAPTIONS = 1_000_000  # that the tokenizer learns from, spread evenly


@dataclass(frozen=True)
class SmallEncoderRecipe:
    """Recipe of a small encoder. The same recipe gives the same bytes.

    Args:
        captions: SHA-256 over the different captions.
        num_captions: number of different captions.
        vocabulary: tokens at most; fewer if the captions do not hold as many.
        width: width of the embeddings.
        layers: layers of the T5.
        heads: heads of the T5.
        seed: seed of its weights.
    """

    captions: str
    num_captions: int
    vocabulary: int
    width: int
    layers: int
    heads: int
    seed: int

    def to_text(self) -> str:
        """Return the recipe as the text of its file in the folder."""
        return json_text(asdict(self), indent=1) + "\n"


def make_small_encoder(
    captions: Iterable[str], folder: Path, *, vocabulary: int = 1024, width: int = 64, layers: int = 2, heads: int = 4,
    seed: int = 0,
) -> bool:  # fmt: skip
    """Make a small encoder in Hugging Face's layout, whole or not at all, for `TextEncoder.load`.

    Args:
        captions: texts to train the tokenizer on; their order and repetitions do not matter.
        folder: empty, not there yet, or with this same encoder.
        vocabulary, width, layers, heads, seed: fields of `SmallEncoderRecipe`.

    Returns:
        False when the folder held this same encoder already.

    Raises:
        ConfigError: no caption has a word, sizes that do not fit, or too small a vocabulary.
        CheckpointError: the folder holds something else, or cannot be written.
        BackendError: transformers or sentencepiece is not installed.
    """
    kept = sorted({" ".join(caption.split()) for caption in captions} - {""})
    recipe = _recipe(kept, vocabulary, width, layers, heads, seed)
    folder = Path(os.path.abspath(folder))
    if _is_present(folder, recipe):
        return False
    tokenizer, tokens = _trained_tokenizer(kept, vocabulary)
    with atomic_folder(folder, lambda: _is_present(folder, recipe)) as made:
        _save_model(recipe, tokens, made)
        (made / TOKENIZER_FILE).write_bytes(tokenizer)
        (made / RECIPE_FILE).write_text(recipe.to_text(), encoding="utf-8")
    return True


def _recipe(
    captions: Sequence[str], vocabulary: int, width: int, layers: int, heads: int, seed: int
) -> SmallEncoderRecipe:
    if not captions:
        raise ConfigError(
            "a text encoder is made from captions, and there are none with a word in them; give a dataset with captions"
        )
    if min(vocabulary, width, layers, heads) < 1 or width % heads:
        raise ConfigError(
            f"vocabulary {vocabulary}, width {width}, layers {layers} and heads {heads} must be at least 1, and the "
            "width a multiple of the heads"
        )
    check_seed(seed)
    digest = hashlib.sha256("\n".join(captions).encode()).hexdigest()
    return SmallEncoderRecipe(digest, len(captions), vocabulary, width, layers, heads, seed)


def _is_present(folder: Path, recipe: SmallEncoderRecipe) -> bool:
    """Return whether the folder holds the result of the recipe already; raise CheckpointError if it holds something
    else."""
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return False
    found = folder / RECIPE_FILE
    if not found.is_file():
        raise CheckpointError(f"{folder} holds something else than a small text encoder; give another folder")
    if found.read_text(encoding="utf-8") != recipe.to_text():
        raise CheckpointError(
            f"{folder} holds a text encoder that was made from other captions or with other sizes (see {RECIPE_FILE} "
            "in it); give another folder, or remove that one"
        )
    if missing := [name for name in (CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which it once had; remove it and make it again")
    return True


def _trained_tokenizer(captions: Sequence[str], vocabulary: int) -> tuple[bytes, int]:
    """A sentencepiece model with T5's ids of special tokens, and its number of tokens."""
    with needing_extra("a text encoder"):
        from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(captions[:: -(-len(captions) // _MOST_CAPTIONS)]),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary,
            hard_vocab_limit=False,
            character_coverage=1.0,
            max_sentence_length=_LONGEST_BYTES,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )  # fmt: skip
    except (OSError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        raise ConfigError(
            f"no tokenizer of {vocabulary} tokens can be trained on these {len(captions)} captions: {reason}; a larger "
            "vocabulary holds every character that they use"
        ) from error
    return model.getvalue(), len(SentencePieceProcessor(model_proto=model.getvalue()))


def _save_model(recipe: SmallEncoderRecipe, tokens: int, folder: Path) -> None:
    """Random weights, from the recipe's seed alone. The process's own random state stays as it is."""
    with quiet_transformers() as transformers, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        model = transformers.T5EncoderModel(_t5_config(transformers, recipe, tokens))
        for name, weight in model.named_parameters():
            if name.endswith("relative_attention_bias.weight"):
                torch.nn.init.normal_(weight, std=_BIAS_STD)
        model.save_pretrained(folder)


def _t5_config(transformers: Any, recipe: SmallEncoderRecipe, tokens: int) -> Any:
    """Return the config of a T5 v1.1, but small."""
    return transformers.T5Config(
        vocab_size=tokens,
        d_model=recipe.width,
        d_kv=recipe.width // recipe.heads,
        d_ff=4 * recipe.width,
        num_layers=recipe.layers,
        num_heads=recipe.heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
