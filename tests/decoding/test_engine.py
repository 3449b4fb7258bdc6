"""The engine: rows that join and leave a batch, each with its settings, against rows alone."""

from __future__ import annotations

import itertools
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from data_modules.tokenizers import ByteTokenizer
from mtp_lightning.decoding import generate
from mtp_lightning.decoding.engine import Engine
from mtp_lightning.decoding.options import DecodingOptions, Request
from mtp_lightning.decoding.sequence import TextSequence
from mtp_lightning.errors import UserError
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.nn.attention import GroupedQueryConfig
from mtp_lightning.nn.feed_forward import DenseConfig
from tests.decoding.models import (
    Letters,
    ids_of,
    random_prompts,
    run_to_end,
    small_model,
    teacher_forced,
)
from tests.kernels import BATCH_INVARIANT
from tests.models import build

SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 5},
)


def requests_of(seed: int, n: int) -> list[Request]:
    """Requests of random lengths, with each of the samplings in turn."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 24, (n,), generator=generator).tolist()
    new = torch.randint(1, 30, (n,), generator=generator).tolist()
    return [
        Request(
            prompt=prompt,
            max_new_tokens=new[i],
            **SAMPLINGS[i % len(SAMPLINGS)],
            seed=seed + i // 5,
            index=i,
        )
        for i, prompt in enumerate(random_prompts(seed, tuple(lengths)))
    ]


def decoded_alone(model: Any, request: Request, **options: Any) -> list[int]:
    with Engine(model, DecodingOptions(batch_size=1, **options)) as engine:
        (row,) = run_to_end(engine, [request])
    return row.token_ids


@pytest.mark.parametrize(
    ("mtp", "options"),
    [
        ({"depth": 2, "stack": "parallel", "correction": "selector"}, {}),
        ({"depth": 2}, {"speculative": False}),
        ({"depth": 1}, {"cache": "single", "draft_depth": 3}),
        ({"depth": 3, "confidence": True}, {"min_confidence": 0.4}),
        ({"depth": 2}, {"max_context": 16, "long": "slide"}),
        ({"depth": 2}, {"tree": (3, 2)}),
    ],
    ids=str,
)
def test_rows_that_join_and_leave_have_the_texts_of_rows_alone(mtp, options):
    """Greedy and sampled rows share a batch; rows that are removed halfway change no other."""
    model = small_model(3, **mtp)
    requests = requests_of(3, 16)
    expected = [decoded_alone(model, request, **options) for request in requests]
    generator = torch.Generator().manual_seed(0)
    waiting, texts, removed = deque(requests), {}, set()
    with Engine(model, DecodingOptions(batch_size=4, **options)) as engine:
        while waiting or engine.sequences:
            most = int(torch.randint(0, 3, (1,), generator=generator))
            joining = [waiting.popleft() for _ in range(min(most, len(waiting), engine.free))]
            for row in [*engine.add(joining), *engine.step()]:
                if row.finish_reason is not None:
                    texts[row.request.index] = row.token_ids
            if engine.sequences and torch.rand((), generator=generator) < 0.05:
                engine.remove(engine.sequences[0])
                removed.add(len(waiting))
    assert removed and len(texts) > 9
    for index, token_ids in texts.items():
        assert token_ids == expected[index], index


@pytest.mark.skipif(not BATCH_INVARIANT, reason="needs the C++")
@pytest.mark.parametrize("lengths", [(20, 32, 17, 40), (15, 17), (3, 9, 16), (200, 30)], ids=str)
@pytest.mark.parametrize("layers", ["dense", "latent", "experts"])
def test_a_prompts_logits_have_the_same_bits_in_a_batch_and_alone(layers, lengths):
    trunk = small_model(0, 0, kv=4, deepseek=layers != "dense").config.trunk
    if layers == "latent":
        trunk = replace(trunk, feed_forward=DenseConfig())
    elif layers == "experts":
        trunk = replace(trunk, attention=GroupedQueryConfig(), d_head=None)
    model = build(trunk, NoMTPConfig(), 0).eval()
    prompts = random_prompts(1, lengths)

    def first_logits(prompts: list[list[int]]) -> list[torch.Tensor]:
        logits: dict[int, torch.Tensor] = {}
        requests = [
            Request(prompt=prompt, index=i, max_new_tokens=2) for i, prompt in enumerate(prompts)
        ]
        keep = partial(keep_first, logits)
        with Engine(model, DecodingOptions(batch_size=4, eot_id=-1), on_logits=keep) as engine:
            engine.add(requests)
        return [logits[i] for i in range(len(prompts))]

    for prompt, together in zip(prompts, first_logits(prompts), strict=True):
        assert torch.equal(first_logits([prompt])[0], together)


def keep_first(kept: dict[int, torch.Tensor], index: int, logits: torch.Tensor) -> None:
    kept.setdefault(index, logits.clone())


def test_a_free_slot_is_taken_by_the_next_prompt():
    """A prompt does not wait for the longest text of a batch: 4 slots are full until none waits."""
    model = small_model(2, 1)
    new = [3, 30, 3, 3, 12, 3, 3, 3, 9, 3]
    requests = [Request(prompt=[i], max_new_tokens=n, index=i) for i, n in enumerate(new)]
    waiting, rounds = deque(requests), []
    with Engine(model, DecodingOptions(batch_size=4, speculative=False)) as engine:
        while waiting or engine.sequences:
            engine.add([waiting.popleft() for _ in range(min(engine.free, len(waiting)))])
            rounds.append((len(engine.step()), len(waiting)))
        storage = engine._decoder.session.trunk_cache._stored[0]
        assert storage.shape[0] == 4
    assert all(alive == 4 for alive, left in rounds if left)
    assert len(rounds) == 29  # those of the longest text; the others shared them


def test_log_probabilities_equal_the_trunks():
    model = small_model(9, 2)
    prompts = random_prompts(9, (1, 6, 17))
    for options in ({}, {"temperature": 0.8, "top_k": 4, "seed": 1}):
        texts = generate(model, prompts, max_new_tokens=12, batch_size=2, logprobs=3, **options)
        for prompt, g in zip(prompts, texts, strict=True):
            (logits_TV,) = teacher_forced(model, prompt + g.token_ids[:-1], 0)
            log_probs_TV = logits_TV[len(prompt) - 1 :].log_softmax(-1)
            assert [entry.token for entry in g.logprobs] == g.token_ids
            for entry, log_probs_V in zip(g.logprobs, log_probs_TV, strict=True):
                assert entry.logprob == pytest.approx(float(log_probs_V[entry.token]), abs=1e-4)
                best = log_probs_V.topk(3)
                assert [token for token, _ in entry.top] == best.indices.tolist()
                values = [value for _, value in entry.top]
                assert values == pytest.approx(best.values.tolist(), abs=1e-4)
    (chosen_only,) = generate(model, prompts[:1], max_new_tokens=3, logprobs=0)
    assert all(entry.top == [] and entry.logprob < 0 for entry in chosen_only.logprobs)
    (none,) = generate(model, prompts[:1], max_new_tokens=3)
    assert none.logprobs is None


@given(st.text("a\u00e9\u4e16", max_size=9), st.text("a\u00e9\u4e16", min_size=1, max_size=3))
def test_no_part_of_a_stop_string_is_shown(text: str, stop: str) -> None:
    """A token is a byte: a part of a character may or may not begin a stop string."""
    request = Request(prompt=[1], max_new_tokens=99, stop=(stop,))
    row, shown = TextSequence(request, 0, ByteTokenizer()), b""
    for byte in (text + stop).encode():
        row.extend([byte], 0, torch.zeros(1, 257))
        shown += bytes(row.fresh().token_ids)
        if row.finish_reason is not None:
            break
    assert row.finish_reason == "stop"
    assert shown.decode() == row.generation().text == (text + stop).partition(stop)[0]


def test_fresh_tokens_make_up_the_text():
    model = small_model(21, 3)
    (prompt,) = random_prompts(21, (5,))
    (whole,) = generate(model, [prompt], max_new_tokens=20, logprobs=1)
    text = Letters().decode(whole.token_ids)
    stops = [(), (text[7:10],), (text[3:5], "zzz"), (text[0],)]
    with Engine(model, DecodingOptions(batch_size=4), tokenizer=Letters()) as engine:
        rows = engine.add(
            [
                Request(prompt=prompt, max_new_tokens=20, stop=stop, eot_id=-1, logprobs=1, index=i)
                for i, stop in enumerate(stops)
            ]
        )
        assert [row.finish_reason for row in rows] == [None, None, None, "stop"]
        assert engine.free == 1
        shown: list[list[int]] = [[] for _ in rows]
        drafted: list[list[bool]] = [[] for _ in rows]
        logprobs: list[list[Any]] = [[] for _ in rows]
        for row in itertools.chain(rows, *iter(engine.step, [])):
            fresh = row.fresh()
            assert len(fresh.token_ids) == len(fresh.logprobs) == len(fresh.rejected)
            shown[row.request.index] += fresh.token_ids
            drafted[row.request.index] += [depth > 0 for depth in fresh.depths]
            logprobs[row.request.index] += fresh.logprobs
    for row, ids, entries, accepted in zip(rows, shown, logprobs, drafted, strict=True):
        done = row.generation()
        assert accepted == done.accepted_mask[: len(ids)]
        assert Letters().decode(ids) == done.text
        assert [entry.token for entry in entries] == ids and done.logprobs[: len(ids)] == entries
        assert len(done.logprobs) == len(done.token_ids)


class FailsAt(TorchFunctionMode):
    """Lets the ``n``-th call of PyTorch fail as for want of memory."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: ..")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("mtp", "options"),
    [
        ({"depth": 2}, {}),
        ({"depth": 1}, {"cache": "single", "draft_depth": 3}),
        ({"depth": 2}, {"tree": (3, 2)}),
    ],
    ids=str,
)
def test_a_request_that_the_memory_does_not_hold_changes_no_other_text(mtp, options):
    """Every third call of PyTorch fails once, of the storage's growth and the prompt's passes."""
    model = small_model(5, **mtp)
    short, joining, long = (
        Request(prompt=prompt, max_new_tokens=9 * (i + 1), index=i, **SAMPLINGS[i % 2])
        for i, prompt in enumerate(random_prompts(5, (3, 5, 60)))
    )
    expected = [decoded_alone(model, request, **options) for request in (short, joining, long)]
    with Engine(model, DecodingOptions(**options)) as engine, pytest.raises(UserError), FailsAt(1):
        engine.add([short])
    refused = 0
    for n in itertools.count(1, 3):
        with Engine(model, DecodingOptions(batch_size=3, **options)) as engine:
            rows = engine.add([short])
            engine.step()
            call = FailsAt(n)
            try:
                with call:
                    rows += engine.add([long])
            except UserError as error:
                assert "tokens of a text, in 3 slots, do not fit into the memory" in str(error)
                refused += 1
            rows += engine.add([joining])
            while engine.sequences:
                engine.step()
        assert all(row.token_ids == expected[row.request.index] for row in rows)
        if call.left > 0:
            break
    assert refused == n // 3 > 20 and len(rows) == 3


def test_a_request_may_ask_for_fewer_drafts():
    """Its text and number of drafts stay the same among rows with more drafts."""
    model = small_model(21, 3)
    prompts = random_prompts(21, (5, 5, 5, 5, 5))
    options = {"temperature": 1.0, "max_new_tokens": 30, "eot_id": -1}
    requests = [
        Request(prompt=p, index=i, draft_depth=depth, **options)
        for i, (p, depth) in enumerate(zip(prompts, (0, 1, 2, None, 9), strict=True))
    ]
    expected = [decoded_alone(model, request) for request in requests]
    with Engine(model, DecodingOptions(batch_size=5)) as engine:
        rows = run_to_end(engine, requests)
    assert ids_of(rows) == expected
    assert [max(row.depths) for row in rows[:3]] == [0, 1, 2]
    # The engine's own number is the most.
    most = Request(prompt=prompts[4], index=4, draft_depth=3, **options)
    assert decoded_alone(model, most) == expected[4]
    with pytest.raises(ValueError, match="draft_depth must be a whole number of at least 0"):
        Request(prompt=[1], draft_depth=-1)


def test_requests_that_do_not_fit_the_engine_are_refused():
    model = small_model(0, 1)
    request = Request(prompt=[1, 2], max_new_tokens=4)
    with Engine(model, DecodingOptions(batch_size=1, max_context=8)) as engine:
        (row,) = engine.add([request])
        with pytest.raises(ValueError, match="1 requests for 0 free slots of 1"):
            engine.add([request])
        engine.remove(row)
        assert engine.free == 1 and engine.step() == []
        with pytest.raises(ValueError, match="the sequence of prompt 0 is not in this engine"):
            engine.remove(row)
        for wrong, message in (
            (Request(prompt=[], max_new_tokens=1), "Prompt 0 is empty"),
            (Request(prompt=[1, 99], max_new_tokens=1, index=3), "Prompt 3 holds 99"),
            (
                Request(prompt=[1], max_new_tokens=9),
                r"\(1 token\) and 9 new tokens exceed the context of 8 that",
            ),
            (Request(prompt=[1], max_new_tokens=2, stop=("a",)), "needs a tokenizer"),
        ):
            with pytest.raises(ValueError, match=message):
                engine.add([request, wrong][1:])
            assert engine.free == 1  # the slot was not taken
        assert len(engine.add([request])) == 1


@pytest.mark.parametrize("indices", [[3, 3], [3], [1, 2, 3], []])
def test_indices_must_differ_and_be_as_many_as_prompts(indices):
    with pytest.raises(UserError, match=f"{re.escape(f'{indices=}')} must be 2 different numbers"):
        generate(small_model(0, 1), [[1, 2], [5, 6]], max_new_tokens=4, indices=indices)


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_two_threads_decode_with_one_model(first_ends_first):
    """Packed weights are kept until the later of the two engines ends."""
    model = small_model(7, depth=2)
    requests = requests_of(7, 2)
    expected = [decoded_alone(model, request) for request in requests]
    engines = [Engine(model, DecodingOptions(batch_size=1)) for _ in range(2)]

    def finish(engine):
        while engine.sequences:
            engine.step()
        engine.__exit__(None, None, None)

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        threads = list(zip((one, other), engines, strict=True))
        rows = []
        for (thread, engine), request in zip(threads, requests, strict=True):
            thread.submit(engine.__enter__).result()
            rows += thread.submit(engine.add, [request]).result()
        for thread, engine in threads if first_ends_first else reversed(threads):
            thread.submit(finish, engine).result()
            # Overwrite memory that was freed.
            sizes = {parameter.numel() for parameter in model.parameters()}
            overwritten = [torch.full((n,), torch.nan) for n in sizes for _ in range(20)]
            assert overwritten
    assert ids_of(rows) == expected
    assert all(getattr(layer, "packed", None) is None for layer in model.modules())


@pytest.mark.parametrize(
    ("seed", "temperature"), [*((seed, 0.0) for seed in (2, 21, 25, 37, 38)), (2, 1.0)]
)
def test_drafts_are_right_after_the_storage_has_grown(seed: int, temperature: float) -> None:
    """A row joins in the slot of a row that ended, and the storage grows for it."""
    model = small_model(seed, 2, vocab=4)
    short, four, other = random_prompts(seed, (5, 4, 4), 4)
    options: dict[str, Any] = {"temperature": temperature, "draft_depth": 0}
    first = Request(prompt=short, max_new_tokens=2, **options)
    options["draft_depth"] = None if temperature else 0
    moves = Request(prompt=four, max_new_tokens=30, index=1, **options)
    joins = Request(prompt=other, max_new_tokens=200, index=2, temperature=temperature)
    with Engine(model, DecodingOptions(batch_size=2)) as engine:
        _, moved = engine.add([first, moves])
        engine.step()
        (joined,) = engine.add([joins])
        while engine.sequences:
            engine.step()
    assert ids_of([moved, joined]) == [decoded_alone(model, request) for request in (moves, joins)]
