"""The embedder's variants in the config: their defaults, and what does not go together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from regen_dist.config import load_config, load_saved_config, save_config, to_yaml
from regen_dist.config.exported import EXPORT_CONFIG_FILE, ExportConfig, OriginConfig, load_export_config
from regen_dist.errors import ConfigError
from tests.helpers.tiny import tiny_model, tiny_run

WINDOW = {"pattern": "window", "window": [2, 3, 3]}


def test_latents_in_context_need_full_attention() -> None:
    """Told with both ways out. The baseline attends to nothing, and takes either."""
    with pytest.raises(ValidationError) as error:
        tiny_model(conditioning__kind="in_context", decoder__attention=WINDOW)
    told = error.value.errors()
    assert len(told) == 1
    for part in (
        "'in_context' needs decoder.attention.pattern 'full', found 'window'",
        "set model.decoder.attention.pattern=full, or model.conditioning.kind=content_aware",
    ):
        assert part in told[0]["msg"]
    assert tiny_model(conditioning__kind="in_context").decoder.attention.pattern == "full"
    assert tiny_model(conditioning__kind="content_aware", decoder__attention=WINDOW).kind == "regen"
    assert tiny_model(kind="magvit2", conditioning__kind="in_context", decoder__attention=WINDOW).kind == "magvit2"


@pytest.mark.parametrize("changes", [{"conditioning__kind": "context"}, {"conditioning__time": "rope"}])
def test_a_variant_that_there_is_not_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match=r"Input should be '(content_aware' or 'in_context|siren' or 'learned)'"):
        tiny_model(**changes)


def test_what_was_saved_before_there_were_variants_is_read_as_the_default(tmp_path: Path) -> None:
    """Run folders and exports alike."""
    config = tiny_run(tmp_path / "runs")
    save_config(config, config.folder)
    (tmp_path / EXPORT_CONFIG_FILE).write_text(ExportConfig.of(config).to_yaml())
    for path in (config.folder / "config.yaml", tmp_path / EXPORT_CONFIG_FILE):
        values = yaml.safe_load(path.read_text())
        del values["model"]["conditioning"]["kind"], values["model"]["conditioning"]["time"]
        del values["model"]["decoder"]["linear"]
        path.write_text(yaml.safe_dump(values))
    assert load_saved_config(config.folder) == config
    model = load_export_config(tmp_path).model
    assert (model.conditioning.kind, model.conditioning.time, model.decoder.linear) == ("content_aware", "siren", True)


def test_a_saved_config_keeps_its_variant(tmp_path: Path) -> None:
    variant = {"model__conditioning__kind": "in_context", "model__conditioning__time": "learned"}
    config = tiny_run(tmp_path / "runs", model__decoder__linear=False, **variant)
    save_config(config, config.folder)
    assert load_saved_config(config.folder) == config
    (tmp_path / EXPORT_CONFIG_FILE).write_text(ExportConfig.of(config).to_yaml())
    assert load_export_config(tmp_path).model == config.model


def test_an_export_whose_origin_looks_like_a_number_reads_back(tmp_path: Path) -> None:
    data = {"data.image_fraction": "1e-05", "data.mixture weights": "None"}
    origin = OriginConfig(
        run="1e-4", step=1, samples=8, config_hash="0", version="1e3", saved_at="2026-01-01T00:00:00", data=data
    )
    export = ExportConfig.of(tiny_run()).model_copy(update={"origin": origin})
    (tmp_path / EXPORT_CONFIG_FILE).write_text(export.to_yaml())
    assert load_export_config(tmp_path) == export


NUMBERS = ["optimizer.lr", "optimizer.weight_decay", "optimizer.clip_norm", "guards.spike.threshold",
           "train.peak_tflops", "guards.latent_std.high", "diffusion.density.mean", "model.conditioning.omega",
           "train.time_limit_s"]  # fmt: skip


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan", "inf", "1e999"])
def test_no_number_of_a_config_is_infinite_or_nan(tmp_path: Path, value: str) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(tiny_run()))
    with pytest.raises(ConfigError) as caught:
        load_config(path, [f"{key}={value}" for key in NUMBERS])
    for key in NUMBERS:
        assert re.search(rf"{key}: .*(finite|less than or equal|YAML 1)", str(caught.value)), key


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.lr=1e30", "less than or equal to 1"),
        ("optimizer.lr=2", "less than or equal to 1"),
        ("optimizer.betas=[0.9, 1.0]", "less than 1"),
        ("optimizer.weight_decay=1e9", "must be below 1"),
    ],
)
def test_rates_that_break_weights_are_refused(tmp_path: Path, override: str, told: str) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(tiny_run()))
    with pytest.raises(ConfigError, match=told):
        load_config(path, [override])
