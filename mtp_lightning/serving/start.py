"""Checks ``conf/serve.yaml``, opens the model and starts the server."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import Any

from mtp_lightning.command_line import check_config
from mtp_lightning.command_line.shell import Stopped
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.errors import UserError, require_package
from mtp_lightning.experiment.device import kernels_line
from mtp_lightning.experiment.generating import open_from_config
from mtp_lightning.opening import OpenedModel
from mtp_lightning.run.layout import CHECKPOINTS
from mtp_lightning.settings import require

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "jinja2")


def serve(cfg: Any) -> None:
    """Answer requests until a signal comes.

    Raises:
        UserError: an option is out of range, a package is missing, or a checkpoint is damaged or of
            another program.
        OSError: a file is missing.
        Stopped: a signal stopped the server.
    """
    check_config.check(dict(cfg), "serve")
    are_names = all(isinstance(name, str) for name in cfg.hosts)
    require(are_names, "hosts", cfg.hosts, "a list of names, such as [gpu.example.org]")
    require(cfg.name is None or bool(str(cfg.name).strip()), "name", cfg.name, "a name or null")
    DecodingOptions.from_config(cfg)
    for package in _PACKAGES:
        require_package(package, what="serving", extra="serve")
    from mtp_lightning.serving.server import Server

    with listen(str(cfg.host), cfg.port) as listening:  # fails before a large model is read
        run = open_from_config(cfg)
        name = _name(cfg, run.path)
        server = Server(cfg, run, name=name)
        host, port = listening.getsockname()[:2]
        page = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        print(f"{name} (page: {page}) answers at {page}v1", flush=True)
        print(_context(run), flush=True)
        if kernels := kernels_line(run.model.head.weight.device.type):
            print(kernels, flush=True)
        server.run([listening])
    if server.worker.failure is not None:
        raise server.worker.failure
    n_cut = server.worker.cut
    texts = {0: "no text was", 1: "1 text was"}.get(n_cut, f"{n_cut} texts were")
    number = signal.SIGINT if server.signum is None else server.signum
    raise Stopped(f"ended; {texts} cut short.", number)


def listen(host: str, port: int) -> socket.socket:
    """Open a socket on a host, a name or an address, and a port, 0 for a free one. Clients that
    connect wait until the server runs.

    Raises:
        UserError: the address is not available.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:  # no label of a name may be empty or long
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
        raise UserError(
            f"host={host} port={port} is not available ({reason}): give another port= or host=."
        ) from error


def _name(cfg: Any, file: Path) -> str:
    """The model's name for clients: ``cfg.name``, or the name of its run or folder."""
    if cfg.name is not None:
        return str(cfg.name)
    file = file.resolve()
    if file.parent.name == CHECKPOINTS:
        return file.parent.parent.name
    return file.name if file.is_dir() else file.stem


def _context(run: OpenedModel) -> str:
    """One line about the model's context."""
    text = f"context: {run.seq_len} tokens"
    if not (run.brings_trunk and run.step):  # not a training that began with an imported trunk
        return text
    return (
        f"{text}, the window of its training; to serve the trunk's whole context, export the run "
        "with max_positions=N (mtp-lightning heads does) and serve the export"
    )
