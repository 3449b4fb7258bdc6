"""``mtp-lightning certify MODEL``; ``--help`` explains it.

The exit code is 0 if every guarantee held, 2 if one was broken, 1 for a user's mistake.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mtp_lightning.command_line.shell import (
    Parser,
    Stopped,
    listed,
    readable_errors,
    sigterm_interrupts,
)
from mtp_lightning.errors import UserError

if TYPE_CHECKING:
    from mtp_lightning.certify.certificate import Certificate

# The file of an interrupted run; certificate.json would claim that all prompts were tried.
UNFINISHED = "unfinished_certificate.json"


def main(
    argv: list[str] | None = None, *, program: str = "python -m mtp_lightning.certify"
) -> None:
    """The command line."""
    parser = Parser(
        prog=program,
        description="Test in every decoding configuration whether drafts change a model's text.",
        epilog="exit code: 0 lossless, 2 a guarantee was broken, 1 nothing could be tested",
    )
    parser.add_argument("model", type=Path, help="a run, a Hugging Face folder or a GGUF file")
    parser.add_argument("--prompts", type=int, default=1000, help="number of prompts (1000)")
    parser.add_argument("--new-tokens", type=int, default=16, help="new tokens per prompt (16)")
    parser.add_argument(
        "--weights",
        type=listed,
        help="fp32,bf16,int8,int4: precisions of the weights (default: those that this machine "
        "has); int4/int8 adds activations=int8",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer configurations, and as many prompts as fit into a minute, at least eight",
    )
    parser.add_argument("--minutes", type=float, help="start no prompt after this time")
    parser.add_argument("--text", type=Path, help="the prompts' text (Python's standard library)")
    parser.add_argument(
        "--against",
        type=listed,
        default=(),
        help="transformers,llama.cpp: also count their texts that differ from their plain decoding",
    )
    parser.add_argument("--output", type=Path, help="folder for certificate.json and badge.svg")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and samples (0)")
    parser.add_argument(
        "--allow", type=listed, default=(), help="packages that it may use, as generate.py's allow"
    )
    args = parser.parse_args(argv)
    with readable_errors(), sigterm_interrupts():
        for option, number in (("--prompts", args.prompts), ("--new-tokens", args.new_tokens)):
            if number < 2:
                raise UserError(f"{option}={number} shows nothing: give 2 or more.")
        if args.weights is not None and not args.weights:
            raise UserError("--weights names no precision: give some, or leave it out for all.")
        if args.minutes is not None and not args.minutes > 0:
            raise UserError(f"--minutes={args.minutes} must be above 0.")
        minutes = 1.0 if args.quick and args.minutes is None else args.minutes
        with _folder(args.output):
            certificate = _certificate(args, minutes)
    sys.exit(2 if certificate.broken() else 0)


@contextmanager
def _folder(output: Path | None) -> Iterator[None]:
    """Make the folder before hours of work, and remove it if nothing was written."""
    if output is None:
        yield
        return
    new = [folder for folder in (output, *output.parents) if not folder.exists()]
    output.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # a folder with results is not empty
            for folder in new:
                folder.rmdir()


def _certificate(args: argparse.Namespace, minutes: float | None) -> Certificate:
    """Make the certificate, print it and write it."""
    # Imported late: --help must not wait for torch.
    from mtp_lightning.certify.run import certify
    from mtp_lightning.run.atomic import write_bytes, write_json

    def keep(so_far: Certificate) -> None:
        print("\n".join(so_far.lines()))
        notice = "interrupted: the table shows the texts until then"
        if args.output is not None:
            write_json(so_far.to_json(), args.output / UNFINISHED)
            notice += f", and {args.output / UNFINISHED} has them"
        raise Stopped(f"{notice}.", getattr(sys.exception(), "signum", signal.SIGINT))

    certificate = certify(
        args.model,
        count=args.prompts,
        length=args.new_tokens,
        precisions=args.weights,
        few=args.quick,
        minutes=minutes,
        file=args.text,
        seed=args.seed,
        against=args.against,
        allow=args.allow,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        interrupted=keep,
    )
    print("\n".join(certificate.lines()))
    if args.output is not None:
        write_json(certificate.to_json(), args.output / "certificate.json")
        write_bytes(certificate.badge().encode(), args.output / "badge.svg")
        (args.output / UNFINISHED).unlink(missing_ok=True)
        print(f"written to {args.output}: certificate.json, badge.svg")
    return certificate


if __name__ == "__main__":
    main()
