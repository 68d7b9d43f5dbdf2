"""A run that goes on by another config says what has changed, and keeps the earlier one."""

from __future__ import annotations

from pathlib import Path

import pytest

from regen_dist.config import load_config, load_saved_config
from regen_dist.observe.record import read_record
from regen_dist.training.run import replace_config, train
from tests.helpers.disks import fill, small_disk
from tests.helpers.tiny import tiny_dataset, tiny_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def _told(run: Path) -> list[str]:
    return [line["event"] for line in read_record(run / "metrics.jsonl", "event")]


def test_a_prolonged_run_tells_every_key_and_the_jump_of_the_rate(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the terminal and in the record, once; the earlier configs are there under their steps."""
    first = tiny_run(tmp_path, data, train__steps=2)
    second = tiny_run(tmp_path, data, train__steps=4, optimizer__lr=3e-3)
    assert train(first) == 0
    assert train(first) == 0
    assert not [text for text in _told(first.folder) if "config" in text]
    assert train(second) == 0
    changed, rate, kept = [text for text in _told(first.folder) if "config" in text]
    assert changed == "the config changed after step 2: optimizer.lr: 0.001 → 0.003; train.steps: 2 → 4"
    assert rate == "the learning rate of step 3 is 0.003, by the earlier config it was 0.001; step 2 had 0.001"
    assert kept == f"the earlier config is {first.folder / 'config-00000002.yaml'}"
    assert changed in capsys.readouterr().err.replace("\n", "")
    assert load_saved_config(first.folder) == second
    assert load_config(first.folder / "config-00000002.yaml") == first


def test_several_changes_at_one_step_keep_every_config(tmp_path: Path) -> None:
    """None takes the place of another, and going back to an earlier one writes no copy of a copy."""
    configs = [tiny_run(tmp_path, optimizer__lr=lr) for lr in (1e-3, 2e-3, 3e-3, 2e-3, 1e-3)]
    for config in configs:
        replace_config(config, 4)
    folder = configs[0].folder
    assert load_saved_config(folder) == configs[-1]
    names = sorted(path.name for path in folder.glob("config-*.yaml"))
    assert names == ["config-00000004-2.yaml", "config-00000004-3.yaml", "config-00000004.yaml"]
    rates = {load_config(folder / name).optimizer.lr for name in names}
    assert rates == {1e-3, 2e-3, 3e-3}


def test_what_leaves_the_rate_alone_says_nothing_of_it(tmp_path: Path) -> None:
    replace_config(tiny_run(tmp_path), 0)
    changed, kept = replace_config(tiny_run(tmp_path, train__log_every=5), 3)
    assert changed == "the config changed after step 3: train.log_every: 1 → 5"
    assert kept.endswith("config-00000003.yaml")


def test_a_config_of_another_version_is_kept_though_it_cannot_be_compared(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    replace_config(config, 0)
    (config.folder / "config.yaml").write_text("of: old\n")
    told = replace_config(config, 3)[0]
    assert "it cannot be compared" in told
    assert (config.folder / "config-00000003.yaml").read_text() == "of: old\n"
    assert load_saved_config(config.folder) == config


def test_a_full_disk_is_told_and_ends_nothing(tmp_path: Path) -> None:
    """The config that is there stays whole."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        first = tiny_run(disk)
        replace_config(first, 0)
        fill(disk)
        told = replace_config(tiny_run(disk, optimizer__lr=2e-3), 3)
        assert any("warning: " in text and "No space left on device" in text for text in told)
        assert any("optimizer.lr: 0.001 → 0.002" in text for text in told)
        assert load_saved_config(first.folder) == first
