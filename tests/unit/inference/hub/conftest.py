"""diffusers copies the code of models into one folder; here into one of each test's own."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    place = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", place)
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        monkeypatch.delitem(sys.modules, name)
