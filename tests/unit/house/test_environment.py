"""environment.yml (conda, GPU cluster), pyproject.toml (pip) and constraints.txt (CI) ask for the same packages."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
CONDA_NAME = {"pytorch": "torch"}  # conda's name -> PyPI's
APEX_BUILD = {  # of apex: compilers, and the headers that torch's own headers include
    "cuda-nvcc", "cuda-cudart-dev", "cuda-cccl", "cuda-nvtx-dev", "cuda-profiler-api", "gxx-linux-64",
    "libcublas-dev", "libcurand-dev", "libcusolver-dev", "libcusparse-dev",
}  # fmt: skip
CONDA_ONLY = {"pip", "cuda-version", "cudnn", "nccl", *APEX_BUILD}


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _pip_requirements() -> dict[str, str]:
    project = _project()
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(each.name): str(each.specifier) for each in parsed if each.name != _project()["name"]}


def _conda_requirements() -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]:
        for line in entry["pip"] if isinstance(entry, dict) else [" ".join(entry.split()[:2])]:
            parsed = Requirement(line)
            name = canonicalize_name(parsed.name)
            found[CONDA_NAME.get(name, name)] = str(parsed.specifier)
    return found


def _pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(each.name): str(each.specifier) for each in parsed}


def test_conda_and_pip_ask_for_the_same_ranges() -> None:
    conda = _conda_requirements()
    python = conda.pop("python")
    assert python == str(Requirement(f"python{_project()['requires-python']}").specifier)
    assert {name: spec for name, spec in conda.items() if name not in CONDA_ONLY} == _pip_requirements()


def test_every_requirement_is_a_range_with_both_ends() -> None:
    open_ended = {name: spec for name, spec in _pip_requirements().items() if ">=" not in spec or "<" not in spec}
    assert open_ended == {}


def test_constraints_pin_every_requirement_inside_its_range() -> None:
    pins = _pins()
    wanted = _pip_requirements()
    for line in _project()["optional-dependencies"]["gpu"]:  # compiled against CUDA, which CI has not
        wanted.pop(canonicalize_name(Requirement(line).name))
    for name, ranges in wanted.items():
        pin = pins[name]
        assert pin.startswith("=="), f"{name} is not pinned exactly: {pin}"
        assert SpecifierSet(ranges).contains(pin.removeprefix("==")), f"{name}{pin} is outside {ranges}"


def test_apex_and_torchvision_are_never_asked_for() -> None:
    forbidden = {"apex", "torchvision"}
    assert forbidden.isdisjoint(_pip_requirements())
    assert forbidden.isdisjoint(_conda_requirements())
    assert forbidden.isdisjoint(_pins())
