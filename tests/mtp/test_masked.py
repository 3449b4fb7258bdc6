"""``mtp=masked``: the main prediction and a frozen trunk do not change, and training and drafting
compute the same.

``tests/objective/test_cross_product.py`` compares losses and gradients with the equations, which
``tests/objective/states.py`` computes one token at a time in float64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from data_modules.windows import WindowBatch
from mtp_lightning.decoding.fused import decoding_passes
from mtp_lightning.decoding.session import Session
from mtp_lightning.experiment.trunk_states import cache_obstacle
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.nn.attention import GroupedQueryConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.moe import ExpertsConfig
from mtp_lightning.objective.schedule.base import Progress
from tests.kernels import LIBRARY, use_library
from tests.losses import mtp_loss, reported_loss, step_of
from tests.models import build, windows

TRUNK = TrunkConfig(
    vocab_size=37, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=48, init_std=0.2
)
EXPERTS = ExpertsConfig(n_routed=6, n_shared=1, top_k=2, d_expert=16, first_k_dense=1)
TRUNKS = {
    "plain": TRUNK,
    "norms, bias": replace(TRUNK, attention=GroupedQueryConfig(qk_norm=True, qkv_bias=True)),
    "experts": replace(TRUNK, feed_forward=EXPERTS),
    "partly rotated": replace(TRUNK, attention=GroupedQueryConfig(d_rope=4)),
}
DEPTH, T = 3, 7


def masked(trunk: TrunkConfig = TRUNK, **switches: Any) -> MTPModel:
    return build(trunk, "masked", **{"depth": DEPTH, **switches})


def in_documents(batch: WindowBatch) -> WindowBatch:
    starts = torch.zeros(batch.tokens.shape, dtype=torch.int64)
    starts[0, 4] = starts[1, 2] = starts[1, 6] = 1
    return WindowBatch(batch.tokens, batch.depth, starts.cumsum(1))


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("trunk", "library"),
    [*((trunk, LIBRARY) for trunk in TRUNKS), ("plain", None), ("experts", None)],
)
def test_the_main_prediction_has_the_bits_of_a_model_without_masks(
    trunk: str, low: bool, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights of the head, in training and in evaluation, also with documents."""
    use_library(monkeypatch, library)
    model = masked(TRUNKS[trunk])
    plain = MTPModel(ModelConfig(trunk=TRUNKS[trunk], mtp=NoMTPConfig()))
    plain.load_state_dict(model.state_dict(), strict=False)
    batch = windows(2, T, DEPTH)
    for training, rows in ((True, batch), (False, batch), (True, in_documents(batch))):
        documents = None if rows.documents is None else rows.documents[:, : T + 1]
        short = WindowBatch(batch.tokens[:, : T + 1], 0, documents)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            with_masks, without = model.train(training)(rows), plain.train(training)(short)
            assert torch.equal(model.head(with_masks[0]), plain.head(without[0]))
        assert with_masks.keys() == set(range(DEPTH + 1))


@pytest.mark.parametrize(
    ("trunk", "drafts"), [*((trunk, DEPTH) for trunk in TRUNKS), ("plain", 1), ("experts", 2)]
)
def test_training_and_drafting_give_the_same_logits(trunk: str, drafts: int) -> None:
    """In float64, after the prompt and after a verify pass over the positions of the masks."""
    model, n = masked(TRUNKS[trunk]).double().eval(), 9
    tokens = windows(1, 3 * n, DEPTH).tokens
    expected = model(WindowBatch(tokens, DEPTH))
    with decoding_passes(model):
        session = Session(model, slots=1, capacity=40, max_draft=drafts)
        session.join([tokens[0, :n].tolist()])
        for accepted in (1, 0):
            n = session.n_read[0]
            session.put(tokens[:, n : n + 1], 0)
            for k in range(1, drafts + 1):
                logits = session.draft(k).logits_BV[0]
                session.put(tokens[:, n + k : n + k + 1], k)
                trained = model.head(expected[k][0, n - 1])
                torch.testing.assert_close(logits, trained, rtol=1e-12, atol=1e-12)
            main = session.verify(drafts)[0]
            trained = model.head(expected[0][0, n : n + drafts + 1])
            torch.testing.assert_close(main, trained, rtol=1e-12, atol=1e-12)
            session.accept([accepted])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_blocks_give_the_same_gradients() -> None:
    """Within rounding. All blocks share one program, though their updates differ."""
    gradients = []
    for compiled in (False, True):
        model = masked().train()
        if compiled:
            model.compile_blocks()
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=3):
            for _ in range(2):
                model.zero_grad()
                batch = in_documents(windows(2, T, DEPTH))
                mtp_loss(model, batch, [0.3] * DEPTH, [14] * 4)[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6, msg=name)


def test_masks_do_not_count_for_the_balance_of_experts() -> None:
    model = masked(TRUNKS["experts"])
    loads = []
    for weights in ([0.3] * DEPTH, [0.0] * DEPTH):
        _, _, auxiliary = reported_loss(model, windows(2, T, DEPTH), weights, [14] * 4)
        loads.append(list(auxiliary.loads.values()))
    assert len(loads[0]) == 2
    assert all(torch.equal(*pair) for pair in zip(*loads, strict=True))
    assert [sorted(of) for of in model.mtp.updates] == [  # experts have no updates
        ["down", "gate_up", "out", "qkv"], ["out", "qkv"], ["out", "qkv"],
    ]  # fmt: skip


def test_training_on_a_frozen_trunk_changes_only_the_head() -> None:
    """Every bit of the trunk, and so of the main prediction, stays as it is."""
    model = masked(depth=2, freeze_trunk=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = windows(4, 12, 2)
    main = model.head(model(batch)[0])
    step, trained = step_of(model), [p for p in model.parameters() if p.requires_grad]
    step(batch, Progress(0, 30), torch.optim.Adam(trained, lr=1e-2))
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == {name for name in before if name.startswith("mtp.")}
    assert torch.equal(model.head(model(batch)[0]), main)


def test_stored_states_of_the_trunk_are_refused() -> None:
    reason = cache_obstacle(masked(freeze_trunk=True))
    assert "data.cache_states=true has no meaning for mtp=masked" in reason
