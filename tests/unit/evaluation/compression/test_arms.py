"""The arms of the compression benchmark: valid configs that differ from each other in what their names say."""

from __future__ import annotations

from pathlib import Path

import pytest

from regen_dist.config import RunConfig, load_embedder_config
from regen_dist.errors import ConfigError
from tools.bench.compression_runs import (
    COMPRESSIONS,
    MARGIN_TARGETS_DB,
    PAPER_DB,
    VARIANTS,
    CompressionArm,
    all_arms,
    baseline,
    chosen_arms,
    paper_form,
    paper_form_alone,
    regen,
    regen_alone,
    stages_of,
    tuned_at,
)

CONFIG = Path(__file__).parents[4] / "configs" / "bench" / "compression.yaml"
BASE = load_embedder_config(CONFIG)


def _config(arm: CompressionArm) -> RunConfig:
    return load_embedder_config(CONFIG, arm.overrides(BASE))


def test_every_arm_is_a_valid_config_of_its_kind_and_compression() -> None:
    arms = list(all_arms())
    configs = [_config(arm) for arm in arms]
    assert len({arm.name for arm in arms}) == len({config.model for config in configs}) == len(arms) == 28
    for arm, config in zip(arms, configs, strict=True):
        assert (config.model.kind, config.model.temporal_compression) == (arm.kind, arm.k)
    same = {"name": "", "model": BASE.model}
    assert len({config.model_copy(update=same) for config in configs}) == 1, "the model alone differs"


@pytest.mark.parametrize("k", COMPRESSIONS)
def test_both_kinds_have_the_same_encoder_and_latents(k: int) -> None:
    ours, theirs = (_config(arm).model for arm in (regen(k), baseline(k)))
    assert (ours.encoder, ours.latent, ours.linear_start) == (theirs.encoder, theirs.latent, theirs.linear_start)


@pytest.mark.parametrize("k", COMPRESSIONS)
def test_the_linear_code_is_regens_and_each_kind_is_trained_with_and_without_it(k: int) -> None:
    has_code = {arm.name: _config(arm).model.decoder.linear for arm in all_arms() if arm.k == k and arm not in VARIANTS}
    assert has_code == {
        f"regen-k{k}": True,
        f"magvit2-k{k}": False,
        f"regen-k{k}-no_linear": False,
        f"magvit2-k{k}-linear": True,
        f"regen-k{k}-paper": True,
        f"regen-k{k}-paper-no_linear": False,
    }


@pytest.mark.parametrize("code", [True, False])
def test_the_papers_form_has_no_local_convolutions_and_a_rate_of_its_own(code: bool) -> None:
    arm = (paper_form if code else paper_form_alone)(8)
    assert not _config(arm).model.decoder.local
    assert tuned_at(arm) == (paper_form if code else paper_form_alone)(16)
    assert tuned_at(arm) != tuned_at((regen if code else regen_alone)(8))


@pytest.mark.parametrize("variant", [arm for arm in all_arms() if arm.against], ids=lambda arm: arm.name)
def test_a_variant_differs_in_one_thing_from_the_arm_that_it_stands_beside(variant: CompressionArm) -> None:
    beside = next(arm for arm in all_arms() if arm.name == variant.against)
    ours, theirs = (_config(arm).model.model_dump(mode="json") for arm in (variant, beside))
    sections = {
        "conditioning": ours["conditioning"],
        "attention": ours["decoder"].pop("attention"),
        "decoder": ours["decoder"],
    }
    others = {
        "conditioning": theirs["conditioning"],
        "attention": theirs["decoder"].pop("attention"),
        "decoder": theirs["decoder"],
    }
    assert sum(sections[name] != others[name] for name in sections) == 1
    assert ours["kind"] == theirs["kind"]


def test_arms_are_chosen_by_their_whole_names() -> None:
    assert [arm.name for arm in chosen_arms("regen-k16|magvit2-k4")] == ["magvit2-k4", "regen-k16"]
    assert len(chosen_arms(".*")) == 28
    with pytest.raises(ConfigError, match="matches no arm; there are regen-k4, "):
        chosen_arms("regen")
    with pytest.raises(ConfigError, match="no regular expression"):
        chosen_arms("(")


def test_only_regen_itself_is_measured_in_more_steps() -> None:
    assert {arm.name for arm in all_arms() if len(arm.steps) > 1} == {f"regen-k{k}" for k in COMPRESSIONS}


def test_a_config_with_too_few_stages_is_refused() -> None:
    base = load_embedder_config(CONFIG, CompressionArm("regen", 8).overrides(BASE))
    assert len(stages_of(base, 8)) == 3
    with pytest.raises(ConfigError, match="has 3 stages; an encoder of k = 16 is made of the first 4"):
        stages_of(base, 16)


def test_targets_are_the_papers_margins() -> None:
    for k, target in MARGIN_TARGETS_DB.items():
        theirs, ours = PAPER_DB["MCL-JCV"][k]
        assert ours - theirs == pytest.approx(target, abs=0.05)
