"""Examines the MTP layers of a checkpoint: ``mtp-lightning doctor``; ``--help`` explains it.

The exit code is 0 for a sound folder, 2 for one that is not, 1 for one that cannot be examined.
``doctor graft BASE TUNED`` puts the layers of one model on the trunk of another
(``mtp_lightning/heads/graft.py``).
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from mtp_lightning import parts
from mtp_lightning.command_line.shell import Parser, listed, readable_errors
from mtp_lightning.command_line.shell import program as typed
from mtp_lightning.errors import UserError


def main(argv: list[str] | None = None, *, program: str = "python doctor.py") -> None:
    """The command line."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["graft"]:
        with readable_errors():
            parts.need("heads", f"{program} graft")
        graft = importlib.import_module("mtp_lightning.heads.graft")
        graft.main(words[1:], program=f"{program} graft")
        return
    parser = Parser(
        prog=program,
        description="Check that a model's MTP layers are complete, trained and read correctly.",
        epilog="exit code: 0 sound, 2 not sound, 1 cannot be examined; to put the layers of a base "
        f"model on a tuned copy of its trunk: {program} graft BASE TUNED",
    )
    parser.add_argument("folder", type=Path, help="a folder with config.json and safetensors")
    parser.add_argument(
        "--new-tokens", type=int, default=64, help="tokens of each of four test texts (64)"
    )
    parser.add_argument(
        "--allow", type=listed, default=(), help="packages that its heads may use, as generate.py's"
    )
    args = parser.parse_args(words)
    with readable_errors():
        if args.new_tokens < 8:
            raise UserError(f"--new-tokens={args.new_tokens} is too few to test: give 8 or more.")
        _require_layout(args.folder)
        # Imported here, so that --help does not wait for torch.
        interop = parts.need("interop", program)
        diagnosis = interop.examine(args.folder, new_tokens=args.new_tokens, allow=args.allow)
        print("\n".join(diagnosis.lines()))
    sys.exit(0 if diagnosis.sound else 2)


def _require_layout(folder: Path) -> None:
    """Refuse a path that is not a folder in Hugging Face's layout."""
    if (folder / "config.json").is_file():
        return
    if not folder.exists():
        raise UserError(f"{folder} does not exist (looked from {Path.cwd()}): check the path.")
    if parts.is_gguf(folder):
        raise UserError(
            f"{folder} is a file: it is examined by mtp-lightning certify {folder}, and by "
            f"{typed('evaluate')} checkpoint={folder}."
        )
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder with config.json and safetensors.")
    if (folder / "config.yaml").is_file() or (folder / "checkpoints").is_dir():
        raise UserError(
            f"{folder} is a run of this project: {typed('export')} checkpoint={folder} "
            "output=FOLDER writes a folder that can be examined."
        )
    raise UserError(f"{folder} holds no config.json: give a folder with it and safetensors.")


if __name__ == "__main__":
    main()
