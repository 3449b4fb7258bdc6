"""``python -m mtp_lightning.interop.check DIR``: compares transformers and this project.

It works on every folder that can be imported, whoever wrote it.
"""

from __future__ import annotations

from pathlib import Path

from mtp_lightning.command_line.shell import Parser, listed, readable_errors


def check(path: Path, allow: tuple[str, ...] = ()) -> None:
    """Loads a folder, which may use the packages ``allow``, with both, compares them, and prints
    the results; raises ``UserError`` if something differs or cannot be read, or ``OSError``."""
    from mtp_lightning.errors import UserError
    from mtp_lightning.interop import stack_file
    from mtp_lightning.interop.config_json import STANDS_FOR
    from mtp_lightning.interop.reading import describe
    from mtp_lightning.interop.tensor_files import CONFIG, read_json
    from mtp_lightning.interop.transformers_model import one_line
    from mtp_lightning.interop.verify import check_with_transformers
    from mtp_lightning.parts import is_gguf

    if is_gguf(path):
        raise UserError(f"{path} is a GGUF file: it is examined by mtp-lightning certify {path}.")
    stored, kind = describe(path, allow=allow), read_json(path / CONFIG)["model_type"]
    depth = 0 if stack_file.is_there(path) else stored.config.mtp.depth
    if depth and kind not in STANDS_FOR:
        line = one_line(kind, stored.config.trunk.n_layers, depth)
        print(f"{depth} MTP layer(s). What transformers needs before it loads them:\n\n  {line}\n")
    for result in check_with_transformers(path, stored.build()):
        print(f"  {result}")
    print("all equal")


def main() -> None:
    """The command."""
    parser = Parser(prog="python -m mtp_lightning.interop.check", description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder with config.json and safetensors")
    parser.add_argument("--allow", type=listed, default=(), help="packages that it may use")
    args = parser.parse_args()
    with readable_errors():
        check(args.folder, args.allow)


if __name__ == "__main__":
    main()
