"""The keys and values that a session stores, and one cache for all drafts (``cache=single``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtp_lightning.decoding import generate
from mtp_lightning.decoding.fused import decoding_passes
from mtp_lightning.decoding.session import Session
from mtp_lightning.decoding.tree import Tree
from mtp_lightning.decoding.tree_session import TreeSession
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.context import ForwardContext
from mtp_lightning.nn.kv_cache import KVCache
from tests.decoding.models import ids_of, random_prompts, small_model, steer_drafts

DEPTH, CAPACITY, NEW = 3, 40, 14
HEADS_WITH_ATTENTION: dict[str, dict[str, Any]] = {
    "sequential": {},
    "parallel": {"stack": "parallel"},
    "parallel mlp": {"stack": "parallel", "correction": "mlp"},
}
HEADS_WITHOUT_ATTENTION: dict[str, dict[str, Any]] = {
    "linear": {"stack": "linear"},
    "linear markov": {"stack": "linear", "correction": "markov"},
    "linear selector": {"stack": "linear", "correction": "selector"},
    "linear, rank 2": {"stack": "linear", "rank": 2},
    "joint": {"stack": "joint"},
    "nextlat": {"stack": "nextlat"},
    "masked": {"stack": "masked"},
}


def stored_bytes(cache: KVCache) -> int:
    """Of keys and values."""
    return sum(x.untyped_storage().nbytes() for x in cache.entries_L_BSMH)


def sessions(model: Any) -> list[Session]:
    chain = Session(model, slots=2, capacity=CAPACITY, max_draft=DEPTH)
    tree = TreeSession(model, slots=2, capacity=CAPACITY, tree=Tree((2,) * DEPTH))
    return [chain, tree]


@pytest.mark.parametrize("head", HEADS_WITHOUT_ATTENTION)
def test_heads_without_attention_store_no_more_than_the_trunk(head: str) -> None:
    model = small_model(0, DEPTH, **HEADS_WITHOUT_ATTENTION[head])
    for session in sessions(model):
        session.reserve(2 * CAPACITY)  # the caches grow
        caches = [session.trunk_cache, *session.depth_caches]
        assert len(caches) == 1 + DEPTH
        assert sum(map(stored_bytes, caches)) == stored_bytes(session.trunk_cache) > 0


@pytest.mark.parametrize("head", HEADS_WITH_ATTENTION)
def test_every_cache_of_a_depth_with_attention_is_written(head: str) -> None:
    model = small_model(0, DEPTH, **HEADS_WITH_ATTENTION[head])
    with decoding_passes(model):
        session = Session(model, slots=2, capacity=CAPACITY, max_draft=DEPTH)
        logits = session.join(random_prompts(0, (6, 9)))
        session.put_pending(logits.argmax(-1))
        for k in range(1, DEPTH + 1):
            session.put(session.draft(k).logits_BV.argmax(-1, keepdim=True), k)
    for cache in session.depth_caches:
        (entries,) = cache.entries_L_BSMH
        assert bool(entries.any())


@pytest.mark.parametrize(
    ("head", "tree"),
    [
        *((head, None) for head in HEADS_WITHOUT_ATTENTION),
        ("linear markov", [2, 2, 1]),
        ("masked", [2, 2, 1]),
    ],
)
def test_texts_and_drafts_do_not_change_if_every_depth_has_a_cache(
    head: str, tree: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(1, DEPTH, vocab=4, **HEADS_WITHOUT_ATTENTION[head])
    prompts = random_prompts(1, (5, 1, 13), 4)
    # Rows join, grow, are dropped and slide.
    options: dict[str, Any] = {"max_new_tokens": NEW, "batch_size": 2, "tree": tree}
    options |= {"max_context": 16, "long": "slide"}
    uncached = generate(model, prompts, **options)
    monkeypatch.setattr(type(model.mtp), "cached_blocks", 1)
    assert stored_bytes(Session(model, slots=1, capacity=8, max_draft=1).depth_caches[0]) > 0
    cached = generate(model, prompts, **options)
    assert ids_of(uncached) == ids_of(cached)
    assert [x.verify_passes for x in uncached] == [x.verify_passes for x in cached]
    plain = generate(model, prompts, **{**options, "tree": None, "speculative": False})
    assert ids_of(uncached) == ids_of(plain)


@pytest.mark.parametrize("head", HEADS_WITHOUT_ATTENTION)
def test_depths_without_attention_read_only_the_end_of_a_prompt(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(1, DEPTH, **HEADS_WITHOUT_ATTENTION[head])
    widths: list[int] = []
    depth_state = MTPModel.depth_state

    def counted(self: MTPModel, k: int, branch: torch.Tensor, *rest: Any, **options: Any) -> Any:
        widths.append(branch.shape[1])
        return depth_state(self, k, branch, *rest, **options)

    monkeypatch.setattr(MTPModel, "depth_state", counted)
    for tree in (None, [1, 1, 1]):
        prompts = random_prompts(1, (9, 40))
        assert generate(model, prompts, max_new_tokens=NEW, tree=tree)
    assert 0 < max(widths) <= 2 * (DEPTH + 1)


VOCAB = 4  # random heads are right now and then
SINGLE: dict[str, Any] = {"cache": "single"}
MODELS: dict[str, dict[str, Any]] = {
    "one module": {"depth": 1},
    "shared": {"depth": 2, "share_layers": True},
    "before last, pre": {"depth": 1, "branch": "before_last", "input_norm": "pre"},
    "deepseek": {"depth": 1, "deepseek": True},
}
every_model = pytest.mark.parametrize("name", MODELS)


@torch.no_grad()
def drafts_of(model: MTPModel, text: list[int], n_drafts: int) -> list[int]:
    """Drafts without a cache: the module reads all states of the trunk, then its own."""
    ctx = ForwardContext.of_window(
        model.config.trunk, len(text) - 1, device="cpu", dtype=torch.float32
    )
    output = model.trunk(model.trunk.embedding(torch.tensor([text[:-1]])), ctx)
    states, drafts = model.mtp.branch(model.trunk, output), []
    for _ in range(n_drafts):
        following = torch.tensor([[*text[1:], *drafts]])
        ctx = ForwardContext.of_window(
            model.config.trunk, states.shape[1], device="cpu", dtype=torch.float32
        )
        read = model.mtp.step(1, states, model.trunk.embedding(following), ctx)
        drafts.append(int(model.head(read[:, -1:]).argmax()))
        states = torch.cat((states, read[:, -1:]), dim=1)
    return drafts


@every_model
def test_a_single_cache_gives_the_drafts_of_naive_recomputation(name: str) -> None:
    right = 0
    for seed in range(2):
        model = small_model(seed, vocab=VOCAB, **MODELS[name])
        for prompt in random_prompts(seed, (1, 6), VOCAB):
            (plain,) = generate(model, [prompt], max_new_tokens=16, speculative=False)
            (drafted,) = generate(model, [prompt], max_new_tokens=16, draft_depth=3, **SINGLE)
            assert drafted.token_ids == plain.token_ids
            accepted, judged, done = [0] * 3, [0] * 3, 1
            while done < 16:
                text = prompt + plain.token_ids[:done]
                room = min(3, 16 - done - 1)
                for j, draft in enumerate(drafts_of(model, text, 3)[:room]):
                    judged[j] += 1
                    if draft != plain.token_ids[done]:
                        break
                    accepted[j] += 1
                    done += 1
                done += 1
            assert (drafted.drafts_accepted, drafted.drafts_reached) == (accepted, judged)
            right += sum(accepted[1:])
    assert right > 0


@pytest.mark.parametrize(
    ("name", "chance"), [("one module", 0.6), ("shared", 0.0), ("shared", 1.0), ("deepseek", 0.6)]
)
def test_a_single_cache_gives_the_greedy_text_of_plain_decoding(
    name: str, chance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that accept different lengths, and a context that slides."""
    model = small_model(5, **MODELS[name])
    prompts = random_prompts(5, (1, 4, 11))
    long: dict[str, Any] = {"max_context": 24, "long": "slide"}
    for options in ({"max_new_tokens": 20}, {"max_new_tokens": 40, **long}):
        plain = ids_of(generate(model, prompts, speculative=False, **options))
        with monkeypatch.context() as patched:
            if "long" not in options:
                steer_drafts(patched, prompts, plain, chance=chance)
            for depth in (3, "auto"):
                drafted = generate(model, prompts, draft_depth=depth, **SINGLE, **options)
                assert ids_of(drafted) == plain
