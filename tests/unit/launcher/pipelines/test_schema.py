"""The file of a pipeline: what it may say, what is wrong with it, and in which order its steps run."""

from __future__ import annotations

from graphlib import CycleError
from pathlib import Path

import pytest

from launcher.pipelines import schema
from launcher.pipelines.schema import Pipeline, exists, load_pipeline
from regen_dist.errors import ConfigError

LOOK = "command: [config, show]"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> Pipeline:
    Path("p.yaml").write_text(text)
    return load_pipeline(Path("p.yaml"), overrides)


def refusal(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()


def test_a_step_waits_for_the_one_above_it() -> None:
    found = load(f"name: p\nsteps:\n  a: {{{LOOK}}}\n  b: {{{LOOK}}}\n  c: {{{LOOK}, after: []}}\n  d: {{{LOOK}}}\n")
    assert found.before == {"a": (), "b": ("a",), "c": (), "d": ("c",)}
    assert found.ordered == ["a", "b", "c", "d"]


def test_a_name_with_dots_may_have_references() -> None:
    text = "name: p\nvariables: {{d: x}}\nsteps:\n  a.v1: {{command: [config, show, '{}'], array: {}}}\n"
    assert load(text.format("${variables.d}/y", 2)).steps["a.v1"].command == ("config", "show", "x/y")
    found = refusal(text.format("${variables.nobody}", "no"))
    assert "p.yaml:4: steps.a.v1.array: found 'no' without quotes" in found[1]
    assert "p.yaml:4: steps.a.v1.command.2: '${variables.nobody}' cannot be resolved" in found[2]
    assert len(found) == 3


def test_a_step_may_stand_below_what_waits_for_it() -> None:
    """A file that extends another adds its steps at the end, wherever they belong."""
    Path("base.yaml").write_text(f"name: p\nsteps:\n  a: {{{LOOK}}}\n  b: {{{LOOK}}}\n")
    text = f"extends: base.yaml\nsteps:\n  b: {{after: [between]}}\n  between: {{{LOOK}, after: [a, a]}}\n"
    found = load(text)
    assert found.ordered == ["a", "between", "b"]
    assert found.before["between"] == ("a",)


def test_orders_keep_to_the_file_where_they_can() -> None:
    assert schema.in_order({"x": [], "y": ["z"], "z": [], "w": []}) == ["x", "z", "y", "w"]
    with pytest.raises(CycleError):
        schema.in_order({"x": ["x"]})


def test_everything_that_is_wrong_is_told_at_once_with_its_line() -> None:
    text = f"""\
name: no name
stepz: 1
steps:
  a:
    {LOOK}
    after: [c]
    arrray: 3
  b: {{{LOOK}, after: [a, cc]}}
  c:
    train: c.yaml
    array: 3
    after: [b]
"""
    assert refusal(text) == [
        "p.yaml: 6 problems",
        "  p.yaml:8: steps.b.after: there is no step 'cc'; did you mean c? Allowed: a, c",
        "  p.yaml:4: steps.a: these steps wait for each other: a -> c -> b -> a; take one `after` out",
        "  p.yaml:1: name: found 'no name' (str); allowed: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$'",
        "  p.yaml:7: steps.a.arrray: unknown key; did you mean steps.a.array? Known here: train, overrides, command, "
        "array, after, inputs, outputs, cluster",
        "  p.yaml:9: steps.c: a training is one task; runs of different values are a sweep",
        "  p.yaml:2: stepz: unknown key; did you mean steps? Known here: name, output, variables, steps",
    ]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("{}", "give either train"),
        ("{train: a.yaml, command: [x]}", "give either train"),
        ("{command: []}", "give either train"),
        (f"{{{LOOK}, overrides: [a=1]}}", "overrides change the config of a training"),
        ("{train: a.yaml, outputs: [x]}", "inputs and outputs are a command's"),
        (f"{{{LOOK}, outputs: ['http://x/y']}}", "http:// is read only"),
        (f"{{{LOOK}, outputs: ['']}}", "the URL is empty"),
        (f"{{{LOOK}, array: 0}}", "greater than 0"),
        (f"{{{LOOK}, after: a}}", "valid tuple"),
        ("{command: [[x]]}", "valid string"),
        ("3", "found 3 (int)"),
    ],
)
def test_what_a_step_cannot_be(step: str, expected: str) -> None:
    assert expected in "\n".join(refusal(f"name: p\nsteps:\n  a: {step}\n"))


@pytest.mark.parametrize("steps", ["{}", "[a]", "none"])
def test_steps_are_a_mapping_with_something_in_it(steps: str) -> None:
    assert "p.yaml:2: steps: " in "\n".join(refusal(f"name: p\nsteps: {steps}\n"))


def test_overrides_and_references() -> None:
    command = "[x, '${variables.data}/t', --side, '${variables.side}', 1.5]"
    text = f"name: p\nvariables: {{data: s3://a/b, side: 64}}\nsteps:\n  a: {{command: {command}}}\n"
    found = load(text, "variables.data=s3://mine", "steps.a.array=7", "steps.a.cluster.time_min=9")
    assert found.steps["a"].command == ("x", "s3://mine/t", "--side", "64", "1.5")
    assert (found.steps["a"].array, found.steps["a"].cluster) == (7, {"time_min": 9})
    assert "command line: steps.b.after: there is no step 'c'" in "\n".join(
        refusal(text, "steps.b.command=[x]", "steps.b.after=[c]")
    )


def test_outputs_that_are_there(tmp_path: Path) -> None:
    Path("folder/below").mkdir(parents=True)
    assert not exists("folder/none")
    assert not exists("folder/below")
    Path("folder/file").touch()
    assert exists("folder/file")
    assert exists("folder/")
    assert exists((tmp_path / "folder").as_uri())
