"""A run's report at its end: versions and machine, and tables for the terminal."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_lightning.command_line.shell import program
from mtp_lightning.errors import counted
from mtp_lightning.paths import ROOT
from mtp_lightning.run.layout import BEST, CHECKPOINTS, LAST, METRICS_FILE, SUMMARY_FILE
from mtp_lightning.system import this_machine

if TYPE_CHECKING:
    import torch

# The rows of the short table: name, key, format and meaning.
_ANSWER = (
    ("bits per byte", "val/bits_per_byte", "{:.3f}", "of held-out text; lower is better"),
    ("right answers", "val/exact_match", "{:.1%}", "of held-out questions; chance {chance}"),
    ("good answers", "val/creativity", "{:.1%}", "of sampled ones: coherent and new"),
    ("excess loss", "val/excess_loss", "{:.4f}", "nats above the process's own surprisal"),
    ("beliefs", "val/belief_r2", "{:.3f}", "R^2 of an affine probe in the states"),
    ("tokens per pass", "decode/tokens_per_step", "{:.2f}", "{interval}1 without drafts"),
    ("speed-up", "decode/speedup", "{:.2f}", "of decoding by drafts, here"),
    ("tokens per second", "perf/tokens_per_second", "{:,.0f}", "read in training"),
    ("time", "time", "{}", "of training, validation left out"),
)
# The rows of the long table: name, key and format.
_NUMBERS = (
    ("bits per byte (depth 0)", "val/bits_per_byte", "{:.4f}"),
    ("  standard error over the text's documents", "val/bits_per_byte_se", "{:.4f}"),
    ("right answers, decoded greedily", "val/exact_match", "{:.1%}"),
    ("  by chance", "val/chance", "{:.2%}"),
    ("  by the best of constant, majority and table", "val/trivial", "{:.2%}"),
    ("validation's questions in the first training examples", "val/seen", "{:.1%}"),
    ("coherent and new of answers at temperature 1", "val/creativity", "{:.1%}"),
    ("loss above the process's own surprisal", "val/excess_loss", "{:.4f}"),
    ("beliefs in the states, R^2 of an affine probe", "val/belief_r2", "{:.3f}"),
    ("tokens per pass, with 95 % interval", "decode/tokens_per_step", "{:.2f}"),
    ("  expected from agreement in own text", "decode/expected_tokens_per_step", "{:.2f}"),
    ("  with drafts looked up in the text instead", "decode/lookup_tokens_per_step", "{:.2f}"),
    ("decoding speed-up by drafts", "decode/speedup", "{:.2f}"),
    ("  expected from tokens and cost per pass", "decode/expected_speedup", "{:.2f}"),
    ("training tokens per second", "perf/tokens_per_second", "{:,.0f}"),
    ("training FLOP/s over the published peak", "perf/mfu", "{:.1%}"),
    ("  over this process's matrix products", "perf/of_matmul", "{:.2f}"),
    ("  whose speed varied by a factor of", "perf/matmul_drift", "{:.1f}"),
    ("parameters", "parameters", "{:,}"),
    ("of them in the trunk and head", "parameters_trunk", "{:,}"),
    ("training FLOPs per token", "flops_per_token", "{:,}"),
    ("tokens", "tokens", "{:,}"),
    ("seconds of training", "seconds", "{:,.1f}"),
)
_PACKAGES = ("torch", "lightning", "torchmetrics", "hydra-core", "numpy", "tokenizers")


def environment(device: torch.device) -> dict[str, Any]:
    """The versions, machine and commit that are needed to reproduce a number of a device."""
    import torch

    from mtp_lightning.nn import ops

    gpu = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    return {
        "versions": {"python": platform.python_version()} | {p: version(p) for p in _PACKAGES},
        "machine": ", ".join([this_machine(), *gpu]),
        "cpu_kernels": ops.code()[0],
        "git_commit": _git_commit(),
    }


def print_summary(summary: dict[str, Any], *, depth: int, own_text: bool = True) -> None:
    """Print a table of the final metrics by depth (0 .. D), and one of the run's other numbers.
    ``own_text`` says whether the model was trained on the other part of the text: only then do the
    lines that both parts share say something about the model."""
    from rich.console import Console
    from rich.table import Table

    cost = Table(title="Run", title_justify="left", show_header=False)
    cost.add_column("what")
    cost.add_column("value", justify="right")
    for name, key, form in _NUMBERS:
        if key in summary:
            cost.add_row(name, form.format(summary[key]) + _interval(summary, key, form))
    console = Console()
    console.print(_rates(summary, depth))
    console.print(cost)
    data = summary.get("data", {}).get("val", {})
    if "documents" in (text := summary.get("evaluation", {})):
        size = f"{text['bytes']:,} bytes, " if "bytes" in text else ""
        print(
            f"evaluated     {counted(text['documents'], 'document')}, {size}"
            f"{text['tokens']:,} tokens, fingerprint {text['fingerprint'][:8]}"
        )
    if "gzip_bits_per_byte" in text:
        print(
            f"              gzip -9 needs {text['gzip_bits_per_byte']:.3f} bits per byte of it, "
            f"xz -9 {text['xz_bits_per_byte']:.3f}"
        )
    if own_text and (share := data.get("lines_in_training")) is not None:
        print(f"              {share:.1%} of the validation split's long lines occur in training")


def _rates(summary: dict[str, Any], depth: int) -> Any:
    """The table of the final metrics by depth."""
    from rich.table import Table

    rates = Table(title="Validation", title_justify="left", caption_justify="left")
    rates.add_column("depth")
    for column in ("loss", "accuracy", "agreement", "overlap", "accepted"):
        rates.add_column(column, justify="right", no_wrap=True)
    # Only evaluate.py measures it: teacher-forced agreement on the decoded text.
    expected = "decode/expected_tokens_per_step" in summary
    if expected:
        rates.add_column("own text", justify="right")
    notes = []
    if any(f"val/agreement_depth_{k}" in summary for k in range(1, depth + 1)):
        notes += [
            "agreement: how often the first choice is that of depth 0",
            "overlap: sum over tokens of the smaller of both probabilities",
        ]
    if "decode/n_prompts" in summary:
        prompts, tokens = summary["decode/n_prompts"], summary["decode/new_tokens"]
        decoded = f"{prompts:.0f} prompts x {tokens:.0f} tokens, greedy"
        notes.append(f"accepted: {decoded}; 95 % interval over the prompts")
        if expected:
            notes.append("own text: agreement in the texts that were decoded")
    elif "not_decoded" in summary:
        notes.append(f"accepted: nothing was decoded, {summary['not_decoded']}")
    rates.caption = "\n".join(notes)
    for k in range(depth + 1):
        shares = [f"val/{name}_depth_{k}" for name in ("accuracy", "agreement", "overlap")]
        accepted = _share(summary, f"decode/acceptance_position_{k}")
        cells = [
            str(k),
            _number(summary.get(f"val/loss_depth_{k}"), "{:.4f}"),
            *(_number(summary.get(key), "{:.1%}") for key in shares),
            # With the extra column, value and interval do not fit on a line of 80 characters.
            accepted.replace(" [", "\n[") if expected else accepted,
        ]
        if expected:
            cells.append(_number(summary.get(f"decode/agreement_position_{k}"), "{:.1%}"))
        rates.add_row(*cells)
    return rates


def print_answer(summary: dict[str, Any]) -> None:
    """Print the main numbers of a run with their meaning; ``--verbose`` prints all of them."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, title="Result", title_justify="left")
    for column in ("what", "value", "meaning"):
        table.add_column(column, justify="right" if column == "value" else "left")
    shown = dict(summary)
    if (seconds := shown.get("seconds")) is not None:
        shown["time"] = f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
    for name, key, form, meaning in _ANSWER:
        # Where any answer is right, their share says nothing.
        if key in shown and not (key == "val/exact_match" and shown.get("val/chance") == 1):
            bounds = _interval(shown, key, form)
            chance = _number(shown.get("val/chance"), "{:.2%}") or "unknown"
            meaning = meaning.format(chance=chance, interval="95 % interval; " if bounds else "")
            table.add_row(name, form.format(shown[key]) + bounds, meaning)
    Console().print(table)
    if "not_decoded" in summary:
        print(f"not decoded   {summary['not_decoded']}")
    print(f"all numbers   --verbose shows them, and {SUMMARY_FILE} has them")


def print_paths(folder: Path, *, writes: bool, allow: Collection[str] = ()) -> None:
    """Print the paths of the files that the run wrote, and commands that use them; ``writes`` says
    whether the model writes text, not a task's symbols, and ``allow`` whose classes it may use."""
    shown = Path(os.path.relpath(folder)) if folder.is_relative_to(Path.cwd()) else folder
    files = [name for name in (BEST, LAST) if (folder / CHECKPOINTS / name).is_file()]
    if LAST in files:
        print(f"checkpoints   {shown / CHECKPOINTS}{os.sep}{', '.join(files)}")
    print(f"metrics       {shown / METRICS_FILE}, {SUMMARY_FILE}")
    typed = shlex.quote(str(shown))
    if any(folder.glob("events.out.tfevents.*")):  # another logger writes none
        print(f"charts        tensorboard --logdir {typed}")
    if LAST in files and writes:
        allowed = f" 'allow=[{','.join(allow)}]'" if allow else ""
        print(f"text          {program('generate')} checkpoint={typed}{allowed} prompt='...'")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _share(summary: dict[str, Any], key: str) -> str:
    if key not in summary:
        return ""
    percent = {name: 100 * summary[name] for name in (key, *_bounds(key)) if name in summary}
    return f"{percent[key]:.1f}%" + _interval(percent, key, "{:.1f}")


def _interval(summary: dict[str, Any], key: str, form: str) -> str:
    bounds = [summary[name] for name in _bounds(key) if name in summary]
    return f" [{', '.join(map(form.format, bounds))}]" if bounds else ""


def _bounds(key: str) -> tuple[str, str]:
    return f"{key}_low", f"{key}_high"


def _git_commit() -> str | None:
    """The commit of the source tree that runs; None where it is not a checkout (an environment with
    an installed copy may lie in a repository of the user's)."""
    try:
        command = ["git", f"--git-dir={ROOT / '.git'}", "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
