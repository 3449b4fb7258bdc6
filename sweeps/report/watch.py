"""Updates a report while its sweep runs, and serves it to this machine only."""

from __future__ import annotations

import posixpath
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from mtp_lightning.hosts import is_called

HOST = "127.0.0.1"
SECONDS = 10.0


class Pages(SimpleHTTPRequestHandler):
    """Serves the report's current files and nothing else of its folder."""

    timeout = 30  # seconds without a byte from the client

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def end_headers(self) -> None:
        """Forbid caching, since the files change."""
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def send_head(self) -> Any:
        """Serve the page, its table and its figures, for requests with a local host name only."""
        if not is_called(self.headers.get("Host")):
            self.send_error(421)
            return None
        path = posixpath.normpath(unquote(self.path.partition("?")[0]))
        self.path = "/report.html" if path == "/" else quote(path)  # what is checked is served
        if path not in ("/", "/report.html", "/runs.csv") and not path.startswith("/figures/"):
            self.send_error(404)
            return None
        return super().send_head()


def watch(
    make: Callable[[], tuple[Path, list[str], bool]],
    *,
    port: int = 0,
    seconds: float = SECONDS,
    tell: Callable[[str], None] = print,
) -> None:
    """Update and serve a report every few seconds until its jobs have ended or Ctrl-C.

    Args:
        make: makes the report; returns what :func:`sweeps.report.__main__.report` does.
        port: port of 127.0.0.1; 0 takes a free one, and a taken one is an OSError.
        seconds: time between two updates.
        tell: prints a line for the user.
    """
    page, _, running = make()
    handler = partial(Pages, directory=str(page.parent))
    with ThreadingHTTPServer((HOST, port), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tell(
            f"http://{HOST}:{server.server_port}/ until the sweep has ended; Ctrl-C ends it sooner"
        )
        try:
            while running:
                time.sleep(seconds)
                _, _, running = make()
            # An open page still loads the last state.
            time.sleep(min(seconds, SECONDS))
        except KeyboardInterrupt:
            pass
        finally:
            server.shutdown()
    tell(f"the last report is {page}")
