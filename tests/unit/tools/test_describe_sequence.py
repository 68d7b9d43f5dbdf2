"""docs/sequence.md says of shared rows what `regen describe` does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from regen_dist.config import RunConfig, T2VConfig, load_config
from regen_dist.config.identity import num_readers
from regen_dist.errors import ConfigError
from regen_dist.models.flops import FlopReport, count_flops, count_row_flops
from regen_dist.models.memory import exchanged_bytes
from tools.cli import app
from tools.describe.facts import EXCHANGED, with_clips_per_gpu
from tools.describe.video import DescribedVideo, latent_frames

ROOT = Path(__file__).parents[3]
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
    counted = count_row_flops(config.model, latent_frames(264, 32), video.cells, video.text_tokens, **_how(config))
    assert counted.num_tokens == 61_440
    assert row[1:] == _cells(config, counted, config.model, counted.num_tokens)


@pytest.mark.parametrize("row", CLIPS, ids=lambda row: f"S={row[0]}")
def test_the_table_of_the_embedder(row: list[str]) -> None:
    config = load_config(ROOT / "configs/embedder/regen_k32.yaml", [f"engine.sequence_parallel={row[0]}"])
    assert isinstance(config, RunConfig)
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
