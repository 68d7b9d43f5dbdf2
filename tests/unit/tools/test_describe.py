"""`regen describe`: every config of the repository, and the pages that quote it."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from regen_dist.config import EmbedderConfig, T2VConfig, load_config
from regen_dist.config.identity import num_readers
from regen_dist.errors import ConfigError
from regen_dist.models.flops import FlopReport, count_flops, count_row_flops
from regen_dist.models.memory import Assumptions, exchanged_bytes, host_bytes
from tests.helpers.tiny import NANO_AT_8
from tools.cli import app
from tools.describe import describe, gather
from tools.describe.facts import EXCHANGED, with_clips_per_gpu
from tools.describe.video import DescribedVideo, latent_frames

ROOT = Path(__file__).parents[3]
NOT_RUNS = ("base", "cluster", "evaluate", "pipelines", "preencode")  # fragments, machines, protocols, steps, caches
LEFT_OUT = ("compression_clips.yaml", "frozen_tiny.yaml")  # a list of test clips; needs a trained autoencoder
CONFIGS = sorted(
    path
    for path in (ROOT / "configs").glob("*/*.yaml")
    if path.parent.name not in NOT_RUNS and path.name not in LEFT_OUT
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_can_be_described(path: Path) -> None:
    config = load_config(path)
    facts = gather(config, world_size=1 if config.engine.kind == "plain" else 2)
    _check_clip(config, facts) if isinstance(config, EmbedderConfig) else _check_row(config, facts)
    unit = facts["unit"]
    assert facts["parameters"]["total"] == sum(facts["parameters"].values()) / 2
    assert facts[f"training_flops_per_{unit}"] >= 3 * facts[f"forward_flops_per_{unit}"]["total"] > 0
    assert all(size > 0 for size in facts["memory_bytes_per_gpu"].values())
    assert facts["training_flops_per_step"] == facts[f"training_flops_per_{unit}"] * config.train.batch_global


def test_frames_that_the_decoder_is_not_trained_on_take_no_memory_and_no_time() -> None:
    whole, some = (
        gather(load_config(ROOT / "configs/embedder/nano.yaml", [*NANO_AT_8, f"diffusion.train_frames={frames}"]), 2)
        for frames in ("null", "3")
    )
    assert some["tokens_per_clip"] * 3 == whole["tokens_per_clip"]
    assert sum(some["memory_bytes_per_gpu"].values()) < sum(whole["memory_bytes_per_gpu"].values())
    assert some["cost"]["computation_s"] < 0.8 * whole["cost"]["computation_s"]


def test_tokens_of_a_decoder_on_larger_cells_are_those_of_eight_pixels() -> None:
    own = ["model.temporal_compression=8", "model.linear_start=dct", "data.size=[64, 64]", "data.buckets=[]"]
    frozen = [f"model.encoder={{kind: diffusers, path: absent, cell: {cell}, stride: 4}}" for cell in (8, 16)]
    configs = [load_config(ROOT / "configs/embedder/nano.yaml", [*own, each]) for each in frozen]
    assert [gather(config, 2)["tokens_per_clip"] for config in configs] == [9 * 8 * 8] * 2


def _check_clip(config: EmbedderConfig, facts: dict[str, Any]) -> None:
    channels, frames, height, width = facts["input_shape"]
    assert (channels, frames) == (3, config.model.temporal_compression + 1)
    assert (facts["latent_frames"], facts["latent_shape"]) == (
        2,
        [config.model.latent.channels, height // 8, width // 8],
    )


def _check_row(config: T2VConfig, facts: dict[str, Any]) -> None:
    clips = max(config.data.clips)
    assert facts["video"] == {"frames": 33 * clips, "size": [192, 320]}
    assert (facts["clips"], facts["latent_frames"]) == (clips, 2 * clips)
    assert facts["latent_shape"] == [config.model.latent_channels, 24, 40]
    assert facts["tokens_per_row"] == 2 * clips * 12 * 20


def test_the_full_size_embedder_at_k_32(capsys: pytest.CaptureFixture[str]) -> None:
    describe(ROOT / "configs/embedder/regen_k32.yaml", world_size=[64])
    text = " ".join(capsys.readouterr().out.split())
    assert "33 frames of 3 x 192 x 320" in text
    assert "2 latent frames of 8 channels, 24 x 40" in text
    assert "24 blocks x width 2048 x 16 heads" in text
    assert "Memory per GPU while training on 64" in text
    assert "A step on 64" in text
    assert "A run on 64" in text


def test_json_holds_what_the_tables_say(capsys: pytest.CaptureFixture[str]) -> None:
    describe(ROOT / "configs/embedder/nano.yaml", [*NANO_AT_8, "data.size=[64,128]"], world_size=[2], as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["input_shape"] == [3, 9, 64, 128]
    assert facts["world_size"] * facts["clips_per_gpu"] == 8
    on_wires = sum(facts["sent_bytes_per_gpu_and_step"].values()) / 450e9
    assert facts["cost"]["latency_s"] == facts["cost"]["collectives"] * 3.4e-6 > 0
    assert facts["cost"]["communication_s"] == pytest.approx(on_wires + facts["cost"]["latency_s"])
    assert math.isclose(facts["compression"], 12 * 9)


def test_latents_in_context_are_tokens_of_the_decoder() -> None:
    """Two latent frames of 4 x 4 cells beside the clip's 9; the other variants leave the tokens as they are."""
    path, expected = ROOT / "configs/embedder/nano.yaml", {"kind=in_context": 11 * 16, "time=learned": 9 * 16}
    for variant, tokens in expected.items():
        facts = gather(load_config(path, [*NANO_AT_8, f"model.conditioning.{variant}"]), 2)
        assert facts["tokens_per_clip"] == tokens


def test_parts_that_are_not_built_are_not_described() -> None:
    facts = gather(load_config(ROOT / "configs/embedder/nano.yaml", [*NANO_AT_8, "model.decoder.linear=false"]), 2)
    assert {*facts["parameters"], *facts["forward_flops_per_clip"]} == {"encoder", "conditioning", "decoder", "total"}


def test_a_world_size_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a multiple of 3 ranks"):
        gather(load_config(ROOT / "configs/embedder/nano.yaml"), world_size=3)


def test_several_world_sizes_are_an_object_by_world_size(capsys: pytest.CaptureFixture[str]) -> None:
    """Each with the facts that it has alone."""
    options = {"clips_per_gpu": 1, "mfu": 0.5, "peak_tflops": 100.0, "as_json": True}
    describe(ROOT / "configs/embedder/nano.yaml", world_size=[1, 2, 8], **options)
    several = json.loads(capsys.readouterr().out)["by_world_size"]
    assert {size: facts["accumulation"] for size, facts in several.items()} == {"1": 8, "2": 4, "8": 1}
    describe(ROOT / "configs/embedder/nano.yaml", ["train.accumulation=4"], world_size=[2], **options)
    assert json.loads(capsys.readouterr().out) == several["2"]


def test_a_step_takes_the_time_of_its_operations_at_the_mfu() -> None:
    """What activation checkpointing computes again is not counted."""
    config = load_config(ROOT / "configs/embedder/regen_k8.yaml")
    facts = gather(config, 64, Assumptions(mfu=0.25, peak_tflops=1000))
    operations = 3 * facts["forward_flops_per_clip"]["total"] * config.train.batch_global
    assert facts["cost"]["step_s"] == pytest.approx(operations / (64 * 250e12))
    assert facts["training_flops_per_step"] > operations


def test_many_small_gathers_cost_latency_at_512_gpus() -> None:
    """Of the 5B: hundreds of gathers, each around a ring of 512. A larger prefetch bucket makes fewer of them."""
    path = ROOT / "configs/t2v/5b.yaml"
    small, large = (
        gather(load_config(path, ["train.accumulation=1", f"engine.zero.prefetch_bucket={size}"]), 512)["cost"]
        for size in (10_000_000, 500_000_000)
    )
    assert small["collectives"] > 4 * large["collectives"] > 0
    assert small["latency_s"] / small["collectives"] == pytest.approx((448 * 3.4 + 63 * 9.6) / 1e6)


def test_the_utilisation_that_is_assumed_is_one_that_runs_reach() -> None:
    assert Assumptions().mfu == 0.28
    assert "[default: 0.28;" in " ".join(CliRunner().invoke(app, ["describe", "--help"]).output.split())


def test_the_copy_for_checkpoints_is_counted_as_host_memory() -> None:
    """Masters, EMA and two moments in fp32, each rank its share."""
    config = load_config(ROOT / "configs/embedder/regen_k8.yaml")
    facts = gather(config, 64)
    exact = 16 * -(-facts["parameters"]["total"] // 64)
    assert exact < facts["host_memory_bytes_per_rank"] < 2 * exact, "torch rounds each piece up to a power of two"
    assert host_bytes([1 << 20, 64 * 3], config.engine, world_size=64) == 16 * ((1 << 14) + 4)


def test_clips_per_gpu_that_do_not_divide_the_batch_are_refused() -> None:
    config = load_config(ROOT / "configs/embedder/nano.yaml")
    with pytest.raises(ConfigError, match=r"batch_global 8 is not a multiple of 6 clips .* train.batch_global=12"):
        with_clips_per_gpu(config, 3, 2)


def test_the_full_size_text_to_video_model(capsys: pytest.CaptureFixture[str]) -> None:
    describe(ROOT / "configs/t2v/5b.yaml", world_size=[64])
    text = " ".join(capsys.readouterr().out.split())
    assert "8 latent frames of 8 channels, 24 x 40" in text
    assert "32 blocks x width 3072 x 24 heads" in text
    assert "rows at once on each GPU" in text
    assert "every step on full rows" in text
    assert 4.8e9 < gather(load_config(ROOT / "configs/t2v/5b.yaml"), 64)["parameters"]["total"] < 5.2e9


def test_a_video_costs_less_at_higher_compression(capsys: pytest.CaptureFixture[str]) -> None:
    """`--size` and `--frames` in the JSON: 100 frames are 20, 12, 6 and 4 clips, whatever the row of the config is."""
    options = {"size": "64x96", "frames": 100, "text_tokens": 20, "world_size": [2], "as_json": True}
    describe(ROOT / "configs/t2v/nano.yaml", **options)
    facts = json.loads(capsys.readouterr().out)
    assert facts["video"] == {"frames": 100, "size": [64, 96]}
    assert (facts["latent_frames"], facts["text_tokens"]) == (8, 20)
    rows = {(row["embedder"], row["temporal_compression"]): row for row in facts["by_embedder"]}
    assert {key: row["latent_frames"] for key, row in rows.items()} == {
        ("conventional", 4): 25, ("regen", 4): 40, ("regen", 8): 24, ("regen", 16): 12, ("regen", 32): 8,
    }  # fmt: skip
    assert all(row["tokens"] == row["latent_frames"] * 4 * 6 for row in rows.values())
    assert rows["regen", 32]["forward_flops"] == facts["forward_flops_per_row"]["total"]
    assert rows["conventional", 4]["flops_ratio"] == 1
    assert rows["regen", 32]["flops_ratio"] > 25 / 8 > 1 > rows["regen", 4]["flops_ratio"]


def test_an_image_is_a_row_of_one_latent_frame() -> None:
    facts = gather(load_config(ROOT / "configs/t2v/nano.yaml"), 2, video=DescribedVideo((32, 32), frames=1))
    assert (facts["clips"], facts["latent_frames"], facts["tokens_per_row"]) == (1, 1, 4)
    config = load_config(ROOT / "configs/t2v/nano.yaml", ["data.image_fraction=1", "data.clips=[4]"])
    facts = gather(config, 2, video=DescribedVideo((32, 32)))
    assert (facts["video"]["frames"], facts["latent_frames"]) == (1, 1), "trained on images alone"


@pytest.mark.parametrize("size", ["192", "192x", "192x328", "0x16", "192X320"])
def test_a_size_that_cannot_be_cut_into_tokens_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match=r"give HEIGHTxWIDTH in multiples of 16, as in 192x320"):
        describe(ROOT / "configs/t2v/nano.yaml", size=size)


def test_an_embedder_says_itself_what_its_clips_are() -> None:
    with pytest.raises(ConfigError, match=r"--size, .* of an embedder set data.size"):
        describe(ROOT / "configs/embedder/nano.yaml", frames=33)


def test_rows_that_do_not_divide_the_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_global 32 is not a multiple of 6 rows"):
        with_clips_per_gpu(load_config(ROOT / "configs/t2v/nano.yaml"), 3, 2)


# docs/scaling.md and docs/t2v.md quote `regen describe` as it is.

QUOTED = {
    page: re.findall(r"```text\n\$ regen (describe .*)\n([^`]*)\n```", (ROOT / "docs" / page).read_text())
    for page in ("scaling.md", "t2v.md")
}


def test_the_page_has_a_table_for_each_full_size_model() -> None:
    """Every full-size preset of REGEN and of text to video, on 8, 64 and 512 GPUs."""
    embedders = {str(path.relative_to(ROOT)) for path in (ROOT / "configs" / "embedder").glob("regen_*.yaml")}
    quoted = QUOTED["scaling.md"]
    assert {shlex.split(command)[1] for command, _ in quoted} == {*embedders, "configs/t2v/5b.yaml"}
    assert all("--world-size 8 --world-size 64 --world-size 512" in command for command, _ in quoted)


def test_the_page_on_text_to_video_has_the_shapes_and_the_cost_by_embedder() -> None:
    tables = " ".join(table for _, table in QUOTED["t2v.md"])
    assert {shlex.split(command)[1] for command, _ in QUOTED["t2v.md"]} == {"configs/t2v/5b.yaml"}
    assert "32 blocks x width 3072 x 24 heads" in tables
    assert all(row in tables for row in ("conventional, 4x", "k = 4 ", "k = 8 ", "k = 16 ", "k = 32 "))


@pytest.mark.parametrize(
    ("command", "table"), [each for quoted in QUOTED.values() for each in quoted], ids=lambda text: text.split()[1]
)
def test_tables_of_the_pages_are_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, command: str, table: str
) -> None:
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, shlex.split(command), env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert table in "\n".join(line.rstrip() for line in result.output.splitlines())


# docs/sequence.md says of shared rows what `regen describe` does.

RANKS = 64
TEXT, CLIPS = (
    [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in re.findall(r"^\| \d+ \|.*GiB.*$", table, re.MULTILINE)
    ]
    for table in (ROOT / "docs" / "sequence.md").read_text().split("### ")[1:3]
)


def test_the_page_has_a_row_for_each_number_of_ranks() -> None:
    assert [row[0] for row in TEXT] == ["1", "2", "4", "8"]
    assert [row[0] for row in CLIPS] == ["1", "8"]


@pytest.mark.parametrize("row", TEXT, ids=lambda row: f"S={row[0]}")
def test_the_table_of_text_to_video(row: list[str]) -> None:
    config = load_config(ROOT / "configs/t2v/5b.yaml", [f"engine.sequence_parallel={row[0]}"])
    assert isinstance(config, T2VConfig)
    video = DescribedVideo((768, 1280), 264)
    how = {**_how(config), "given_frames": config.diffusion.gives_frames}
    counted = count_row_flops(config.model, latent_frames(264, 32), video.cells, video.text_tokens, **how)
    assert counted.num_tokens == 61_440
    assert row[1:] == _cells(config, counted, config.model, counted.num_tokens)


@pytest.mark.parametrize("row", CLIPS, ids=lambda row: f"S={row[0]}")
def test_the_table_of_the_embedder(row: list[str]) -> None:
    config = load_config(ROOT / "configs/embedder/regen_k32.yaml", [f"engine.sequence_parallel={row[0]}"])
    assert isinstance(config, EmbedderConfig)
    counted = count_flops(config.model, config.data.sizes[0], **_how(config))
    _, rows, columns = counted.latent_shape
    assert row[1:] == _cells(config, counted, config.model.decoder, 33 * rows * columns)


def _how(config: Any) -> dict[str, Any]:
    engine = config.engine
    assert (engine.precision, engine.activation_checkpointing) == ("bf16", True)
    return {"activation_checkpointing": True, "sequence_parallel": engine.sequence_parallel}


def _cells(config: Any, counted: FlopReport, transformer: Any, tokens: int) -> list[str]:
    """What is kept, sent and computed again, as the page writes it."""
    samples = config.train.batch_global // num_readers(config, RANKS)
    sizes = {"tokens": tokens, "width": transformer.width, "blocks": transformer.blocks, "samples": samples}
    sent, again = exchanged_bytes(config.engine, **sizes), counted.recomputed_flops / (3 * counted.num_forward_flops)
    return [f"{counted.activation_bytes / 2**30:.2f} GiB", f"{sent / 1e9:.1f} GB", f"{100 * again:.0f} %"]


def test_the_tables_name_what_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ranks share rows, and only there."""
    monkeypatch.chdir(ROOT)
    asked = ["describe", "configs/t2v/nano.yaml", "--world-size", "4", "engine.kind=zero3", "model.heads=4"]
    plain, shared = (
        CliRunner().invoke(app, [*asked, f"engine.sequence_parallel={size}"], env={"COLUMNS": "80"}) for size in (1, 2)
    )
    assert (plain.exit_code, shared.exit_code) == (0, 0)
    assert "exchanged" not in plain.output
    assert re.search(r"GPUs that share each row\s+│\s+2 ", shared.output)
    assert f"sent: {EXCHANGED}" in shared.output


def test_clips_at_once_are_those_of_a_group() -> None:
    config = load_config(ROOT / "configs/t2v/5b.yaml", ["engine.sequence_parallel=8"])
    assert with_clips_per_gpu(config, 64, 2).train.accumulation == config.train.batch_global // (8 * 2)
    with pytest.raises(ConfigError, match=r"multiple of 24 rows \(3 at once on each of 64 GPUs, of which 8 share"):
        with_clips_per_gpu(config, 64, 3)
