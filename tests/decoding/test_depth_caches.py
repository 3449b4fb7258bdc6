"""A session stores keys and values for depths that attend to earlier positions, and no others."""

from __future__ import annotations

from typing import Any

import pytest

from mtp_lightning.decoding import generate
from mtp_lightning.decoding.fused import decoding_passes
from mtp_lightning.decoding.session import Session
from mtp_lightning.decoding.tree import Tree
from mtp_lightning.decoding.tree_session import TreeSession
from mtp_lightning.mtp.joint import JointConfig
from mtp_lightning.mtp.linear import LinearConfig
from mtp_lightning.mtp.masked import MaskedConfig
from mtp_lightning.mtp.nextlat import NextLatConfig
from mtp_lightning.mtp.parallel import ParallelConfig
from mtp_lightning.mtp.parameter_free import ParameterFreeConfig
from mtp_lightning.nn.kv_cache import KVCache
from tests.decoding.models import random_prompts, small_model

DEPTH, CAPACITY, NEW = 3, 40, 14
ATTENDING: dict[str, dict[str, Any]] = {
    "sequential": {},
    "parallel": {"stack": ParallelConfig},
    "parallel mlp": {"stack": ParallelConfig, "correction": "mlp"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "linear": {"stack": LinearConfig},
    "linear markov": {"stack": LinearConfig, "correction": "markov"},
    "linear selector": {"stack": LinearConfig, "correction": "selector"},
    "linear, rank 2": {"stack": LinearConfig, "rank": 2},
    "joint": {"stack": JointConfig},
    "nextlat": {"stack": NextLatConfig},
    "masked": {"stack": MaskedConfig},
}


def stored(cache: KVCache) -> int:
    """Bytes of keys and values."""
    return sum(x.untyped_storage().nbytes() for x in cache.entries_L_BSMH)


def sessions(model: Any) -> list[Session]:
    chain = Session(model, slots=2, capacity=CAPACITY, max_draft=DEPTH)
    tree = TreeSession(model, slots=2, capacity=CAPACITY, tree=Tree((2,) * DEPTH))
    return [chain, tree]


@pytest.mark.parametrize("head", OTHERS)
def test_heads_without_attention_store_no_more_than_the_trunk(head: str) -> None:
    model = small_model(0, DEPTH, **OTHERS[head])
    for session in sessions(model):
        session.reserve(2 * CAPACITY)  # which grows what there is
        caches = [session.trunk_cache, *session.depth_caches]
        assert len(caches) == 1 + DEPTH
        assert sum(map(stored, caches)) == stored(session.trunk_cache) > 0


def test_targets_draft_nothing_and_store_nothing() -> None:
    model = small_model(0, DEPTH, stack=ParameterFreeConfig)
    assert model.mtp.max_draft_depth == 0
    assert Session(model, slots=2, capacity=CAPACITY, max_draft=0).depth_caches == []


@pytest.mark.parametrize("head", ATTENDING)
def test_depths_that_attend_back_write_what_they_have(head: str) -> None:
    """So that none is given a cache, or denied one, for nothing."""
    model = small_model(0, DEPTH, **ATTENDING[head])
    with decoding_passes(model):
        session = Session(model, slots=2, capacity=CAPACITY, max_draft=DEPTH)
        logits = session.join(random_prompts(0, (6, 9)))
        session.put_pending(logits.argmax(-1))
        for k in range(1, DEPTH + 1):
            session.put(session.draft(k).argmax(-1, keepdim=True), k)
    for cache in session.depth_caches:
        (entries,) = cache.entries_L_BSMH
        assert bool(entries.any())


@pytest.mark.parametrize("head", OTHERS)
@pytest.mark.parametrize("tree", [None, [2, 2, 1]])
def test_texts_and_drafts_are_those_with_caches(
    head: str, tree: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OTHERS[head]
    model = small_model(1, DEPTH, vocab=4, **options)
    prompts = random_prompts(1, (5, 1, 13), 4)
    # Rows come, grow, are dropped and slide.
    asked: dict[str, Any] = {"max_new_tokens": NEW, "batch_size": 2, "tree": tree}
    asked |= {"max_context": 16, "long": "slide"}
    bare = generate(model, prompts, **asked)
    monkeypatch.setattr(type(model.mtp), "attends_back", True)
    assert stored(Session(model, slots=1, capacity=8, max_draft=1).depth_caches[0]) > 0
    held = generate(model, prompts, **asked)
    assert [x.token_ids for x in bare] == [x.token_ids for x in held]
    assert [x.verify_passes for x in bare] == [x.verify_passes for x in held]
    plain = generate(model, prompts, **{**asked, "tree": None, "speculative": False})
    assert [x.token_ids for x in bare] == [x.token_ids for x in plain]
