"""Optional packages: nothing imports them before it uses them, and a missing one is an error that says what to do."""

from __future__ import annotations

import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from regen_dist.checks.findings import Target, refuse
from regen_dist.checks.kernels import packages
from regen_dist.errors import EXTRAS, BackendError, errors_in_one_line
from tests.helpers.tiny import tiny_run
from tests.unit.house.test_environment import ROOT, _project

DISTRIBUTIONS = {  # by the name that is imported, where that is another one
    "PIL": "pillow", "cv2": "opencv-python-headless", "scenedetect": "scenedetect-headless",
}  # fmt: skip
# Classes that derive from diffusers', and the page, which is gradio's through and through.
NEED_THEIR_PACKAGE = {"regen_dist.inference.hub.embedder", "regen_dist.inference.hub.pipeline", "tools.app.page"}
WALK = """
import importlib, pkgutil, sys
from regen_dist.errors import EXTRAS

for name in (*EXTRAS, "skimage", "scipy"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
import launcher, regen_dist, tools

for root in (launcher, regen_dist, tools):
    for found in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError:
            print(found.name)
"""


def test_no_module_imports_an_optional_package_before_it_is_used() -> None:
    done = subprocess.run([sys.executable, "-c", WALK], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == NEED_THEIR_PACKAGE


def test_the_table_of_extras_is_that_of_the_project() -> None:
    extras = _project()["optional-dependencies"]
    asked = {name: {canonicalize_name(Requirement(line).name) for line in lines} for name, lines in extras.items()}
    for package, extra in EXTRAS.items():
        assert canonicalize_name(DISTRIBUTIONS.get(package, package)) in asked[extra], package
    known = {canonicalize_name(DISTRIBUTIONS.get(package, package)) for package in EXTRAS} | {"regen-dist"}
    users = set(EXTRAS.values())
    assert set().union(*(asked[extra] for extra in users)) == known
    (everything,) = (Requirement(line) for line in extras["all"])
    assert everything.extras == users


@pytest.mark.parametrize(("package", "extra"), sorted(EXTRAS.items()))
def test_a_missing_package_is_one_line(
    package: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", ["regen", "--debug", "train", "run.yaml"])
    with pytest.raises(SystemExit) as end, errors_in_one_line({}):
        __import__(package)
    assert end.value.code == BackendError.exit_code
    assert capsys.readouterr().err == (
        f"error: `regen train` needs {package}, which is not installed; run: pip install 'regen-dist[{extra}]'\n"
    )


def test_other_missing_modules_keep_their_traceback() -> None:
    with pytest.raises(ModuleNotFoundError), errors_in_one_line({}):
        __import__("no_package_of_this_name")


@pytest.mark.parametrize(
    ("package", "changes"),
    [
        ("pyarrow", {}),
        ("av", {}),
        ("wandb", {"wandb__mode": "offline"}),
        ("tensorboard", {"tensorboard__enabled": True}),
    ],
)
def test_a_run_is_refused_before_its_start(
    package: str, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(**changes)
    assert list(packages(config, Target())) == []
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendError, match=rf"needs {package}, .*\[{EXTRAS[package]}\]'"):
        refuse(packages(config, Target()))
    (finding,) = packages(config, Target())
    assert finding.exit_code == BackendError.exit_code
    assert list(packages(config, Target(packages=False))) == []
