"""Each key of a config is described once, in its code; schemas, files and the page of all keys agree with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import fastjsonschema
import pytest
from typer.testing import CliRunner

from regen_dist.config.files import inherited
from regen_dist.config.project import schema_comment
from regen_dist.config.run import Section
from regen_dist.config.schema import config_keys, file_schema, schema_text
from regen_dist.config.yaml_files import parse_yaml, read_yaml
from tests.unit.house.test_contracts import ROOT
from tools.cli import app
from tools.config import SOURCES, ConfigKind, schema_class

MOST_CHARACTERS = 160
SCHEMAS = ROOT / "configs" / "schema"
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
MODULES = {f"regen_dist.config.{path.stem}" for path in (ROOT / "regen_dist" / "config").glob("[a-z]*.py")}


def _sections() -> Iterator[type[Section]]:
    for name in sorted(MODULES | {module for _, module, _ in SOURCES.values()}):
        for each in vars(import_module(name)).values():
            if isinstance(each, type) and issubclass(each, Section) and each.__module__ == name:
                yield each


def test_each_key_is_described_in_one_line() -> None:
    keys = [(section, name, field.description or "") for section in _sections()
            for name, field in section.model_fields.items()]  # fmt: skip
    assert len(keys) > 180
    wrong = [
        f"{section.__name__}.{name}: {text!r}"
        for section, name, text in keys
        if not 10 <= len(text) <= MOST_CHARACTERS or "\n" in text or text[-1] not in ".…"
    ]
    assert wrong == [], f"write Field(description=…), a sentence of at most {MOST_CHARACTERS} characters"


def test_no_comment_says_it_again() -> None:
    """A comment behind a field is a description that `regen config explain` does not print."""
    commented = re.compile(r"^    (?:\w+: .*Field\(.*|\))  # (?!fmt|type|noqa).*$", re.MULTILINE)
    files = {import_module(section.__module__).__file__ for section in _sections()}
    assert commented.search("    width: int = Field(default=3)  # of it")
    assert commented.search("    )  # of it")
    assert [(file, commented.findall(Path(str(file)).read_text())) for file in files
            if commented.search(Path(str(file)).read_text())] == []  # fmt: skip


@pytest.mark.parametrize("kind", ConfigKind)
def test_the_committed_schema_is_the_codes(kind: ConfigKind) -> None:
    written = (SCHEMAS / f"{kind}.json").read_text(encoding="utf-8")
    assert written == schema_text(schema_class(kind)), f"run: make schemas (or: regen config schema {kind} --out …)"


def test_the_page_of_all_keys_is_the_codes() -> None:
    assert {path.stem for path in SCHEMAS.iterdir()} == set(ConfigKind)
    printed = CliRunner().invoke(app, ["config", "keys"]).output
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == printed, "run: make schemas"
    for kind in ConfigKind:
        for key in config_keys(schema_class(kind)):
            assert f"`{key.name}`" in printed or f": {key.name}\n" in printed, key


def _schema_of(path: Path) -> Path:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    named = first.removeprefix(schema_comment(""))
    assert named != first, f"{path}: its first line must be {schema_comment('…')}"
    return (path.parent / named).resolve()


@pytest.fixture(scope="module")
def validators() -> dict[str, Any]:
    return {kind: fastjsonschema.compile(file_schema(schema_class(kind)), use_default=False) for kind in ConfigKind}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_file_fits_the_schema_that_it_names(path: Path, validators: dict[str, Any]) -> None:
    schema = _schema_of(path)
    assert schema.parent == SCHEMAS
    validators[schema.stem](read_yaml(path)[0])
    task = inherited(path).get("task")  # of a run's config or fragment
    assert (task or schema.stem) == schema.stem


WRONG = {  # kind and content of a file -> part of what a validator says
    ("embedder", "{name: a, trian: {steps: 1}}"): "trian",
    ("embedder", "{train: {steps: 0}}"): "train.steps",
    ("embedder", "{optimizer: {kind: adam}}"): "optimizer.kind",
    ("embedder", "{optimizer: {betas: [0.9]}}"): "optimizer.betas",
    ("embedder", "{optimizer: {betas: [0.9, 0.9, 0.9]}}"): "optimizer.betas",
    ("embedder", "{data: {mixture: [{weight: 1.0}]}}"): "url",
    ("embedder", "{data: {size: [64, wide]}}"): "data.size",
    ("embedder", "{model: {latent: {channels: text}}}"): "latent.channels",
    ("t2v", "{task: embedder}"): "task",
    ("t2v", "{diffusion: {target: x0}}"): "target",
    ("cluster", "{kind: pbs}"): "kind",
    ("pipeline", "{steps: {a b: {train: x}}}"): "a b",
    ("pipeline", "{steps: {a: {trian: x}}}"): "trian",
    ("preencode", "{text: {max_tokens: 0}}"): "text",
    ("protocol", "{videos: [{first: 1}]}"): "'video'",
    ("cluster", "{environment: {A: 1}}"): "environment",
    ("t2v", "{data: {clips: [0]}}"): "data.clips",
}
RIGHT = {
    "embedder": "{extends: [a.yaml, b.yaml], train: {steps: '${x.y}', accumulation: 2}}",
    "t2v": "{diffusion: {shift: 1}, data: {clips: ['${a}', 8]}, generation: {embedder: null}}",
    "pipeline": "{steps: {a: {command: [shards, build, 3, 0.5, '${variables.x}'], array: '${variables.n}'}}}",
    "cluster": "{time_min: '${oc.env:MINUTES}', sbatch: {comment: a, reboot: true}, environment: {A: '1'}}",
}  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), WRONG)
def test_an_editor_sees_what_is_wrong(kind: str, text: str, validators: dict[str, Any]) -> None:
    with pytest.raises(fastjsonschema.JsonSchemaException, match=re.escape(WRONG[kind, text])):
        validators[kind](parse_yaml(text))


@pytest.mark.parametrize("kind", RIGHT)
def test_an_editor_lets_references_and_fragments_pass(kind: str, validators: dict[str, Any]) -> None:
    validators[kind](parse_yaml(RIGHT[kind]))


def test_a_schema_has_what_an_editor_shows() -> None:
    """Description, default, range and values of a key; a section's default only where it differs from its keys'."""
    schema = file_schema(schema_class(ConfigKind.T2V))
    sections = schema["definitions"]
    rate = sections["OptimizerConfig"]["properties"]["lr"]
    assert rate["description"].startswith("Peak learning rate")
    assert rate["default"] == 1e-4
    assert {"exclusiveMinimum": 0.0, "maximum": 1.0, "type": "number"} in rate["anyOf"]
    assert sections["OptimizerConfig"]["properties"]["kind"]["anyOf"][0]["enum"] == ["adamw", "cpu_adam", "fused_adam"]
    assert sections["FlowConfig"]["properties"]["density"]["default"] == {"pure_noise": 0.0}
    assert "default" not in schema["properties"]["optimizer"]
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"


def test_a_key_is_explained() -> None:
    def said(key: str) -> str:
        result = CliRunner().invoke(app, ["config", "explain", key])
        return result.output if result.exit_code == 0 else str(result.exception)

    assert said("optimizer.lr").splitlines()[:2] == [
        "optimizer.lr (embedder, t2v)",
        "  number > 0, ≤ 1; default 0.0001",
    ]
    assert "guards.hang.limit_s (embedder, t2v)" in said("guards")
    assert "diffusion.density.pure_noise (t2v)\n  number ≥ 0, ≤ 1; default 0.0\n" in said("diffusion.density")
    assert "did you mean optimizer.lr or train.losses.adversarial.lr?" in said("lr")
    assert "did you mean optimizer.warmup_steps" in said("optimizer.warmup_step")


def test_the_schema_is_written_to_a_file(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["config", "schema", "cluster", "--out", str(tmp_path / "new" / "cluster.json")])
    assert (result.exit_code, result.output) == (0, "")
    assert json.loads((tmp_path / "new" / "cluster.json").read_text())["title"] == "ClusterConfig"
    assert json.loads(CliRunner().invoke(app, ["config", "schema"]).output)["title"] == "EmbedderConfig"
