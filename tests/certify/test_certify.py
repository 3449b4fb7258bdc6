"""The certificate: what it says of sound decoding, and four defects that it must find."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from mtp_lightning.certify import run
from mtp_lightning.certify.__main__ import main
from mtp_lightning.certify.cells import Cell, cells, ways
from mtp_lightning.certify.certificate import Certificate, Row
from mtp_lightning.certify.greedy import Greedy
from mtp_lightning.certify.sampled import Sampled, transform
from mtp_lightning.decoding import verification
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.session import Session
from mtp_lightning.model import MTPModel
from mtp_lightning.nn import ops
from mtp_lightning.opening import OpenedModel
from tests.decoding.models import small_model


class Words:
    """A tokenizer of the model's 37 ids."""

    eot_id, end_ids = 36, (36,)

    def encode(self, text: str) -> list[int]:
        return [ord(c) % 36 for c in text]


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let ``mine`` be a model of this test's own."""

    def of(model: MTPModel) -> None:
        opened = OpenedModel(
            model=model,
            tokenizer_state={},
            config={"data": {"seq_len": 64}},
            step=1,
            path=Path("mine"),
        )
        opened.__dict__["tokenizer"] = Words()
        monkeypatch.setattr(run, "open_model", lambda path, *, allow: opened)

    return of


@pytest.fixture
def certify(put: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Certify a model of this test's own, in all cells or those of some drafts."""

    def of(model: MTPModel, *drafts: str, **options: Any) -> Certificate:
        put(model)
        if drafts:
            batches = options.pop("batches", (1, 8))
            kept = [c for c in cells(model, (1,)) if c.drafts in drafts and c.batch in batches]
            kept = [c for c in kept if c.reads == "whole"]
            monkeypatch.setattr(run, "cells", lambda *_, **__: kept)
        options = {"count": 8, "length": 12, "precisions": ["fp32"], "few": True} | options
        return run.certify(Path("mine"), **options)

    return of


def test_sound_decoding(certify: Any) -> None:
    found = certify(small_model(0, 2), few=False, count=12, length=6)
    assert found.broken() == [] and found.verdict().startswith("lossless: ")
    assert {row.cell.batch for row in found.rows} == {1, 8}
    assert {row.cell.reads for row in found.rows} == {"whole", "resumed"}
    assert all(row.greedy.texts == 12 for row in found.rows)
    drawn = [row.sampled for row in found.rows if row.sampled is not None]
    assert len(drawn) == len(ways(small_model(0, 2))) and all(s.tokens == 72 for s in drawn)


def test_cells_are_those_that_a_model_is_capable_of() -> None:
    assert list(ways(small_model(0, 1))) == [
        *("none", "depth 1", "depth 2", "depth 4", "deeper", "one cache", "auto", "tree"),
        *("short head", "block", "confident", "looked up"),
    ]
    assert "deeper" not in ways(small_model(0, 3)) and "depth 3" in ways(small_model(0, 3))
    few, all_ = (list(cells(small_model(0, 1), (1, 2), few=few)) for few in (True, False))
    assert len(all_) == 12 * 8 - 1 and len(few) == 12 * 4 - 1
    assert len(set(map(repr, all_))) == len(all_)


def test_two_threads_write_the_same(certify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found = certify(small_model(1, 1), count=4, length=5)
    assert {row.cell.threads for row in found.rows} == {1, 2} and not found.broken()


# -------------------------------------------------------------------------------------- defects


def test_sums_that_depend_on_the_number_of_rows_are_found(
    certify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes of several tokens add up the head's products from the other end."""
    verify = Session.verify
    monkeypatch.setattr(ops, "code", lambda: ("native", "as on a CPU with AVX-512"))

    def other_order(session: Session, n_drafts: int) -> Tensor:
        states, head = [], session.model.head
        hook = session.model.head.register_forward_pre_hook(lambda _, read: states.append(read[0]))
        monkeypatch.setattr(session, "_fused_trunk", None)
        logits = verify(session, n_drafts)
        hook.remove()
        if n_drafts == 0:
            return logits
        products = (states[-1].unsqueeze(-2) * head.weight).flip(-1)
        return products.cumsum(-1)[..., -1]

    monkeypatch.setattr(Session, "verify", other_order)
    found = certify(small_model(0, 2), "none", "depth 2")
    assert any("logits of" in line and "differ, by up to" in line for line in found.broken())
    assert found.verdict().startswith("BROKEN: ")


def test_a_rejected_drafts_cache_entry_that_stays_is_found(
    certify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify, accept = Session.verify, Session.accept
    stale: dict[int, bool] = {}

    def noticing(session: Session, accepted: Sequence[int]) -> None:
        n_drafted = session._n_drafted
        accept(session, accepted)
        stale[id(session)] = n_drafted > accepted[0]

    def keeping(session: Session, n_drafts: int) -> Tensor:
        at, layers = session.n[0], session.trunk_cache.entries_L_BSMH
        old = [entries[0, at].clone() for entries in layers]
        logits = verify(session, n_drafts)
        if stale.get(id(session)):
            for entries, entry in zip(layers, old, strict=True):
                entries[0, at] = entry
        return logits

    monkeypatch.setattr(Session, "accept", noticing)
    monkeypatch.setattr(Session, "verify", keeping)
    found = certify(small_model(0, 2), "none", "depth 2")
    assert any("greedy texts differ" in line for line in found.broken())


def test_a_residual_that_is_not_renormalised_is_found(
    certify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unnormalised(probs: Tensor, uniform: Tensor) -> Tensor:
        cumulative = probs.double().cumsum(dim=-1)
        # The total is taken to be 1, which it is of everything but a residual.
        behind = cumulative <= uniform.double().unsqueeze(-1)
        return behind.sum(dim=-1).clamp_(max=probs.shape[-1] - 1)

    monkeypatch.setattr(verification, "draw", unnormalised)
    found = certify(small_model(0, 2), "none", "depth 2", batches=(8,), count=120)
    broken = found.broken()
    assert broken and all("sampled tokens do not follow" in line for line in broken)
    assert not any("drafts: none" in line for line in broken)


def test_ties_that_are_broken_by_another_rule_are_found(
    certify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(0, 2)
    with torch.no_grad():
        model.head.weight[18:36] = model.head.weight[:18]  # every token has a twin
    assert certify(model, "none", "depth 2").broken() == []
    first = Tensor.argmax

    def last(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
        if x.dim() < 3 or x.shape[1] == 1:
            return first(x, dim=dim, keepdim=keepdim)
        return x.shape[-1] - 1 - first(x.flip(-1), dim=-1)

    monkeypatch.setattr(Tensor, "argmax", last)
    assert any("greedy texts differ" in line for line in certify(model, "depth 2").broken())


# ------------------------------------------------------------------------------------- its parts


def test_the_transform_is_uniform_and_only_for_the_right_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(5, generator=generator, dtype=torch.float64)
    p = logits.softmax(-1)
    ids = torch.multinomial(p, 40_000, replacement=True, generator=generator).tolist()
    u = transform(logits.expand(40_000, 5), ids, generator)
    order = p.argsort(descending=True).tolist()
    for x in range(5):  # token x's numbers fill its own stretch
        low = sum(float(p[y]) for y in order[: order.index(x)])
        mine = u[torch.tensor(ids) == x]
        assert low <= float(mine.min()) and float(mine.max()) <= low + float(p[x]) + 1e-12
    even = Sampled(40_000, torch.histc(u, 16, 0.0, 1.0).long().tolist())
    assert even.p > 0.001
    wrong = transform((logits * 1.1).expand(40_000, 5), ids, generator)
    assert Sampled(40_000, torch.histc(wrong, 16, 0.0, 1.0).long().tolist()).p < 1e-6


def test_the_p_value_is_that_of_a_chi_square() -> None:
    # 15 degrees of freedom: P(X > 24.996) = .05, P(X > 30.578) = .01 (any table)
    for statistic, p in ((24.9958, 0.05), (30.5779, 0.01)):
        spread = (statistic * 1000 / 2) ** 0.5
        counts = [1000 + spread, 1000 - spread, *[1000] * 14]
        found = Sampled(16_000, counts)  # type: ignore[arg-type]
        assert found.chi_square == pytest.approx(statistic) and found.p == pytest.approx(
            p, rel=1e-4
        )


def test_a_difference_is_counted_up_to_where_texts_part() -> None:
    from mtp_lightning.certify.texts import DecodedText

    wanted = DecodedText([1, 2, 3, 4], [torch.zeros(4, 2)])
    found = DecodedText([2, 9, 4], [torch.tensor([[0.0, 0], [0, 0.5], [7, 7]])])
    counted = Greedy()
    counted.compare(5, wanted, found, 1)
    assert counted == Greedy(texts=1, equal=0, tokens=2, same_bits=1, largest=0.5, first=(5, 2))


@pytest.mark.parametrize("broken", [False, True])
def test_table_json_and_badge(broken: bool) -> None:
    cell = Cell(drafts="<b>depth 1</b>", options=DecodingOptions(), batch=8, threads=2)
    greedy = Greedy(texts=1000, equal=1000 - broken, tokens=5000, same_bits=5000)
    greedy.first = (7, 3) if broken else None
    found = Certificate(
        "m", {"seed": 0}, True, rows=[Row("fp32", cell, greedy, Sampled(32, [2] * 16))]
    )
    lines = list(found.lines())
    assert f"{1000 - broken:,}/1,000" in lines[1] and "5,000/5,000" in lines[1]
    plain = json.loads(json.dumps(found.plain()))
    assert plain["cells"][0]["p"] == 1 and len(plain["broken"]) == broken
    if broken:
        assert plain["broken"][0] == (
            "fp32, drafts: <b>depth 1</b>, batch 8, 2 threads, whole prefix: 1 of 1,000 greedy "
            "texts differ, text 7 first, from its token 3 on"
        )
    shown = "".join(ElementTree.fromstring(found.badge()).itertext())
    assert ("broken" in shown) == broken and ("1,000 of 1,000 texts" in shown) != broken


def test_logits_are_judged_only_where_they_are_promised() -> None:
    row = Row("fp32", Cell(drafts="none", options=DecodingOptions()), Greedy(1, 1, 9, 8, 1e-6))
    assert Certificate("m", {}, False, rows=[row]).broken() == []
    assert len(Certificate("m", {}, True, rows=[row]).broken()) == 1
    # A model that reads prompts otherwise in a batch and in parts promises less.
    for cell, promised in (({}, 1), ({"batch": 8}, 0), ({"reads": "resumed"}, 0)):
        other = replace(row, cell=replace(row.cell, **cell))
        found = Certificate("m", {}, True, prompts_alike=False, rows=[other])
        assert len(found.broken()) == promised


# ---------------------------------------------------------------------------------- the command


@pytest.fixture
def three_cells(put: Any, monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Let ``mine`` be a small model with three cells."""
    put(model := small_model(0, 2))
    kept = list(cells(model, (1,), few=True))[:3]
    monkeypatch.setattr(run, "cells", lambda *_, **__: kept)
    return kept


def test_the_command(
    three_cells: list[Cell],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text").write_text("a text of one's own, which is long enough. " * 30)
    few = ["mine", "--prompts", "4", "--new-tokens", "4", "--weights", "fp32", "--quick"]
    asked = [*few, "--text", str(tmp_path / "text"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(asked)
    said = capsys.readouterr()
    assert ended.value.code == 0 and "lossless: " in said.out and "4 of 4 prompts" in said.err
    stored = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert stored["new_tokens"] == 4 and stored["processor"]
    assert (tmp_path / "out" / "badge.svg").read_text().startswith("<svg ")
    monkeypatch.setattr(Certificate, "broken", lambda self: ["a promise"])
    with pytest.raises(SystemExit) as ended:
        main(few)
    assert ended.value.code == 2 and "BROKEN" in capsys.readouterr().out
    monkeypatch.setattr(run, "certify", lambda *_, **__: pytest.fail("it worked for hours"))
    with pytest.raises(SystemExit) as ended:
        main([*few, "--output", str(tmp_path / "text")])
    assert ended.value.code == 1 and "cannot be used (File exists)" in capsys.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_was_tried(
    signum: int,
    three_cells: list[Cell],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["mine", "--prompts", "9", "--new-tokens", "4", "--weights", "fp32", "--quick"]
    asked += ["--output", str(tmp_path / "new" / "out")]
    tried = Greedy.try_on

    def ended(greedy: Greedy, model: MTPModel, cell: Cell, *given: Any, first: int) -> None:
        if first == stopping_at and cell is three_cells[1]:
            signal.raise_signal(signum)
        tried(greedy, model, cell, *given, first=first)

    monkeypatch.setattr(Greedy, "try_on", ended)
    file = tmp_path / "new" / "out" / "unfinished_certificate.json"
    for first_tried, texts in ((0, [8]), (8, [9, 8, 8])):
        stopping_at = first_tried
        with pytest.raises(SystemExit) as stopped:
            main(asked)
        said = capsys.readouterr()
        assert stopped.value.code == 128 + signum and "interrupted: the table shows" in said.err
        assert f"{file} has them.\n" in said.err and f"{sum(texts)} of {sum(texts)}" in said.out
        stored = json.loads(file.read_text())
        assert [cell["texts"] for cell in stored["cells"]] == texts
        assert [path.name for path in file.parent.iterdir()] == [file.name]
    stopping_at = -1
    with pytest.raises(SystemExit) as stopped:
        main(asked)
    names = {path.name for path in file.parent.iterdir()}
    assert stopped.value.code == 0 and names == {"certificate.json", "badge.svg"}


def test_a_folder_for_nothing_is_not_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").mkdir()
    for folder in ("old", "new/out"):
        with pytest.raises(SystemExit) as ended:
            main([str(tmp_path / "wrong"), "--output", str(tmp_path / folder)])
        assert ended.value.code == 1 and "wrong" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["mine", "--prompts", "1"], "--prompts=1 shows nothing"),
        (["mine", "--new-tokens", "1"], "--new-tokens=1 shows nothing"),
        (["mine", "--minutes", "0"], "--minutes=0.0 must be above 0"),
        (["mine", "--weights", "fp16"], "fp16"),
        (["mine", "--new-tokens", "64", "--weights", "fp32"], "64 new tokens do not fit"),
        (
            ["mine", "--against", "vllm"],
            "--against vllm is unknown: give transformers or llama.cpp.",
        ),
        (["mine", "--against", "llama.cpp"], "llama.cpp"),  # it is missing, or reads no runs
        (["mine", "--text", "TINY", "--weights", "fp32"], "too little text"),
        (["mine", "--text", "LATIN", "--weights", "fp32"], "is not UTF-8"),
    ],
)
def test_mistakes(
    words: list[str], told: str, put: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(small_model(0, 2))
    (tmp_path / "TINY").write_text("a")
    (tmp_path / "LATIN").write_bytes("café ".encode("latin-1") * 200)
    words = [str(tmp_path / word) if word.isupper() else word for word in words]
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and told in said and said.count("\n") == 1


def test_a_model_without_heads_is_tried_in_batches_and_on_threads(certify: Any) -> None:
    found = certify(small_model(0, 0), count=8, few=False)
    assert {row.cell.drafts for row in found.rows} == {"none", "looked up"} and not found.broken()
    assert found.verdict().endswith("; the model has no heads that draft.")
