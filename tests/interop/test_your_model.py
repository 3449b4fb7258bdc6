"""The commands of docs/your_model.md in order, on small models of transformers: from a folder of
Llama's, Qwen's or DeepSeek's to verified heads and back."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from data_modules.tokenizers import ByteTokenizer
from mtp_lightning.interop.writing import write_tokenizer
from mtp_lightning.opening import open_model
from tests.integration.helpers import ROOT, execute
from tests.interop.folders import read_folder
from tests.interop.theirs import INSTALLED, save

pytestmark = [pytest.mark.extras, pytest.mark.skipif(not INSTALLED, reason="extra 'hf'")]

PAGE = (ROOT / "docs" / "your_model.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)
COMMANDS = [
    shlex.split(line, comments=True)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
]
# An installation and a download.
SKIPPED = (["pip"], ["python", "-m", "data_modules.corpora.smollm2"])
# A small model, few texts and few steps.
HEADS = "mtp_lightning.heads"
SETTINGS = {
    "generate.py": ["max_new_tokens=6", "num_threads=1", "activations=fp32"],
    HEADS: [
        "--hours", "0.02", "data.n_prompts=64", "trainer.max_steps=10",
        "trainer.val_check_interval=5", "trainer.num_threads=1", "logger=csv",
    ],
    "train.py": [
        "init_from=theirs", "data.prompts.paths=prompts.jsonl", "data.chat_share=0",
        "objective.draft_vocab=64",
        "data.n_prompts=40", "data.prompt_tokens=8", "data.new_tokens=24", "data.seq_len=16",
        "data.batch_size=4", "trainer.max_steps=4", "trainer.val_check_interval=2",
        "trainer.num_threads=1", "trainer.accelerator=cpu", "logger=csv",
        "callbacks.speculative_eval.new_tokens=8", "callbacks.throughput.measure_matmul=false",
    ],
    "benchmarks.pretrained_heads": ["--new-tokens", "4", "--prompts", "1", "--draft-vocab", "64"],
}  # fmt: skip


def small_command(words: list[str]) -> list[str]:
    """The command's words with a small model in the place of the page's."""
    words = [re.sub(r"^(checkpoint=)?checkpoints/.*", r"\1theirs", word) for word in words]
    words = ["theirs" if word == "FOLDER" else word for word in words]
    if words[:2] == ["mtp-lightning", "heads"]:
        words = ["python", "-m", HEADS, *words[2:]]
    program, rest = words[1], words[2:]
    if program == "-m":
        return ["-m", *rest, *SETTINGS[rest[0]]]
    settings = SETTINGS.get(program, [])
    keys = {word.split("=")[0] for word in settings}
    others = [word for word in rest if word.split("=")[0] not in keys]
    return [str(ROOT / program), *others, *settings]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("llama", marks=pytest.mark.long),
        pytest.param("qwen2", marks=pytest.mark.long),
        pytest.param("deepseek", marks=pytest.mark.slow),
    ],
)
def test_every_command_of_the_page_runs(name: str, tmp_path: Path) -> None:
    save(tmp_path / "theirs", name)
    write_tokenizer(tmp_path / "theirs", ByteTokenizer(), max_positions=64)
    texts = [f'{{"text": "{word} and more of it, a line of text"}}' for word in range(60)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(texts))
    cache = {"PYTHONPATH": str(ROOT), "MTP_LIGHTNING_CACHE": str(tmp_path / "cache")}
    outputs: list[str] = []
    for words in COMMANDS:
        if words[:3] in SKIPPED or words[:1] in SKIPPED:
            continue
        done = execute([sys.executable, *small_command(words)], tmp_path, **cache)
        # Without heads, and with heads of four steps, the doctor finds nothing sound.
        codes = (0, 2) if words[1] == "doctor.py" else (0,)
        if name == "deepseek" and "output=smollm2_heads.gguf" in words:
            codes = (1,)  # its norms have two epsilons
            assert "one epsilon for all" in done.stderr
        assert done.returncode in codes, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        outputs.append(done.stdout)
        if words[1] == "heads":
            again = execute([sys.executable, *small_command(words)], tmp_path, **cache)
            assert again.stdout.count("done before: ") == 4, again.stdout
    assert len(outputs) == 9
    assert all(word in outputs[1] for word in ("verified", "lossless", "agreement", "Measured"))
    assert (tmp_path / "smollm2_heads" / "certificate" / "badge.svg").is_file()
    # the head of the last step, not of the first validation
    assert open_model(tmp_path / "smollm2_heads" / "run").step == 10
    assert "no MTP" in outputs[4] and "x transformers" in outputs[6]
    assert "agreement" in outputs[8]
    card = tmp_path / "smollm2_heads.md"
    assert name == "deepseek" or "1 MTP module" in card.read_text()
    before, after = read_folder(tmp_path / "theirs"), read_folder(tmp_path / "smollm2_mtp")
    assert after.config.trunk == before.config.trunk and after.config.mtp.depth == 1
