"""The layout of the code and of conf/, as CONTRIBUTING.md describes it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from mtp_lightning.command_line.conf_comments import groups, included
from tests.integration.helpers import composed, execute
from tests.layout import ROOT, imports, sources, takes
from tests.warm import LIGHT

CONF = ROOT / "conf"
APPS = ["evaluate.py", "export.py", "generate.py", "serve.py", "train.py"]

# A package imports itself and packages of a lower number, never one of the same number or higher.
# Files of mtp_lightning/ that are not in a folder count as packages of their own.
RANK = {
    # tools that know nothing of models
    "errors": -1.5,
    **dict.fromkeys(["paths", "settings", "built", "system"], -1),
    **dict.fromkeys(["parts", "stored"], -0.5),
    **dict.fromkeys(["chat_template", "hosts", "llama_server", "markdown"], 0),
    **dict.fromkeys(["processes", "registry", "runtime"], 0),
    "command_line": 0.1,
    "nn": 0.5,
    **dict.fromkeys(["mtp", "optim"], 1),
    "model": 2,
    "weights": 2.5,
    **dict.fromkeys(["objective", "run"], 3),
    "opening": 3.5,
    **dict.fromkeys(["decoding", "metrics"], 4),
    "cpu": 4.5,
    **dict.fromkeys(["certify", "interop", "matching"], 5),
    "loggers": 6,
    **dict.fromkeys(["module", "callbacks"], 7),
    "distributed": 7.5,
    "experiment": 8,
    "serving": 8.5,
    **dict.fromkeys(["apps", "heads", "plan"], 9),
    **dict.fromkeys(["console", "notebook"], 10),
}

# Modules that keep files in the cache folder.
CACHED = tuple(
    f"mtp_lightning/{name}.py"
    for name in ("decoding/programs", "decoding/paying", "cpu/packed_cache", "heads/phases")
)

# The modules of mtp_lightning that sweeps and hydra_plugins may import; none of them imports torch.
SHARED_WITH_SWEEPS = (
    *(
        f"mtp_lightning.{name}"
        for name in (
            *("command_line", "errors", "hosts", "markdown"),
            *("parts", "paths", "stored", "system"),
        )
    ),
    *(
        f"mtp_lightning.run.{name}"
        for name in ("atomic", "config", "layout", "lock", "metrics", "solved", "status")
    ),
)

# Claims may also import these, in functions: they read weights or count FLOPs with torch.
WEIGHTS = (
    *("mtp_lightning.run.checkpoints", "mtp_lightning.run.loading"),
    "mtp_lightning.experiment.build",
)

LIGHTNING = tuple(
    f"mtp_lightning/{name}" for name in ("module", "callbacks/", "distributed/", "loggers/")
)
EXPERIMENT = "mtp_lightning/experiment/"
CONFIGURED = (
    EXPERIMENT,
    *(f"mtp_lightning/{name}" for name in ("apps/", "interop/exporting.py", "plan.py")),
    "mtp_lightning/command_line/quote.py",
)
LAZY = (
    "tokenizers", "datasets", "rich", "transformers", "safetensors", "matplotlib", "pandas",
    "tensorboard",
)  # fmt: skip
LATE = "slow to import, or an extra: do it in the function that needs it"


def package_of(parts: list[str]) -> str:
    return parts[1].removesuffix(".py") if len(parts) > 1 else ""


def test_imports_are_found_in_functions_and_type_checking_blocks() -> None:
    all_imports = set(imports(f"{EXPERIMENT}build.py"))
    assert "omegaconf.OmegaConf" in all_imports and "mtp_lightning.module.MTPModule" in all_imports
    assert "data_modules.WindowDataModule" in all_imports  # for the type checker alone
    top = set(imports(f"{EXPERIMENT}build.py", top_only=True))
    assert "omegaconf.OmegaConf" in top and "data_modules.WindowDataModule" not in top
    assert "rich.console.Console" in set(imports("mtp_lightning/run/summary.py"))
    assert "rich.console.Console" not in set(imports("mtp_lightning/run/summary.py", top_only=True))


def test_packages_import_only_packages_of_lower_rank() -> None:
    for file in sources("mtp_lightning"):
        package = package_of(file.split("/"))
        if package == "__init__":
            assert list(imports(file, top_only=True)) == []
            assert all(takes(name, "mtp_lightning.parts") for name in imports(file))
            continue
        assert package in RANK, f"give {package} a place in RANK and in CONTRIBUTING.md"
        for name in imports(file):
            if takes(name, "mtp_lightning"):
                other = package_of(name.split("."))
                assert other in RANK, f"give {other} a place in RANK"
                allowed = other == package or RANK[other] < RANK[package]
                assert allowed, f"{package} imports {other}: {name}"


def test_lightning_hydra_and_data_are_imported_only_where_allowed() -> None:
    for file in sources("mtp_lightning", "data_modules"):
        for name in imports(file):
            where = f"{file}: {name}"
            if takes(name, "lightning", "pytorch_lightning"):
                assert file.startswith((*LIGHTNING, EXPERIMENT, "data_modules/")), where
            if takes(name, "hydra", "omegaconf"):
                assert file.startswith(CONFIGURED), where
            if takes(name, "mtp_lightning"):
                # how a setting is refused, a library of C++ opened, a file locked, and what systems
                # do differently
                shared = ("settings", "errors", "built", "parts", "stored", "system", "run.lock")
                is_shared = takes(name, *(f"mtp_lightning.{module}" for module in shared))
                assert is_shared or not file.startswith("data_modules/"), where
            if takes(name, "data_modules") and not file.startswith("data_modules/"):
                # Models and data share only the batch. experiment/ and certify/ use both,
                # opening.py builds the stored tokenizer, and some modules use the cache folder.
                stored = file == "mtp_lightning/opening.py" and takes(
                    name, "data_modules.tokenizers"
                )
                is_cache = file in CACHED and takes(name, "data_modules.cache")
                together = file.startswith((EXPERIMENT, "mtp_lightning/certify/"))
                allowed = stored or is_cache or together or takes(name, "data_modules.windows")
                assert allowed, where
            assert not takes(name, "conf", "tests", "benchmarks", "sweeps", *_app_names()), where
        late = [name for name in imports(file, top_only=True) if takes(name, *LAZY)]
        assert late == [], f"{file}: {LATE}"


def test_windows_and_sources_import_neither_lightning_nor_tokenizers() -> None:
    """Imports are followed through this project."""
    todo = ["data_modules.windows", "data_modules.sources", "data_modules.tokenizers"]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        assert not takes(name, "lightning", "tokenizers", "datasets", "hydra"), name
        for path in accumulate(name.split("."), "{}/{}".format):
            for file in {f"{path}.py", f"{path}/__init__.py"} - seen:
                if (ROOT / file).is_file():
                    seen.add(file)
                    todo += imports(file, top_only=True)
    assert len(seen) > 5


def test_the_report_imports_neither_torch_nor_hydra() -> None:
    for file in sources("sweeps/report"):
        for name in imports(file):
            if not takes(name, "sweeps.report", *SHARED_WITH_SWEEPS):
                refused = takes(name, "mtp_lightning", "data_modules", "torch", "hydra")
                assert not refused, f"{file}: {name}"
        slow = (*LAZY, "scipy", "jinja2")
        late = [name for name in imports(file, top_only=True) if takes(name, *slow)]
        assert late == [], f"{file}: {LATE}"


def test_nn_and_mtp_import_only_torch() -> None:
    """Heads also import windows, from which they make their targets."""
    for file in sources("mtp_lightning/nn", "mtp_lightning/mtp"):
        windows = ["data_modules.windows"] if file.startswith("mtp_lightning/mtp/") else []
        for name in imports(file):
            where = f"{file}: {name}"
            assert takes(name, "torch", "mtp_lightning", *windows) or _standard(name), where


def test_sweeps_import_no_models_and_no_data() -> None:
    for file in sources("sweeps", "hydra_plugins"):
        for name in imports(file):
            where = f"{file}: {name}"
            others = ("lightning", "data_modules", "conf", "tests", *_app_names())
            assert not takes(name, *others), where
            shared = (*SHARED_WITH_SWEEPS, *(WEIGHTS if file.startswith("sweeps/claims/") else []))
            assert not takes(name, "mtp_lightning") or takes(name, *shared), where
        slow = ("torch", "optuna", "submitit", "ray", "sweeps.launch", *WEIGHTS, *LAZY)
        for name in imports(file, top_only=True):
            where = f"{file}: {name}: {LATE}"
            assert not takes(name, *slow), where
            if file.startswith("hydra_plugins/"):  # which Hydra imports at every start
                allowed = ("hydra", "omegaconf", *SHARED_WITH_SWEEPS)
                assert takes(name, *allowed) or _standard(name), where


def test_apps_import_slow_packages_late() -> None:
    for app in APPS:
        files = [app, f"mtp_lightning/apps/{app}", "mtp_lightning/apps/__init__.py"]
        for name in (name for file in files for name in imports(file, top_only=True)):
            allowed = takes(name, "hydra", "omegaconf", "mtp_lightning.apps", *SHARED_WITH_SWEEPS)
            assert allowed or _standard(name), (app, name)
        for file in ("command_line/shell", "command_line/quote", "paths", "errors", "console"):
            for name in imports(f"mtp_lightning/{file}.py", top_only=True):
                assert takes(name, *SHARED_WITH_SWEEPS) or _standard(name), (app, name)


def _standard(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names


def _app_names() -> list[str]:
    return [app.removesuffix(".py") for app in APPS]


@pytest.mark.parametrize("app", ["train.py", "generate.py"])
def test_help_is_quick(app: str) -> None:
    """Help tells of the groups without loading torch or Lightning, within 8 imports of Hydra."""
    watched = ["torch", "lightning", "tokenizers", "numpy", "tensorboard", "rich"]
    program = (
        "import atexit, runpy, sys;"
        f"atexit.register(lambda: print('LOADED', [m for m in {watched} if m in sys.modules]));"
        f"sys.path.insert(0, {str(ROOT)!r}); sys.argv = [{app!r}, '--help'];"
        f"runpy.run_path({str(ROOT / app)!r}, run_name='__main__')"
    )
    hydra = [sys.executable, "-c", "import hydra"]
    # Processor time as a ratio within one try: the machine's speed varies from try to try.
    ratios: list[float] = []
    while len(ratios) < 3 and not (ratios and ratios[-1] < 8):
        done = execute([sys.executable, "-c", program], Path("/"), code=0, imported=())
        ratios.append(done.seconds / execute(hydra, imported=()).seconds)
    assert min(ratios) < 8, ratios
    assert "LOADED []" in done.stdout
    assert f"python {app}" in done.stdout


def test_help_names_every_group_and_override() -> None:
    done = execute([sys.executable, str(ROOT / "train.py"), "--help"], imported=LIGHT)
    for group in ("model", "mtp", "lambda_schedule", "data", "tokenizer", "optimizer", "trainer"):
        assert f"\n{group}: " in done.stdout
    keys = {line.split("=")[0].strip() for line in done.stdout.split("used most:")[1].splitlines()}
    overrides = {key for key in keys if key and " " not in key}
    assert len(overrides) >= 10
    cfg = composed("config", [])
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    missing = object()
    for key in overrides - groups:
        assert OmegaConf.select(cfg, key, default=missing) is not missing, key


CONFIGS = sorted(path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml"))


def test_every_key_of_conf_has_a_comment() -> None:
    for file in CONFIGS:
        lines = (CONF / file).read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith("# "), f"the first line of {file} says what it is"
        if file.startswith(("debug/", "experiment/", "sweeps/")):
            continue  # a preset sets other files' keys, which are explained there
        group, _, name = file.removesuffix(".yaml").rpartition("/")
        _, *parts = included(groups()[group][name])
        explained = {key.name for part in parts for key in part.keys if key.comment}
        for key, line in _keys(yaml.compose((CONF / file).read_text(encoding="utf-8"))):
            above = lines[line - 1].strip() if line else ""
            message = f"{file}: {key} in line {line + 1} has no comment above it"
            assert above.startswith("#") or key in explained, message


def _keys(node: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(key, line from 0) of every value that is not a mapping of further keys."""
    for key, value in node.value:
        name = key.value
        if name in ("defaults", "hydra", "_target_", "_convert_", "_partial_"):
            continue
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", key.start_mark.line


# parts of other files
SHARED = {
    "model/base", "model/deepseek_base", "data/base", "data/task", "lambda_schedule/base",
    "objective/base", "paths/default",
}  # fmt: skip
OPTIONS = [
    option.removesuffix(".yaml")
    for option in CONFIGS
    if "/" in option and not option.startswith(("hydra/", "sweeps/"))  # tests/sweeps composes these
]
NEEDS = {  # the keys of an option that have no default
    "data/text": ["data.paths=TEXT"],
    "data/huggingface": ["data.source.path=parquet", "data.source.data_files=x.parquet"],
    "data/tokens": ["data.path=TEXT", "tokenizer=byte"],
    "tokenizer/pretrained": ["tokenizer.path=TOKENIZER"],
    "tokenizer/ids": ["tokenizer.vocab_size=300", "tokenizer.eot_id=0"],
}
# Composed only: their packages may be missing.
EXTRAS = {
    *("data/huggingface", "data/literature", "data/shakespeare"),
    *("logger/mlflow", "logger/trackio", "logger/wandb"),
}


# Composed and built with every preset (test_presets.py), and by themselves (test_heads.py).
ELSEWHERE = ("mtp", "experiment")
# Independent groups: one config has an option of each.
INDEPENDENT = (
    *("model", "objective", "callbacks", "lambda_schedule", "balance", "optimizer"),
    *("optimizer/schedule", "trainer", "compare"),
)


def chosen_together() -> list[tuple[str, ...]]:
    """Every option, alone or with others; tasks are built by their presets (test_presets.py)."""
    tasks = {f"data/{file.stem}" for file in (CONF / "experiment").glob("*.yaml")}
    options = [option for option in OPTIONS if option not in SHARED | tasks]
    groups = [[o for o in options if o.rsplit("/", 1)[0] == group] for group in INDEPENDENT]
    several = [
        tuple(group[i % len(group)] for group in groups) for i in range(max(map(len, groups)))
    ]
    others = [o for o in options if o.rsplit("/", 1)[0] not in (*INDEPENDENT, *ELSEWHERE)]
    return [*several, *((option,) for option in others)]


@pytest.mark.parametrize("options", chosen_together(), ids="+".join)
def test_every_option_composes_and_builds(options: tuple[str, ...], tmp_path: Path) -> None:
    from mtp_lightning.experiment import build
    from mtp_lightning.experiment.device import resolve_auto
    from mtp_lightning.experiment.instantiate import instantiate
    from mtp_lightning.experiment.trainer import build_trainer

    text = tmp_path / "text.txt"
    text.write_text("one line of text, and another\n" * 400)
    chosen = [word for option in options for word in NEEDS.get(option, [])]
    chosen += ["=".join(option.rsplit("/", 1)) for option in options]
    (option, *_) = options
    group, name = option.rsplit("/", 1)
    if group != "data":
        chosen += ["data=text", "data.paths=TEXT", "data.seq_len=8"]
    paths = {"TEXT": text}
    if option == "tokenizer/pretrained":
        paths["TOKENIZER"] = _tokenizer_file(tmp_path)
    for placeholder, path in paths.items():
        chosen = [part.replace(placeholder, str(path)) for part in chosen]
    chosen += [f"paths.output_dir={tmp_path / 'run'}", f"paths.cache_dir={tmp_path / 'cache'}"]
    cfg = composed("config", [*chosen, "trainer.accelerator=cpu"])
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=option not in EXTRAS)
    if option in EXTRAS:
        return
    cfg = resolve_auto(cfg)
    data = instantiate(cfg.data)
    if group == "tokenizer" and name != "ids":  # ids reads no text
        data.prepare()
        assert data.tokenizer.vocab_size > 256
    assert build.build_model_config(cfg, 300).num_params() > 0
    schedule = instantiate(cfg.lambda_schedule)
    instantiate(cfg.optimizer)
    trainer = build_trainer(cfg, resume_step=None, may_skip=schedule.depth_ever_skipped)
    assert trainer.max_steps == cfg.trainer.max_steps


def _tokenizer_file(folder: Path) -> Path:
    from data_modules.tokenizers import BPETokenizer

    BPETokenizer(vocab_size=300).train(["one line of text, and another\n" * 50]).save(folder)
    return folder / "tokenizer.json"


def test_no_page_has_merge_conflict_markers() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("conf/**/*.yaml")]
    assert len(pages) > 100
    marked = [page for page in pages if re.search("^(<{7} |={7}$|>{7} )", page.read_text(), re.M)]
    assert marked == []
