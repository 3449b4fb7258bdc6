"""The loader: its order, ranks, workers, and state."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules import loader as loader_module
from data_modules.evaluation_text import EvaluationText, EvaluationWindows
from data_modules.loader import EvaluationLoader, WindowLoader
from data_modules.order import epoch_order
from data_modules.token_store import TokenFile
from data_modules.window_dataset import WindowDataset, window_count
from tests.data_modules.loaders import T, loader_of, numbers, stream, token_file
from tests.data_modules.programs import start
from tests.models import target_counts

# torch warns on a machine with one core.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def evaluation_of(folder: Path, tokens: int, *, depth: int = 2) -> EvaluationWindows:
    """Windows of one document, whose stream is [tokens, 0, 1, ..]: its token i is at i + 1."""
    text = EvaluationText(
        token_file(folder, tokens), np.array([0]), np.array([tokens]), np.array([tokens]), "text"
    )
    return EvaluationWindows(text, seq_len=T, depth=depth, eot_id=tokens)


def as_rank(monkeypatch, rank: int, world: int) -> None:
    monkeypatch.setattr(loader_module, "_world", lambda: (rank, world))


@given(st.integers(0, 200), st.integers(1, 20), st.integers(0, 20))
def test_window_count_fits_and_does_not_depend_on_depth(n_tokens, seq_len, depth):
    depth = min(depth, seq_len)
    n = window_count(n_tokens, seq_len, depth)
    assert n == 0 or (n - 1) * seq_len + seq_len + depth + 1 <= n_tokens
    assert (n == 0) == (n_tokens < seq_len + depth + 1)
    if n_tokens >= 2 * seq_len + 1:
        assert n == window_count(n_tokens, seq_len, 0)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_batches_against_brute_force(tmp_path_factory, data):
    depth = data.draw(st.integers(0, 4))
    n = data.draw(st.integers(T + depth + 1, 150))
    starts = sorted({0, *data.draw(st.lists(st.integers(0, n - 1), max_size=20))})
    file = token_file(tmp_path_factory.mktemp("file"), n, starts)
    dataset = WindowDataset(file, seq_len=T, depth=depth, document_mask=True)
    batch = dataset[np.array(data.draw(st.permutations(range(len(dataset)))))]
    document_of = np.searchsorted(starts, np.arange(n), side="right") - 1
    assert batch.tokens.dtype == batch.documents.dtype == torch.int64
    for tokens, documents in zip(batch.tokens.tolist(), batch.documents.tolist(), strict=True):
        assert tokens[0] % T == 0 and tokens == list(range(tokens[0], tokens[0] + T + depth + 1))
        assert documents == document_of[tokens].tolist()


def test_every_depth_sees_the_same_windows_in_the_same_order(tmp_path):
    orders = [numbers(loader_of(tmp_path, depth=depth)) for depth in (0, 1, 4, T)]
    assert all(other == orders[0] for other in orders)


def test_order_is_a_pure_function_of_seed_and_epoch(tmp_path):
    loader = loader_of(tmp_path, seed=5)
    epochs = [numbers(loader) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [len(loader)] * 3 == [6] * 3
    for i, epoch in enumerate(epochs):
        flat = sum(epoch, [])
        assert flat == epoch_order(25, seed=5, epoch=i)[:24].tolist() and len(set(flat)) == 24
    assert epochs[0] != epochs[1] != epochs[2]
    assert numbers(loader_of(tmp_path, seed=6)) != epochs[0]
    # The bits are part of the contract: a run resumed elsewhere sees the same batches.
    assert epoch_order(10, seed=0, epoch=0).tolist() == GOLDEN


GOLDEN = [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]


def test_workers_change_neither_batches_nor_the_global_generator(tmp_path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    orders = [
        [numbers(loader) for loader in [loader_of(tmp_path, num_workers=n)] for _ in range(2)]
        for n in (0, 1, 2)
    ]
    assert orders[0] == orders[1] == orders[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("windows", [25, 24])  # one is left out of an epoch, none
@pytest.mark.parametrize(
    ("consumed", "workers"), [(1, 0), (5, 0), (6, 0), (7, 0), (15, 0), (5, 2), (6, 2)]
)
def test_a_restored_state_continues_with_the_next_batch(tmp_path, consumed, workers, windows):
    whole = numbers(stream(loader_of(tmp_path, windows=windows, seed=1), 20))
    first = loader_of(tmp_path, windows=windows, seed=1, num_workers=workers)
    assert numbers(stream(first, consumed)) == whole[:consumed]
    state = first.state_dict()
    assert {type(value) for value in state.values()} == {int}
    second = loader_of(tmp_path, windows=windows, seed=1, num_workers=workers)
    iter(second)  # an unused iterator, as Lightning makes, keeps the state
    second.load_state_dict(state)
    assert second.state_dict() == state and len(second) == 6
    assert numbers(stream(second, 20 - consumed)) == whole[consumed:]


def test_a_state_brings_its_seed_and_is_refused_for_other_data(tmp_path):
    state = loader_of(tmp_path, seed=3).state_dict()
    length = state["seq_len"]
    with pytest.raises(ValueError, match=f"25 training windows of {length} .* has 26 of {length}:"):
        loader_of(tmp_path, windows=26).load_state_dict(state)
    with pytest.raises(ValueError, match=f"windows of 3 tokens but this data has 25 of {length}:"):
        loader_of(tmp_path, seed=3).load_state_dict({**state, "seq_len": 3})
    other = loader_of(tmp_path, seed=4)
    other.load_state_dict({k: v for k, v in state.items() if k != "seq_len"})  # an older one
    other.load_state_dict(state)
    assert numbers(other) == numbers(loader_of(tmp_path, seed=3))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_read_the_batches_of_one_rank(tmp_path, monkeypatch, world):
    one = loader_of(tmp_path, batch_size=2 * world, seed=2)
    expected = numbers(one)
    shards = []
    for rank in range(world):
        # Made before the process group, as in a launcher's main process.
        loader = loader_of(tmp_path, batch_size=2, seed=2)
        as_rank(monkeypatch, rank, world)
        shards.append(numbers(loader))
        assert len(loader) == len(expected)
        # The state is the whole job's: a resume with another number of ranks continues as well.
        assert loader.state_dict() == one.state_dict()
    assert [sum(parts, []) for parts in zip(*shards, strict=True)] == expected


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 300), batch_size=st.integers(1, 6), world=st.integers(1, 5))
def test_ranks_together_evaluate_the_batches_of_one_rank(tmp_path_factory, n, batch_size, world):
    dataset = evaluation_of(tmp_path_factory.mktemp("file"), n)
    one = list(EvaluationLoader(dataset, batch_size=batch_size))
    scored = [batch.tokens[batch.scored][1:] for batch in one]
    assert [len(batch) for batch in one[:-1]] == [batch_size] * (len(one) - 1)
    assert len(scored) == len(one) == -(-n // (T * batch_size))
    with pytest.MonkeyPatch.context() as patch:
        shards = []
        for rank in range(world):
            loader = EvaluationLoader(dataset, batch_size=batch_size)
            as_rank(patch, rank, world)
            shards.append(list(loader))
            assert len(loader) == len(shards[-1])
    assert len({len(shard) for shard in shards}) == 1
    together = [batch for step in zip(*shards, strict=True) for batch in step]
    for left, right in zip(together, one, strict=False):
        assert torch.equal(left.tokens, right.tokens) and torch.equal(left.scored, right.scored)
    for padding in together[len(one) :]:
        assert len(padding) == 1 and target_counts(padding).tolist() == [0] * 3


def test_too_little_text_is_refused_with_the_minimum(tmp_path):
    short = WindowDataset(token_file(tmp_path, T + 2), seq_len=T, depth=2)
    with pytest.raises(ValueError, match="the training split has 10 tokens .* at least 11 "):
        iter(WindowLoader(short, batch_size=1))
    exact = WindowDataset(token_file(tmp_path, T + 3), seq_len=T, depth=2)
    assert numbers(WindowLoader(exact, batch_size=1)) == [[0]]
    with pytest.raises(ValueError, match=r"has 25 windows but one step needs 26 \(26 windows x 1 "):
        len(loader_of(tmp_path, batch_size=26))
    with pytest.raises(ValueError, match="the validation split has no document: give more text"):
        len(EvaluationLoader(evaluation_of(tmp_path, 0), batch_size=1))
    assert len(EvaluationLoader(evaluation_of(tmp_path, 1), batch_size=1)) == 1


def test_an_empty_file_has_no_window(tmp_path):
    empty = TokenFile(tmp_path / "empty.bin", "uint16", 0, 0, 0)
    (tmp_path / "empty.bin").touch()
    assert len(WindowDataset(empty, seq_len=T, depth=0)) == 0 and os.path.getsize(empty.path) == 0
    assert empty.tokens().shape == (0,)


def test_a_limit_keeps_the_same_windows_across_the_text(tmp_path):
    file = token_file(tmp_path, 101 * T + 1)

    def windows_read(seed: int, depth: int, epochs: int) -> list[int]:
        dataset = WindowDataset(file, seq_len=T, depth=depth, limit=20)
        assert len(dataset) == 20
        loader = WindowLoader(dataset, batch_size=4, seed=seed)
        return [n for _ in range(epochs) for batch in numbers(loader) for n in batch]

    first = windows_read(0, 0, 2)
    assert sorted(first[:20]) == sorted(first[20:]) and first[:20] != first[20:]
    assert len(set(first)) == 20 and max(first) > 70 and min(first) < 30
    # The same windows for every seed and depth; the seed orders them.
    other = windows_read(1, 2, 1)
    assert sorted(other) == sorted(first[:20]) and other != first[:20]
    with pytest.raises(ValueError, match="data.train_windows=101 is more than the 100"):
        WindowDataset(file, seq_len=T, depth=0, limit=101)


FETCHING = """
import os, signal, sys, time
import numpy as np
from data_modules.loader import WindowLoader

class Windows:
    def __len__(self): return 4000
    def require(self, batch_size, world): pass
    def order(self, seed, epoch): return np.arange(4000)
    def __getitem__(self, numbers):
        import torch
        return torch.from_numpy(numbers).repeat(100)

heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
fetched = 0
for batch in WindowLoader(Windows(), batch_size=4, num_workers=2):
    fetched += 1
    if fetched == 50:
        print("ready", flush=True)
        until = time.monotonic() + 60
        while not heard and time.monotonic() < until:
            time.sleep(0.01)
    if fetched == 500:
        print("fetched", fetched, len(heard), flush=True)
    if fetched > 500:
        time.sleep(0.1)
"""


def test_worker_processes_ignore_sigterm_and_end_with_the_run() -> None:
    """The main process alone acts on a signal to all; a killed run leaves no traceback."""
    process = start(FETCHING, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGTERM)
    assert process.stdout.readline() == "fetched 500 1\n"
    process.kill()
    out, err = process.communicate(timeout=240)  # ends when every process has closed the pipe
    assert (out, process.returncode) == ("", -signal.SIGKILL)
    assert "Traceback" not in err, err
