"""``mtp-lightning heads MODEL``; ``--help`` explains it.

Every phase is a program of its own, so that memory is given back between them. A phase that has
left its result in the folder is not repeated.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mtp_lightning.cli import Parser, readable_errors
from mtp_lightning.errors import UserError

PLAN, RUN, CERTIFICATE, EXPORT = "plan.json", "run", "certificate", "model"


def main(argv: list[str] | None = None, *, program: str = "python -m mtp_lightning.heads") -> None:
    """The command."""
    parser = Parser(
        prog=program,
        description="Train, measure, certify and export heads for a finished model.",
        epilog="The same command continues where it was stopped.",
    )
    parser.add_argument("model", type=Path, help="a Hugging Face folder or a GGUF file")
    parser.add_argument("overrides", nargs="*", help="settings of training, as train.py takes them")
    parser.add_argument("--output", type=Path, help="folder for all of it (MODEL_heads)")
    parser.add_argument("--hours", type=float, default=1.0, help="of this machine (1)")
    parser.add_argument(
        "--text", nargs="+", default=[], help="train on these files, not on the model's own texts"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    args = parser.parse_intermixed_args(argv)
    with readable_errors():
        if not args.hours > 0:
            raise UserError(f"--hours={args.hours:g} must be above 0.")
        require_inputs(args, args.model)
        name = args.model.resolve().name.removesuffix(".gguf")
        folder = (args.output or Path(f"{name}_heads")).resolve()
        texts = [str(Path(file).resolve()) for file in args.text]
        asked = {"hours": args.hours, "files": texts, "overrides": args.overrides}
        found = make_plan(args.model, folder, asked, keep=not args.dry_run)
        print("\n".join(found.lines()), flush=True)
        if args.dry_run:
            return
        run = folder / RUN
        run_phase(
            "training",
            run / "summary.json",
            ["mtp_lightning.apps.train", *found.train(), f"run_dir={run}"],
        )
        run_phase(
            "certificate",
            folder / CERTIFICATE / "certificate.json",
            ["mtp_lightning.certify", str(run), "--quick", "--output", str(folder / CERTIFICATE)],
        )
        run_phase(
            "export",
            folder / EXPORT / "config.json",
            ["mtp_lightning.apps.export", f"checkpoint={run}", f"output={folder / EXPORT}"],
        )
        print("\n".join(_result(folder)))


def require_inputs(args: Any, *models: Path) -> None:
    """Refuse what cannot be settings of training, and paths that are not there.

    Raises:
        UserError: naming the word or the path.
    """
    for word in args.overrides:
        if "=" not in word:
            raise UserError(f"{word} is not a setting: give KEY=VALUE, as train.py takes it.")
    for file in (*models, *map(Path, args.text)):
        if not file.exists():
            raise UserError(f"{file} does not exist (looked from {Path.cwd()}): check the path.")


def make_plan(
    model: Path, folder: Path, asked: dict[str, Any], *, keep: bool, further: bool = False
) -> Any:
    """The folder's plan, or a new one, whose arguments are ``model``, ``asked`` and ``further``.

    Raises:
        UserError: the folder was begun with another question.
    """
    from mtp_lightning.heads.planning import Plan, plan
    from mtp_lightning.run.atomic import write_json

    file = folder / PLAN
    if file.is_file():
        try:
            found = Plan(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}): give another --output.") from error
        asked = {"model": str(model.resolve()), **asked}
        for name, value in asked.items():
            if getattr(found, name) != value:
                raise UserError(
                    f"{folder} was begun with {name}={getattr(found, name)}, not {value}: repeat "
                    "that command, or give another --output."
                )
        return found
    found = plan(model, further=further, **asked)
    if keep:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(asdict(found), file)
    return found


def run_phase(name: str, result: Path, command: Sequence[str]) -> None:
    """Run a module unless it has left its result.

    Raises:
        UserError: it failed; it has said why itself.
    """
    if result.is_file():
        print(f"{name:<12}done before: {result}", flush=True)
        return
    print(f"{name:<12}python -m {' '.join(command)}", flush=True)
    began = time.monotonic()
    # Modules are found where this one was, not in the folder in which it was typed.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    with subprocess.Popen([sys.executable, "-m", *command], env=environment) as phase:
        # Whoever ends this process ends the phase, too; Ctrl-C reaches both by itself.
        before = signal.signal(signal.SIGTERM, lambda number, _: phase.send_signal(number))
        try:
            code = phase.wait()
        except KeyboardInterrupt:
            phase.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if code:
        raise UserError(
            f"the {name} ended with code {code} after {time.monotonic() - began:.0f} s; once that "
            "is mended, the same command continues here."
        )
    print(f"{name:<12}took {(time.monotonic() - began) / 60:.1f} minutes", flush=True)


def _result(folder: Path) -> list[str]:
    summary = json.loads((folder / RUN / "summary.json").read_text(encoding="utf-8"))
    certificate = json.loads((folder / CERTIFICATE / "certificate.json").read_text("utf-8"))
    rows: list[tuple[str, str, Callable[[float], str]]] = [
        ("agreement", "val/agreement_depth_1", lambda x: f"{x:.1%} of tokens are the trunk's own"),
        ("tokens", "decode/tokens_per_step", lambda x: f"{x:.2f} per pass"),
        ("speed", "decode/speedup", lambda x: f"{x:.2f} times plain decoding"),
    ]
    lines = [
        f"{name:<12}{shown(summary[tag])}"
        for name, tag, shown in rows
        if isinstance(summary.get(tag), int | float)
    ]
    return [
        *lines,
        f"{'lossless':<12}{certificate['verdict']}",
        f"{'written to':<12}{folder / EXPORT}",
        f"{'try it':<12}mtp-lightning generate checkpoint={folder / EXPORT} prompt='...'",
    ]


if __name__ == "__main__":
    main()
