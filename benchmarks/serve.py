"""The server's speed by the number of clients, with drafts and without.

    python -m benchmarks.serve --checkpoint runs/mine

Two servers (extra ``serve``) of one thread each, one drafting and one plain, take turns. A client
asks for a greedy text again as soon as it has its answer. With ``--cpu-time`` the seconds are CPU
seconds of the server's process, HTTP included. Ratios are medians over turns: ``against_one`` of a
server's tokens/s over those of one client in the same turn, ``speedup`` of drafting over plain.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks import cli, harness
from benchmarks.harness import Row

WAYS = {"speculative": "true", "plain": "false"}
PROMPTS = (
    "import os\n",
    "def main(",
    "class Reader:\n    def ",
    "for line in ",
    "    return ",
    "# The ",
    "if __name__ == ",
    "with open(",
)


# The address of a running server, and the clock for its seconds.
Served = tuple[str, Callable[[], float]]


@contextmanager
def server(checkpoint: str, speculative: str) -> Iterator[Served]:
    """A server that runs in the block."""
    app = [sys.executable, str(harness.ROOT / "serve.py"), f"checkpoint={checkpoint}", "port=0"]
    options = [f"speculative={speculative}", "num_threads=1", "batch_size=8"]
    with subprocess.Popen([*app, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().split()[-1]
            cpu_clock = partial(cpu_seconds, process.pid)
            yield url, cpu_clock if harness.counts_cpu_time() else time.perf_counter
        finally:
            process.terminate()


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ask(url: str, prompt: str, tokens: int) -> tuple[str, int]:
    """A text and its number of tokens."""
    body = json.dumps({"prompt": prompt, "max_tokens": tokens, "temperature": 0}).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/completions", body, headers)
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
    return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]


def load(served: Served, clients: int, *, requests: int, tokens: int) -> Row:
    """The rates of so many clients, each of which asks ``requests`` times."""
    url, clock = served
    asked = [PROMPTS[i % len(PROMPTS)] for i in range(clients * requests)]
    began = clock()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda prompt: ask(url, prompt, tokens), asked))
    seconds = clock() - began
    total = sum(n for _, n in answers)
    return {
        "texts": [text for text, _ in answers],
        "tokens_per_second": total / seconds,
        "requests_per_second": len(asked) / seconds,
    }


@cli.command(quick={"turns": 1, "requests": 8}, cpu_time=True)
def serve(
    *,
    checkpoint: str,
    clients: Sequence[int] = (1, 4, 8),
    requests: int = 128,
    tokens: int = 64,
    turns: int = 5,
) -> Row:
    """The server's speed by the number of clients.

    Args:
        checkpoint: as serve.py takes it.
        clients: numbers of clients at once.
        requests: requests of all clients together in one turn.
    """
    with ExitStack() as stack:
        servers = {
            way: stack.enter_context(server(checkpoint, speculative))
            for way, speculative in WAYS.items()
        }
        for served in servers.values():
            load(served, max(clients), requests=1, tokens=tokens)
        sides = {
            (way, n): partial(load, served, n, requests=max(2, requests // n), tokens=tokens)
            for n in clients
            for way, served in servers.items()
        }
        found = harness.take_turns(sides, turns, say="requests")
    rates = {key: [got["tokens_per_second"] for got in own] for key, own in found.items()}
    rows = [
        {
            "way": way,
            "clients": n,
            "tokens_per_second": median(rates[way, n]),
            "requests_per_second": median(got["requests_per_second"] for got in own),
            "against_one": harness.ratio(rates[way, n], rates[way, clients[0]]),
            "speedup": harness.ratio(rates[way, n], rates["plain", n]),
        }
        for (way, n), own in found.items()
    ]
    same = all(
        a["texts"] == b["texts"]
        for n in clients
        for a, b in zip(found["speculative", n], found["plain", n], strict=True)
    )
    cli.print_table(
        f"Texts of {tokens} tokens, {'CPU' if harness.counts_cpu_time() else 'wall'} seconds",
        "server: way; clients: clients; tokens/s: tokens_per_second .0f; "
        "requests/s: requests_per_second .2f; against one client: against_one .2f; "
        "against plain: speedup .2f",
        rows,
    )
    print(f"texts of both servers are the same: {same}")
    return {"rows": rows, "same_texts": same}


main = cli.program(serve)


if __name__ == "__main__":
    main()
