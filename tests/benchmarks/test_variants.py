"""The benchmark of the variants: its numbers on a tiny model, in this process."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import objectives, variants


def row(name: str, depth: int) -> dict[str, Any]:
    mtp, overrides = variants.VARIANTS.get(name, (name, []))
    task = {
        "name": name, "mtp": mtp, "overrides": overrides, "depth": depth, "model": "nano",
        "vocab_size": 40, "batch_size": 2, "seq_len": 16, "steps": 1,
    }  # fmt: skip
    return variants.combine(task, [variants.measure(task)])


def test_numbers_are_those_of_the_variants() -> None:
    plain = row("none", 0)
    for name, grows in (("sequential", True), ("parallel", False), ("linear", False)):
        shallow, deep = row(name, 1), row(name, 4)
        for found in (shallow, deep):
            variants.compare(found, plain)
        grown = deep["saved_peak"] / shallow["saved_peak"]
        assert grown > 1.2 if grows else grown < 1.001, (name, grown)
        assert deep["parameters_added"] == 4 * shallow["parameters_added"] > 0
        assert 0 < shallow["stack_share"] < deep["stack_share"] < 1
        assert deep["ms_per_step"] > 0 and deep["tokens_per_second"] > 0
    shared = row("sequential, shared", 4)
    variants.compare(shared, plain)
    assert shared["parameters_added"] == row("sequential", 1)["parameters"] - plain["parameters"]
    free = row("parameter_free", 4)
    variants.compare(free, plain)
    assert free["parameters_added"] == 0 and free["stack_share"] == 0


def test_an_objective_costs_what_its_teacher_costs() -> None:
    """A chain's is free, that of heads side by side is a pass for each; both learn the same."""
    flops = {name: row(name, 2)["flops_per_token"] for name in ("sequential", "parallel")}
    taught = {name: row(f"{name}, kl", 2)["flops_per_token"] for name in flops}
    assert taught["sequential"] == flops["sequential"]
    assert taught["parallel"] == flops["parallel"] + 2 * 2 * 40 * 96
    names = ["kl", objectives.ALONE]
    together, alone = objectives.measure(37, 16, 2, repeats=1, names=names, windows=1)
    assert alone["loss"] == pytest.approx(together["loss"], rel=1e-5)
    assert together["over_first"] == 1 and alone["ms"] > 0
