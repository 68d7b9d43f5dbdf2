"""Environments: environment.yml, pyproject.toml, constraints.txt, the Dockerfile and docs/gpu.md ask for the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from regen_dist.models.layers import FIRST_CUDNN

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


# What GPU machines are set up by: environment.yml, the Dockerfile and docs/gpu.md ask for the same.


CONDA, DOCKER, PAGE = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("environment.yml", "Dockerfile", "docs/gpu.md")
)
PYTHON_OF = {"ubuntu22.04": "3.10", "ubuntu24.04": "3.12"}
ARGS = {name: value.strip('"') for name, value in re.findall(r"^ARG (\w+)=(.+)$", DOCKER, re.MULTILINE)}


def test_conda_holds_cuda_to_one_minor_version_and_says_it_to_the_solver() -> None:
    """nvcc, which builds apex, is of torch's own version; a login node has no driver to tell it by."""
    low, high = re.fullmatch(r"<(\d+\.\d+),>=(\d+\.\d+)", _conda_requirements()["cuda-version"]).group(2, 1)  # type: ignore[union-attr]
    major, minor = map(int, low.split("."))
    assert high == f"{major}.{minor + 1}"
    for text in (CONDA, PAGE, (ROOT / "README.md").read_text(encoding="utf-8")):
        assert re.findall(r"CONDA_OVERRIDE_CUDA=([\d.]+) conda env create", text) == [low]


def test_conda_has_what_apex_is_built_with() -> None:
    assert set(_conda_requirements()) >= APEX_BUILD


def test_cudnn_is_one_that_training_accepts() -> None:
    first = f"{FIRST_CUDNN // 10_000}.{FIRST_CUDNN // 100 % 100}"
    assert _conda_requirements()["cudnn"] == f">={first}"
    assert f"| cuDNN | {first} |" in PAGE
    *_, last = re.findall(r"pip install .*", DOCKER)  # pip undoes it where it installs what depends on torch
    assert last.split()[3:] == ["--no-deps", f'"nvidia-cudnn-cu${{CUDA%%.*}}>={first}"']


@pytest.mark.parametrize("name", ["torch", "flash-attn"])
def test_the_image_installs_the_ranges_of_the_project(name: str) -> None:
    wanted = Requirement(ARGS[name.replace("-", "_").upper()])
    assert wanted.name == name
    assert wanted.specifier == SpecifierSet(_pip_requirements()[name])


def test_the_image_compiles_by_torchs_cuda_and_runs_on_it() -> None:
    major, minor, _ = ARGS["CUDA"].split(".")
    assert ARGS["TORCH_INDEX"].endswith(f"/cu{major}{minor}")
    bases = re.findall(r"^FROM (\S+)", DOCKER, re.MULTILINE)
    assert bases == [f"nvidia/cuda:${{CUDA}}-{kind}-${{UBUNTU}}" for kind in ("devel", "runtime")]
    assert SpecifierSet(_project()["requires-python"]).contains(PYTHON_OF[ARGS["UBUNTU"]])


def test_the_image_finds_the_files_that_it_copies() -> None:
    """They are there, and .dockerignore lets them through."""
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [line.split()[1:-1] for line in DOCKER.splitlines() if line.startswith("COPY ") and "--from" not in line]
    files = {file for files in copied for file in files}
    assert files == let_through
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_every_variable_of_the_image_is_declared() -> None:
    used = set(re.findall(r"\$\{(\w+)\}", DOCKER))
    assert used <= set(ARGS)
    assert set(re.findall(r"--build-arg (\w+)=", DOCKER + PAGE)) <= set(ARGS)


def test_the_page_sets_keys_that_a_cluster_file_has() -> None:
    import yaml

    from launcher.cluster import ClusterConfig

    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        ClusterConfig.model_validate({"time_min": 60, **yaml.safe_load(block)})
