"""Windows: inputs, targets and the document mask of every depth."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision

from data_modules.windows import IGNORE_INDEX, WindowBatch
from tests.models import target_counts


def batch_of(tokens: list[list[int]], depth: int, documents=None, scored=None) -> WindowBatch:
    fields = (None if field is None else torch.tensor(field) for field in (documents, scored))
    return WindowBatch(torch.tensor(tokens), depth, *fields)


def test_no_view_begins_where_the_window_has_too_few_tokens():
    batch = WindowBatch(torch.arange(8).unsqueeze(0), depth=1, stride=2, extra=1)
    assert batch.seq_len == 4 and batch.shifted(batch.tokens, 1).tolist() == [[3, 4, 5, 6]]
    with pytest.raises(AssertionError):
        batch.shifted(batch.tokens, 2)


@pytest.mark.parametrize(
    "plugin", [DoublePrecision(), HalfPrecision("bf16-true")], ids=["64-true", "bf16-true"]
)
def test_lightning_converts_only_the_states_of_a_batch(plugin) -> None:
    """As for the batches of a LightningModule of the user's own in this precision."""
    batch = WindowBatch(torch.arange(8).unsqueeze(0), depth=1, states=torch.ones(1, 1, 6, 3))
    converted = plugin.convert_input(batch)
    assert converted.tokens is batch.tokens and converted.seq_len == 6
    wanted = {"64-true": torch.float64, "bf16-true": torch.bfloat16}[plugin.precision]
    assert converted.states.dtype == wanted and batch.states.dtype == torch.float32


def test_targets_without_a_mask_are_views_of_one_tensor():
    batch = batch_of([list(range(8)), list(range(10, 18))], 3)
    storage = batch.tokens.untyped_storage().data_ptr()
    for k in range(4):
        view = batch.targets(k)
        assert view.shape == (2, 4)
        assert view.untyped_storage().data_ptr() == storage
        assert view.data_ptr() == batch.tokens[:, k + 1 :].data_ptr()
        assert view.tolist() == [[k + 1 + i for i in range(4)], [k + 11 + i for i in range(4)]]
        assert batch.valid(k) is None
    assert target_counts(batch).tolist() == [8, 8, 8, 8] and batch.every_target_counts


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_mask_against_brute_force_over_random_packings(data):
    depth = data.draw(st.integers(0, 4))
    seq_len = data.draw(st.integers(1, 12))
    rows = data.draw(st.integers(1, 3))
    length = seq_len + depth + 1
    documents, document = [], 0
    for _ in range(rows):
        row: list[int] = []
        while len(row) < length:
            # Lengths down to 1: a short document between two others must not leak.
            row += [document] * data.draw(st.integers(1, 6))
            document += 1
        documents.append(row[:length])
    tokens = [[1000 * r + i for i in range(length)] for r in range(rows)]
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    scored = data.draw(st.none() | st.lists(flags, min_size=rows, max_size=rows))
    batch = batch_of(tokens, depth, documents, scored)
    for k in range(depth + 1):
        expected = [[IGNORE_INDEX] * seq_len for _ in range(rows)]
        for r, i in product(range(rows), range(seq_len)):
            one_document = len(set(documents[r][i : i + k + 2])) == 1
            if one_document and (scored is None or scored[r][i + k + 1]):
                expected[r][i] = tokens[r][i + k + 1]
        assert batch.targets(k).tolist() == expected and not batch.every_target_counts
        assert target_counts(batch)[k] == sum(t != IGNORE_INDEX for row in expected for t in row)
        assert torch.equal(batch.valid(k), batch.targets(k) != IGNORE_INDEX)
    # Masking copies: the tokens themselves stay.
    assert batch.tokens.tolist() == tokens


def test_micro_batches_are_views_that_cover_the_batch():
    scored = [[True, True, i > 1] for i in range(5)]
    batch = batch_of([[i, i + 1, i + 2] for i in range(5)], 1, [[0, 0, 1]] * 5, scored)
    parts = batch.micro_batches(2)
    assert [len(part) for part in parts] == [3, 2]
    assert torch.equal(torch.cat([part.tokens for part in parts]), batch.tokens)
    assert parts[1].tokens.data_ptr() == batch.tokens[3:].data_ptr()
    assert torch.equal(sum(target_counts(part) for part in parts), target_counts(batch))


def test_moving_a_batch_to_a_device_moves_every_field():
    batch = batch_of([[1, 2, 3]], 1, [[0, 0, 1]], [[True, True, False]])
    moved = batch.to("meta")
    assert moved.device.type == moved.documents.device.type == "meta" and moved.depth == 1
    assert moved.scored.device.type == "meta" and moved.texts is None
    assert batch.to("cpu").tokens.tolist() == [[1, 2, 3]]


def test_a_depth_other_than_the_models_is_refused():
    batch = batch_of([[1, 2, 3]], 1)
    batch.require_depth(1)
    with pytest.raises(ValueError, match="built for mtp.depth=1 but the model's is 2: give"):
        batch.require_depth(2)
