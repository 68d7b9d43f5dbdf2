"""`regen gpu-check --cpu`: every part, at small sizes, through the command line."""

from __future__ import annotations

import json
import subprocess

from regen_dist.programs import regen
from tools.gpu_check.command import PARTS


def test_every_part_passes_on_the_cpu() -> None:
    done = subprocess.run(regen("gpu-check", "--cpu", "--json"), capture_output=True, text=True, check=False)
    told = json.loads(done.stdout)
    assert {each["part"]: each["status"] for each in told["parts"]} == {part.name: "passed" for part in PARTS}, done
    assert done.returncode == 0
    assert told["passed"] is True
