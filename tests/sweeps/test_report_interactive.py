"""Points, legends and configs for the script of the report's page; reports that are updated while a
sweep runs."""

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
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(match[1])


def points(page: str, name: str) -> list[tuple[int, float, float, list[str]]]:
    """The setting's number, x, y and the title's lines of every point of a figure."""
    figure = page[page.index(f'id="figure-{name}"') :].partition("</figure>")[0]
    pattern = (
        r'<circle cx="([\d.]+)" cy="([\d.]+)" r="6" class="point series-(\d+)">'
        r"<title>(.*?)</title></circle>"
    )
    matches = re.findall(pattern, figure, re.S)
    return [(int(n), float(x), float(y), title.splitlines()) for x, y, n, title in matches]


def test_points_have_the_means_and_intervals_of_their_settings(page, data):
    assert data["settings"] == ["D = 0", "D = 1", "D = 2"]
    for number, losses in enumerate(LOSSES.values()):
        title = next(lines for n, _, _, lines in points(page, "loss_depth") if n == number)
        mean = sum(losses) / 3
        deviation = (sum((loss - mean) ** 2 for loss in losses) / 2) ** 0.5
        assert title[0] == f"D = {number}" and title[1].startswith("depth: ")
        # t(0.975, 2)
        half = 4.302653 * deviation / 3**0.5
        assert title[2] == f"nats per token: {mean:.5g} ± {half:.5g}"


def test_points_lie_on_the_marks_of_the_figure(page: str) -> None:
    """A marker of matplotlib's SVG is a ``use`` at its place."""
    figure = page[page.index('id="figure-loss_depth"') :]
    for number in range(3):
        marks = re.findall(rf'<g id="loss_depth-series-{number}-\d+".*?</g>\s*</g>', figure, re.S)
        places = re.findall(r'<use href="[^"]*" x="([\d.]+)" y="([\d.]+)"', "".join(marks))
        marked = {(round(float(x), 1), round(float(y), 1)) for x, y in places}
        of_setting = [(x, y) for n, x, y, _ in points(page, "loss_depth") if n == number]
        assert of_setting
        for x, y in of_setting:
            assert any(abs(x - a) <= 0.1 and abs(y - b) <= 0.1 for a, b in marked), (x, y, marked)


def test_legends_are_switches_of_all_figures(page: str) -> None:
    for name in ("loss_tokens", "loss_flops", "loss_depth"):
        for number in range(3):
            # A handle and a text.
            assert len(re.findall(f'id="{name}-switch-{number}-\\d+"', page)) == 2
            assert f'id="{name}-series-{number}-' in page


def test_diff_lists_different_keys_and_the_numbers_of_two_runs(data, tmp_path, capsys):
    assert all(
        set(c) <= {"mtp.depth", "data.depth", "seed", "data.seed"} for c in data["configs"].values()
    )
    assert len(data["configs"]) == 9
    for name, changes in (("a", {"mtp.depth": 1}), ("b", {"mtp.depth": 2, "x": "<b>"})):
        changes["logger.csv.folder"] = str(tmp_path / name)  # differs between any two runs
        loss = 2.0 if name == "a" else 2.5
        write_run(tmp_path / name, {"seed": 0, "run_dir": name, **changes}, loss=loss)
    main(["--diff", str(tmp_path / "a"), str(tmp_path / "b")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["data.depth: 1 | 2", "mtp.depth: 1 | 2", "x: – | <b>"]
    assert lines[3] == "val/loss_depth_0: 2.0000 | 2.5000" and "flops: 3 G | 3 G" in lines
    main(["--diff", str(tmp_path / "a"), str(tmp_path / "a")])
    equal = ["the configs are equal", "val/loss_depth_0: 2.0000 | 2.0000"]
    assert capsys.readouterr().out.splitlines()[:2] == equal
    for arguments, message in (
        (["--diff", str(tmp_path / "a")], "compares two runs, not 1"),
        (["--diff", str(tmp_path / "a"), str(tmp_path)], "is not a run with a config.yaml"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
    page = page_of(tmp_path)
    assert "<b>" not in page.partition('id="data">')[2].partition("</script>")[0]


def response(port: str, path: str, **headers: str) -> tuple[int, bytes]:
    """The status and the content of a server's response on this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    content = answer.status, answer.read()
    connection.close()
    return content


def test_watch_updates_the_page_and_serves_it_on_this_machine_only(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("0")
    (tmp_path / "config.yaml").write_text("secret")
    (tmp_path / "figures" / "inner" / "secret").mkdir(parents=True)
    made, messages, responses = [], [], {}
    ready = threading.Event()
    hidden = ("/config.yaml", "/figures/", "/figures/../config.yaml", "/config.yaml#/../figures/a")

    def make() -> tuple[Path, list[str], bool]:
        made.append(len(made))
        if len(made) > 1:  # the first page has been requested
            assert ready.wait(30)
        (tmp_path / "report.html").write_text(str(made[-1]))
        return tmp_path / "report.html", [], len(made) < 3

    def request_pages(text: str) -> None:
        messages.append(text)
        if address := re.match(r"http://127\.0\.0\.1:(\d+)/", text):
            for path in ("/", "/report.html", "/figures/inner/", *hidden):
                responses[path] = response(address[1], path)
            for host in (f"localhost:{address[1]}", "evil.example"):
                responses[host.partition(":")[0]] = response(address[1], "/", Host=host)
            ready.set()

    watch(make, seconds=0.01, tell=request_pages)
    assert made == [0, 1, 2]
    assert responses["/"] == responses["/report.html"] == responses["localhost"] == (200, b"0")
    assert responses["evil.example"][0] == 421
    assert [responses[path][0] for path in hidden] == [404] * 4
    assert b"secret" not in responses["/figures/inner/"][1], "folders are not listed"
    assert "the last report is" in messages[-1]
    assert watching.HOST == "127.0.0.1"


def test_only_a_watched_page_reloads_itself(tmp_path: Path) -> None:
    running = {"state": "running", "reason": "", "overrides": []}
    write_run(tmp_path / "a", {"seed": 0}, loss=2.0)
    write_run(tmp_path / "b", {"seed": 1}, status=running, done=False)
    refresh = '<meta http-equiv="refresh" content="10">'
    assert refresh in page_of(tmp_path, watched=True)
    assert 'http-equiv="refresh"' not in page_of(tmp_path)
