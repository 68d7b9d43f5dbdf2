"""A Python that has what users of diffusers have, and nothing of this project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

OURS = ("regen_dist", "regen-dist", "__editable__", "launcher", "tools", "tests", "pydantic", "deepspeed", "omegaconf")
_CHECK = """
import importlib.util, sys
for name in ("regen_dist", "launcher", "pydantic", "deepspeed", "omegaconf"):
    assert importlib.util.find_spec(name) is None, name + " can be imported here"
"""


def clean_python(folder: Path) -> Path:
    """The interpreter of a new virtual environment with links to every installed package but ours, and those that only
    we need."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    for place in map(Path, sys.path):
        if place.name not in ("site-packages", "dist-packages") or not place.is_dir():
            continue
        for entry in place.iterdir():
            link = site / entry.name
            if entry.suffix != ".pth" and not entry.name.startswith(OURS) and not os.path.lexists(link):
                link.symlink_to(entry)
    return folder / "bin" / "python"


def run_clean(python: Path, code: str, *arguments: object, home: Path) -> dict[str, object]:
    """Run a script there, without a network, after checking that nothing of ours can be imported; what its last line
    says in JSON."""
    hidden = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment = hidden | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(python), "-I", "-c", _CHECK + code, *map(str, arguments)], env=environment, cwd=home, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found | {"stderr": done.stderr}
