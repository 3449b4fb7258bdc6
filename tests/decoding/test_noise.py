"""Random numbers belong to their row, whoever comes and goes."""

from __future__ import annotations

import torch

from mtp_lightning.decoding.noise import Noise


def rows_of(streams, rounds, *, seed=5, per_round=7):
    noise = Noise(len(streams), per_round, "cpu")
    first = noise.join([(seed, index) for index in streams])
    return torch.stack([first, *(noise.next().clone() for _ in range(rounds))], dim=1)


def test_noise_belongs_to_the_prompt():
    together, apart = rows_of([0, 1, 2], 300), rows_of([2, 1], 300)  # beyond several blocks
    assert torch.equal(together[1:], apart.flip(0))
    assert len(together.unique()) == together.numel()
    assert not torch.equal(rows_of([0], 3, seed=6), rows_of([0], 3))


def test_rows_come_and_go_without_a_trace():
    expected = rows_of(range(40), 200)
    noise, alive, rounds = Noise(4, 7, "cpu"), [], {}
    generator = torch.Generator().manual_seed(1)
    waiting = list(range(40))
    while waiting or alive:
        while waiting and len(alive) < 4 and torch.rand((), generator=generator) < 0.5:
            index = waiting.pop(0)
            assert torch.equal(noise.join([(5, index)])[0], expected[index, 0])
            alive.append(index)
            rounds[index] = 0
        if not alive:
            continue
        for row, numbers in enumerate(noise.next()):
            rounds[alive[row]] += 1
            assert torch.equal(numbers, expected[alive[row], rounds[alive[row]]])
        for row in range(len(alive) - 1, -1, -1):
            if rounds[alive[row]] == 200 or torch.rand((), generator=generator) < 0.02:
                noise.drop_row(row)
                alive[row] = alive[-1]
                alive.pop()
    assert max(rounds.values()) > 64
