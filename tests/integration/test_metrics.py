"""A run's reported numbers, recomputed from its files by independent means."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_lightning.callbacks.speculative_eval import SpeculativeEval
from mtp_lightning.nn.config import TrunkConfig
from tests.integration import helpers
from tests.integration.conftest import Once
from tests.integration.helpers import ROOT, checkpoint, column, evaluated, events, rows, train_here
from tests.reference import sequential

DEPTH, SEQ_LEN = 2, 16
LAST = "checkpoints/last.ckpt"

# One document, of characters that are one, two and three bytes long.
POEM = "".join(
    f"Line {i}: the old goose — naïve, ünruly — walks {'over' if i % 3 else 'under'} hill {i % 7}\n"
    for i in range(45)
)
# The last line end before 90 % of the characters: what comes after it is the validation text.
CUT = POEM.rfind("\n", 0, round(len(POEM) * 0.9)) + 1


@dataclass
class Run:
    folder: Path
    cache: Path
    summary: dict[str, Any]


def train_on_poem(tmp: Path, cache: Path, **more: Any) -> None:
    file = tmp / "poem.txt"
    file.write_text(POEM, encoding="utf-8")
    settings = helpers.typed(
        "data=text data.val_fraction=0.1 data.eval_batch_size=3 data.eval_bytes=all "
        "trainer.max_steps=20 trainer.val_check_interval=7 optimizer.lr=0.02 "
        f"mtp.depth={DEPTH} callbacks.throughput.measure_matmul=true"
    )
    summary = train_here(tmp / "run", cache, {**settings, "data.paths": file, **more})
    (tmp / "returned.json").write_text(json.dumps(summary))


def read_run(folder: Path, cache: Path) -> Run:
    return Run(folder / "run", cache, json.loads((folder / "returned.json").read_text()))


@pytest.fixture(scope="module")
def run(once: Once, cache: Path) -> Run:
    """Bytes, with TensorBoard."""
    more = {"logger": "default", "callbacks.speculative_eval.new_tokens": 8}
    return read_run(once("bytes", lambda folder: train_on_poem(folder, cache, **more)), cache)


@pytest.fixture(scope="module")
def bpe(once: Once, cache: Path) -> Run:
    """Of a BPE tokenizer."""
    more = {"tokenizer": "bpe", "tokenizer.vocab_size": 300, "data.eval_batch_size": 2}
    more["callbacks"] = "sampled_acceptance"
    return read_run(once("bpe", lambda folder: train_on_poem(folder, cache, **more)), cache)


def recomputed(content: dict[str, Any], ids: list[int]) -> dict[str, float]:
    """The rates of docs/semantics.md in float64, position by position, from stored weights, for a
    text's tokens in windows that start T apart and follow an end of text."""
    trunk = TrunkConfig(**content["model_config"]["trunk"])
    weights = {
        name.removeprefix("model."): tensor.double()
        for name, tensor in content["state_dict"].items()
        if name.startswith("model.")
    }
    head = weights["trunk.embedding.weight"]  # tied
    sums = {
        f"{name}_depth_{k}": [0.0, 0]
        for k in range(DEPTH + 1)
        for name in ("loss", "accuracy", "agreement", "overlap")
    }

    def count(name: str, value: float) -> None:
        sums[name][0] += value
        sums[name][1] += 1

    stream = [256, *ids]
    for start in range(0, len(ids), SEQ_LEN):
        window = stream[start : start + SEQ_LEN + DEPTH + 1]
        window += [0] * (SEQ_LEN + DEPTH + 1 - len(window))
        hidden = sequential(torch.tensor(window), weights, trunk, DEPTH)
        probabilities = [torch.softmax(h @ head.T, -1) for h in hidden]
        for k in range(DEPTH + 1):
            for i in range(min(SEQ_LEN, len(stream) - start - k - 1)):
                q = probabilities[k][i]
                target = window[i + k + 1]
                count(f"loss_depth_{k}", -math.log(q[target]))
                count(f"accuracy_depth_{k}", int(q.argmax()) == target)
                if k and i + k < SEQ_LEN:
                    p = probabilities[0][i + k]
                    count(f"agreement_depth_{k}", int(q.argmax()) == int(p.argmax()))
                    count(f"overlap_depth_{k}", float(torch.minimum(p, q).sum()))
    return {name: total / n for name, (total, n) in sums.items() if n}


def test_validation_equals_the_papers_equations_in_float64(run: Run) -> None:
    # The text's bytes and the end of text, without the token store.
    expected = recomputed(checkpoint(run.folder), [*POEM[CUT:].encode(), 256])
    assert len(expected) == 3 + 3 + 2 + 2
    for name, value in expected.items():
        assert run.summary[f"val/{name}"] == pytest.approx(value, rel=2e-5), name
        assert column(run.folder, f"val/{name}")[20] == pytest.approx(value, rel=2e-5), name
    # Every depth has learned: an untrained model would agree with too many formulas.
    assert max(expected[f"loss_depth_{k}"] for k in range(3)) < 4 < math.log(257)


def test_bits_per_byte_equals_a_calculation_by_hand(run: Run, bpe: Run) -> None:
    text = POEM[CUT:]
    n_bytes = len(text.encode())
    from tokenizers import Tokenizer

    stored = Tokenizer.from_file(str(bpe.folder / "tokenizer.json"))
    assert bpe.summary["data"]["val"]["bytes"] == n_bytes == run.summary["data"]["val"]["bytes"]
    for summary, n_tokens in (
        (run.summary, n_bytes + 1),
        (bpe.summary, len(stored.encode(text, add_special_tokens=False).ids) + 1),
    ):
        assert summary["data"]["val"]["tokens"] == n_tokens == summary["evaluation"]["tokens"]
        assert summary["evaluation"]["bytes"] == n_bytes
        nats = summary["val/loss_depth_0"] * n_tokens  # of the whole text, end of text included
        assert summary["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes)
    assert run.summary["evaluation"]["fingerprint"] == bpe.summary["evaluation"]["fingerprint"]
    tokens = {name: r.summary["data"]["val"]["tokens"] for name, r in (("b", run), ("t", bpe))}
    assert tokens["t"] < 0.7 * tokens["b"]


def test_the_summary_agrees_with_metrics_csv_and_the_checkpoint(run: Run) -> None:
    stored = helpers.summary_of(run.folder)
    assert stored == run.summary
    last = rows(run.folder)[-1]
    for tag in (tag for tag in last if tag.startswith("val/")):
        assert stored[tag] == pytest.approx(last[tag], rel=1e-6)
    assert stored["tokens"] == 20 * 4 * SEQ_LEN
    assert stored["flops"] == stored["tokens"] * stored["flops_per_token"]
    # Every validation logs the cost so far, in full steps; the last one is the summary's.
    assert column(run.folder, "progress/tokens") == {s: s * 4 * SEQ_LEN for s in (7, 14, 20)}
    for name in ("flops", "seconds"):
        costs = list(column(run.folder, f"progress/{name}").values())
        assert costs == sorted(costs) and costs[0] > 0
        assert costs[-1] == pytest.approx(stored[name], rel=1e-6)
    state = checkpoint(run.folder)["state_dict"]
    tensors = {name: t for name, t in state.items() if name.startswith("model.")}
    for key, without in (("parameters", "nothing"), ("parameters_trunk", ".mtp.")):
        counted = {t.data_ptr(): t.numel() for name, t in tensors.items() if without not in name}
        assert stored[key] == sum(counted.values())
    assert stored["seconds"] > 0 and stored["perf/tokens_per_second"] > 0
    for key in ("python", "torch", "lightning"):
        assert stored["versions"][key]


def evaluate_here(run: Run, checkpoint: str, *more: str) -> dict[str, Any]:
    """``checkpoint`` is a path in the run's folder."""
    return evaluated(run.folder / checkpoint, f"paths.cache_dir={run.cache}", *more)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_evaluate_repeats_the_last_validation(request: pytest.FixtureRequest, kind: str) -> None:
    run: Run = request.getfixturevalue("run" if kind == "bytes" else "bpe")
    metrics = evaluate_here(run, LAST)
    tags = [tag for tag in run.summary if tag.startswith("val/")]
    assert len(tags) == 11
    for key in (*tags, "evaluation", "parameters", "step"):
        assert metrics[key] == run.summary[key]
    assert "flops_per_token" not in metrics  # a training's, which depends on its objective


def test_evaluate_repeats_the_runs_acceptance(run: Run) -> None:
    metrics = evaluate_here(run, LAST, "decode.new_tokens=8", "long_range=false")
    rates = [f"decode/acceptance_position_{j}" for j in (1, 2)] + ["decode/tokens_per_step"]
    bounds = [f"{tag}_{end}" for tag in rates for end in ("low", "high")]
    for tag in (*rates, *bounds, "decode/n_prompts", "decode/new_tokens"):
        assert metrics[tag] == run.summary[tag], tag
    assert 4 < metrics["decode/n_prompts"] <= 64
    assert metrics["decode/tokens_per_step_low"] < metrics["decode/tokens_per_step_high"]


def test_a_window_too_short_for_decoding_is_reported(bpe, capsys):
    """64 new tokens do not fit into 16, in the run and in evaluate.py."""
    reason = bpe.summary["not_decoded"]
    assert "data.seq_len=16 leaves no room" in reason
    metrics = evaluate_here(bpe, ".", "long_range=false")
    assert reason.endswith("lower callbacks.speculative_eval.new_tokens")
    assert metrics["not_decoded"].endswith("new_tokens=64: lower decode.new_tokens")
    assert "nothing was decoded" in capsys.readouterr().out
    assert not [tag for tag in (*metrics, *bpe.summary) if tag.startswith("decode/")]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_evaluate_repeats_the_last_validation_in_the_runs_precision(tmp_path, cache, precision):
    more = {"trainer.precision": precision, "trainer.max_steps": 3, "data.document_mask": "true"}
    more["data.val_fraction"] = 0.3
    summary = train_here(tmp_path / "run", cache, more)
    run = Run(tmp_path / "run", cache, summary)
    metrics = evaluate_here(run, LAST, "long_range=false", "decode.n_prompts=0")
    for tag in (tag for tag in summary if tag.startswith("val/")):
        assert metrics[tag] == summary[tag], tag
    everything = evaluate_here(run, LAST, "long_range=false", "eval_bytes=all")["evaluation"]
    assert everything["bytes"] > summary["evaluation"]["bytes"]
    assert everything["fingerprint"] != summary["evaluation"]["fingerprint"]


def test_evaluate_reads_the_best_checkpoint_of_a_folder(run: Run) -> None:
    """Also where the best validation is the one after the last step."""
    best = checkpoint(run.folder, "best.ckpt")["global_step"]
    by_step = column(run.folder, "val/loss_depth_0")
    assert best == min(by_step, key=by_step.__getitem__)
    metrics = evaluate_here(run, ".")
    assert metrics["val/loss_depth_0"] == pytest.approx(by_step[best], rel=1e-6)


@pytest.mark.slow
def test_evaluate_reads_another_text_from_the_command_line(run: Run, tmp_path: Path) -> None:
    """Another text through the run's own tokenizer, from another folder, into a JSON file."""
    (tmp_path / "other.txt").write_text("12345 67890\n" * 60)
    args = [f"checkpoint={run.folder / 'checkpoints' / 'last.ckpt'}", "data=text"]
    args += ["data.paths=other.txt", "data.val_fraction=0.9", "output=out.json"]
    args += [f"paths.cache_dir={run.cache}"]
    done = helpers.execute([sys.executable, str(ROOT / "evaluate.py"), *args], cwd=tmp_path, code=0)
    metrics = json.loads((tmp_path / "out.json").read_text())
    assert metrics["val/loss_depth_0"] > run.summary["val/loss_depth_0"]
    # Other keys are the run's, not those of data=text.
    assert metrics["data"]["val_fraction"] == 0.9
    assert metrics["data"]["train"]["windows"] == 3  # 73 tokens in windows of 16
    assert metrics["evaluation"]["bytes"] == 12 * 54  # data.eval_bytes=all
    assert "bits per byte" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt", "out.json"]
    # A text whose validation documents are named has no share of them.
    (tmp_path / "named.txt").write_text("67890\n" * 60)
    args = [args[0], "data=text", "data.paths=other.txt", "data.val_paths=named.txt", args[-1]]
    helpers.execute([sys.executable, str(ROOT / "evaluate.py"), *args], cwd=tmp_path, code=0)


# The tags of each depth from 1.
OF_A_DEPTH = "train/loss val/loss val/accuracy train/lambda val/agreement val/overlap"


def test_every_tag_reaches_tensorboard(run: Run) -> None:
    logged = events(run.folder)
    expected = {"train/loss", "val/bits_per_byte", "perf/tokens_per_second", "perf/of_matmul"}
    for k, tags in enumerate(["train/loss val/loss val/accuracy"] + 2 * [OF_A_DEPTH]):
        expected |= {f"{tag}_depth_{k}" for tag in tags.split()}
    expected |= {"decode/tokens_per_step", "decode/speedup", "decode/acceptance_position_1"}
    expected |= {"decode/tokens_per_second", "progress/tokens", "progress/seconds"}
    assert expected <= set(logged.Tags()["scalars"])
    for tag in expected:
        seen = {event.step: event.value for event in logged.Scalars(tag)}
        assert seen == pytest.approx(column(run.folder, tag), rel=1e-5), tag
    # The run is a row of the HPARAMS tab, from its start and again at its end.
    ends = {"_hparams_/session_start_info", "_hparams_/session_end_info"}
    assert ends <= set(logged.summary_metadata)
    # The chart that groups all depths.
    assert "custom_scalars__config__" in logged.Tags()["tensors"]


def test_a_run_folder_holds_all_its_files(run: Run, bpe: Run) -> None:
    for name in ("config.yaml", "summary.json", "metrics.csv", "tokenizer_state.json"):
        assert (run.folder / name).is_file(), name
    assert len(list(run.folder.glob("events.out.tfevents.*"))) >= 1
    assert (bpe.folder / "tokenizer.json").is_file()
    checkpoints = {p.stem for p in (run.folder / "checkpoints").iterdir()}
    assert checkpoints == {"best", "last", "previous"}


def test_epochs_shorter_than_the_interval_of_rows_give_no_warning(
    tmp_path: Path, cache: Path
) -> None:
    train_here(tmp_path, cache, {"data.train_windows": 8, "trainer.log_every_n_steps": 5})
    assert list(column(tmp_path, "train/loss")) == [5, 10]


def test_an_inactive_depth_is_not_logged(tmp_path: Path, cache: Path) -> None:
    """Lightning alone would repeat the newest value."""
    stages = {"lambda_schedule": "reverse_curriculum", "trainer.max_steps": 9}
    train_here(tmp_path, cache, stages)
    for k, last in ((0, 9), (1, 6), (2, 3)):
        assert list(column(tmp_path, f"train/loss_depth_{k}")) == list(range(1, last + 1))


def test_a_summary_has_no_numbers_of_earlier_validations(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last texts may have no draft at a position that earlier ones had."""
    drafts = iter([{"decode/acceptance_position_2": 1 / 3}, {"decode/tokens_per_step": 4 / 3}])
    monkeypatch.setattr(SpeculativeEval, "measure", lambda *_: next(drafts))
    summary = train_here(tmp_path, cache, {"callbacks.speculative_eval.new_tokens": 8})
    decoding = {tag: value for tag, value in summary.items() if tag.startswith("decode/")}
    assert decoding == {"decode/tokens_per_step": 4 / 3}


def test_a_model_without_drafts_reports_tokens_per_second(tmp_path: Path, cache: Path) -> None:
    more = {"mtp.depth": 0, "callbacks.speculative_eval.new_tokens": 8, "trainer.max_steps": 2}
    summary = train_here(tmp_path, cache, more)
    decoding = {tag: value for tag, value in summary.items() if tag.startswith("decode/")}
    assert list(decoding) == ["decode/tokens_per_second"]
    assert decoding["decode/tokens_per_second"] > 0
