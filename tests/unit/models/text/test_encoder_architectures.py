"""Encoders of other architectures, with random weights, saved to a folder as they are published."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from regen_dist.config.t2v import TextConfig
from regen_dist.errors import CheckpointError
from regen_dist.models.text import TextEncoder, convert_encoder, make_small_encoder
from regen_dist.programs import regen
from tests.helpers.commands import run_here

WORDS = ["a", "red", "blue", "ring", "disk", "moves", "up", "down", "left", "right"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
SIZE = len(SPECIAL) + len(WORDS)
SMALL: dict[str, Any] = {
    "vocab_size": SIZE + 3, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48,
}  # fmt: skip
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _tokenizer(template: bool = True, longest: int | None = None) -> PreTrainedTokenizerFast:
    """Words to ids; with special tokens around them, as most have, or without, as causal models."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        made.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 1), ("</s>", 2)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    more = {} if longest is None else {"model_max_length": longest}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names, **more)


def _byte_tokenizer() -> Any:
    """As Qwen's: pieces of bytes, nothing added, one token for a text's end."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    made.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    content = json.loads(made.to_str())["model"]
    merges = [tuple(pair) for pair in content["merges"]]
    return transformers.Qwen2Tokenizer(vocab=content["vocab"], merges=merges, unk_token=None)


def _clip() -> Any:
    text = transformers.CLIPTextConfig(**SMALL, **IDS, max_position_embeddings=12, projection_dim=16)
    vision = transformers.CLIPVisionConfig(**SMALL | {"vocab_size": None}, image_size=16, patch_size=8)
    return transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)


T5 = {"vocab_size": SIZE + 3, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4} | IDS
CAUSAL = SMALL | IDS | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
QWEN = CAUSAL | {"vocab_size": 320}
ENCODERS: dict[str, Callable[[], Any]] = {
    "t5 with a fast tokenizer": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "umt5": lambda: transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**T5)),
    "umt5 encoder": lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**T5)),
    "clip": lambda: transformers.CLIPModel(_clip()),
    "clip text": lambda: transformers.CLIPTextModel(_clip().text_config),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL, max_position_embeddings=12)),
    "bert of a masked model": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    "roberta": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(**SMALL, pad_token_id=0, max_position_embeddings=13)
    ),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**CAUSAL)),
    "gemma 2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**CAUSAL)),
    "qwen 2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**QWEN)),
    "qwen 3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**QWEN)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**CAUSAL)),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=SIZE + 3, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, **IDS,
        )
    ),
}  # fmt: skip
CAUSAL_KINDS = ("gemma", "gemma 2", "qwen 2", "qwen 3", "llama")
LIMITED = {"clip": 12, "clip text": 12, "bert": 12, "roberta": 12}


def _saved(kind: str, folder: Path) -> Any:
    """The model that was saved, with a tokenizer beside it."""
    torch.manual_seed(0)
    model = ENCODERS[kind]().eval()
    model.save_pretrained(folder)
    tokenizer = _byte_tokenizer() if kind.startswith("qwen") else _tokenizer(template=kind not in CAUSAL_KINDS)
    tokenizer.save_pretrained(folder)
    return model


def _load(folder: Path | str, max_tokens: int = 256) -> TextEncoder:
    return TextEncoder.load(TextConfig(encoder=str(folder), max_tokens=max_tokens))


def _expected(model: Any, ids: list[int]) -> torch.Tensor:
    """The last hidden state of the model's text part, by hand."""
    part = model
    if model.config.is_encoder_decoder:
        part = model.get_encoder()
    elif hasattr(model, "text_model") and hasattr(model, "vision_model"):
        part = model.text_model
    elif model.base_model is not model and not hasattr(model, "text_model"):
        part = model.base_model
    with torch.no_grad():
        found: torch.Tensor = part(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return found


@pytest.mark.parametrize("kind", ENCODERS)
def test_captions_become_the_last_hidden_states(kind: str, tmp_path: Path) -> None:
    model, encoder = _saved(kind, tmp_path), _load(tmp_path)
    ids = encoder.tokens("a red ring")
    if kind.startswith("qwen"):
        assert "".join(encoder.pieces("a red ring")) == "aĠredĠring"
    else:
        words = ["a", "red", "ring"]
        assert encoder.pieces("a red ring") == (words if kind in CAUSAL_KINDS else ["<s>", *words, "</s>"])
    (embedded,) = encoder.encode(["a red ring"])
    assert embedded.shape == (len(ids), 32)
    torch.testing.assert_close(embedded, _expected(model, ids), atol=1e-5, rtol=1e-5)
    assert encoder.facts() == {
        "encoder": str(tmp_path), "fingerprint": encoder.fingerprint, "width": 32, "max_tokens": 256,
    }  # fmt: skip
    together = encoder.encode(["a blue disk moves up", "a red ring", ""])
    assert torch.equal(together[1], embedded)
    assert not torch.equal(together[0][-1], embedded[-1])
    null = encoder.null()
    assert len(null) == (1 if kind in CAUSAL_KINDS else 2)
    assert bool(null.isfinite().all())


@pytest.mark.parametrize("kind", ENCODERS)
def test_long_captions_are_cut_where_the_encoder_ends(kind: str, tmp_path: Path) -> None:
    _saved(kind, tmp_path)
    caption = " ".join(["ring"] * 40)
    encoder = _load(tmp_path, max_tokens=30)
    most = LIMITED.get(kind, 30)
    assert len(encoder.tokens(caption)) == most
    assert encoder.encode([caption])[0].shape == (most, 32)
    assert encoder.cuts(caption)
    assert not encoder.cuts("a red ring")
    if kind not in CAUSAL_KINDS:
        assert encoder.tokens(caption)[-1] == 2, "the end of the text stays"


def test_the_tokenizers_own_limit_and_special_names(tmp_path: Path) -> None:
    _saved("bert of a masked model", tmp_path)
    _tokenizer(longest=6).save_pretrained(tmp_path)
    encoder = _load(tmp_path)
    assert len(encoder.tokens("red ring " * 9)) == 6
    assert encoder.tokens("red </s> ring").count(2) == 1, "a caption cannot end itself early"


def test_every_file_of_the_tokenizer_counts_for_the_fingerprint(tmp_path: Path) -> None:
    _saved("bert", tmp_path)
    found = [_load(tmp_path).fingerprint]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = tmp_path / name
        path.write_text(path.read_text() + "\n")
        found.append(_load(tmp_path).fingerprint)
    assert len(set(found)) == 3


def test_weights_of_the_text_part_must_be_there(tmp_path: Path) -> None:
    _saved("bert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"tensors are missing, among them encoder\.layer\.2"):
        _load(tmp_path)


def test_code_of_an_encoders_folder_is_not_run(tmp_path: Path) -> None:
    """`auto_map` names a module of the folder: refused."""
    _saved("bert", tmp_path)
    mark = tmp_path / "was here"
    (tmp_path / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModel": "own.Own"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        _load(tmp_path)
    assert not mark.exists()


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickled files are converted in this process instead of one of their own."""
    monkeypatch.setattr(subprocess, "run", run_here)


def _pickle_weights(folder: Path, shards: int = 1, legacy: bool = False) -> None:
    """As older models are published: pytorch_model.bin, or several with an index; tied weights share memory."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if "shared.weight" in weights:
        weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        return
    files = {name: f"pytorch_model-0000{i % shards + 1}-of-0000{shards}.bin" for i, name in enumerate(sorted(weights))}
    for file in set(files.values()):
        torch.save({name: weights[name] for name in weights if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    ("kind", "shards", "legacy"),
    [
        ("t5", 1, False),
        ("t5", 1, True),
        ("t5", 2, False),
        *((kind, 1, False) for kind in ("umt5", "clip", "bart", "qwen 2")),
    ],
)
def test_pickled_weights_are_converted(kind: str, shards: int, legacy: bool, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "runs" / "out"
    if kind == "t5":
        make_small_encoder(["a red ring", "a blue disk"], source, vocabulary=64, width=32)
        whole = transformers.T5ForConditionalGeneration(transformers.T5Config.from_pretrained(source))
        whole.save_pretrained(source)
    else:
        _saved(kind, source)
    expected = _load(source).encode(["a red ring", ""])
    _pickle_weights(source, shards, legacy)
    with pytest.raises(CheckpointError, match="regen text convert"):
        _load(source)
    assert convert_encoder(str(source), out)
    for one, other in zip(_load(out).encode(["a red ring", ""]), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)  # other places in memory round otherwise
    names = {name for path in out.glob("*.safetensors") for name in load_file(path)}
    assert (
        not [name for name in names if name.startswith(("decoder.", "lm_head.", "model.decoder."))] or kind == "qwen 2"
    )
    assert not convert_encoder(str(source), out), "complete already"
    with pytest.raises(CheckpointError, match="something else"):
        convert_encoder(str(source), out, "bfloat16")


@pytest.mark.usefixtures("quickly")
def test_weights_may_be_halved(tmp_path: Path) -> None:
    _saved("bert", tmp_path / "source")
    _pickle_weights(tmp_path / "source")
    assert convert_encoder(str(tmp_path / "source"), tmp_path / "out", "bfloat16")
    dtypes = {
        each.dtype for each in load_file(tmp_path / "out" / "model.safetensors").values() if each.is_floating_point()
    }
    assert dtypes == {torch.bfloat16}
    assert _load(tmp_path / "out").encode(["a red ring"])[0].dtype == torch.float32


class _Evil:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("by_torch", [True, False])
def test_a_pickle_that_runs_something_is_refused_and_nothing_is_left(by_torch: bool, tmp_path: Path) -> None:
    _saved("bert", tmp_path / "source")
    _pickle_weights(tmp_path / "source")
    content = {"weight": torch.ones(2), "evil": _Evil(str(tmp_path / "was here"))}
    path = tmp_path / "source" / "pytorch_model.bin"
    if by_torch:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not converted: .*Only tensors are taken"):
        convert_encoder(str(tmp_path / "source"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    ("content", "match"), [([1, 2], "not tensors by name"), ({"a": 1}, "a is no tensor"), (None, "is not converted")]
)
def test_what_is_no_weight_is_told(content: object, match: str, tmp_path: Path) -> None:
    _saved("bert", tmp_path / "source")
    _pickle_weights(tmp_path / "source")
    path = tmp_path / "source" / "pytorch_model.bin"
    if content is None:
        path.write_bytes(path.read_bytes()[:500])
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=match):
        convert_encoder(str(tmp_path / "source"), tmp_path / "out")


def test_nothing_is_unpickled_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _saved("bert", tmp_path / "source")
    _pickle_weights(tmp_path / "source")

    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("torch.load in this process")

    monkeypatch.setattr(torch, "load", refuse)
    assert convert_encoder(str(tmp_path / "source"), tmp_path / "out")


def test_safetensors_need_no_conversion(tmp_path: Path) -> None:
    _saved("bert", tmp_path / "source")
    with pytest.raises(CheckpointError, match="use it as it is"):
        convert_encoder(str(tmp_path / "source"), tmp_path / "out")


@pytest.mark.usefixtures("quickly")
def test_the_command(tmp_path: Path) -> None:
    _saved("umt5", tmp_path / "source")
    _pickle_weights(tmp_path / "source")
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    for said in ("the encoder with safetensors", "complete already"):
        assert said in run_here(regen("text", "convert", source, "--out", out)).stdout
    assert "embedding: 5 tokens x 32" in run_here(regen("text", "show", out, "a red ring")).stdout
