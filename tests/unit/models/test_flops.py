"""Counts on the meta device against formulas, and against a real forward pass."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from regen_dist.config import EmbedderConfig, load_embedder_config
from regen_dist.config.embedder import AttentionConfig
from regen_dist.config.run import EngineConfig
from regen_dist.config.t2v import T2VModelConfig
from regen_dist.models import flops
from regen_dist.models.embedder import build_model
from regen_dist.models.flops import FlopReport, count_flops, count_pass, count_row_flops, training_flops_per_row
from regen_dist.models.memory import memory_bytes
from tests.helpers.tiny import NANO_AT_8, tiny_t2v_model

count_once = cache(count_flops)  # the meta device is slow, and several tests compare with the same model


@pytest.fixture(scope="module")
def nano(root: Path) -> EmbedderConfig:
    return load_embedder_config(root / "configs/embedder/nano.yaml", [*NANO_AT_8, "model.decoder.blocks=2"])


def _decoder_flops(config: EmbedderConfig, tokens: int, seen: int) -> int:
    """The transformer's matrix products, by hand: `tokens` of them, each of which sees `seen`."""
    decoder = config.model.decoder
    width = decoder.width
    per_token = 2 * width * (3 + 1) * width + 2 * 2 * width * int(width * decoder.mlp_ratio) + 2 * 2 * width * seen
    per_token += 2 * 9 * width  # the local convolution
    pixels = 2 * 2 * tokens * width * 3 * 64  # embedding and head
    modulation = 2 * (256 * width + width * width + (6 + 2 + 1) * width * width)  # blocks, head, noise gate
    return decoder.blocks * tokens * per_token + pixels + modulation


def test_decoder_flops_equal_the_formula(nano: EmbedderConfig) -> None:
    tokens = 9 * 8 * 8
    assert count_once(nano.model, (64, 64)).forward_flops["decoder"] == _decoder_flops(nano, tokens, tokens)


def test_windows_make_attention_linear(nano: EmbedderConfig) -> None:
    decoder = nano.model.decoder.model_copy(update={"attention": AttentionConfig(pattern="window", window=(9, 4, 4))})
    model = nano.model.model_copy(update={"decoder": decoder})
    small, large = (count_flops(model, size).forward_flops["decoder"] for size in ((64, 64), (64, 128)))
    full = count_once(nano.model, (64, 64)).forward_flops["decoder"]
    assert small < full
    assert large / small == pytest.approx(2.0, rel=0.02)


def test_parameters_are_those_of_the_real_model(nano: EmbedderConfig) -> None:
    real = build_model(nano.model)
    assert count_once(nano.model, (64, 64)).num_parameters == sum(each.numel() for each in real.parameters())


def _kept_bytes(model: nn.Module, *inputs: torch.Tensor) -> int:
    """Bytes that autograd keeps in a real forward pass, weights apart."""
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(*inputs)
    assert output is not None
    return sum(kept.values())


def test_activations_are_what_autograd_keeps_in_a_real_forward_pass(nano: EmbedderConfig) -> None:
    clip = torch.rand(1, 3, 9, 64, 64)
    counted = count_flops(nano.model, (64, 64), precision="fp32").activation_bytes
    assert counted == pytest.approx(_kept_bytes(build_model(nano.model), clip, clip, torch.ones(1)), rel=0.01)


def test_frames_that_are_not_decoded_are_not_counted(nano: EmbedderConfig, root: Path) -> None:
    """`diffusion.train_frames`: the transformer sees fewer tokens and keeps less; the baseline decodes all frames."""
    counted = count_flops(nano.model, (64, 64), decoded=2, precision="fp32")
    assert counted.forward_flops["decoder"] == _decoder_flops(nano, 2 * 8 * 8, 2 * 8 * 8)
    clip, times = torch.rand(1, 3, 9, 64, 64), torch.tensor([[1.0, 5.0]])
    kept = _kept_bytes(build_model(nano.model), clip, clip[:, :, :2].clone(), torch.ones(1), None, times)
    assert counted.activation_bytes == pytest.approx(kept, rel=0.01)
    assert count_flops(nano.model, (64, 64), num_frames=1, decoded=2) == count_flops(nano.model, (64, 64), num_frames=1)
    baseline = load_embedder_config(root / "configs/embedder/nano_magvit2.yaml", NANO_AT_8).model
    assert count_flops(baseline, (64, 64), decoded=2) == count_flops(baseline, (64, 64))


def test_weights_of_attention_are_counted_where_the_backend_keeps_them() -> None:
    config = tiny_t2v_model(width=64, attention__backend="eager")
    inputs = torch.rand(1, 8, 8, 8, 12), torch.ones(1), torch.rand(1, 7, 12), torch.ones(1, 7, dtype=torch.bool)
    counted = count_row_flops(config, *ROW, precision="fp32").activation_bytes
    assert counted == pytest.approx(_kept_bytes(build_model(config), *inputs), rel=0.02)
    fused = count_row_flops(
        tiny_t2v_model(width=64, attention__backend="sdpa"), *ROW, precision="fp32"
    ).activation_bytes
    assert counted > fused + config.blocks * config.heads * 192 * 192 * 4


def test_checkpointing_trades_memory_for_operations(root: Path) -> None:
    """With four blocks: one of them is kept while it is recomputed."""
    model = load_embedder_config(root / "configs/embedder/nano.yaml", NANO_AT_8).model
    plain, checkpointed = (count_flops(model, (64, 64), activation_checkpointing=on) for on in (False, True))
    assert plain.num_training_flops == 3 * plain.num_forward_flops
    assert 3 * plain.num_forward_flops < checkpointed.num_training_flops <= 4 * plain.num_forward_flops
    assert checkpointed.activation_bytes < 0.7 * plain.activation_bytes


def test_both_kinds_keep_the_same_latents(nano: EmbedderConfig, root: Path) -> None:
    baseline = count_flops(load_embedder_config(root / "configs/embedder/nano_magvit2.yaml", NANO_AT_8).model, (64, 64))
    embedder = count_once(nano.model, (64, 64))
    assert baseline.latent_shape == embedder.latent_shape == (8, 8, 8)
    assert baseline.bits_per_pixel == embedder.bits_per_pixel == pytest.approx(16 * 2 * 8 / (9 * 64))
    assert baseline.compression == embedder.compression == pytest.approx(12 * 9)


def test_every_attention_backend_counts_alike(nano: EmbedderConfig) -> None:
    decoder = nano.model.decoder.model_copy(update={"attention": AttentionConfig(backend="flash")})
    flash = count_flops(nano.model.model_copy(update={"decoder": decoder}), (64, 64))
    assert flash == count_once(nano.model, (64, 64))


COUNTED = FlopReport({"encoder": 600, "decoder": 1000}, {"decoder": 1}, 0, 7, (600, 1000))
BUCKET = 5 * 10**8  # elements, DeepSpeed's own


def test_zero3_shards_the_states_and_not_the_rest() -> None:
    one = memory_bytes(COUNTED, EngineConfig(), world_size=1, clips_per_gpu=3)
    eight = memory_bytes(COUNTED, EngineConfig(), world_size=8, clips_per_gpu=3)
    assert sum(one.values()) == 1600 * (2 + 4 + 4 + 8 + 4 + 4) + 2 * (BUCKET + 1600) + 3 * 7
    assert sum(eight.values()) == 200 * (2 + 4 + 4 + 8 + 4 + 4) + 2 * 1600 + 2 * (BUCKET + 1600) + 3 * 7


def test_one_process_training_keeps_fp32_weights_and_no_second_copy() -> None:
    alone = EngineConfig(kind="plain", precision="fp32")
    terms = memory_bytes(COUNTED, alone, world_size=1, clips_per_gpu=1, accumulation=2)
    assert sum(terms.values()) == 1600 * (4 + 4 + 8 + 4) + 7
    assert not any("sharded" in name for name in terms)


def test_one_process_in_bf16_keeps_masters_and_gradients_in_both() -> None:
    alone = EngineConfig(kind="plain", precision="bf16")
    terms = memory_bytes(COUNTED, alone, world_size=1, clips_per_gpu=1, accumulation=2)
    assert sum(terms.values()) == 1600 * (2 + 4 + (2 + 4) + 8 + 4) + 7


@pytest.mark.parametrize(
    ("engine", "accumulation", "both"),
    [
        (EngineConfig(kind="plain", precision="fp32"), 1, False),
        (EngineConfig(kind="plain", precision="fp32"), 2, True),
        (EngineConfig(kind="plain", precision="fp32", activation_checkpointing=True), 1, True),
        (EngineConfig(kind="zero3", precision="fp32"), 1, True),
    ],
)
def test_gradients_take_the_place_of_activations_where_these_are_gone(
    engine: EngineConfig, accumulation: int, both: bool
) -> None:
    """A thousand samples keep more than all gradients take."""
    terms = memory_bytes(COUNTED, engine, world_size=1, clips_per_gpu=1000, accumulation=accumulation)
    assert ("gradients (fp32)" in terms) == both
    assert terms["activations of 1000 samples"] == 7000


ROW = (8, (8, 12), 7)  # latent frames, cells, text tokens: 8 * 4 * 6 = 192 tokens


def _wide() -> T2VModelConfig:
    return tiny_t2v_model(width=64, blocks=5, attention__backend="sdpa")


def test_operations_of_a_row_equal_the_formula() -> None:
    config, tokens, text = _wide(), 192, 7
    width, hidden, values = config.width, 2 * config.width, 4 * config.latent_channels
    products = tokens * (4 + 2) * width**2 + text * 2 * width**2 + 2 * tokens * width * hidden  # projections, network
    attention = 2 * tokens * (tokens + text) * width
    caption = text * (config.text_width * width + width**2)
    modulation = 256 * width + width**2 + (6 + 2) * width**2
    multiplications = config.blocks * (products + attention) + caption + modulation + 2 * tokens * values * width
    multiplications += tokens * 16 * width  # where in its frame a token lies
    counted = count_row_flops(config, *ROW)
    assert counted.num_forward_flops == 2 * multiplications
    assert counted.num_tokens == tokens
    assert training_flops_per_row(config, *ROW) == 3 * 2 * multiplications
    given = count_row_flops(config, *ROW, given_frames=True)  # eight frames with a time of their own, not one
    assert given.num_forward_flops == 2 * (multiplications + 7 * modulation)
    assert training_flops_per_row(config, *ROW, given_frames=True) == given.num_training_flops


def test_a_new_caption_length_needs_no_new_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly the count of each length, from two counts on the meta device for all of them."""
    config, size = _wide().model_copy(update={"width": 48}), (8, (8, 12))
    counts: list[int] = []
    count = flops.count_pass
    monkeypatch.setattr(flops, "count_pass", lambda *args: (counts.append(1), count(*args))[1])
    found = {tokens: training_flops_per_row(config, *size, tokens) for tokens in (1, 2, 7, 64, 300, 512)}
    assert len(counts) == 2
    assert found == {tokens: count_row_flops(config, *size, tokens).num_training_flops for tokens in found}


@pytest.mark.parametrize("given", [False, True])
def test_activations_of_a_row_are_what_autograd_keeps(given: bool) -> None:
    """Also of rows with given frames, where every latent frame has a time of its own."""
    times = torch.ones(1, 8) if given else torch.ones(1)
    inputs = torch.rand(1, 8, 8, 8, 12), times, torch.rand(1, 7, 12), torch.ones(1, 7, dtype=torch.bool)
    counted = count_row_flops(_wide(), *ROW, precision="fp32", given_frames=given).activation_bytes
    assert counted == pytest.approx(_kept_bytes(build_model(_wide()), *inputs), rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_given_frames_take_next_to_no_memory(checkpointing: bool) -> None:
    """The modulation of a frame is not spread over its tokens."""
    plain, given = (
        count_row_flops(_wide(), *ROW, activation_checkpointing=checkpointing, given_frames=on).activation_bytes
        for on in (False, True)
    )
    assert plain < given < 1.02 * plain


@pytest.mark.parametrize("checkpointing", [False, True])
def test_counting_two_blocks_is_counting_all(checkpointing: bool) -> None:
    """The shortcut of `account_row` against the pass of the whole model."""
    config = _wide()
    with torch.device("meta"):
        model = build_model(config).bfloat16()
    x, t, text = (torch.ones(shape, device="meta") for shape in ((1, 8, 8, 8, 12), (1,), (1, 7, 12)))
    whole = count_pass(model, lambda: model(x, t, text, text[..., 0].bool()), checkpointing)
    counted = count_row_flops(config, *ROW, activation_checkpointing=checkpointing)
    assert (counted.forward_flops, counted.recomputed_flops) == (whole.forward_flops, whole.recomputed_flops)
    assert counted.activation_bytes == whole.activation_bytes
    assert counted.num_parameters == sum(each.numel() for each in model.parameters())
    assert sum(counted.parameter_sizes) == counted.num_parameters


def test_checkpointing_recomputes_the_blocks_of_a_row() -> None:
    plain, checkpointed = (count_row_flops(_wide(), *ROW, activation_checkpointing=on) for on in (False, True))
    assert checkpointed.recomputed_flops == plain.forward_flops["blocks"]
    assert checkpointed.activation_bytes < 0.5 * plain.activation_bytes
    terms = memory_bytes(checkpointed, EngineConfig(), world_size=8, clips_per_gpu=2)
    assert terms["activations of 2 rows"] == 2 * checkpointed.activation_bytes
