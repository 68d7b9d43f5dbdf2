"""Tables, plots and page of the compression benchmark: margins, targets, budgets, and what was not measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.compression_measure import DOUBLE, OTHER, TRAINED
from tools.bench.compression_report import (
    budgets_markdown,
    draw,
    margins,
    markdown,
    missed,
    read_budgets,
    tables,
    write_page,
)
from tools.bench.compression_runs import IN_CONTEXT, all_arms

PSNR = {
    "magvit2-k8": 20.0,
    "regen-k8": 24.0,
    "magvit2-k16": 19.0,
    "regen-k16": 22.5,
    "magvit2-k32": 18.0,
    "regen-k32": 24.5,
}
TRAINING = {
    "lr": 1e-3, "steps": 50, "clips": 400, "seconds": 61.0, "cpu_seconds": 59.0, "flops": 3.2e13, "loss": 0.1,
    "parameters": {"encoder": 900_000, "decoder": 600_000}, "encode_flops": 10**9, "decode_flops": 2 * 10**9,
}  # fmt: skip


def _quality(psnr_db: float, notes: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"psnr_db": psnr_db, "ssim": 0.5, "vmaf": None, "frechet": 12.3, "notes": list(notes)}


def _facts(psnr: dict[str, float]) -> dict[str, Any]:
    arms = {}
    for arm in all_arms():
        if arm.name in psnr:
            best, note = psnr[arm.name], ("VMAF: no ffmpeg",) if arm.k == 8 else ()
            by_steps = {str(number): _quality(best - 0.1 * number + 0.1, note) for number in arm.steps}
            sizes = {TRAINED: by_steps, DOUBLE: {"1": _quality(best - 1)}, OTHER: {"1": _quality(best - 0.5)}}
            between = {"clips": 2, "decoded_then_blended_db": 21.0, "blended_db": 25.0}
            told = {name: getattr(arm, name) for name in ("kind", "k", "variant", "label", "against")}
            arms[arm.name] = {**told, "training": TRAINING, "measures": {**sizes, "between": between}}
    tuning = {"regen": {"lr": 1e-3, "at_edge": True, "tried": [{"lr": 1e-3, "psnr_db": 21.0}]}}
    facts = {
        "command": "regen bench compression", "minutes_per_arm": 1.0, "at_once": 2, "arms": arms, "tuning": tuning,
        "sizes": {name: {"crop": [32, 32], "short_side": 64} for name in (TRAINED, DOUBLE, OTHER)},
        "tests": {"chosen": "by hand", "stretches": [{"video": "a.mp4", "first": 3}], "left_out": ["b"]},
        "config": "c.yaml", "config_hash": "0" * 64, "load": {"before": (0.5, 1.0, 1.5)},
        "machine": {"device": "a CPU", "python": "3.11", "packages": {"torch": "2"}},
    }  # fmt: skip
    return facts | {"missed": missed(facts)}


def test_margins_stand_beside_their_targets() -> None:
    facts = _facts(PSNR)
    assert margins(facts) == {
        "k = 8": {"margin_db": 4.0, "target_db": 3.6, "met": True},
        "k = 16": {"margin_db": 3.5, "target_db": 3.8, "met": False},
        "k = 32": {"margin_db": 6.5, "target_db": 5.7, "met": True},
    }
    assert facts["missed"] == [
        "k = 16: +3.50 dB, the target is +3.8 dB",
        "the margin does not grow from k = 8 to k = 16",
    ]


def test_what_was_not_trained_has_no_margin_and_is_not_missed() -> None:
    assert margins(_facts({"regen-k8": 24.0})) == {}
    assert _facts({"regen-k8": 24.0, "magvit2-k4": 20.0})["missed"] == []


def test_conditioning_is_judged_at_twice_the_resolution() -> None:
    facts = _facts({IN_CONTEXT: 15.0, "regen-k16-full-no_linear": 20.5})
    assert margins(facts) == {
        "over latents in context, at twice the resolution": {"margin_db": 5.5, "target_db": 6.0, "met": False}
    }
    variants = next(table for table in tables(facts) if table.title.startswith("Variants"))
    assert len(variants.rows) == 2
    assert variants.rows[1][2:] == ["15.00 (-5.50)", "14.00 (-5.50)", "14.50 (-5.50)"]
    assert "+5.50 dB, the target is ≥ +6.0 dB ✗ missed" in variants.note


def test_leads_are_told_without_the_linear_code_and_with_it_in_both() -> None:
    facts = _facts(PSNR | {"regen-k8-no_linear": 22.5, "magvit2-k8-linear": 23.75, "magvit2-k16-linear": 21.0})
    table = next(table for table in tables(facts) if table.title == "What the linear code does")
    assert table.rows == [
        ["8", "20.00", "22.50", "+2.50", "23.75", "24.00", "+0.25", "+4.00"],
        ["16", "19.00", "–", "–", "21.00", "22.50", "+1.50", "+3.50"],
    ]
    assert not any(table.title == "What the linear code does" for table in tables(_facts(PSNR)))


def test_markdown_has_every_table_and_every_shortfall() -> None:
    text = markdown(_facts(PSNR))
    assert "| REGEN, k = 8 | 24.00 | 0.500 | – | 12.3 | +4.00 dB | ≥ +3.6 dB | ✓ | 32.74 / 29.34 |" in text
    assert "| +3.50 dB | ≥ +3.8 dB | ✗ missed |" in text
    assert "| REGEN, k = 32 | 8 | 23.80 |" in text
    assert "| MAGVIT-v2, k = 16 | 2 | – | 21.00 | 25.00 |" in text
    assert "| REGEN, k = 8 | 0.001 | 50 | 59 | 61 | 32.0 | 1.50 M | 2.00 |" in text
    assert "regen 0.001 (of 0.001: 21.00 dB, on held-out video of the training film, at the edge)" in text
    assert "Missed: k = 16: +3.50 dB, the target is +3.8 dB;" in text
    assert "Not measured: REGEN, k = 8, training: VMAF: no ffmpeg." in text


def test_every_row_fits_its_table() -> None:
    for table in tables(_facts(PSNR)):
        assert {len(row) for row in table.rows} == {len(table.columns)}, table.title


def test_plots_need_two_points() -> None:
    assert draw(_facts({"magvit2-k8": 1.0})) == []


def test_the_page_is_one_file_with_plots_and_frames(tmp_path: Path) -> None:
    facts, kept = _facts(PSNR), {}
    for name in ("regen-k16", "magvit2-k16"):
        kept[name] = tmp_path / f"{name}.npz"
        frames = np.zeros((17, 32, 32, 3), np.uint8)
        np.savez(kept[name], **{"training/0/source": frames, "training/0/made": frames})
    plots = draw(facts)
    assert [plot.name for plot in plots] == ["psnr", "margin", "steps_psnr", "steps_frechet"]
    assert "var(--accent)" in plots[0].svg
    assert "var(" not in plots[0].file
    page = write_page(tmp_path, facts, plots, kept).read_text()
    assert page.count("<svg") == 4
    assert page.count("data:image/webp;base64,") == 1
    assert page.count('class="bad">✗ missed') == 1
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "Not measured: REGEN, k = 8, training: VMAF: no ffmpeg." in page


# The table of PSNR against training time, out of the records of several budgets.


def _record(folder: Path, figures: dict[str, float]) -> Path:
    folder.mkdir()
    arms = {name: {"measures": {"training": {"1": {"psnr_db": value}}}} for name, value in figures.items()}
    (folder / "compression.json").write_text(json.dumps({"arms": arms}))
    return folder


def test_a_row_is_an_arm_and_a_column_a_budget(tmp_path: Path) -> None:
    folders = {
        20.0: _record(tmp_path / "long", {"regen-k16": 22.0, "magvit2-k16-linear": 21.25, "regen-k16-paper": 21.0}),
        5.0: _record(tmp_path / "short", {"regen-k16": 21.5, "magvit2-k16-linear": 21.0}),
        60.0: tmp_path / "not there yet",
    }
    budgets = read_budgets(folders)
    assert list(budgets) == [5.0, 20.0]
    title, _, *lines = budgets_markdown(budgets).splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines]
    assert (title, rows[0]) == ("### k = 16", ["k = 16, one-step PSNR dB after", "5 min", "20 min"])
    assert [row[1:] for row in rows[2:]] == [
        ["21.50", "22.00"],
        ["–", "21.00"],
        ["21.00", "21.25"],
        ["+0.50", "+0.75"],
        ["–", "–"],
    ]
    assert rows[5][0] == "lead with the code in both"
