"""Config files: inheritance, overrides, and errors that say everything at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from regen_dist.config import config_hash, load_config, load_saved_config, save_config
from regen_dist.config.files import write_text_atomically
from regen_dist.config.run import HangConfig
from regen_dist.errors import ConfigError

Write = Callable[[str, str], Path]

COMPLETE = """
name: tiny
model:
  temporal_compression: 4
  encoder:
    stem_patch: 4
    stages:
      - {channels: 8, spatial: 2, temporal: 2}
      - {channels: 16, temporal: 2}
data: {url: data/train}
train: {steps: 10, batch_global: 4}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file below an empty current directory."""
    monkeypatch.chdir(tmp_path)

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file


def problems(path: Path, *overrides: str) -> list[str]:
    """The lines of the one error that loading raises, without the first."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    first, *rest = str(caught.value).splitlines()
    assert first.endswith(f"{len(rest)} problem{'s' if len(rest) != 1 else ''}")
    return [line.strip() for line in rest]


def message(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- composing
def test_a_file_is_laid_over_the_one_it_extends(write: Write) -> None:
    write("base/base.yaml", COMPLETE)
    child = write("runs/child.yaml", "extends: ../base/base.yaml\nname: child\ntrain: {steps: 20}\n")
    config = load_config(child)
    assert (config.name, config.train.steps, config.train.batch_global) == ("child", 20, 4)


def test_of_several_parents_the_later_wins_and_lists_are_replaced(write: Write) -> None:
    write("a.yaml", COMPLETE + "optimizer: {lr: 1e-3, warmup_steps: 7}\n")
    write("b.yaml", "optimizer: {lr: 2e-3}\nmodel: {encoder: {stages: [{channels: 32, spatial: 2, temporal: 2}]}}\n")
    stages = "[{channels: 4, spatial: 2, temporal: 2}, {channels: 5, temporal: 2}]"
    child = write("c.yaml", f"extends: [a.yaml, b.yaml]\nmodel: {{encoder: {{stages: {stages}}}}}\n")
    config = load_config(child)
    assert (config.optimizer.lr, config.optimizer.warmup_steps) == (2e-3, 7)
    assert [stage.channels for stage in config.model.encoder.stages] == [4, 5]


def test_files_that_extend_each_other_in_a_circle_are_refused(write: Write) -> None:
    write("a.yaml", "extends: b.yaml\n")
    path = write("b.yaml", "extends: a.yaml\n")
    assert "b.yaml -> a.yaml -> b.yaml" in message(path)


def test_one_ancestor_may_be_reached_twice(write: Write) -> None:
    write("base.yaml", COMPLETE)
    write("left.yaml", "extends: base.yaml\nname: left\n")
    write("right.yaml", "extends: base.yaml\ntrain: {steps: 99}\n")
    config = load_config(write("both.yaml", "extends: [left.yaml, right.yaml]\nname: both\n"))
    assert (config.name, config.train.steps) == ("both", 99)


@pytest.mark.parametrize(
    ("override", "section", "key", "expected"),
    [
        ("train.steps=77", "train", "steps", 77),
        ("optimizer.lr=3e-4", "optimizer", "lr", 3e-4),
        ("data.size=[16, 24]", "data", "size", (16, 24)),
        ("data.url=a b'c $(x)=y", "data", "url", "a b'c $(x)=y"),
        ("data.url=a #b", "data", "url", "a #b"),
        ("data.url='a' # b", "data", "url", "a"),
        ("data.validation_url=null", "data", "validation_url", None),
        ("data.flip=false", "data", "flip", False),
    ],
)
def test_overrides_are_typed_as_yaml(override: str, section: str, key: str, expected: Any, write: Write) -> None:
    config = load_config(write("a.yaml", COMPLETE), [override])
    assert getattr(getattr(config, section), key) == expected


def test_an_override_can_name_an_element_of_a_list(write: Write) -> None:
    config = load_config(write("a.yaml", COMPLETE), ["model.encoder.stages.1.channels=24"])
    assert [(stage.channels, stage.temporal) for stage in config.model.encoder.stages] == [(8, 2), (24, 2)]


def test_of_two_overrides_of_one_key_the_last_wins(write: Write) -> None:
    assert load_config(write("a.yaml", COMPLETE), ["train.steps=1", "train.steps=2"]).train.steps == 2


def test_references_are_resolved_to_keys_and_to_the_environment(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGEN_TEST_DATA", "somewhere")
    text = "wandb: {project: '${name}-${oc.env:REGEN_TEST_DATA}-${oc.env:REGEN_ABSENT,none}'}\n"
    config = load_config(write("a.yaml", COMPLETE + text), ["train.log_every=${train.steps}"])
    assert config.wandb.project == "tiny-somewhere-none"
    assert config.train.log_every == 10


def test_the_result_is_frozen(write: Write) -> None:
    config = load_config(write("a.yaml", COMPLETE))
    with pytest.raises(ValidationError):
        config.train.steps = 3  # type: ignore[misc]


# --- errors
def test_all_problems_come_at_once_each_with_its_place(write: Write) -> None:
    write("base.yaml", COMPLETE + "optimizer:\n  lrr: 1e-3\n")
    child = write("child.yaml", "extends: base.yaml\nengine:\n  kind: zero2\n")
    found = problems(child, "train.steps=abc", "model.decoder.widht=3")
    assert len(found) == 4
    text = "\n".join(found)
    assert "base.yaml:13: optimizer.lrr: unknown key; did you mean optimizer.lr?" in text
    assert "child.yaml:3: engine.kind: found 'zero2' (str); allowed: 'zero3' or 'plain'" in text
    assert "command line: train.steps: found 'abc' (str); allowed: a valid integer" in text
    assert "command line: model.decoder.widht: unknown key; did you mean model.decoder.width?" in text


def test_a_key_of_another_section_is_found(write: Write) -> None:
    (only,) = problems(write("a.yaml", COMPLETE), "train.lr=3e-4")
    assert "did you mean optimizer.lr?" in only


def test_a_key_unlike_any_other_is_told_what_is_known(write: Write) -> None:
    (only,) = problems(write("a.yaml", COMPLETE), "wandb.zzzzz=1")
    assert "unknown key; nothing like it is known. Known here: mode, project, entity" in only


def test_the_file_that_set_the_key_last_is_named(write: Write) -> None:
    write("base.yaml", COMPLETE + "optimizer: {lr: 1}\n")
    child = write("child.yaml", "extends: base.yaml\n\noptimizer: {lr: none}\n")
    (only,) = problems(child)
    assert only.startswith("child.yaml:3: optimizer.lr: found 'none'")


def test_a_key_inside_a_list_has_its_own_line(write: Write) -> None:
    (only,) = problems(write("a.yaml", COMPLETE.replace("channels: 16", "channels: -16")))
    assert only.startswith("a.yaml:9: model.encoder.stages.1.channels: found -16 (int); allowed: greater than 0")


def test_a_missing_key_is_named_with_the_file_that_was_asked_for(write: Write) -> None:
    write("base.yaml", COMPLETE.replace("data: {url: data/train}\n", ""))
    assert problems(write("child.yaml", "extends: base.yaml\n")) == ["child.yaml: data: is required and not set"]


def test_a_rule_between_keys_keeps_its_own_words(write: Write) -> None:
    (only,) = problems(write("a.yaml", COMPLETE), "model.temporal_compression=8")
    assert only.startswith("a.yaml:3: model: ")
    assert "multiply to temporal_compression = 8" in only


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps", "not an override; allowed: a.b=value"),
        ("train..steps=1", "not an override"),
        ("=1", "not an override"),
        ("data.url=[a", "not valid YAML"),
        ("data.url=caf\udce9", "is not UTF-8"),
        ("data.url=&a [*a]", "within its own anchor"),
        ("model.encoder.stages.7.channels=1", "'7' is no element of a list of 2"),
        ("name=${nobody}", "cannot be resolved"),
        ("name=${oc.env:REGEN_ABSENT}", "REGEN_ABSENT"),
        ("name=${", "no valid reference"),
        ("name=${oc.create:x}", "asks for more than a reference"),
        ("name=${oc.env:AWS_SECRET_ACCESS_KEY}", "looks like a secret"),
        ("extends=other.yaml", "unknown key"),
    ],
)
def test_a_wrong_override_is_one_problem_of_the_command_line(override: str, expected: str, write: Write) -> None:
    (only,) = problems(write("a.yaml", COMPLETE), override)
    assert only.startswith("command line: ")
    assert expected in only


@pytest.mark.parametrize("value", ["1e-3", "${oc.env:HOME}", "${train.steps}"])
def test_a_key_with_dots_in_a_file_is_told_how_to_nest_it(value: str, write: Write) -> None:
    (only,) = problems(write("a.yaml", COMPLETE + f"optimizer.lr: {value}\n"))
    assert only.startswith("a.yaml:12: optimizer.lr: a file has its sections nested, as in `train: {steps: 100}`")


@pytest.mark.parametrize("value", ["", " adamw", " [1, 2]"])
def test_what_is_no_section_is_told_what_one_is(value: str, write: Write) -> None:
    (only,) = problems(write("a.yaml", COMPLETE + f"optimizer:{value}\n"))
    assert only.startswith("a.yaml:12: optimizer: found ")
    assert "allowed: a section, its keys indented below" in only


def test_a_number_for_a_name_is_told_how_to_quote_it(write: Write) -> None:
    (only,) = problems(write("a.yaml", COMPLETE), "name=007.1")
    assert "found 7.1 (float); allowed: a valid string; quote it" in only


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "found nothing at the top"),
        ("- a\n", "found a list at the top"),
        ("word\n", "found a str at the top"),
        ("a: [1\n", "not valid YAML"),
        ("a: 1\nb:\n\t- 2\n", "a.yaml:3: not valid YAML"),
        ("name: x\nname: y\n", "a.yaml:2: name stands twice (first on line 1)"),
        ("on: 1\n", "a.yaml:1: a key must be a name"),
        ("a: &a {b: 1}\nc: {<<: *a}\n", "a.yaml:2: a key must be a name; found '<<'; `<<` is not supported"),
        ("extends: {a: b}\n", "allowed: a path, or a list of paths"),
        ("extends: nowhere.yaml\n", "nowhere.yaml: no such file"),
        ("a: \x00\n", "not valid YAML"),
        ("a: &a\n  b: *a\n", "a.yaml: nested too deeply, or an alias"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(text: str, expected: str, write: Write) -> None:
    assert expected in message(write("a.yaml", text))


def test_bytes_that_are_not_utf8_are_refused(write: Write) -> None:
    path = write("a.yaml", "")
    path.write_bytes(b"name: caf\xe9\n")
    assert "not UTF-8 (byte 9)" in message(path)


def test_a_missing_file_is_refused_with_its_neighbours(write: Write) -> None:
    write("folder/nano.yaml", COMPLETE)
    assert message(Path("folder/nanno.yaml")) == "folder/nanno.yaml: no such file; folder has: nano.yaml"
    assert "there is no folder" in message(Path("absent/nano.yaml"))
    assert "is a folder" in message(Path("folder"))


# --- saving
def test_a_saved_config_reads_back_equal(write: Write, tmp_path: Path) -> None:
    overrides = [r"data.url='\${literal}: [x'", "optimizer.lr=1.5e-7", "name='7.1'"]
    config = load_config(write("a.yaml", COMPLETE), overrides)
    assert (config.data.url, config.name) == ("${literal}: [x", "7.1")
    folder = tmp_path / "run"
    save_config(config, folder)
    assert load_saved_config(folder) == config
    assert (folder / "config.hash").read_text().strip() == config_hash(config)
    assert sorted(each.name for each in folder.iterdir()) == ["config.hash", "config.yaml"]


def test_a_save_that_fails_leaves_what_was_there(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write("a.yaml", COMPLETE))
    save_config(config, tmp_path / "run")

    def fail(*paths: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        save_config(config.model_copy(update={"name": "other"}), tmp_path / "run")
    assert load_saved_config(tmp_path / "run") == config
    assert sorted(each.name for each in (tmp_path / "run").iterdir()) == ["config.hash", "config.yaml"]


def test_files_have_the_mode_that_the_user_asks_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text_atomically(tmp_path / "a.json", "{}")
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder"):
        load_saved_config(tmp_path)


def test_the_hash_depends_on_values_alone(write: Write) -> None:
    values = yaml.safe_load(COMPLETE)
    turned = {key: values[key] for key in reversed(values)}
    first = load_config(write("a.yaml", COMPLETE))
    moved = load_config(write("far/away/b.yaml", yaml.safe_dump(turned, sort_keys=False)))
    assert config_hash(first) == config_hash(moved)
    assert config_hash(load_config(Path("a.yaml"), ["train.seed=1"])) != config_hash(first)
    assert config_hash(load_config(Path("a.yaml"), ["train.seed=0"])) == config_hash(first)


def test_loading_imports_no_torch(root: Path) -> None:
    code = "import sys; from regen_dist.config import load_config; load_config('configs/embedder/nano.yaml')"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize("hang", [{"warn_s": 900}, {"beat_s": 200}, {"start_limit_s": 60}])
def test_hang_limits_out_of_order_are_refused(hang: dict[str, float]) -> None:
    """A warning that comes after the end, or a heartbeat rarer than what it is to show, would never be noticed."""
    with pytest.raises(ValidationError, match=r"beat_s .* <= warn_s .* < limit_s .* <= start_limit_s"):
        HangConfig.model_validate(hang)
