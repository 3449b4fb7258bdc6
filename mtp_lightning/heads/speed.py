"""``python -m mtp_lightning.heads.speed MODEL --output FILE``: how many drafts pay here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mtp_lightning.command_line.shell import Parser, readable_errors
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.paying import description, with_measured_depth
from mtp_lightning.decoding.precision import AUTO
from mtp_lightning.experiment.generating import open_for_decoding
from mtp_lightning.opening import draft_vocab_of
from mtp_lightning.run.atomic import write_json
from mtp_lightning.runtime import pick_accelerator, set_threads


def main(argv: Sequence[str] | None = None) -> None:
    """The command: measures what generate.py would find at its first start, one text at a time."""
    parser = Parser(prog="python -m mtp_lightning.heads.speed", description=__doc__)
    parser.add_argument("model", type=Path, help="a model with heads")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--activations", default="fp32", help="as of generate.py (fp32)")
    args = parser.parse_args(argv)
    with readable_errors():
        set_threads(None)
        setting = {"precision": "fp32", "head_precision": AUTO, "activations": args.activations}
        opened = open_for_decoding(args.model, device=pick_accelerator("auto"), **setting)
        opened.model.mtp.require_drafts()
        # Options, device, threads and words are generate.py's, so that it finds the measurement.
        options = DecodingOptions(
            draft_vocab=draft_vocab_of(opened.run_config), max_context=opened.seq_len
        )
        measured = with_measured_depth(options, opened, rows=1, **setting).measured
        assert measured is not None
        write_json({"said": description(measured), **asdict(measured)}, args.output)


if __name__ == "__main__":
    main()
