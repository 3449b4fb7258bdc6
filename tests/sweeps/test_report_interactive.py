"""The data of the page's script: points at their places in the figures, ids of the settings' marks,
configs of two runs; and the report that is updated while a sweep runs."""

from __future__ import annotations

import http.client
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from sweeps.report import watch as watching
from sweeps.report.__main__ import main
from sweeps.report.watch import watch
from tests.sweeps.fixture_runs import depth_sweep, write_run
from tests.sweeps.reported import page_of

LOSSES = {0: (2.0, 2.1, 2.2), 1: (1.9, 2.05, 2.0), 2: (1.8, 1.9, 2.0)}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sweep")
    depth_sweep(folder, LOSSES)
    return page_of(folder)


@pytest.fixture(scope="module")
def data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(found[1])


def points(page: str, name: str) -> list[tuple[int, float, float, list[str]]]:
    """Number of the setting, place and lines of every point of a figure."""
    figure = page[page.index(f'id="figure-{name}"') :].partition("</figure>")[0]
    pattern = (
        r'<circle cx="([\d.]+)" cy="([\d.]+)" r="6" class="point series-(\d+)">'
        r"<title>(.*?)</title></circle>"
    )
    found = re.findall(pattern, figure, re.S)
    return [(int(n), float(x), float(y), said.splitlines()) for x, y, n, said in found]


def test_points_say_what_the_figures_show(page: str, data: dict[str, Any]) -> None:
    assert data["settings"] == ["D = 0", "D = 1", "D = 2"]
    for number, losses in enumerate(LOSSES.values()):
        said = next(lines for n, _, _, lines in points(page, "loss_depth") if n == number)
        mean = sum(losses) / 3
        deviation = (sum((loss - mean) ** 2 for loss in losses) / 2) ** 0.5
        assert said[0] == f"D = {number}" and said[1].startswith("depth: ")
        # t(0.975, 2)
        half = 4.302653 * deviation / 3**0.5
        assert said[2] == f"nats per token: {mean:.5g} ± {half:.5g}"


def test_places_are_those_of_the_marks(page: str) -> None:
    """A marker of matplotlib's SVG is a ``use`` at its place."""
    figure = page[page.index('id="figure-loss_depth"') :]
    for number in range(3):
        marks = re.findall(rf'<g id="loss_depth-series-{number}-\d+".*?</g>\s*</g>', figure, re.S)
        places = re.findall(r'<use href="[^"]*" x="([\d.]+)" y="([\d.]+)"', "".join(marks))
        drawn = {(round(float(x), 1), round(float(y), 1)) for x, y in places}
        own = [(x, y) for n, x, y, _ in points(page, "loss_depth") if n == number]
        assert own
        for x, y in own:
            assert any(abs(x - a) <= 0.1 and abs(y - b) <= 0.1 for a, b in drawn), (x, y, drawn)


def test_legends_are_switches_of_all_figures(page: str) -> None:
    for name in ("loss_tokens", "loss_flops", "loss_depth"):
        for number in range(3):
            # Its handle and its text.
            assert len(re.findall(f'id="{name}-switch-{number}-\\d+"', page)) == 2
            assert f'id="{name}-series-{number}-' in page


def test_configs_are_compared(data, tmp_path, capsys):
    assert all(
        set(c) <= {"mtp.depth", "data.depth", "seed", "data.seed"} for c in data["configs"].values()
    )
    assert len(data["configs"]) == 9
    for name, changes in (("a", {"mtp.depth": 1}), ("b", {"mtp.depth": 2, "x": "<b>"})):
        changes["logger.csv.folder"] = str(tmp_path / name)  # as every run has it
        loss = 2.0 if name == "a" else 2.5
        write_run(tmp_path / name, {"seed": 0, "run_dir": name, **changes}, loss=loss)
    main(["--diff", str(tmp_path / "a"), str(tmp_path / "b")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["data.depth: 1 | 2", "mtp.depth: 1 | 2", "x: – | <b>"]
    assert lines[3] == "val/loss_depth_0: 2.0000 | 2.5000" and "flops: 3 G | 3 G" in lines
    main(["--diff", str(tmp_path / "a"), str(tmp_path / "a")])
    equal = ["the configs are equal", "val/loss_depth_0: 2.0000 | 2.0000"]
    assert capsys.readouterr().out.splitlines()[:2] == equal
    for wrong, said in (
        (["--diff", str(tmp_path / "a")], "compares two runs, not 1"),
        (["--diff", str(tmp_path / "a"), str(tmp_path)], "is not a run with a config.yaml"),
    ):
        with pytest.raises(SystemExit):
            main(wrong)
        assert said in capsys.readouterr().err
    page = page_of(tmp_path)
    assert "<b>" not in page.partition('id="data">')[2].partition("</script>")[0]


def answer(port: str, path: str, **headers: str) -> tuple[int, bytes]:
    """The status and the content that this machine's server gives."""
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
    connection.request("GET", path, headers=headers)
    found = connection.getresponse()
    content = found.status, found.read()
    connection.close()
    return content


def test_a_watched_page_is_made_again_and_served_to_this_machine(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("0")
    (tmp_path / "config.yaml").write_text("secret")
    made, said, got = [], [], {}
    ready = threading.Event()
    hidden = ("/config.yaml", "/figures/", "/figures/../config.yaml")

    def make() -> tuple[Path, list[str], bool]:
        made.append(len(made))
        if len(made) > 1:  # the first one has been served before
            assert ready.wait(30)
        (tmp_path / "report.html").write_text(str(made[-1]))
        return tmp_path / "report.html", [], len(made) < 3

    def look(text: str) -> None:
        said.append(text)
        if found := re.match(r"http://127\.0\.0\.1:(\d+)/", text):
            for path in ("/", "/report.html", *hidden):
                got[path] = answer(found[1], path)
            for host in (f"localhost:{found[1]}", "evil.example"):
                got[host.partition(":")[0]] = answer(found[1], "/", Host=host)
            ready.set()

    watch(make, seconds=0.01, tell=look)
    assert made == [0, 1, 2]
    assert got["/"] == got["/report.html"] == got["localhost"] == (200, b"0")
    assert got["evil.example"][0] == 421
    assert [got[path][0] for path in hidden] == [404, 404, 404]
    assert "the last report is" in said[-1]
    assert watching.HOST == "127.0.0.1"


def test_only_a_page_of_running_jobs_loads_itself_again(tmp_path: Path) -> None:
    running = {"state": "running", "reason": "", "overrides": []}
    write_run(tmp_path / "a", {"seed": 0}, loss=2.0)
    write_run(tmp_path / "b", {"seed": 1}, status=running, done=False)
    refresh = '<meta http-equiv="refresh" content="10">'
    assert refresh in page_of(tmp_path, watched=True)
    assert 'http-equiv="refresh"' not in page_of(tmp_path)
