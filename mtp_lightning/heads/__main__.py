"""``mtp-lightning heads MODEL``; ``--help`` explains it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from mtp_lightning.command_line.shell import Parser, readable_errors
from mtp_lightning.heads.phases import (
    EXPORT,
    RUN,
    add_options,
    make_plan,
    output_of,
    require_inputs,
    run_export,
    run_phase,
    run_training,
    say,
)
from mtp_lightning.run.folder import claimed
from mtp_lightning.run.layout import SUMMARY_FILE
from mtp_lightning.settings import require_number
from mtp_lightning.stored import read_json

CERTIFICATE, SPEED = "certificate", "speed.json"


def main(argv: list[str] | None = None, *, program: str = "python -m mtp_lightning.heads") -> None:
    """The command."""
    parser = Parser(
        prog=program,
        description="Train, measure, certify and export heads for a finished model.",
        epilog="The same command continues where it was stopped.",
    )
    parser.add_argument("model", type=Path, help="a Hugging Face folder or a GGUF file")
    add_options(parser, output="MODEL_heads", hours="hours on this machine (1)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    args = parser.parse_intermixed_args(argv)
    with readable_errors():
        require_number("--hours", args.hours, above=0)
        require_inputs(args, args.model)
        folder = output_of(args, "heads", args.model)
        if args.dry_run:
            make_plan(args.model, folder, args, [args.model], keep=False)
            return
        with claimed(folder, option="--output", seconds=0):  # no second command works in it
            _run(args, folder)


def _run(args: Any, folder: Path) -> None:
    """All phases."""
    plan = make_plan(args.model, folder, args, [args.model], keep=True)
    run = run_training(plan, folder)
    file = folder / CERTIFICATE / "certificate.json"
    run_phase("certificate", file, certify_command(run, plan.activations, file.parent))
    run_export(run, folder, plan.context)
    command = ["mtp_lightning.heads.speed", str(folder / EXPORT), "--output", str(folder / SPEED)]
    command += [f"--activations={plan.activations}"]
    run_phase("speed", folder / SPEED, command)
    _say_result(folder, plan)


def certify_command(run: Path, activations: str, output: Path) -> list[str]:
    """The words that certify a run in all precisions, and in the arithmetic of ``activations``,
    which the last line of the command recommends."""
    from mtp_lightning.decoding.precision import PRECISIONS

    words = ["mtp_lightning.certify", str(run), "--quick", "--output", str(output)]
    if activations == "fp32":
        return words
    return [*words, "--weights", ",".join([*PRECISIONS, f"fp32/{activations}"])]


def _say_result(folder: Path, plan: Any) -> None:
    summary = read_json(folder / RUN / SUMMARY_FILE)
    for name, tag, form in (
        ("agreement", "val/agreement_depth_1", "{:.1%} of tokens are the trunk's own"),
        ("tokens", "decode/tokens_per_step", "{:.2f} per pass"),
    ):
        if isinstance(summary.get(tag), int | float):
            say(name, form.format(summary[tag]))
    say("speed", read_json(folder / SPEED)["said"])
    say("certificate", read_json(folder / CERTIFICATE / "certificate.json")["verdict"])
    say("written to", str(folder / EXPORT))
    drafting = "" if plan.activations == "fp32" else f" activations={plan.activations}"
    checkpoint = shlex.quote(f"checkpoint={folder / EXPORT}")
    say("try it", f"mtp-lightning generate {checkpoint} prompt='...'{drafting}")


if __name__ == "__main__":
    main()
