"""The certificate: sound decoding passes, four planted defects are found, and the command."""

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
from mtp_lightning.certify.cells import PLAIN, Cell, cells, ways
from mtp_lightning.certify.certificate import Certificate, Row
from mtp_lightning.certify.greedy import Greedy
from mtp_lightning.certify.sampled import Sampled, transform
from mtp_lightning.certify.texts import DecodedText, decode, prompts
from mtp_lightning.decoding import verification
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.session import Session
from mtp_lightning.decoding.speculative import Decoder
from mtp_lightning.model import MTPModel
from mtp_lightning.nn import ops
from tests.decoding.models import opened_model, small_model


class Words:
    """A tokenizer of 37 ids, as many as the model has."""

    eot_id, end_ids, vocab_size, reads_text = 36, (36,), 37, True

    def encode(self, text: str) -> list[int]:
        return [ord(c) % 36 for c in text]


@pytest.fixture
def open_as_mine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``open_as_mine(model)``: the path ``mine`` then opens this model."""

    def patch(model: MTPModel) -> None:
        opened = replace(opened_model(0, seq_len=64), model=model, path=Path("mine"))
        opened.__dict__["tokenizer"] = Words()
        monkeypatch.setattr(run, "open_model", lambda path, *, allow, packer_for: opened)

    return patch


@pytest.fixture
def certify(open_as_mine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``certify(model, *drafts)``: its certificate, in all cells or only those of these drafts."""

    def certificate_of(model: MTPModel, *drafts: str, **options: Any) -> Certificate:
        open_as_mine(model)
        if drafts:
            batches = options.pop("batches", (1, 8))
            some = [c for c in cells(model, (1,)) if c.drafts in drafts and c.batch in batches]
            some = [c for c in some if c.reads == "whole"]
            monkeypatch.setattr(run, "cells", lambda *_, **__: some)
        options = {"count": 8, "length": 12, "precisions": ["fp32"], "few": True} | options
        return run.certify(Path("mine"), **options)

    return certificate_of


def test_sound_decoding_is_certified_lossless(certify: Any) -> None:
    certificate = certify(small_model(0, 2), few=False, count=12, length=6)
    assert certificate.broken() == [] and certificate.verdict().startswith("lossless: ")
    assert {row.cell.batch for row in certificate.rows} == {1, 8}
    assert {row.cell.reads for row in certificate.rows} == {"whole", "resumed"}
    assert all(row.greedy.texts == 12 for row in certificate.rows)
    sampled = [row.sampled for row in certificate.rows if row.sampled.tokens]
    assert len(sampled) == len(ways(small_model(0, 2))) and all(s.tokens == 72 for s in sampled)


def test_cells_are_those_that_a_model_supports() -> None:
    assert list(ways(small_model(0, 1))) == [
        *("none", "depth 1", "depth 2", "depth 4", "deeper", "one cache", "auto", "tree"),
        *("short head", "block", "confident", "looked up"),
    ]
    tree = ways(small_model(0, 1))["tree"].tree
    assert tree is not None and tree.widths == (3, 2)
    assert "deeper" not in ways(small_model(0, 3)) and "depth 3" in ways(small_model(0, 3))
    deep = small_model(0, 17, share_layers=True)
    assert max(options.max_draft(deep) for options in ways(deep).values()) == 15
    few, all_ = (list(cells(small_model(0, 1), (1, 2), few=few)) for few in (True, False))
    assert len(all_) == 12 * 8 - 1 and len(few) == 12 * 4 - 1
    assert len(set(map(repr, all_))) == len(all_)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """For every round: drafts of the modules, texts, and whether drafts were looked up."""
    seen: list[tuple[int, int, bool]] = []
    whole_round = Decoder.round

    def recorded(self: Decoder, n_drafts: int, caps: Any, looked_up: Any = ()) -> Any:
        seen.append((n_drafts, len(caps), any(looked_up)))
        return whole_round(self, n_drafts, caps, looked_up)

    monkeypatch.setattr(Decoder, "round", recorded)
    return seen


def test_the_number_of_drafts_changes_while_auto_decodes(rounds: Any) -> None:
    model = small_model(0, 2)
    for batch, temperature in ((1, 0.0), (8, 0.0), (8, 1.0)):
        cell = Cell(drafts="auto", options=ways(model)["auto"], batch=batch)
        decode(model, cell, [[1, 2]] * 8, [16] * 8, temperature=temperature)
        assert {n_drafts for n_drafts, *_ in rounds} == {0, 1, 2}
        rounds.clear()


def test_texts_join_a_batch_and_leave_it(rounds: Any) -> None:
    model = small_model(0, 2)
    decode(model, replace(PLAIN, batch=8), [[1, 2]] * 8, [16 - i for i in range(8)])
    n_texts = [n for _, n, _ in rounds]
    assert n_texts[:3] == [4, 4, 8] and n_texts[-1] < 8


def test_samples_with_lookups_are_of_single_texts(certify: Any, rounds: Any) -> None:
    model = small_model(0, 2)
    rows = certify(model, "none", "looked up").rows
    sampled = {row.cell.drafts: row.cell.batch for row in rows if row.sampled.tokens}
    assert sampled == {"none": 8, "looked up": 1}
    rounds.clear()
    cell = Cell(drafts="looked up", options=ways(model)["looked up"])
    decode(model, cell, [[1, 2, 3, 4]], [60], temperature=0.05)  # a model of chance repeats itself
    assert any(looked_up for *_, looked_up in rounds)


def test_a_model_that_reads_no_text_gets_random_tokens(certify: Any, monkeypatch: Any) -> None:
    """Those of a task read only its own symbols."""
    monkeypatch.setattr(Words, "reads_text", False)
    monkeypatch.setattr(Words, "encode", lambda *_: pytest.fail("no text"))
    certificate = certify(small_model(0, 2), "none", "depth 2", count=20)
    assert certificate.verdict().startswith("lossless: ")
    drawn = prompts(Words(), 20, longest=6, seed=0, file=None)
    assert {len(ids) for ids in drawn} == {4, 5, 6} and len(set(sum(drawn, []))) > 30


def test_decoding_on_two_threads_is_certified(
    certify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    certificate = certify(small_model(1, 1), count=4, length=5)
    assert {row.cell.threads for row in certificate.rows} == {1, 2} and not certificate.broken()


# -------------------------------------------------------------------------------------- defects


def test_sums_that_depend_on_the_number_of_rows_are_found(
    certify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes of several tokens sum the head's products in reverse."""
    verify = Session.verify
    monkeypatch.setattr(ops, "code", lambda: ("native", "as on a CPU with AVX-512"))

    def reversed_sums(session: Session, n_drafts: int) -> Tensor:
        states, head = [], session.model.head
        hook = session.model.head.register_forward_pre_hook(lambda _, read: states.append(read[0]))
        monkeypatch.setattr(session, "_fused_trunk", None)
        logits = verify(session, n_drafts)
        hook.remove()
        if n_drafts == 0:
            return logits
        products = (states[-1].unsqueeze(-2) * head.weight).flip(-1)
        return products.cumsum(-1)[..., -1]

    monkeypatch.setattr(Session, "verify", reversed_sums)
    certificate = certify(small_model(0, 2), "none", "depth 2")
    assert any("logits of" in line and "differ, by up to" in line for line in certificate.broken())
    assert certificate.verdict().startswith("BROKEN: ")


def test_a_stale_cache_entry_of_a_rejected_draft_is_found(
    certify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify, accept = Session.verify, Session.accept
    stale: dict[int, bool] = {}

    def record_rejections(session: Session, accepted: Sequence[int]) -> None:
        n_drafted = session._n_drafted
        accept(session, accepted)
        stale[id(session)] = n_drafted > accepted[0]

    def restore_stale_entry(session: Session, n_drafts: int) -> Tensor:
        at, layers = session.n_read[0], session.trunk_cache.entries_L_BSMH
        old = [entries[0, at].clone() for entries in layers]
        logits = verify(session, n_drafts)
        if stale.get(id(session)):
            for entries, entry in zip(layers, old, strict=True):
                entries[0, at] = entry
        return logits

    monkeypatch.setattr(Session, "accept", record_rejections)
    monkeypatch.setattr(Session, "verify", restore_stale_entry)
    certificate = certify(small_model(0, 2), "none", "depth 2")
    assert any("greedy texts differ" in line for line in certificate.broken())


def test_a_residual_that_is_not_renormalized_is_found(
    certify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw_unnormalized(probs: Tensor, uniform: Tensor) -> Tensor:
        """Assumes that the sum is 1, which is wrong only for a residual."""
        below = probs.double().cumsum(dim=-1) <= uniform.double().unsqueeze(-1)
        return below.sum(dim=-1).clamp_(max=probs.shape[-1] - 1)

    monkeypatch.setattr(verification, "draw", draw_unnormalized)
    rule = verification.accept_or_resample.plain
    monkeypatch.setitem(verification.RULES, "token", rule)
    certificate = certify(small_model(0, 2), "none", "depth 2", batches=(8,), count=120)
    broken = certificate.broken()
    assert broken and all("sampled tokens do not follow" in line for line in broken)
    assert not any("drafts: none" in line for line in broken)


def test_ties_that_verify_passes_break_otherwise_are_found(
    certify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(0, 2)
    with torch.no_grad():
        model.head.weight[18:36] = model.head.weight[:18]  # tokens have equal logits in pairs
    assert certify(model, "none", "depth 2").broken() == []
    first = Tensor.argmax

    def last(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
        if x.dim() < 3 or x.shape[1] == 1:
            return first(x, dim=dim, keepdim=keepdim)
        return x.shape[-1] - 1 - first(x.flip(-1), dim=-1)

    monkeypatch.setattr(Tensor, "argmax", last)
    assert any("greedy texts differ" in line for line in certify(model, "depth 2").broken())


# ----------------------------------------------------------------------------------------- parts


def test_the_transform_is_uniform_only_for_the_right_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(5, generator=generator, dtype=torch.float64)
    p = logits.softmax(-1)
    ids = torch.multinomial(p, 40_000, replacement=True, generator=generator).tolist()
    u = transform(logits.expand(40_000, 5), ids, generator)
    order = p.argsort(descending=True).tolist()
    for x in range(5):  # the numbers of token x lie in an interval of length p(x)
        low = sum(float(p[y]) for y in order[: order.index(x)])
        u_x = u[torch.tensor(ids) == x]
        assert low <= float(u_x.min()) and float(u_x.max()) <= low + float(p[x]) + 1e-12
    even = Sampled(40_000, torch.histc(u, 16, 0.0, 1.0).long().tolist())
    assert even.p > 0.001
    wrong = transform((logits * 1.1).expand(40_000, 5), ids, generator)
    assert Sampled(40_000, torch.histc(wrong, 16, 0.0, 1.0).long().tolist()).p < 1e-6


def test_no_packed_copy_is_left_in_the_cache_folder(
    open_as_mine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: list[Any] = []

    def open_it(path: Path, *, allow: Any, packer_for: Any) -> Any:
        packer_for(opened.model, path)
        return opened

    open_as_mine(small_model(0, 1))
    opened = run.open_model(Path("mine"), allow=(), packer_for=None)
    monkeypatch.setattr(run, "open_model", open_it)
    monkeypatch.setattr(
        run, "packer_after_rounding", lambda *_: lambda model, path=None: paths.append(path)
    )
    run.certify(Path("mine"), count=8, length=4, precisions=["fp32"], few=True)
    assert paths == [None]


def test_the_p_value_is_that_of_a_chi_square() -> None:
    # 15 degrees of freedom: P(X > 24.996) = .05, P(X > 30.578) = .01 (any table)
    for statistic, p in ((24.9958, 0.05), (30.5779, 0.01)):
        spread = (statistic * 1000 / 2) ** 0.5
        counts = [1000 + spread, 1000 - spread, *[1000] * 14]
        sampled = Sampled(16_000, counts)  # type: ignore[arg-type]
        assert sampled.chi_square == pytest.approx(statistic)
        assert sampled.p == pytest.approx(p, rel=1e-4)


def test_logits_are_compared_up_to_the_first_different_token() -> None:
    plain = DecodedText([1, 2, 3, 4], [torch.zeros(4, 2)])
    drafted = DecodedText([2, 9, 4], [torch.tensor([[0.0, 0], [0, 0.5], [7, 7]])])
    greedy = Greedy()
    greedy.compare(5, plain, drafted, 1)
    assert greedy == Greedy(1, 0, (5, 2), tokens=2, logits_equal=1, largest_difference=0.5)
    # -0 is another bit pattern than 0.
    signed = DecodedText([2, 3, 4], [torch.tensor([[0.0, -0.0], [0, 0], [0, 0]])])
    greedy.compare(6, plain, signed, 1)
    assert (greedy.tokens, greedy.logits_equal) == (5, 3)


@pytest.mark.parametrize("broken", [False, True])
def test_the_table_the_json_and_the_badge_show_the_counts(broken: bool) -> None:
    cell = Cell(drafts="<b>depth 1</b>", options=DecodingOptions(), batch=8, threads=2)
    greedy = Greedy(1000, 1000 - broken, (7, 3) if broken else None, 5000, 5000)
    rows = [Row("fp32", cell, greedy, Sampled(32, [2] * 16))]
    certificate = Certificate("m", {"seed": 0}, True, rows=rows)
    lines = list(certificate.lines())
    assert f"{1000 - broken:,}/1,000" in lines[1] and "5,000/5,000" in lines[1]
    stored = json.loads(json.dumps(certificate.to_json()))
    assert stored["prompts"] == 1000  # as many as were tried
    assert stored["cells"][0]["p"] == 1 and len(stored["broken"]) == broken
    if broken:
        assert stored["broken"][0] == (
            "fp32, drafts: <b>depth 1</b>, batch 8, 2 threads, whole prefix: 1 of 1,000 greedy "
            "texts differ, text 7 first, from its token 3 on"
        )
    badge = "".join(ElementTree.fromstring(certificate.badge()).itertext())
    assert ("broken" in badge) == broken and ("1,000 of 1,000 texts" in badge) != broken


def test_different_logits_break_only_a_certificate_that_promises_bits() -> None:
    row = Row(
        "fp32", Cell(drafts="none", options=DecodingOptions()), Greedy(1, 1, None, 9, 8, 1e-6)
    )
    unpromised = Certificate("m", {}, False, rows=[row])
    assert unpromised.broken() == []
    assert "8 of 9 logits to the last bit (guaranteed only with" in unpromised.verdict()
    assert len(Certificate("m", {}, True, rows=[row]).broken()) == 1
    # Some models read a prompt with other kernels in parts.
    for changes, promised in (({}, 1), ({"batch": 8}, 1), ({"reads": "resumed"}, 0)):
        changed = replace(row, cell=replace(row.cell, **changes))
        certificate = Certificate("m", {}, True, prompts_alike=False, rows=[changed])
        assert len(certificate.broken()) == promised


# ---------------------------------------------------------------------------------- the command


def exit_code(*words: object) -> Any:
    """The exit code of the command."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


@pytest.fixture
def three_cells(open_as_mine: Any, monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """The cells of the small model that ``mine`` opens."""
    open_as_mine(model := small_model(0, 2))
    first = list(cells(model, (1,), few=True))[:3]
    monkeypatch.setattr(run, "cells", lambda *_, **__: first)
    return first


def test_the_command_writes_a_certificate_and_exits_by_its_verdict(
    three_cells: list[Cell],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text").write_text("a text of the user, which is long enough. " * 30)
    quick = ["mine", "--prompts", "4", "--new-tokens", "4", "--weights", "fp32", "--quick"]
    assert exit_code(*quick, "--text", tmp_path / "text", "--output", tmp_path / "out") == 0
    output = capsys.readouterr()
    assert "lossless: " in output.out and "4 of 4 prompts" in output.err
    stored = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert stored["new_tokens"] == 4 and stored["processor"]
    assert (tmp_path / "out" / "badge.svg").read_text().startswith("<svg ")
    monkeypatch.setattr(Certificate, "broken", lambda self: ["a promise"])
    assert exit_code(*quick) == 2 and "BROKEN" in capsys.readouterr().out
    monkeypatch.setattr(run, "certify", lambda *_, **__: pytest.fail("it would work for hours"))
    assert exit_code(*quick, "--output", tmp_path / "text") == 1
    assert "cannot be used (File exists)" in capsys.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_writes_the_cells_that_it_tried(
    signum: int,
    three_cells: list[Cell],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["mine", "--prompts", "9", "--new-tokens", "4", "--weights", "fp32", "--quick"]
    file = tmp_path / "new" / "out" / "unfinished_certificate.json"
    words += ["--output", str(file.parent)]
    try_on = Greedy.try_on

    def interrupted(greedy: Greedy, model: MTPModel, cell: Cell, *args: Any, first: int) -> None:
        if first == interrupt_at and cell is three_cells[1]:
            signal.raise_signal(signum)
        try_on(greedy, model, cell, *args, first=first)

    monkeypatch.setattr(Greedy, "try_on", interrupted)
    for first_prompt, texts in ((0, [8]), (8, [9, 8, 8])):
        interrupt_at = first_prompt
        assert exit_code(*words) == 128 + signum
        output = capsys.readouterr()
        assert "interrupted: the table shows" in output.err
        assert f"{file} has them.\n" in output.err and f"{sum(texts)} of {sum(texts)}" in output.out
        stored = json.loads(file.read_text())
        assert [cell["texts"] for cell in stored["cells"]] == texts
        assert [path.name for path in file.parent.iterdir()] == [file.name]
    interrupt_at = -1
    assert exit_code(*words) == 0
    assert {path.name for path in file.parent.iterdir()} == {"certificate.json", "badge.svg"}


def test_a_command_that_fails_at_once_leaves_no_empty_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").mkdir()
    for folder in ("old", "new/out"):
        assert exit_code(tmp_path / "wrong", "--output", tmp_path / folder) == 1
        assert "wrong" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mine", "--prompts", "1"], "--prompts=1 shows nothing"),
        (["mine", "--new-tokens", "1"], "--new-tokens=1 shows nothing"),
        (["mine", "--minutes", "0"], "--minutes=0.0 must be above 0"),
        (["mine", "--weights", "fp16"], "fp16"),
        (["mine", "--weights", ","], "--weights names no precision"),
        (["mine", "--weights", "fp32, fp32"], "--weights names fp32 twice"),
        (["mine", "--new-tokens", "64", "--weights", "fp32"], "64 new tokens do not fit"),
        (
            ["mine", "--against", "vllm"],
            "--against vllm is unknown: give transformers or llama.cpp.",
        ),
        (["mine", "--against", "llama.cpp"], "llama.cpp"),  # is missing, or cannot read a run
        (["mine", "--text", "TINY", "--weights", "fp32"], "too little text"),
        (["mine", "--text", "LATIN", "--weights", "fp32"], "is not UTF-8"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    words: list[str],
    message: str,
    open_as_mine: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    open_as_mine(small_model(0, 2))
    (tmp_path / "TINY").write_text("a")
    (tmp_path / "LATIN").write_bytes("café ".encode("latin-1") * 200)
    assert exit_code(*(tmp_path / word if word.isupper() else word for word in words)) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_model_without_heads_is_certified_with_lookups_alone(certify: Any) -> None:
    certificate = certify(small_model(0, 0), count=8, few=False)
    assert {row.cell.drafts for row in certificate.rows} == {"none", "looked up"}
    assert not certificate.broken()
    assert certificate.verdict().endswith("; the model has no heads that draft.")
