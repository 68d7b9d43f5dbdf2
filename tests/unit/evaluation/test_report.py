"""The page shows what it was given, refers to nothing outside its folder, and is written whole."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regen_dist.errors import DataError
from regen_dist.evaluation.metrics import Options
from regen_dist.evaluation.reconstruct import TrivialCodec, reconstruct
from regen_dist.evaluation.report import decoders_table, draw_curves, read_metrics, write_report
from regen_dist.evaluation.sheet import sheet_frames, write_sheet
from regen_dist.inference.frames import SourceVideo, VideoWriter

LINES = [
    {"kind": "event", "step": 0, "event": "start"},
    *(
        {
            "kind": "train",
            "step": step,
            "loss": 1 / step,
            "clips_per_s": 3.0,
            "latent_std_content": 1.0,
            "latent_std_motion": 0.9,
        }
        for step in (10, 20, 30)
    ),
    {"kind": "event", "step": 20, "event": "start"},
    {"kind": "validation", "step": 30, "psnr_db": 21.5},
    {"kind": "train", "step": 40, "loss": float("nan")},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run folder and a reconstruction made of it."""
    root = tmp_path_factory.mktemp("report")
    with VideoWriter(root / "<video>.mp4", 10, preset="ultrafast") as writer:
        for t in range(12):
            writer.write(np.full((16, 24, 3), 10 * t, np.uint8))
    source = SourceVideo(root / "<video>.mp4")
    codec = TrivialCodec("mean", 5)
    reconstruct(
        source, codec, root / "one", Options(), label="REGEN <1>", model={"run": "r", "step": None}, compare=True
    )
    run = root / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (run / "config.yaml").write_text("name: <run>\n")
    return run, root / "one"


def test_page(folders: tuple[Path, Path], tmp_path: Path) -> None:
    run, one = folders
    page = write_report(tmp_path / "report", title="A & B", run=run, reconstructions=[one])
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / "report" / "index.html"
    for shown in (
        "A &amp; B",
        "REGEN &lt;1&gt;",
        "Repeat the first frame",
        "name: &lt;run&gt;",
        "21.5 dB",
        "&lt;video&gt;.mp4",
    ):
        assert shown in text
    assert text.count("<svg") == 4
    assert "prefers-color-scheme: dark" in text
    links = re.findall(r'(?:src|href)="([^"#]+)"', text)
    assert len(links) >= 4
    for link in links:
        assert (page.parent / link).is_file(), link
    assert set(re.findall(r"https?://[^/\"]+", text)) <= {"http://www.w3.org"}  # names of namespaces, never fetched
    assert {path.name for path in page.parent.iterdir()} == {"index.html", "media"}
    assert len(list((page.parent / "media").iterdir())) == 3


def test_page_without_training(folders: tuple[Path, Path], tmp_path: Path) -> None:
    text = write_report(tmp_path, title="T", run=tmp_path / "none", reconstructions=[folders[1]]).read_text()
    assert "<svg" not in text
    assert "Resolved config" not in text


def test_incomplete_reconstructions_are_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    with pytest.raises(DataError, match=r"half lacks metrics\.json"):
        write_report(tmp_path / "out", title="T", run=folders[0], reconstructions=[tmp_path / "half"])
    with pytest.raises(DataError, match="at least one"):
        write_report(tmp_path / "out", title="T", run=folders[0], reconstructions=[])
    assert not (tmp_path / "out").exists()


def test_rows(folders: tuple[Path, Path]) -> None:
    table = decoders_table([read_metrics(folders[1])])
    assert (len(table.rows), table.styles) == (4, {0: "bold"})
    assert table.rows[0][1:] == table.rows[3][1:]  # our stand-in is the mean of the clip
    assert [column.name for column in table.header] == ["decoder", "PSNR dB", "mean frame PSNR dB", "SSIM", "VMAF"]


def test_curves() -> None:
    curves = draw_curves(LINES)
    assert [curve.title for curve in curves][:2] == ["Training loss", "PSNR of the validation clips, one step"]
    assert curves[0].last == "0.0333"  # the last finite one
    assert all("#0" not in curve.svg and "var(--accent)" in curve.svg for curve in curves)
    assert draw_curves([]) == []


def test_the_validation_loss_of_text_to_video_has_a_curve() -> None:
    curves = draw_curves([{"kind": "validation", "step": step, "loss": 0.5} for step in (10, 20)])
    assert [(curve.title, curve.last) for curve in curves] == [("Loss on the validation rows", "0.5")]


@pytest.mark.parametrize(("height", "width"), [(16, 24), (40, 8), (300, 500)])
def test_sheet(tmp_path: Path, height: int, width: int) -> None:
    frames = [np.full((height, width, 3), 40 * t, np.uint8) for t in range(5)]
    numbers = sheet_frames(5, 3)
    chosen = [frames[number] for number in numbers]
    write_sheet(tmp_path / "sheet.png", numbers, chosen, {"a": chosen, "b": chosen}, title="title")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.height > 5 * min(height, 40)
    assert list(tmp_path.iterdir()) == [tmp_path / "sheet.png"]


def test_sheet_frames() -> None:
    assert sheet_frames(1) == [0]
    assert sheet_frames(3) == [0, 1, 2]
    assert sheet_frames(101, 6) == [0, 20, 40, 60, 80, 100]
