"""The report's files: their places, completeness, escaping, figures and captions."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from itertools import product
from pathlib import Path

import pytest

from sweeps.report.__main__ import main, report
from sweeps.report.chart import key_to, looks, styled
from sweeps.report.comparable import note_on_depths
from sweeps.report.metrics import LOSS
from sweeps.report.read import read_sweep
from sweeps.report.settings import Setting
from sweeps.report.tables import of_jobs, of_settings
from tests.sweeps.fixture_runs import BASE, depth_sweep, write_plan, write_run
from tests.sweeps.reported import checked_page, drawings, page_of, rows_of, settings_of, table_of

ROOT = Path(__file__).parents[2]


def grid(folder: Path, *, without: tuple[int, float] | None = None) -> None:
    for depth, weight, seed in product((0, 1, 2), (0.1, 0.3), (0, 1)):
        if (depth, weight) == without:
            continue
        loss = 2.0 - 0.1 * depth + weight * 0.1 + 0.01 * seed
        summary = {"flops": 1e9 * (1 + depth), "decode/tokens_per_second": 100.0 + depth}
        summary |= {f"val/loss_depth_{k}": loss for k in range(1, depth + 1)}
        config = {"mtp.depth": depth, "mtp_lambda": weight, "seed": seed}
        write_run(folder / f"d{depth}_l{weight}_s{seed}", config, loss=loss, summary=summary)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep with its report."""
    folder = tmp_path_factory.mktemp("sweep")
    grid(folder)
    report([folder])
    return folder


def test_a_report_writes_its_files_and_nothing_into_the_runs(reported: Path) -> None:
    assert (reported / "report.html").is_file() and (reported / "runs.csv").is_file()
    names = {path.stem for path in (reported / "figures").glob("*.png")}
    assert names == {path.stem for path in (reported / "figures").glob("*.svg")}
    wanted = {"loss_tokens", "loss_flops", "loss_seconds", "loss_depth", "differences"}
    wanted |= {"lambda_loss_depth_0", "heat_map", "pareto_flops", "pareto_decoding"}
    assert wanted <= names
    assert not list(reported.rglob("*.tmp"))
    for svg in (reported / "figures").glob("*.svg"):
        ElementTree.parse(svg)
    for run in reported.glob("d0*"):
        assert {p.name for p in run.iterdir()} == {"config.yaml", "metrics.csv", "summary.json"}


def test_the_page_is_complete_and_self_contained(reported: Path) -> None:
    html = checked_page(reported)
    assert not re.findall(r'<(?:script|img|link|iframe)[^>]+(?:src|href)="(?!#)[^"]*"', html)
    assert not re.findall(r"@import|url\((?!#)", html)
    assert "default-src 'none'" in html
    assert len(rows_of(html)) == 5 + 4  # settings, and differences: plain training has no lambda
    assert "<caption>" in html and '<html lang="en">' in html
    assert "1.9150" in html  # d1_l0.1: 1.91 and 1.92


def test_a_second_report_replaces_the_first_and_no_other_files(tmp_path: Path) -> None:
    grid(tmp_path)
    report([tmp_path])
    before = (tmp_path / "runs.csv").read_bytes()
    names = ("speedup_final.png", "heat_map_paper.svg")
    files_of_the_user = [tmp_path / "figures" / name for name in names]
    for file in files_of_the_user:
        file.write_bytes(b"the user's")
    for run in {*tmp_path.glob("d2*"), *tmp_path.glob("*_l0.3_*")}:
        for file in run.iterdir():
            file.unlink()
    path, sentences, _ = report([tmp_path])
    assert path == tmp_path / "report.html" and sentences[0].startswith("2 settings")
    assert not (tmp_path / "figures" / "heat_map.svg").exists()  # lambda is not varied any more
    assert all(file.exists() for file in files_of_the_user)
    assert (tmp_path / "runs.csv").read_bytes() != before
    assert len(list((tmp_path / "figures").glob("events*"))) == 1


@pytest.mark.usefixtures("real_figures")
def test_the_same_runs_give_the_same_figures(reported: Path) -> None:
    with styled():
        for name in ("loss_tokens", "heat_map", "lambda_loss_depth_0"):
            chart = drawings(reported)[name].chart
            assert chart.svg() == (reported / "figures" / f"{name}.svg").read_bytes()


def test_curves_are_means_at_common_steps(tmp_path: Path) -> None:
    """Seed 0 has ended and seed 1 has validated twice, so the mean has two points."""
    write_run(tmp_path / "a", {"seed": 0}, loss=2.0, curve=(3.0, 2.5))
    write_run(tmp_path / "b", {"seed": 1}, done=False, curve=(3.2, 2.9))
    drawing = drawings(tmp_path)["loss_flops"]
    (axes,) = drawing.chart.panels
    (bold,) = [line for line in axes.lines if line.get_label() == "all runs"]
    assert list(bold.get_xdata()) == [1e9, 2e9]
    assert list(bold.get_ydata()) == pytest.approx([3.1, 2.7])
    thin = [list(line.get_ydata()) for line in axes.lines if line is not bold]
    assert thin == [[3.0, 2.5, 2.0], [3.2, 2.9]]


def test_a_nan_breaks_the_curve(tmp_path: Path) -> None:
    write_run(tmp_path / "a", done=False, curve=(3.0, float("nan"), 2.0))
    axes = drawings(tmp_path)["loss_tokens"].chart.axes
    (line,) = axes.lines
    assert [str(y) for y in line.get_ydata()] == ["3.0", "nan", "2.0"]


def test_a_heat_map_has_a_gap_for_a_missing_setting(tmp_path: Path) -> None:
    grid(tmp_path, without=(2, 0.3))
    drawing = drawings(tmp_path)["heat_map"]
    texts = [text.get_text() for text in drawing.chart.axes.texts]
    # Plain training has its whole row; t(1) = 12.706, s = 0.01 / sqrt 2.
    assert texts[:3] == ["2.0350\n± 0.0635", "2.0350\n± 0.0635", "1.9150\n± 0.0635"]
    assert texts[-1] == "–" and len(texts) == 6


def test_a_grid_of_three_keys_has_a_map_for_each_size(tmp_path: Path) -> None:
    for size, depth, weight in product((64, 128), (1, 2), (0.1, 0.3)):
        config = {"model.d_model": size, "mtp.depth": depth, "mtp_lambda": weight}
        write_run(tmp_path / f"{size}{depth}{weight}", config)
    maps = [d for name, d in drawings(tmp_path).items() if name.startswith("heat_map")]
    assert [d.title for d in maps] == [f"D by lambda at model.d_model={n}" for n in (64, 128)]
    assert len({d.name for d in maps}) == 2


def test_steps_that_matching_has_set_are_a_column(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "plain", {"mtp.depth": 0})
    write_run(tmp_path / "a" / "heads", {"mtp.depth": 1})
    assert ("Training", "steps") not in of_settings(settings_of(tmp_path / "a"), ()).head
    matched = {"step": 7, "compare": {"max_steps": 7}}
    write_run(tmp_path / "a" / "matched", {"mtp.depth": 2}, summary=matched)
    table = of_settings(settings_of(tmp_path / "a"), ())
    at = table.head.index(("Training", "steps"))
    assert [row[at].text for row in table.rows] == ["20", "20", "7"]


def test_markers_of_the_pareto_front_are_filled(tmp_path: Path) -> None:
    for d_model, loss, flops in ((64, 3.0, 1e9), (128, 2.0, 2e9), (256, 2.5, 3e9)):
        config, summary = {"model.d_model": d_model}, {"flops": flops}
        write_run(tmp_path / f"{d_model}", config, loss=loss, summary=summary)
    axes = drawings(tmp_path)["pareto_flops"].chart.axes
    line = axes.lines[0]
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [(1e9, 3.0), (2e9, 2.0)]
    filled = {c.get_label(): c.lines[0].get_markerfacecolor() for c in axes.containers}
    assert [value != "none" for value in filled.values()] == [True, True, False]


def test_missing_figures_have_a_reason(tmp_path: Path) -> None:
    write_run(tmp_path / "a", loss=2.0)
    reasons = {name: d.why for name, d in drawings(tmp_path).items() if d.why}
    wanted = {"lambda_loss_depth_0": "mtp_lambda is not varied"}
    wanted |= {"speedup": "no finished run has decode/speedup"}
    wanted |= {"differences": "no two finished settings share a seed"}
    assert wanted.items() <= reasons.items()
    assert f"Speed-up against D: {wanted['speedup']}." in page_of(tmp_path)


def test_a_legend_of_many_settings_is_by_key() -> None:
    grid = product((0, 1, 2), range(9), "xy")
    settings = [Setting(values={"a": a, "b": b, "c": c}, config={}) for a, b, c in grid]
    assert len({(o.color, o.dash, o.marker) for o in looks(settings).values()}) == len(settings)
    small = [one for one in settings if one.values["b"] < 2]  # dashes are enough for them
    assert len({(o.color, o.dash) for o in looks(small).values()}) == len(small)
    legend = [label for label, _ in key_to(settings, settings)]
    assert legend[:4] == ["a=0", "a=1", "a=2", "b=0, c=x"] and len(legend) == 3 + 18
    few = [label for label, _ in key_to(settings, settings[:3])]
    assert few == ["a=0, b=0, c=x", "a=0, b=0, c=y", "a=0, b=1, c=x"]


def test_trials_of_a_search_have_no_legend_and_no_heat_map(tmp_path: Path) -> None:
    """Each trial has values of its own: a grid of them is empty, and a legend longer than they."""
    values = [{"optimizer.lr": 0.1 / (i + 1), "mtp_lambda": 0.01 * i} for i in range(25)]
    jobs = {f"{i}": [f"{k}={v}" for k, v in config.items()] for i, config in enumerate(values)}
    write_plan(tmp_path, jobs)
    for name, config in zip(jobs, values, strict=True):
        write_run(tmp_path / name, config)
    settings = settings_of(tmp_path)
    assert len(key_to(settings.all, settings.all)) == 50 and len(settings.all) == 25
    drawn = drawings(settings)
    assert drawn["heat_map"].why == "most pairs of these values have no run"
    assert drawn["pareto_flops"].chart.figure.legends == []


def test_a_report_of_a_running_sweep_lists_running_and_missing_jobs(tmp_path: Path) -> None:
    depth_sweep(tmp_path, {0: (2.0, 2.1)}, status={"state": "done"})
    running = {"state": "running", "overrides": ["mtp.depth=1", "seed=0"]}
    folder = write_run(tmp_path / "new", {"mtp.depth": 1}, status=running, done=False)
    with (folder / "metrics.csv").open("a") as file:
        file.write("30,,2.")  # an incomplete line
    jobs = {f"depth-0_seed-{s}": ["mtp.depth=0", f"seed={s}"] for s in (0, 1)}
    jobs |= {"new": running["overrides"], "next": ["mtp.depth=1", "seed=1"]}
    write_plan(tmp_path, jobs)
    path, sentences, _ = report([tmp_path])
    assert sentences[0] == "2 settings, 2 seeds, 4 runs: 2 done, 1 running, 1 missing."
    html = path.read_text()
    assert "made while jobs were running" in html and "0 of 2" in html
    assert re.search(r'>next</th>\s*<td class="text state">missing', html)
    write_run(tmp_path / "x", {"mtp.depth": 1, "seed": 2}, loss=1.5)
    assert report([tmp_path])[1][0].startswith("2 settings, 3 seeds, 5 runs: 3 done")


def test_links_to_logs_are_relative_to_the_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "s" / "a", status={"state": "failed"}, done=False)
    (folder / "job.log").write_text("Traceback")
    runs = read_sweep(tmp_path / "s").runs
    assert [row[3].link for row in of_jobs(runs, tmp_path / "s").rows] == ["a/job.log"]
    elsewhere = report([tmp_path / "s"], output=tmp_path / "out")[0]
    assert 'href="../s/a/job.log"' in elsewhere.read_text()


def test_unfinished_jobs_list_the_overrides_that_distinguish_them(tmp_path: Path) -> None:
    for seed, state in ((1, "done"), (2, "pending")):
        status = {"state": state, "overrides": ["data=packages", f"seed={seed}"]}
        write_run(tmp_path / f"{seed}", {"seed": seed}, status=status, done=state == "done")
    ((name, state, _, _, overrides),) = of_jobs(read_sweep(tmp_path).runs, tmp_path).rows
    assert (name.text, state.text, overrides.text) == ("2", "pending", "seed=2")


def variants(folder: Path, readers: dict[str, bool | None]) -> None:
    for name, reads in readers.items():
        rates = {"val/loss_depth_1": 2.5, "val/agreement_depth_1": 0.6, "mtp_reads_tokens": reads}
        config = {"mtp._target_": f"mtp_lightning.mtp.{name}", "mtp.depth": int(reads is not None)}
        write_run(folder / name, config, summary=rates)


def test_depths_with_and_without_true_tokens_are_noted_as_two_tasks(tmp_path: Path) -> None:
    variants(tmp_path / "both", {"sequential": True, "parallel": False, "linear": False})
    figures = drawings(tmp_path / "both")
    html = page_of(tmp_path / "both")
    for text in (figures["loss_depth"].caption, figures["agreement_depth"].caption, html):
        where = text.index("Only decode/* compares the depths of all these heads")
        reading, not_reading = text[where : where + 450].split("and none beyond")
        assert "sequential" in reading and "parallel" not in reading
        assert "parallel" in not_reading and "linear" in not_reading
    table = re.search(r'<h2 id="settings">.*?</caption>', html, re.DOTALL)
    assert table and "Only decode/* compares" in table[0]
    assert "Only decode/* compares" not in figures["loss_tokens"].caption
    variants(tmp_path / "given", {"sequential": True, "none": None})
    assert "reads the true tokens before its" in note_on_depths(settings_of(tmp_path / "given"))
    variants(tmp_path / "blind", {"parallel": False})
    assert "reads no token beyond" in note_on_depths(settings_of(tmp_path / "blind"))


def test_a_head_that_predicts_no_tokens_is_noted_apart(tmp_path: Path) -> None:
    variants(tmp_path, {"sequential": True, "none": None})
    config = {"mtp._target_": "mtp_lightning.mtp.bag", "mtp.depth": 1}
    facts = {"mtp_reads_tokens": False, "mtp_predicts_tokens": False}
    write_run(tmp_path / "bag", config, summary={"val/loss_depth_1": 912.5, **facts})
    caption = drawings(tmp_path)["loss_depth"].caption  # the figure has only its main depth
    assert "two different tasks" not in caption and "reads the true tokens before its" in caption
    where = caption.index("predicts no token of its own")
    assert "bag" in caption[where:]


def test_a_difference_equal_at_every_seed_has_no_interval(tmp_path: Path) -> None:
    depth_sweep(tmp_path, {0: (2.0, 2.1), 1: (1.9, 2.0), 2: (1.9, 2.2)})
    one, two = rows_of(table_of(page_of(tmp_path), "differences"))
    assert ">the same at every seed, so there is no variance to test<" in one
    assert "−0.1000</td>" in one and "±" not in one
    assert "±" in two and "within noise" in two


def test_a_report_of_two_folders_names_their_runs_and_its_folder(tmp_path: Path) -> None:
    depth_sweep(tmp_path / "a", {0: (2.0, 2.1)})
    depth_sweep(tmp_path / "b", {0: (1.0, 1.1001)})
    path, sentences, _ = report([tmp_path / "a", tmp_path / "b"])
    assert path == tmp_path / "report_a_b" / "report.html"
    assert any("b is better than a by 1.0000" in text for text in sentences)
    with pytest.raises(ValueError, match="given twice"):
        report([tmp_path / "a", tmp_path / "b" / ".." / "a"])
    equal = [tmp_path / name / "sweep" for name in ("x", "y")]
    for folder in equal:
        depth_sweep(folder, {0: (2.0,)})
    path, _, _ = report(equal, output=tmp_path / "o")
    assert "\nx/sweep/depth-0_seed-0" in (path.parent / "runs.csv").read_text()


def test_the_command_prints_the_answer_and_the_page(tmp_path, capsys):
    depth_sweep(tmp_path, {0: (2.0, 2.1), 1: (1.9, 2.001)})
    main([str(tmp_path), "--reference", "mtp.depth=1"])
    output = capsys.readouterr().out
    assert "D = 0 is worse than D = 1" in output and f"{tmp_path}/report.html" in output


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "scipy" else name)
    with pytest.raises(ValueError, match=r"needs the package scipy: .*'\.\[report\]'"):
        report([tmp_path])


def test_fixture_runs_have_the_keys_of_real_configs() -> None:
    """A renamed key would make the report's tests meaningless."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("config", overrides=["paths.output_dir=x"])
    missing = object()
    assert [k for k in BASE if OmegaConf.select(cfg, k, default=missing) is missing] == []
    assert LOSS == "val/loss_depth_0"
