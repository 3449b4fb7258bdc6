"""Terms that compare with the main prediction: alignment, gradients, memory, by every stack."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data_modules.windows import WindowBatch
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective import through_head
from mtp_lightning.objective.objective import Objective, count_taught
from mtp_lightning.objective.step import step_counts
from mtp_lightning.objective.terms.base import Term
from mtp_lightning.objective.terms.js import JS
from mtp_lightning.objective.terms.kl import KL
from mtp_lightning.objective.terms.lk import LK
from mtp_lightning.objective.terms.mixture import Mixture
from mtp_lightning.objective.terms.nla import NLA
from mtp_lightning.objective.terms.reverse_kl import ReverseKL
from mtp_lightning.objective.terms.tv import TV
from tests.losses import mtp_loss
from tests.models import build, windows
from tests.objective.teaching import expected, gradients

VARIANTS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "parallel": {},
    "linear": {"branch": "before_last"},
    "parameter_free": {},
}
CUT: list[dict[str, Any]] = [{"detach": "trunk"}, {"detach": "all"}, {"freeze_trunk": True}]
CASES = [(variant, switches) for variant, switches in VARIANTS.items()]
CASES += [(variant, cut) for variant in ("sequential", "parallel") for cut in CUT]

# name in FORMULAS -> weight, and the term that it is
OBJECTIVES: dict[str, tuple[dict[str, float], Term]] = {
    "kl": ({"kl": 1.0}, KL()),
    "kl and ce": ({"kl": 0.7, "ce": 0.3}, KL(beta=0.7)),
    "warm kl": ({"kl at temperature 2": 1.0}, KL(temperature=2)),
    "reverse_kl": ({"reverse_kl": 1.0}, ReverseKL()),
    "js": ({"js": 1.0}, JS()),
    "tv": ({"tv": 1.0}, TV()),
    "nla": ({"nla": 1.0}, NLA()),
    "lk": ({"lk": 1.0}, LK()),
    "mix": ({"ce": 0.1, "tv": 0.9, "js": 2.0}, Mixture({"ce": 0.1, "tv": 0.9, "js": 2})),
    "feature": ({"kl": 0.1, "feature": 1.0}, Mixture({"kl": 0.1, "feature": 1})),
    "nextlat": (
        {"kl": 1.0, "raw feature": 1.0},
        Mixture({"kl": 1, "feature": {"weight": 1, "normalise": False}}),
    ),
}


def masked(batch: WindowBatch, length: int) -> WindowBatch:
    documents = (torch.arange(batch.tokens.shape[1]) // length).expand_as(batch.tokens)
    return WindowBatch(batch.tokens, batch.depth, documents)


def cases() -> Iterator[Any]:
    """Every objective by every stack; the switches, masks and chunks for some."""
    for objective in OBJECTIVES:
        thorough = objective in ("kl and ce", "feature")
        for variant, switches in CASES if thorough else CASES[: len(VARIANTS)]:
            for document in (None, 5) if thorough else (5,):
                for rows in (1000, 7) if thorough else (7,):
                    yield objective, variant, switches, document, rows


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_values_and_gradients(
    tiny_trunk: TrunkConfig,
    case: tuple[str, str, dict[str, Any], int | None, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against autograd over the formulas, whole, and in chunks that straddle windows."""
    objective, variant, switches, document, rows = case
    monkeypatch.setattr(through_head, "chunk_rows", lambda *_: rows)
    mixture, term = OBJECTIVES[objective]
    model = build(tiny_trunk, MTPConfig.find(variant)(depth=2, **switches)).double()
    batch = windows(2, 9, 2)
    if document:
        batch = masked(batch, document)
    weights, counts = [0.5, 0.25], batch.counts().tolist()
    total, sums = mtp_loss(model, batch, weights, counts, term=term)
    total.backward()
    found = gradients(model)
    want_total, want_means = expected(model, batch, weights, mixture)
    assert total.item() == pytest.approx(want_total.item(), rel=1e-6)
    taught = count_taught(batch).tolist()
    for index, (name, means) in enumerate(want_means.items()):
        column = sums if sums.dim() == 1 else sums[:, index]
        for k, mean in enumerate(means, start=1):
            count = counts[k] if name == "ce" else taught[k]
            assert column[k].item() / count == pytest.approx(mean, rel=1e-6)
    if switches == CUT[1]:  # the shared head learns from the main prediction alone
        return
    want_total.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("variant", ["sequential", "parallel"])
def test_the_teacher_is_the_prediction_of_the_same_token(
    tiny_trunk: TrunkConfig, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tiny_trunk, MTPConfig.find(variant)(depth=2)).double()
    batch = windows(2, 9, 2)
    right, _ = mtp_loss(model, batch, [0.5, 0.5], [18] * 3, term=KL())
    original = through_head.places_left
    for shift in (-1, 1):
        monkeypatch.setattr(
            through_head, "places_left", lambda place, k, h, s=shift: original(place, k + s, h)
        )
        wrong, _ = mtp_loss(model, batch, [0.5, 0.5], [18] * 3, term=KL())
        assert abs(wrong.item() - right.item()) > 1e-3


@pytest.mark.parametrize("variant", ["sequential", "parallel", "linear"])
def test_no_gradient_goes_through_the_teacher(tiny_trunk: TrunkConfig, variant: str) -> None:
    """Untied, and the modules cut off: then nothing of the trunk learns from the depths."""
    trunk = replace(tiny_trunk, tie_embeddings=False)
    model = build(trunk, MTPConfig.find(variant)(depth=2, detach="all")).double()
    batch = windows(2, 9, 2)
    found = []
    for weights in ([0.0, 0.0], [0.5, 0.25]):
        mtp_loss(model, batch, weights, [18] * 3, term=KL())[0].backward()
        found.append(gradients(model))
    without, taught = found
    for name in without:
        assert torch.equal(without[name], taught[name]), name
    assert any(name.startswith("mtp.") for name in taught)


def test_a_frozen_trunk_teaches(tiny_trunk: TrunkConfig) -> None:
    model = build(tiny_trunk, MTPConfig.find("sequential")(depth=2, freeze_trunk=True)).double()
    batch = windows(2, 9, 2)
    total, sums = mtp_loss(model, batch, [0.5, 0.5], [18] * 3, main=0.0, term=KL())
    total.backward()
    assert sums[0] == 0 and sums[1] > 0
    assert {name.split(".")[0] for name in gradients(model)} == {"mtp"}


@pytest.mark.parametrize("variant", ["parallel", "linear"])
def test_head_by_head_equals_joint(tiny_trunk: TrunkConfig, variant: str) -> None:
    from mtp_lightning.objective import stack_loss

    model = build(tiny_trunk, MTPConfig.find(variant)(depth=3)).double()
    batch, weights = windows(3, 10, 3), [0.3, 0.0, 0.1]
    arguments = (model, batch, weights, [30] * 4)
    objective = Objective(term=KL(beta=0.5), train_head=False)
    total, sums = mtp_loss(*arguments, term=objective)
    total.backward()
    found = gradients(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack_loss, "SideBySide", type("Nobody", (), {}))
        want_total, want_sums = mtp_loss(*arguments, term=objective)
    want_total.backward()
    torch.testing.assert_close(total, want_total)
    torch.testing.assert_close(sums, want_sums)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


class LiveMemory(TorchDispatchMode):
    """The largest tensor that a pass makes, and the most bytes of large ones alive at once."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.largest, self.peak = least, 0, 0
        self._live: list[tuple[weakref.ref[Tensor], int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.numel() >= self.least:
                self.largest = max(self.largest, tensor.numel())
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._live = [entry for entry in self._live if entry[0]() is not None]
        self._live.append((weakref.ref(tensor), storage.data_ptr(), storage.nbytes()))
        once = {address: size for _, address, size in self._live}
        self.peak = max(self.peak, sum(once.values()))


MEMORY = [KL(temperature=2), JS(), LK(), Mixture({"ce": 1, "kl": 1, "tv": 1, "feature": 1})]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sequential", "parallel", "parameter_free"])
@pytest.mark.parametrize("term", MEMORY, ids=lambda term: term.name)
def test_a_few_chunks_are_all_that_there_is_of_size_v(
    tiny_trunk: TrunkConfig, variant: str, term: Term, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the forward and in the backward pass, whatever the number of depths and positions."""
    rows, vocab = 16, 20_000
    monkeypatch.setattr(through_head, "chunk_rows", lambda *_: rows)
    trunk = replace(tiny_trunk, vocab_size=vocab)
    peaks = []
    for depth in (1, 4):
        model = build(trunk, MTPConfig.find(variant)(depth=depth))
        batch = windows(8, 64, depth)
        with LiveMemory(least=rows * vocab // 2) as memory:
            total, _ = mtp_loss(model, batch, [0.1] * depth, [512] * (depth + 1), term=term)
            total.backward()
        head = vocab * trunk.d_model  # a gradient of the weight is no chunk
        assert memory.largest <= max(rows * vocab, head) < 512 * vocab
        peaks.append(memory.peak)
    assert peaks[1] <= peaks[0] + 4 * rows * vocab
    # Two of the head's: its gradient, and a chunk's part of it.
    assert peaks[1] <= 4 * (7 * rows * vocab + 2 * head) < 4 * 512 * vocab


@pytest.mark.parametrize("variant", ["parallel", "linear"])
@pytest.mark.parametrize("objective", ["kl and ce", "tv", "feature"])
def test_depths_that_leap_are_taught_where_they_land(
    tiny_trunk: TrunkConfig, variant: str, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stride s, by the main prediction s k places on: the same token's."""
    monkeypatch.setattr(through_head, "chunk_rows", lambda *_: 7)
    mixture, term = OBJECTIVES[objective]
    model = build(tiny_trunk, MTPConfig.find(variant)(depth=2, stride=3)).double()
    plain = windows(2, 9, 6)
    documents = (torch.arange(16) // 9).expand_as(plain.tokens)
    for batch in (
        WindowBatch(plain.tokens, 2, stride=3),
        WindowBatch(plain.tokens, 2, documents, stride=3),
    ):
        total, _ = mtp_loss(model, batch, [0.5, 0.25], batch.counts().tolist(), term=term)
        total.backward()
        found = gradients(model)
        want, _ = expected(model, batch, [0.5, 0.25], mixture)
        assert total.item() == pytest.approx(want.item(), rel=1e-6)
        want.backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
        counts = step_counts(batch, model.mtp, taught=True)
        assert counts.taught == count_taught(batch).tolist()
