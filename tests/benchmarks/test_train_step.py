"""The measured cost of a training step, with plausible numbers for tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import profiles, train_step, workloads
from mtp_lightning.cpu import library as native

SHALLOW = ["model.n_layers=2"]


def row(name: str, depth: int) -> dict[str, Any]:
    mtp, overrides = train_step.VARIANTS.get(name, (name, []))
    task = {
        "name": name, "mtp": mtp, "overrides": [*SHALLOW, *overrides], "depth": depth,
        "model": "nano", "vocab_size": 40, "batch_size": 2, "seq_len": 16, "steps": 1,
    }  # fmt: skip
    answers = train_step.measure(task)
    return train_step.combine(task, [next(answers) | next(answers)])


@pytest.mark.long
def test_costs_of_variants_depend_on_their_depths() -> None:
    plain, single = row("none", 0), row("sequential", 1)
    for shallow, name, grows in (
        (single, "sequential", True),
        (row("parallel", 1), "parallel", False),
    ):
        deep = row(name, 4)
        for measured in (shallow, deep):
            train_step.compare(measured, plain)
        grown = deep["saved_peak"] / shallow["saved_peak"]
        assert grown > 1.2 if grows else grown < 1.001, (name, grown)
        assert deep["parameters_added"] == 4 * shallow["parameters_added"] > 0
        assert 0 < shallow["stack_share"] < deep["stack_share"] < 1
        assert deep["ms_per_step"] > 0 and deep["tokens_per_second"] > 0
    shared = row("sequential, shared", 4)
    train_step.compare(shared, plain)
    assert shared["parameters_added"] == single["parameters_added"]
    free = row("parameter_free", 4)
    train_step.compare(free, plain)
    assert free["parameters_added"] == 0 and free["stack_share"] == 0


def test_the_cost_of_an_objective_includes_its_teacher() -> None:
    """The teacher of sequential modules is free; parallel heads need a pass for each depth."""
    flops = {name: row(name, 2)["gflop_per_step"] / 32 * 1e9 for name in ("sequential", "parallel")}
    taught = {name: row(f"{name}, kl", 2)["gflop_per_step"] / 32 * 1e9 for name in flops}
    assert taught["sequential"] == flops["sequential"]
    assert taught["parallel"] == pytest.approx(flops["parallel"] + 2 * 2 * 40 * 96)


@pytest.mark.long
def test_the_command_measures_steps_and_memory(tmp_path: Path) -> None:
    shape = ["--batch-size", "2", "--seq-len", "32"]
    shape += ["--steps", "2", "--repeats", "1", "--output", str(tmp_path / "x.json")]
    arguments = ["--model", "nano", "--vocab-sizes", "300", "--depths", "0,2", *shape]
    result = train_step.main(arguments)
    plain, deep = result["rows"]
    assert (plain["depth"], deep["depth"]) == (0, 2)
    for row in result["rows"]:
        assert row["tokens_per_second"] == pytest.approx(2 * 32 / row["ms_per_step"] * 1e3)
        assert row["gflops"] == pytest.approx(row["gflop_per_step"] / row["ms_per_step"] * 1e3)
        assert 0 < row["ratio_to_matmul"] < 10 and 0 < row["ratio_to_fastest"] < 10
        assert 1 < row["loss"] < 10
        # The process holds the imports, then the model's state, then the activations.
        assert 50e6 < row["rss_imported"] < row["rss_peak"] < 2e9
        assert row["state_bytes"] == 16 * row["parameters"]
        assert row["beyond_state"] - row["saved_bytes"] == row["transient"]
    # The modules' own costs, by hand: nano's block, a projection of twice the width, three norms.
    block = 96 * (3 + 2 * 1) * 32 + 96 * 96 + 3 * 96 * 256 + 2 * 96
    module = block + 2 * 96 * 96 + 3 * 96
    assert deep["parameters"] - plain["parameters"] == 2 * module
    assert deep["saved_bytes"] > plain["saved_bytes"] > 4 * 2 * 32 * 96
    assert plain["cost_over_share"] == 1 and plain["peak_over_plain_without_own"] == 1
    share = deep["gflop_per_step"] / plain["gflop_per_step"]
    assert 1 < share < 3
    assert deep["cost_over_share"] == pytest.approx(
        deep["ms_per_step"] / plain["ms_per_step"] / share
    )


def test_profile_of_a_step_adds_up() -> None:
    tiny = {"vocab_size": 300, "depth": 2, "batch_size": 2, "seq_len": 32, "steps": 2}
    built = workloads.build_step({"model": "nano", "overrides": SHALLOW, **tiny})
    built.step()
    rows = profiles.profile_step(built, n_steps=2, seconds_per_step=0.5)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert sum(row["ms"] for row in rows) == pytest.approx(500)
    parts = {row["part"]: row for row in rows}
    layers = {"Attention", "Linear of Attention", "RMSNorm", "Embedding", "FeedForward"}
    assert layers | {f"{layer}, backward" for layer in layers} <= parts.keys()
    platform = {profiles.STEP, profiles.LOSS, profiles.PRODUCTS, "optimizer", "clipping"}
    assert platform <= parts.keys()
    # The FLOPs of linear layers and head by hand: all matrices, in three passes.
    matrices = sum(p.numel() for n, p in built.model.named_parameters() if p.dim() == 2)
    matrices -= 300 * 96  # the embedding, tied to the head
    # A feed-forward layer is one op; in C++ its products are not visible.
    named, inside = built.model.named_parameters(), ("gate_up.weight", "down.weight")
    inner = sum(p.numel() for n, p in named if n.endswith(inside))
    matrices -= inner
    visible = 0 if native.library else 2 * 2 * 32 * inner / 1e9
    feed_forward = [parts[f"FeedForward{end}"]["gflop"] for end in ("", ", backward")]
    assert feed_forward == pytest.approx([visible, 2 * visible])
    linear, back = (
        [row for row in rows if row["part"].startswith("Linear") and ends(row["part"])]
        for ends in (lambda part: "backward" not in part, lambda part: "backward" in part)
    )
    gflop = sum(row["gflop"] for row in linear)
    assert gflop == pytest.approx(2 * 2 * 32 * matrices / 1e9)
    assert sum(row["gflop"] for row in back) == pytest.approx(2 * gflop)
    assert parts[profiles.PRODUCTS]["gflop"] == pytest.approx(3 * 3 * 2 * 64 * 96 * 300 / 1e9)
    assert all(row["products_ms"] > 0 and row["operators"] >= 2 for row in linear)


@pytest.mark.long
def test_the_commands_profile_precision_and_memory(tmp_path, monkeypatch):
    shape = {"vocab_size": 50, "depth": 1, "batch_size": 1, "seq_len": 16}
    monkeypatch.setitem(train_step.MODELS, "pico", {**shape, "mtp": "parallel"})
    output = ["--quick", "--output", str(tmp_path / "result.json")]
    result = train_step.main(["profile", "--models", "pico", "--threads", "1", *output])
    (profile,) = result["profiles"]
    assert profile["model"] == "pico" and profile["threads"] == 1
    assert sum(row["ms"] for row in profile["rows"]) == pytest.approx(profile["ms_per_step"])
    result = train_step.main(["precision", "--models", "pico", *output])
    (row,) = result["rows"]
    assert row["tokens_per_second"] * row["ms_bf16"] == pytest.approx(16 * 1e3)
    assert row["ms_fp32"] > 0 and row["speedup"] > 0
    kept, given_back = train_step.main(["memory", "--model", "pico", *output])["rows"]
    assert (kept["name"], given_back["name"]) == ("kept", "given back")
    assert given_back["speedup"] == 1 and kept["speedup"] == pytest.approx(
        given_back["ms_per_step"] / kept["ms_per_step"]
    )
