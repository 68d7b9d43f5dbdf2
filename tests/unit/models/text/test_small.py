"""The small encoder: it tells words apart, is made whole or not at all, and always of the same bytes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, one_hot

from regen_dist.data.synthetic.shapes import COLOURS
from regen_dist.errors import CheckpointError, ConfigError
from regen_dist.models.text import TextEncoder, files, make_small_encoder, small
from tests.helpers.preencoding import captioned_scenes

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def means(encoder: TextEncoder) -> Tensor:
    """Mean embedding of each of the captions [N, D]."""
    return torch.stack([embedded.mean(0) for embedded in encoder.encode([text for _, text in captioned_scenes(300)])])


def _readable(x: Tensor, classes: Tensor) -> float:
    """Share of the last third that a ridge regression on the rest gets right. x: [N, D], classes: [N]."""
    x, fitted = torch.cat([x, torch.ones(len(x), 1)], 1).double(), len(x) * 2 // 3
    seen = x[:fitted]
    square = seen.T @ seen + torch.eye(x.shape[1]).double()
    weights = torch.linalg.solve(square, seen.T @ one_hot(classes[:fitted]).double())
    return ((x[fitted:] @ weights).argmax(1) == classes[fitted:]).double().mean().item()


class TestWords:
    """What embeddings tell."""

    def test_frequent_words_are_tokens(self, encoder: TextEncoder) -> None:
        text = "a small purple triangle slides downwards quickly in front of a checkered background"
        assert encoder.pieces(text) == [*(f"▁{word}" for word in text.split()), "</s>"]
        assert "<unk>" not in encoder.pieces("maroon"), "letters that are known spell what is not"

    @pytest.mark.parametrize("attribute", ["colour", "shape", "size", "background", "speed"])
    def test_what_a_caption_says_can_be_read(self, means: Tensor, attribute: str) -> None:
        """By a linear map from the mean embedding, fitted on two thirds of the captions."""
        said = [getattr(scene, attribute) for scene, _ in captioned_scenes(300)]
        names = sorted(set(said))
        assert _readable(means, torch.tensor([names.index(each) for each in said])) >= 0.97

    def test_words_are_far_apart(self, encoder: TextEncoder) -> None:
        """Embeddings of all colours, in the same place of the same caption."""
        place = encoder.pieces("a small red ring").index("▁red")
        rows = torch.stack([encoder.encode([f"a small {colour} ring"])[0][place] for colour in COLOURS])
        alike = cosine_similarity(rows[:, None], rows[None], dim=-1) - torch.eye(len(rows))
        assert alike.max() < 0.6
        assert 0.5 < rows.std() < 2

    def test_order_counts(self, encoder: TextEncoder) -> None:
        """The same words in another order: a token tells where it stood, and is still itself."""
        texts = "a red circle on a blue background", "a blue circle on a red background"
        here, there = (encoder.encode([text])[0][encoder.pieces(text).index("▁red")] for text in texts)
        assert 0.8 < cosine_similarity(here, there, dim=0) < 0.985


class TestMaking:
    """The folder."""

    def test_the_same_captions_give_the_same_bytes(self, folder: Path, captions: list[str], tmp_path: Path) -> None:
        """Whatever their order, how often each comes, and the process's random state, which stays as it is."""
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        assert make_small_encoder([*captions[::-1], captions[0], "", f"  {captions[0]}\n"], tmp_path / "again")
        assert torch.equal(torch.rand(1), expected)
        assert _bytes(tmp_path / "again") == _bytes(folder)
        assert sorted(_bytes(folder)) == ["config.json", "model.safetensors", "recipe.json", "spiece.model"]
        assert make_small_encoder(captions, tmp_path / "seed", seed=1)
        assert _bytes(tmp_path / "seed")["model.safetensors"] != _bytes(folder)["model.safetensors"]

    def test_made_once(self, folder: Path, captions: list[str]) -> None:
        """The same again changes nothing; anything else is refused and leaves the folder as it is."""
        before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        assert not make_small_encoder(captions, folder)
        with pytest.raises(CheckpointError, match="other captions or with other sizes"):
            make_small_encoder(captions, folder, width=32)
        with pytest.raises(CheckpointError, match="other captions or with other sizes"):
            make_small_encoder(captions[1:], folder)
        with pytest.raises(CheckpointError, match="holds something else"):
            make_small_encoder(captions, ROOT / "docs")
        assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before

    def test_whole_or_not_at_all(self, captions: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is left of one that failed; an empty folder is filled; one that lost a file is told of."""
        out = tmp_path / "out"
        out.mkdir()
        with monkeypatch.context() as patched:
            patched.setattr(files, "sync", _no_space)
            with pytest.raises(CheckpointError, match=r"cannot be written to .*out: No space left"):
                make_small_encoder(captions[:9], out)
        assert list(tmp_path.rglob("*")) == [out]
        assert make_small_encoder(captions[:9], out)
        (out / "spiece.model").unlink()
        with pytest.raises(CheckpointError, match=r"lacks spiece\.model"):
            make_small_encoder(captions[:9], out)

    def test_what_a_killed_one_left_is_removed(
        self, captions: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A converted encoder that is cut off takes gigabytes."""
        gone = subprocess.Popen(["true"])
        gone.wait()
        out = tmp_path / "out"
        with monkeypatch.context() as killed:
            killed.setattr(os, "getpid", lambda: gone.pid)
            killed.setattr(files.shutil, "rmtree", lambda *_, **__: None)
            with pytest.raises(KeyboardInterrupt), files.atomic_folder(out, lambda: False):
                raise KeyboardInterrupt
        (left,) = tmp_path.iterdir()
        os.utime(left, (0, 0))
        assert make_small_encoder(captions[:9], out)
        assert list(tmp_path.iterdir()) == [out]

    def test_two_at_once(
        self, folder: Path, captions: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where another process was quicker with the same encoder, its folder stands."""
        save = small._save_model

        def outrun(*arguments: Any) -> None:
            save(*arguments)
            shutil.copytree(folder, tmp_path / "out")

        monkeypatch.setattr(small, "_save_model", outrun)
        assert make_small_encoder(captions, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert _bytes(tmp_path / "out") == _bytes(folder)

    @pytest.mark.parametrize(
        ("given", "sizes", "match"),
        [
            ([], {}, "there are none"),
            (["", "  "], {}, "there are none"),
            (["a ring"], {"width": 30}, "a multiple of the heads"),
            (["a ring"], {"layers": 0}, "at least 1"),
            (["a ring"], {"seed": 2**63}, r"it must be in -2\*\*63"),
            (["a ring"], {"vocabulary": 8}, "no tokenizer of 8 tokens"),
        ],
    )
    def test_what_cannot_be_made(self, given: list[str], sizes: Any, match: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=match):
            make_small_encoder(given, tmp_path / "out", **sizes)
        assert list(tmp_path.iterdir()) == []


def _bytes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def _no_space(path: Path) -> None:
    raise OSError(28, "No space left on device")
