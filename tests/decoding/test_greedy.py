"""Greedy speculative decoding against plain decoding and against teacher forcing."""

from __future__ import annotations

import pytest
import torch

from mtp_lightning.decoding import generate
from mtp_lightning.decoding.fused import decoding_passes
from mtp_lightning.decoding.session import Session
from mtp_lightning.decoding.speculative import Decoder
from tests.decoding.models import (
    NEW,
    assert_wide_passes_have_the_bits_of_single_ones,
    check_passes,
    ids_of,
    plain_ids,
    random_prompts,
    small_model,
    steer_drafts,
    teacher_forced,
)
from tests.kernels import BATCH_INVARIANT, LIBRARY, use_library

LENGTHS = (5, 1, 13)
VARIANTS = [
    {},
    {"share_layers": True},
    {"branch": "before_last", "input_norm": "pre"},
    {"stack": "parallel"},
    {"stack": "linear"},
    {"stack": "joint"},
    {"stack": "nextlat"},
    {"stack": "parallel", "correction": "mlp"},
    {"stack": "linear", "correction": "markov"},
    {"stack": "eagle"},
    {"stack": "eagle", "draft_vocab": 21},
    {"stack": "parallel", "correction": "selector"},
    {"stack": "masked"},
    {"stack": "dflash"},
    {"stack": "dflash", "blocks": 2, "correction": "markov"},
    {"stack": "dflash", "correction": "selector"},
    {"blocks": 2},
    {"share_layers": True, "blocks": 3},
    {"token_dropout": 0.5},
    {"token_dropout": 1.0},
]


def uncached(model, prompt, n_new):
    """Greedy decoding that reads the whole text again for every token."""
    tokens = list(prompt)
    for _ in range(n_new):
        (logits,) = teacher_forced(model, tokens, 0)[:1]
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(("depth", "mtp"), [(0, {}), (2, {"stack": "parameter_free"})], ids=str)
def test_a_model_that_cannot_draft_decodes_as_without_a_cache(depth, mtp):
    model = small_model(0, depth, **mtp)
    for prompt in random_prompts(0, LENGTHS):
        (g,) = generate(model, [prompt], max_new_tokens=NEW)
        assert plain_ids(model, [prompt]) == [g.token_ids] == [uncached(model, prompt, NEW)]
        assert g.acceptance == [] and g.tokens_per_step == 1.0


@pytest.mark.parametrize(
    ("number", "deepseek"),
    [
        *((number, False) for number in range(len(VARIANTS))),
        *((number, True) for number in (0, 2, 5, 7)),
    ],
)
def test_speculative_equals_plain(number, deepseek, monkeypatch):
    seed, depth = 2 * number + deepseek, 1 + (number + 2 * deepseek) % 4
    trunk = {"deepseek": True} if deepseek else {"kv": (1, 2, 4)[seed % 3]}
    model = small_model(seed, depth, **trunk, **VARIANTS[number])
    prompts = random_prompts(seed, LENGTHS)
    expected = plain_ids(model, prompts)
    assert max(len(set(tokens)) for tokens in expected) > 3  # the texts are not trivial
    depths = [depth, depth + 2] if model.mtp.max_draft_depth is None else [depth]
    for drafted in depths:
        assert ids_of(generate(model, prompts, max_new_tokens=NEW, draft_depth=drafted)) == expected
        with monkeypatch.context() as patch:
            # Random modules hardly ever agree with the trunk: make 60% of the drafts right.
            steer_drafts(patch, prompts, expected, chance=0.6, seed=seed)
            together = generate(model, prompts, max_new_tokens=NEW, draft_depth=drafted)
            assert ids_of(together) == expected
            assert any(any(g.accepted_mask) for g in together)


@pytest.mark.parametrize(
    "variant", [{}, {"deepseek": True}, {"stack": "linear", "rank": 2}], ids=str
)
@pytest.mark.parametrize(("n_threads", "rows"), [(1, 1), (2, 1), (1, 24)])
def test_a_verify_pass_gives_the_bits_of_single_passes(n_threads, rows, variant):
    """So that near-ties are decided as in plain decoding."""
    if not BATCH_INVARIANT:
        pytest.skip("needs oneDNN's AVX-512 kernels")
    model = small_model(3, 2, **variant)
    assert_wide_passes_have_the_bits_of_single_ones(model, n_threads=n_threads, rows=rows)


@pytest.mark.parametrize(
    ("depth", "drafted", "mtp"),
    [
        (3, 3, {}),
        (2, 3, {"share_layers": True, "deepseek": True}),
        (2, 2, {"branch": "before_last"}),
        (3, 3, {"stack": "parallel"}),
        (2, 2, {"stack": "joint", "deepseek": True}),
        (2, 4, {"stack": "nextlat"}),
        (3, 3, {"stack": "parallel", "correction": "mlp"}),
        (3, 3, {"stack": "linear", "correction": "markov"}),
        (2, 4, {"stack": "eagle", "draft_vocab": 21}),
        (3, 3, {"stack": "linear", "correction": "selector"}),
        (3, 2, {"stack": "masked", "lora_rank": 3}),
        (3, 3, {"stack": "dflash", "blocks": 2, "correction": "markov"}),
        (3, 2, {"stack": "dflash"}),
    ],
)
def test_cached_logits_are_teacher_forced_logits(depth, drafted, mtp, monkeypatch):
    """Compares the trunk and every module at every position whose tokens were accepted."""
    model = small_model(1, depth, **mtp)
    prompts = random_prompts(1, LENGTHS)
    expected = plain_ids(model, prompts)
    compared = check_passes(model, prompts, expected, drafted, monkeypatch)
    steer_drafts(monkeypatch, prompts, expected, chance=0.7)
    generate(model, prompts, max_new_tokens=NEW, draft_depth=drafted)
    assert all(compared.values()), compared


@pytest.mark.parametrize(
    ("mtp", "batch_size"),
    [
        ({}, 1),
        ({"share_layers": True, "deepseek": True}, 2),
        ({"stack": "linear"}, 3),
        ({"stack": "eagle", "draft_vocab": 21}, 2),
        ({"stack": "masked"}, 3),
        ({"stack": "dflash", "blocks": 2}, 2),
    ],
)
def test_modules_first_read_the_tokens_that_were_decoded_without_drafts(
    mtp, batch_size, monkeypatch
):
    """As with draft_depth="auto", few rounds draft; meanwhile rows join and leave."""
    model, new = small_model(1, 2, **mtp), 45
    prompts = random_prompts(1, (5, 1, 13, 9))
    expected = plain_ids(model, prompts, new)
    compared = check_passes(model, prompts, expected, 2, monkeypatch)
    steer_drafts(monkeypatch, prompts, expected, chance=0.7)
    rounds, real = [0], Decoder.round

    def round_with_few_drafts(decoder, n_drafts, *more):
        rounds[0] += 1
        return real(decoder, n_drafts if rounds[0] % 13 < 2 else 0, *more)

    monkeypatch.setattr(Decoder, "round", round_with_few_drafts)
    assert ids_of(generate(model, prompts, max_new_tokens=new, batch_size=batch_size)) == expected
    assert all(compared.values()), compared


@pytest.mark.parametrize("mtp", [{}, {"stack": "masked"}], ids=str)
def test_a_sliding_context_gives_the_same_text_with_and_without_drafts(mtp, monkeypatch):
    model = small_model(4, 2, **mtp)
    prompts = random_prompts(4, (5, 1, 30))
    options = {"max_new_tokens": 40, "max_context": 16, "long": "slide"}
    expected = [generate(model, [p], speculative=False, **options)[0].token_ids for p in prompts]
    assert ids_of(generate(model, prompts, **options)) == expected
    with monkeypatch.context() as patch:
        # A block must end where plain decoding slides, also if its drafts are right.
        steer_drafts(patch, prompts, expected, chance=0.9)
        slid = generate(model, prompts, **options)
        assert ids_of(slid) == expected
        assert min(g.tokens_per_step for g in slid) > 1.5
    # After a slide the context is read again: the tokens until the next slide follow from it.
    for prompt, tokens in zip(prompts[:2], expected, strict=False):
        text = prompt + tokens
        assert text[17:26] == uncached(model, text[9:17], 9)
        assert text[26:35] == uncached(model, text[18:26], 9)

    (five,) = generate(model, [prompts[0]], max_new_tokens=12, max_context=16)
    assert five.token_ids == expected[0][:12]
    with pytest.raises(
        ValueError, match=r"\(5 tokens\) and 13 new tokens exceed the context of 16"
    ):
        generate(model, [prompts[0]], max_new_tokens=13, max_context=16)


@pytest.mark.parametrize(
    ("dtype", "deepseek", "fast"),
    [
        *((dtype, False, True) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
        (torch.bfloat16, False, False),
        (torch.float16, True, True),
    ],
    ids=str,
)
def test_models_of_other_precisions_decode_greedily_within_rounding(
    dtype, deepseek, fast, monkeypatch
):
    """Packed weights and kernels are for fp32, and must not be used here."""
    use_library(monkeypatch, LIBRARY if fast else None)
    model, prompts = small_model(5, 2, deepseek=deepseek).to(dtype), random_prompts(5, LENGTHS)
    texts = plain_ids(model, prompts)
    assert ids_of(generate(model, prompts, max_new_tokens=NEW)) == texts
    exact = model.double()  # the same weights
    for prompt, text in zip(prompts, texts, strict=True):
        (logits,) = teacher_forced(exact, prompt + text, 0)[:1]
        ends = logits[len(prompt) - 1 : -1]
        chosen = ends.gather(1, torch.tensor(text).unsqueeze(1)).squeeze(1)
        assert float((ends.amax(1) - chosen).max()) < 0.1


def is_restored(model):
    """Whether no weight is packed and no forward pass is replaced."""
    replaced = [m for m in model.modules() if "forward" in vars(m)]
    return not replaced and all(not vars(p) for p in model.parameters())


def test_decoding_restores_the_model_also_after_an_error():
    model = small_model(7, 1).train()
    model.trunk.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    generate(model, [[1, 2]], max_new_tokens=3)
    assert [module.training for module in model.modules()] == modes
    assert is_restored(model)
    with decoding_passes(model):
        assert not any(module.training for module in model.modules())
    with pytest.raises(RuntimeError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "verify", lambda *_: (_ for _ in ()).throw(RuntimeError()))
        generate(model, [[1, 2]], max_new_tokens=3)
    assert [module.training for module in model.modules()] == modes
    assert is_restored(model)


def naive(model, prompt, n_new, depth):
    """Greedy drafting without a cache: tokens, and the drafts accepted and judged by position."""

    def choice(tokens, k):
        """Depth k's token at the last position that has k tokens after it."""
        return int(teacher_forced(model, tokens + [0] * (depth - k), depth)[k][-1].argmax())

    text = [*prompt, choice(prompt, 0)]
    accepted, judged = [0] * depth, [0] * depth
    while len(text) < len(prompt) + n_new:
        drafts = []
        for k in range(1, depth + 1):
            drafts.append(choice(text + drafts, k))
        room = min(depth, len(prompt) + n_new - len(text) - 1)
        for j, draft in enumerate(drafts[:room]):
            judged[j] += 1
            if draft != choice(text, 0):
                break
            accepted[j] += 1
            text.append(draft)
        text.append(choice(text, 0))
    return text[len(prompt) :], accepted, judged


@pytest.mark.parametrize(
    "mtp",
    [
        {"stack": "parallel", "correction": "markov"},
        {"stack": "linear", "rank": 3},
        {"stack": "eagle", "draft_vocab": 3},
        {"stack": "masked"},
        {"stack": "dflash", "layers": (0, 0, 2)},
        {"stack": "dflash", "layers": (0, 0, 2), "correction": "markov"},
    ],
    ids=str,
)
def test_heads_that_read_drafts_give_those_of_naive_recomputation(mtp):
    right, vocab = 0, 4  # random heads are right now and then
    for seed, depth in ((1, 3), (2, 2)):
        model = small_model(seed, depth, vocab=vocab, **mtp)
        prompt = random_prompts(seed, (1, 6), vocab)[1]
        (g,) = generate(model, [prompt], max_new_tokens=14)
        tokens, accepted, judged = naive(model, prompt, 14, depth)
        assert g.token_ids == tokens
        assert (g.drafts_accepted, g.drafts_reached) == (accepted, judged)
        right += sum(accepted)
    assert right > 0
