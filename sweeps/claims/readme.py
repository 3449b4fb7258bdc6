"""The README's part between the markers, in each of its languages: the answers to its three
questions, two pictures, and the verdicts of the claims that were run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_lightning.markdown import plain
from sweeps.claims import words
from sweeps.claims.claim import Claim
from sweeps.claims.decide import FAILS, HOLDS, UNDECIDED
from sweeps.claims.figure import CURVE, files_of
from sweeps.claims.result import UNPREDICTED, Result, is_stale, with_trial

STALE = "stale"
NOT_RUN = "not run"

# Whether the main prediction gains at equal compute, and what a head is good for.
QUESTION = "text_equal_flops"
PLANNING = "star_graph_heads_5000"
# Further heads on the same task, against the same control.
MORE_PLANNING = "star_graph_summaries"
# What keeps sequential modules from that.
HIDING = "token_dropout"
# Shown in the place of the first while it has no numbers.
INSTEAD = "drafts_best"


@dataclass(frozen=True)
class Language:
    """What the part says; the numbers are the same in all.

    Attributes:
        question: the first one, in bold.
        waiting: where it has no numbers yet; takes ``command``.
        answer: takes ``verdict``, ``n``, ``worse``, ``better``, ``open``, ``least`` and ``most``.
        plans: the second question, in bold, and its answer; takes ``shares`` and ``beyond``.
        hides: the third one, likewise.
        arms: names of arms that a reader can do without knowing the claim's file.
        share: of an arm's seeds; takes ``arm``, ``count`` and ``n``.
        nobody: in the place of ``beyond`` where there is none.
        figures: what the pictures show, by the claim's name; of curves by :data:`CURVE`.
        head: of the table's three columns.
        held: the verdict, and how many predictions hold; takes ``verdict``, ``held`` and ``n``.
        states: a verdict's words.
        missing: in front of the claims that were not run.
        superseded: of claims that are not shown, since later ones ask better; takes ``names``.
    """

    question: str
    waiting: str
    answer: str
    plans: str
    hides: str
    arms: Mapping[str, str]
    share: str
    nobody: str
    figures: Mapping[str, str]
    head: tuple[str, str, str]
    held: str
    states: Mapping[str, str]
    missing: str
    superseded: str


ENGLISH = Language(
    question="**Is the main prediction better with MTP, at equal training compute?**",
    waiting="Not judged yet: `{command}`.",
    answer=(
        "The claim that it is not, at this small scale: **{verdict}**. "
        "Bits per byte against plain training at equal FLOPs, {n} settings of head and depth: "
        "{worse} worse beyond noise, {better} better beyond noise, {open} undecided; "
        "from {least} to {most} (95 % intervals over seeds)."
    ),
    plans=(
        "**Does it teach a model to plan?** Seeds that learned the way through a star graph: "
        "{shares}. More than by next-token training, beyond noise: {beyond}."
    ),
    hides=(
        "**Is it the tokens between that keep sequential modules from it?** The same with some of "
        "these tokens hidden from the modules: {shares}. More than with none hidden, beyond noise: "
        "{beyond}."
    ),
    arms={
        "p0": "none hidden",
        **{f"p{p:03}": f"{p} %" for p in (25, 50, 75)},
        "p1": "all",
    },
    share="{arm} {count} of {n}",
    nobody="none",
    figures={
        QUESTION: (
            "Bits per byte of each head and depth minus plain training's at equal FLOPs, with 95 % "
            "intervals over seeds: right of the line is worse."
        ),
        CURVE: (
            "Training loss of the next token against training FLOPs, by head and depth, with 95 % "
            "intervals over seeds."
        ),
        INSTEAD: (
            "Drafts: tokens that a verify pass gives with other heads minus those with sequential "
            "modules, at equal FLOPs, with 95 % intervals over seeds."
        ),
        PLANNING: "Planning: the share of seeds that learn the way through a star graph, by head.",
    },
    head=("claimed", "measured here", "seeds an arm"),
    held="{verdict}; {held} of {n} predictions hold",
    states={},
    missing="Predicted, and not run yet",
    superseded=(
        "Superseded by later claims, with their numbers in [docs/log.md](docs/log.md): {names}."
    ),
)

CHINESE = Language(
    question="**在训练计算量相同的条件下，MTP 能让主预测更好吗？**",
    waiting="尚无结论：`{command}`。",
    answer=(
        "论断“在这样的小规模下不能”：**{verdict}**。"
        "与 FLOPs 相同的普通训练相比（比特/字节），{n} 种预测头与深度的组合中，"
        "{worse} 种变差且超出噪声，{better} 种变好且超出噪声，{open} 种未决；"
        "差值从 {least} 到 {most}（跨种子的 95 % 置信区间）。"
    ),
    plans=(
        "**它能让模型学会规划吗？** 学会在星形图里找到路径的种子数：{shares}。"
        "比普通的下一词元训练更多且超出噪声的：{beyond}。"
    ),
    hides=(
        "**妨碍串行模块的是它们读到的中间词元吗？** 对模块隐藏这些词元时，学会的种子数：{shares}。"
        "比全部可见时更多且超出噪声的：{beyond}。"
    ),
    arms={
        "p0": "不隐藏",
        **{f"p{p:03}": f"{p} %" for p in (25, 50, 75)},
        "p1": "全部隐藏",
    },
    share="{arm} {count}/{n}",
    nobody="无",
    figures={
        QUESTION: (
            "相同 FLOPs 下，各预测头与深度的比特/字节减去普通训练的差值，"
            "误差线为跨种子的 95 % 置信区间；竖线右侧表示更差。"
        ),
        CURVE: (
            "下一词元的训练损失与训练 FLOPs 的关系，按预测头与深度区分，"
            "阴影为跨种子的 95 % 置信区间。"
        ),
        INSTEAD: (
            "草稿：相同 FLOPs 下，其他预测头每次验证得到的词元数减去串行模块的，"
            "误差线为跨种子的 95 % 置信区间。"
        ),
        PLANNING: "规划：各预测头中学会在星形图里找到路径的种子比例。",
    },
    head=("论断（英文原文）", "这里测得", "每组种子数"),
    held="{verdict}（{held}/{n} 条预测成立）",
    states={
        HOLDS: "成立",
        FAILS: "不成立",
        UNDECIDED: "未决",
        STALE: "已过期",
        NOT_RUN: "未运行",
        UNPREDICTED: "预测不在任何提交中",
    },
    missing="已写下预测、尚未运行",
    superseded="已被后来的论断取代，数字见 [docs/log.md](docs/log.md)：{names}。",
)

LANGUAGES = {"README.md": ENGLISH, "README.zh-CN.md": CHINESE}

Found = Sequence[tuple[Claim, Result | None]]


def part(found: Found, language: Language) -> str:
    """What stands between the markers.

    Args:
        found: all claims, with their results where there are any.
        language: of the page.
    """
    here = [(claim, result) for claim, result in found if claim.setting == "cpu"]
    on_cpu = {claim.name: (claim, result) for claim, result in here if not claim.superseded_by}
    old = [claim.name for claim, _ in here if claim.superseded_by]
    return "\n\n".join(
        filter(
            None,
            [
                *_answer(on_cpu, language),
                _solvers((PLANNING, MORE_PLANNING), language.plans, on_cpu, language),
                _solvers((HIDING,), language.hides, on_cpu, language),
                *_pictures(on_cpu, language),
                _table(on_cpu, language),
                language.superseded.format(names=", ".join(old)) if old else "",
            ],
        )
    )


def state(claim: Claim, result: Result | None) -> str:
    """A claim's verdict, or why it has none."""
    if result is None:
        return NOT_RUN
    verdict = STALE if is_stale(result, claim) else plain(result["verdict"])
    return with_trial(verdict, result["predicted_in"])


def _answer(on_cpu: Mapping[str, tuple[Claim, Result | None]], language: Language) -> list[str]:
    if QUESTION not in on_cpu:
        return []
    claim, result = on_cpu[QUESTION]
    entries = [] if result is None else [e for e in result["predictions"] if e["low"] is not None]
    if result is None or not entries:
        return [f"{language.question} {language.waiting.format(command=claim.command)}"]
    verdicts = [entry["verdict"] for entry in entries]
    by_size = sorted(entries, key=lambda entry: float(entry["effect"]))
    least, most = (plain(f"{words.measured(e)} ({e['arm']})") for e in (by_size[0], by_size[-1]))
    said = language.answer.format(
        verdict=_word(state(claim, result), language),
        n=len(entries),
        worse=verdicts.count(HOLDS),
        better=verdicts.count(FAILS),
        open=verdicts.count(UNDECIDED),
        least=least,
        most=most,
    )
    return [f"{language.question} {said}"]


def _solvers(
    names: Sequence[str],
    said: str,
    on_cpu: Mapping[str, tuple[Claim, Result | None]],
    in_: Language,
) -> str:
    """Of every arm of some claims the seeds that solved the task; nothing where the first claim has
    no numbers."""
    counts: dict[str, Mapping[str, int]] = {}
    beyond: list[str] = []
    for name in names:
        entries = _of_shares(name, on_cpu)
        if not entries and not counts:
            return ""
        for entry in entries:
            if entry["other"]:
                counts.setdefault(entry["against"], entry["other"])
            counts[entry["arm"]] = entry["own"]
            if entry["against"] and entry["verdict"] == HOLDS:
                beyond.append(entry["arm"])
    return said.format(
        shares=", ".join(
            in_.share.format(arm=in_.arms.get(arm, plain(arm)), count=of["count"], n=of["n"])
            for arm, of in counts.items()
        ),
        beyond=", ".join(in_.arms.get(arm, plain(arm)) for arm in beyond) or in_.nobody,
    )


def _of_shares(
    name: str, on_cpu: Mapping[str, tuple[Claim, Result | None]]
) -> list[Mapping[str, Any]]:
    """A claim's predictions on shares of seeds, where it compares any; none of a stale one."""
    claim, result = on_cpu.get(name, (None, None))
    if claim is None or result is None or is_stale(result, claim):
        return []
    found = [entry for entry in result["predictions"] if entry["own"]]
    return found if any(entry["against"] for entry in found) else []


def _pictures(on_cpu: Mapping[str, tuple[Claim, Result | None]], language: Language) -> list[str]:
    """One of each group: the first that has numbers."""
    shown = []
    for group in ((QUESTION, INSTEAD), (PLANNING,)):
        for name in group:
            claim, result = on_cpu.get(name, (None, None))
            if claim is None or result is None:
                continue
            if files := files_of(result, claim.label, Path("results")):
                file = files[-1] if name == QUESTION else files[0]
                said = language.figures[CURVE if file.stem.endswith(CURVE) else name]
                shown.append(f"![{said}]({file.as_posix()})<br>{said}")
                break
    return shown


def _table(on_cpu: Mapping[str, tuple[Claim, Result | None]], language: Language) -> str:
    """A line for each claim that was run, and one for all that were not."""
    run = [
        f"| [{name}]({_anchor(claim, result)}): {plain(claim.sentence)} "
        f"| {_measured(claim, result, language)} | {_n(result)} |"
        for name, (claim, result) in on_cpu.items()
        if result is not None
    ]
    rest = [name for name, (_, result) in on_cpu.items() if result is None]
    head = [f"| {' | '.join(language.head)} |", "|---|---|---|"]
    missing = f"{language.missing}: {', '.join(rest)}." if rest else ""
    return "\n\n".join(filter(None, ["\n".join([*head, *run]) if run else "", missing]))


def _measured(claim: Claim, result: Result, language: Language) -> str:
    verdict = _word(state(claim, result), language)
    if is_stale(result, claim):
        return verdict
    held = [entry["verdict"] for entry in result["predictions"]].count(HOLDS)
    return language.held.format(verdict=verdict, held=held, n=len(result["predictions"]))


def _word(said: str, language: Language) -> str:
    for english, own in language.states.items():
        said = said.replace(english, own)
    return said


def _anchor(claim: Claim, result: Result) -> str:
    """The section of docs/results.md, whose title ends in the verdict."""
    said = re.sub(r"[^\w ]", "", state(claim, result)).replace(" ", "-")
    return f"docs/results.md#{claim.name}-{said}"


def _n(result: Result) -> str:
    """Of the arm with the fewest finished, and of the one with the most."""
    counts = [
        sum(seed["state"] == "done" for seed in arm["seeds"].values())
        for arm in result["arms"].values()
    ]
    least, most = min(counts), max(counts)
    return str(most) if least == most else f"{least}–{most}"
