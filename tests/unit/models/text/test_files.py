"""The files of an encoder: what is read, what is fetched, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from regen_dist.config.t2v import TextConfig
from regen_dist.errors import BackendError, CheckpointError
from regen_dist.models.text import TextEncoder, make_small_encoder


def _load(name: Path | str) -> TextEncoder:
    return TextEncoder.load(TextConfig(encoder=str(name)))


def _without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def _with_config(**changes: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | changes)
    )


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _sharded(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    files = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(sorted(weights))}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


class TestFolder:
    """A local folder."""

    def test_a_whole_t5(self, copy: Path) -> None:
        """Encoder and decoder, as they are published: the encoder alone is taken, and gives what it gives there."""
        from transformers import T5Config, T5ForConditionalGeneration

        torch.manual_seed(0)
        whole = T5ForConditionalGeneration(T5Config.from_pretrained(copy)).eval()
        whole.save_pretrained(copy)
        encoder = _load(copy)
        ids = torch.tensor([encoder.tokens("a red ring")])
        with torch.no_grad():
            expected = whole.get_encoder()(ids).last_hidden_state[0]
        assert torch.equal(encoder.encode(["a red ring"])[0], expected)
        assert sum(each.numel() for each in encoder._model.parameters()) < sum(x.numel() for x in whole.parameters())

    def test_weights_in_several_files(self, encoder: TextEncoder, copy: Path) -> None:
        """As large encoders have them; each counts for the fingerprint, and none may be missing."""
        _sharded(copy)
        assert torch.equal(_load(copy).encode(["a red ring"])[0], encoder.encode(["a red ring"])[0])
        _without("model-00002-of-00002.safetensors")(copy)
        with pytest.raises(CheckpointError, match="1 of 2 files of weights are missing"):
            _load(copy)
        (copy / "model.safetensors.index.json").write_text("[]")
        with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
            _load(copy)

    @pytest.mark.parametrize(
        ("harm", "match"),
        [
            (_without("config.json"), r"has no config\.json"),
            (_without("spiece.model"), r"has no spiece\.model"),
            (_without("model.safetensors"), r"has no model\.safetensors"),
            (_pickled, r"pickled weights \(pytorch_model.bin\) are not read"),
            (_cut("model.safetensors"), "cannot be loaded"),
            (_cut("config.json"), "cannot be loaded"),
            (_cut("spiece.model"), "is no sentencepiece model"),
            (_with_config(d_ff=32), "cannot be loaded"),
            (_with_config(num_layers=3), "tensors are missing, among them encoder.block.2"),
        ],
    )
    def test_damage(self, harm: Callable[[Path], object], match: str, copy: Path) -> None:
        harm(copy)
        with pytest.raises(CheckpointError, match=match):
            _load(copy)

    def test_a_tokenizer_of_another_encoder(self, copy: Path, captions: list[str], tmp_path: Path) -> None:
        """One with more tokens than the T5 has rows for."""
        few = tmp_path / "few"
        assert make_small_encoder(captions, few, vocabulary=100, layers=1)
        shutil.copy(copy / "spiece.model", few)
        with pytest.raises(CheckpointError, match="do not belong together"):
            _load(few)

    @pytest.mark.parametrize("package", ["transformers", "sentencepiece"])
    def test_a_package_that_is_not_installed(
        self, package: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        for use in (lambda: _load(folder), lambda: make_small_encoder(["a red ring"], tmp_path / "out")):
            with pytest.raises(BackendError, match=rf"needs {package}, .* run: pip install 'regen-dist\[text\]'"):
                use()

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        """A path is never looked for on the hub."""
        with pytest.raises(CheckpointError, match=r"there is no such folder; .*regen text make"):
            _load(tmp_path / "absent")


class TestHub:
    """A name on the Hugging Face hub; the hub itself is stood in for."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch, copy: Path) -> list[tuple[str, list[str]]]:
        asked: list[tuple[str, list[str]]] = []

        def fetch(name: str, allow_patterns: list[str]) -> str:
            asked.append((name, allow_patterns))
            if name.startswith("absent"):
                raise ConnectionError("no route to host\nand more")
            return str(copy)

        monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
        return asked

    def test_what_is_fetched(self, asked: list[tuple[str, list[str]]], encoder: TextEncoder) -> None:
        """The files of the encoder, nothing pickled; its fingerprint is that of the same files in a folder."""
        fetched = _load("google/small")
        assert fetched.facts() == {**encoder.facts(), "encoder": "google/small"}
        ((name, patterns),) = asked
        assert name == "google/small"
        assert not [pattern for pattern in patterns if "bin" in pattern or "pt" in pattern]

    def test_the_hub_cannot_be_reached(self, asked: list[tuple[str, list[str]]]) -> None:
        with pytest.raises(CheckpointError, match=r"\(no route to host\)\. Run `hf download absent/small`"):
            _load("absent/small")
        assert len(asked) == 1

    def test_pickled_weights_alone(self, asked: list[tuple[str, list[str]]], copy: Path) -> None:
        """Say how they are converted."""
        (copy / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"regen text convert google/small --out"):
            _load("google/small")
