"""The claim ``lossless``, which certificates test."""

from __future__ import annotations

import json
from pathlib import Path

from mtp_lightning.certify.cells import Cell
from mtp_lightning.certify.certificate import Certificate, Row
from mtp_lightning.certify.greedy import Greedy
from mtp_lightning.certify.others import Count
from mtp_lightning.certify.sampled import Sampled
from mtp_lightning.decoding.options import DecodingOptions
from sweeps.claims.pages import lossless, pages
from sweeps.claims.result import write_result
from tests.sweeps.claims.fixture_claims import claim_of, result_of, with_pages

ROOT = Path(__file__).resolve().parents[3]


def store(root: Path, name: str, *, texts_equal: int) -> None:
    """A certificate of two cells with ten texts each, where some of the second's are equal."""
    equal = Greedy(texts=10, texts_equal=10, tokens=50, logits_equal=50)
    other = Greedy(texts=10, texts_equal=texts_equal, tokens=40, logits_equal=40)
    if texts_equal < 10:
        other.first_difference = (3, 1)
    cells = [Cell(drafts=drafts, options=DecodingOptions()) for drafts in ("1", "2")]
    samples = Sampled(tokens=160, counts=[10] * 16)
    rows = [Row("fp32", cells[0], equal, samples), Row("int8", cells[1], other)]
    facts = {"processor": "a | processor", "new_tokens": 16}
    certificate = Certificate(
        "runs/mine", facts, True, rows, [Count("an engine", "bf16", "drafts", 10, 7)]
    )
    folder = root / "results" / "certificates"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(certificate.to_json()))


def test_lossless_holds_until_a_certificate_has_a_broken_promise(tmp_path: Path) -> None:
    with_pages(tmp_path)
    page = tmp_path / "docs" / "results.md"
    claims = tmp_path / "claims"
    claims.mkdir()
    assert lossless(tmp_path) is None and "lossless" not in pages(tmp_path, claims)[page]
    store(tmp_path, "one", texts_equal=10)
    text = pages(tmp_path, claims)[page]
    assert "### lossless: holds" in text and "an engine" in text and "7 of 10" in text
    assert (
        "runs/mine | a &#124; processor | fp32, int8 | 2 | 20 of 20 | 90 of 90 | 1, least p = 1 |"
        in text
    )
    # With results of runs, its row stands in the table of all claims.
    claim = claim_of(claims)
    write_result(result_of(claim), claim.label, tmp_path / "results")
    assert "[lossless](#lossless-holds)" in pages(tmp_path, claims)[page]
    store(tmp_path, "two", texts_equal=8)
    text = pages(tmp_path, claims)[page]
    assert "### lossless: does not hold" in text and "18 of 20" in text


def test_the_front_page_has_the_number_of_its_certificate() -> None:
    facts = lossless(ROOT)
    assert facts is not None
    (heads,) = (row for row in facts["rows"] if row["file"] == "smollm2_heads.json")
    assert heads["logits_equal"] == heads["tokens"]
    for page in ("README.md", "README.zh-CN.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert f"{heads['texts_equal']:,}" in text and str(heads["cells"]) in text
    assert f"{heads['texts_equal']:,} of {heads['texts']:,}" in (ROOT / "README.md").read_text()
