"""The container: its Dockerfile, and, with docker, the built image."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from omegaconf import OmegaConf

from mtp_lightning.paths import CONF
from tests.integration.helpers import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_the_image_serves_and_does_not_run_as_root() -> None:
    image = DOCKERFILE.rpartition("\nFROM ")[2]
    (user,) = re.findall(r"^USER (\S+)$", image, re.MULTILINE)
    assert user not in ("root", "0") and image.index(f"useradd --create-home {user}") > 0
    assert image.index("apt-get") < image.index("USER ") < image.index("ENTRYPOINT")
    port = OmegaConf.load(CONF / "serve.yaml").port
    assert f"EXPOSE {port}\n" in image and f":{port}/health" in image
    (extras,) = re.findall(r"'\.\[(.*?)\]'", DOCKERFILE)
    assert "serve" in extras.split(",")


@pytest.mark.parametrize(
    ("command", "status", "healthy"),
    [("serve", 200, True), ("serve", 503, False), ("serve", None, False), ("train", None, True)],
)
def test_the_health_check_follows_the_servers_answer(command, status, healthy, tmp_path):
    """As docker runs it, with another process 1 and another port."""
    (words,) = re.findall(r"^HEALTHCHECK .*? CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    _, flag, program = json.loads(words)

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert status is not None and self.path == "/health"
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    first = tmp_path / "cmdline"
    first.write_text("\0".join(("python", "/venv/bin/mtp-lightning", command, "port=8000", "")))
    with ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        port = server.server_port
        if status is None:
            server.server_close()
        else:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        program = program.replace("/proc/1/cmdline", str(first)).replace(":8000/", f":{port}/")
        done = subprocess.run([sys.executable, flag, program], capture_output=True, timeout=60)
        assert (done.returncode == 0) == healthy, done.stderr
        if status is not None:
            server.shutdown()


@pytest.mark.long
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
