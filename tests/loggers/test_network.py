"""Loggers with their default settings connect to no other machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
# Python's own sockets refuse to connect, and print the address. The environment's proxy, which
# wandb's other process uses, refuses too.
LIFE = """
import importlib, socket, sys, time
from pathlib import Path

def local(address):
    host = address[0] if isinstance(address, tuple) else address
    return host in (None, "", "localhost") or not isinstance(host, str) or host.startswith(
        ("/", "127.", "::1", "0.0.0.0", "\\0"))

def refusing(name):
    real = getattr(socket.socket, name)
    def connect(self, address, *rest):
        if not local(address):
            print("REACHED", address, file=sys.stderr, flush=True)
            raise OSError(f"refused: {address}")
        return real(self, address, *rest)
    setattr(socket.socket, name, connect)

for name in ("connect", "connect_ex"):
    refusing(name)
look_up = socket.getaddrinfo
def getaddrinfo(host, *rest, **more):
    if not local((host,)) and host != socket.gethostname():
        print("REACHED", host, file=sys.stderr, flush=True)
        raise socket.gaierror(f"refused: {host}")
    return look_up(host, *rest, **more)
socket.getaddrinfo = getaddrinfo

module, name = sys.argv[1].split(":")
kind = getattr(importlib.import_module(f"mtp_lightning.loggers.{module}"), name)
folder = Path("run").absolute()
arguments = {"csv": [], "tensorboard": [2]}.get(module, ["lab"])
logger = kind(folder, *arguments)
logger.log_hyperparams({"mtp.depth": 2})
for step in range(1, 4):
    logger.log_metrics({"train/loss": step / 8}, step)
logger.write_text("decode/sample", "a text", 3)
logger.log_final({"mtp.depth": 2}, {"val/final": 0.5}, 3)
logger.finalize("success")
time.sleep(2)
print("ENDED")
"""


class _Proxy(BaseHTTPRequestHandler):
    requests: list[str] = []

    def refuse(self) -> None:
        self.requests.append(self.path)
        self.send_error(403)

    do_CONNECT = do_GET = do_POST = do_PUT = do_HEAD = refuse

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
    _Proxy.requests = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "logger",
    [
        pytest.param("csv:MetricsCSV", marks=pytest.mark.long),
        pytest.param("tensorboard:RunTensorBoard", marks=pytest.mark.slow),
        pytest.param("wandb:RunWandb", marks=[pytest.mark.slow, pytest.mark.extras]),
        pytest.param("mlflow:RunMLflow", marks=[pytest.mark.long, pytest.mark.extras]),
        pytest.param("trackio:RunTrackio", marks=[pytest.mark.long, pytest.mark.extras]),
    ],
)
def test_no_logger_connects_to_another_machine(logger: str, proxy: str, tmp_path: Path) -> None:
    module = logger.partition(":")[0]
    if module not in ("csv", "tensorboard"):
        pytest.importorskip(module, reason=f"pip install -e '.[{module}]'")
    # Libraries switch telemetry off if they notice tests or a user's own servers.
    left_out = ("PYTEST_", "CI", "GITHUB_", "WANDB_", "MLFLOW_", "TRACKIO_", "HF_", "DO_NOT_TRACK")
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(left_out) and not key.lower().endswith("_proxy")
    }
    more = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "WANDB_SILENT": "true"}
    if module == "wandb":  # has a process outside Python, which uses the proxy
        more |= {name: proxy for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")}
        more |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    command = [sys.executable, "-c", LIFE, logger]
    options = {"capture_output": True, "text": True, "timeout": 240}
    done = subprocess.run(command, cwd=tmp_path, env=environment | more, **options)
    assert "ENDED" in done.stdout, done.stderr[-3000:]
    reached = [line for line in done.stderr.splitlines() if line.startswith("REACHED")]
    assert reached == [] and _Proxy.requests == []
