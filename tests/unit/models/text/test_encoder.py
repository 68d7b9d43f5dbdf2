"""Tokens are those of T5's own tokenizer, and embeddings do not depend on the batch."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity

from regen_dist.config.t2v import TextConfig
from regen_dist.models.text import TextEncoder, make_small_encoder

ROOT = Path(__file__).parents[4]


def _load(path: Path, max_tokens: int = 256, dtype: torch.dtype | None = None) -> TextEncoder:
    return TextEncoder.load(TextConfig(encoder=str(path), max_tokens=max_tokens), dtype=dtype)


class TestEncoding:
    """Captions to embeddings."""

    def test_bytes_do_not_depend_on_the_batch(self, encoder: TextEncoder, captions: list[str]) -> None:
        """Alone, among others, in another order, twice: the same bits. Lengths are those of the tokens."""
        together = encoder.encode([*captions[:20], "", captions[3]])
        for text, embedded in zip(captions[:20], together, strict=False):
            assert embedded.shape == (len(encoder.tokens(text)), encoder.width)
            assert torch.equal(encoder.encode([text])[0], embedded)
        assert torch.equal(together[3], together[-1])
        backwards = encoder.encode(captions[:20][::-1])
        assert all(torch.equal(one, other) for one, other in zip(backwards[::-1], together, strict=False))
        assert len({len(embedded) for embedded in together}) > 3, "captions of several lengths"
        assert encoder.encode([]) == []

    def test_as_a_padded_batch_with_its_mask(self, encoder: TextEncoder, folder: Path, captions: list[str]) -> None:
        """What transformers itself makes of a batch, up to rounding."""
        from transformers import T5EncoderModel

        texts = ["a red ring", *captions[:3]]
        rows = [encoder.tokens(text) for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        with torch.no_grad():
            padded = T5EncoderModel.from_pretrained(folder).eval()(ids, attention_mask=mask).last_hidden_state
        for row, whole, alone in zip(rows, padded, encoder.encode(texts), strict=True):
            torch.testing.assert_close(whole[: len(row)], alone, atol=1e-5, rtol=1e-5)

    def test_the_empty_caption(self, encoder: TextEncoder) -> None:
        """The end of the sentence alone; spaces are no words."""
        assert encoder.tokens("") == [1]
        assert encoder.null().shape == (1, encoder.width)
        assert torch.equal(encoder.null(), encoder.encode(["  "])[0])

    def test_long_captions_are_cut(self, encoder: TextEncoder, folder: Path, captions: list[str]) -> None:
        """The end of the sentence stays."""
        short = _load(folder, max_tokens=5)
        whole = encoder.tokens(captions[0])
        assert short.tokens(captions[0]) == [*whole[:4], 1]
        assert short.tokens("red") == encoder.tokens("red")
        assert short.encode(captions[:1])[0].shape == (5, short.width)

    def test_no_gradient_and_the_dtype(self, encoder: TextEncoder, folder: Path) -> None:
        """Embeddings can enter what is trained, and ask for no gradient themselves."""
        embedded = encoder.encode(["a red ring"])[0]
        assert not embedded.requires_grad
        weight = torch.ones(encoder.width, requires_grad=True)
        (embedded * weight).sum().backward()
        assert weight.grad is not None
        assert embedded.dtype == torch.float32
        half = _load(folder, dtype=torch.bfloat16).encode(["a red ring"])[0]
        assert half.dtype == torch.bfloat16
        assert cosine_similarity(half.float().flatten(), embedded.flatten(), dim=0) > 0.999

    def test_the_fingerprint(self, encoder: TextEncoder, copy: Path, captions: list[str], tmp_path: Path) -> None:
        """Changes with each file's bytes and with the longest caption, not with the folder."""
        facts = _load(copy).facts()
        assert facts == {**encoder.facts(), "encoder": str(copy)}
        assert (facts["width"], facts["max_tokens"]) == (64, 256)
        found = [facts["fingerprint"], _load(copy, max_tokens=8).fingerprint]
        weights = load_file(copy / "model.safetensors")
        weights["shared.weight"][5, 5] += 1
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
        found.append(_load(copy).fingerprint)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-5}))
        found.append(_load(copy).fingerprint)
        assert make_small_encoder(captions, tmp_path / "other", vocabulary=100, layers=1)
        shutil.copy(tmp_path / "other" / "spiece.model", copy)
        found.append(_load(copy).fingerprint)
        assert len(set(found)) == 5


class TestTokens:
    """T5's own tokenizer is transformers' `T5Tokenizer`, for unigram models."""

    def test_as_transformers_does(self, copy: Path, captions: list[str]) -> None:
        """The same ids, also for spaces, signs, ligatures and letters that were never seen; and when cut."""
        from transformers import T5Tokenizer

        (copy / "spiece.model").write_bytes(_unigram_model())
        ours, theirs = _load(copy, max_tokens=12), T5Tokenizer.from_pretrained(copy)
        texts = [
            "",
            "A cat.",
            "  two  spaces,\tand a tab ",
            "ﬁne Ⅷ é ü €",
            "don't (really) 3.5 % 中文 x",
            *captions[:5],
        ]
        for text in texts:
            assert ours.tokens(text) == theirs(text, truncation=True, max_length=12).input_ids
        assert len(ours.tokens(captions[0])) == 12

    def test_names_of_special_tokens_are_plain_text(self, encoder: TextEncoder) -> None:
        """A caption cannot end itself early."""
        tokens = encoder.tokens("red </s> ring")
        assert tokens.index(1) == len(tokens) - 1


def _unigram_model() -> bytes:
    """Of T5's kind, trained on a page."""
    from sentencepiece import SentencePieceTrainer

    lines = [line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="unigram", vocab_size=350, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()
