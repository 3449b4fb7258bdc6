"""The container, built and asked for its help where there is docker."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.integration.helpers import ROOT

pytestmark = pytest.mark.long


@pytest.mark.skipif(shutil.which("docker") is None, reason="needs docker")
@pytest.mark.parametrize("torch", ["cpu", "cuda"])
def test_the_image_trains(torch: str) -> None:
    tag = f"mtp-lightning-test:{torch}"
    build = ["docker", "build", "--build-arg", f"TORCH={torch}", "-t", tag, "."]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert built.returncode == 0, built.stderr
    run = ["docker", "run", "--rm", tag, "train", "debug=fast", "data=synthetic", "tokenizer=byte"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "bits per byte" in done.stdout, done.stderr
