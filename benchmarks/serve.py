"""The server's speed by the number of clients, with drafts and without.

    python -m benchmarks.serve --checkpoint runs/mine

Two servers (extra ``serve``) of one thread each, one drafting and one plain, are asked in turn, so
that a busy spell of the machine falls on both; every client asks again as soon as it is answered.
Texts are greedy. With ``--cpu-time`` the seconds are those that the server's process has had of the
CPU, HTTP included: for a machine that is busy with something else. Ratios are medians over turns:
``against_one`` of a server's tokens/s over those of one client in the same turn, ``speedup`` of
drafting over plain.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import common

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


@dataclass(frozen=True)
class Served:
    """A server that runs: its address, and how its seconds are counted."""

    url: str
    clock: Callable[[], float]


@contextmanager
def server(checkpoint: str, speculative: str, *, cpu_time: bool) -> Iterator[Served]:
    """A server for as long as it is needed."""
    app = [sys.executable, str(common.ROOT / "serve.py"), f"checkpoint={checkpoint}", "port=0"]
    options = [f"speculative={speculative}", "num_threads=1", "batch_size=8"]
    with subprocess.Popen([*app, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().split()[-1]
            clock = time.perf_counter
            yield Served(url, (lambda: cpu_seconds(process.pid)) if cpu_time else clock)
        finally:
            process.terminate()


def cpu_seconds(pid: int) -> float:
    """What a process has had of the CPU so far (Linux)."""
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


def load(served: Served, clients: int, *, requests: int, tokens: int) -> dict[str, Any]:
    """What so many clients get that ask ``requests`` times each."""
    asked = [PROMPTS[i % len(PROMPTS)] for i in range(clients * requests)]
    began = served.clock()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda prompt: ask(served.url, prompt, tokens), asked))
    seconds = served.clock() - began
    total = sum(n for _, n in answers)
    return {
        "texts": [text for text, _ in answers],
        "tokens_per_second": total / seconds,
        "requests_per_second": len(asked) / seconds,
    }


def measure(
    checkpoint: str, *, clients: list[int], turns: int, tokens: int, cpu_time: bool
) -> dict[str, Any]:
    """Rows of the table, and whether the texts of both servers are the same."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        servers = {
            way: stack.enter_context(server(checkpoint, speculative, cpu_time=cpu_time))
            for way, speculative in WAYS.items()
        }
        for served in servers.values():
            load(served, max(clients), requests=1, tokens=tokens)
        for turn in range(turns):
            common.progress(f"turn {turn + 1} of {turns}")
            for n in clients:
                for way, served in servers.items():
                    got = load(served, n, requests=8 if n == 1 else 2, tokens=tokens)
                    found.setdefault((way, n), []).append(got)

    def ratio(a: tuple[str, int], b: tuple[str, int]) -> float:
        both = zip(found[a], found[b], strict=True)
        return median(x["tokens_per_second"] / y["tokens_per_second"] for x, y in both)

    rows = [
        {
            "way": way,
            "clients": n,
            **{k: median(g[k] for g in got) for k in ("tokens_per_second", "requests_per_second")},
            "against_one": ratio((way, n), (way, clients[0])),
            "speedup": ratio((way, n), ("plain", n)),
        }
        for (way, n), got in found.items()
    ]
    same = all(
        a["texts"] == b["texts"]
        for n in clients
        for a, b in zip(found["speculative", n], found["plain", n], strict=True)
    )
    return {"rows": rows, "same_texts": same}


def main() -> None:
    """The command."""
    parser = common.parser("The server's speed by the number of clients.", "serve")
    parser.add_argument("--checkpoint", required=True, help="as serve.py takes it")
    parser.add_argument("--clients", type=common.whole_numbers, default=[1, 4, 8])
    parser.add_argument("--tokens", type=int, default=64, help="of every text")
    common.add_cpu_time(parser)
    given = parser.parse_args()
    turns = 1 if given.quick else 5
    result = measure(
        given.checkpoint,
        clients=given.clients,
        turns=turns,
        tokens=given.tokens,
        cpu_time=given.cpu_time,
    )
    common.print_table(
        f"texts of {given.tokens} tokens, {'CPU' if given.cpu_time else 'wall'} seconds",
        {
            "server": "way",
            "clients": "clients",
            "tokens/s": "tokens_per_second|.0f",
            "requests/s": "requests_per_second|.2f",
            "against one client": "against_one|.2f",
            "against plain": "speedup|.2f",
        },
        result["rows"],
    )
    print(f"texts of both servers are the same: {result['same_texts']}")
    common.write_json({**result, "machine": common.machine()}, given.output)


if __name__ == "__main__":
    main()
