"""Settings of heads that are refused, and the messages."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mtp_lightning.mtp.bag import BagConfig
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.eagle import EagleConfig
from mtp_lightning.mtp.linear import LinearConfig
from mtp_lightning.mtp.masked import MaskedConfig
from mtp_lightning.mtp.nextlat import NextLatConfig
from mtp_lightning.mtp.parallel import ParallelConfig
from mtp_lightning.mtp.registers import RegistersConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.mtp.teacherless import TeacherlessConfig
from mtp_lightning.mtp.top import TopConfig
from mtp_lightning.nn.config import TrunkConfig
from tests.deepseek import trunk as deepseek_trunk
from tests.models import build

TRUNK = TrunkConfig(vocab_size=37, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48)


def eagle(**switches: object) -> object:
    return build(TRUNK, EagleConfig(depth=3, **switches))  # type: ignore[arg-type]


def linear(**switches: object) -> object:
    return LinearConfig(**{"depth": 2, **switches})  # type: ignore[arg-type]


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: ParallelConfig(depth=1, branch="top"), "mtp.branch=top is unknown"),
    (
        lambda: SequentialConfig(depth=1, branch="middle"),
        "branch=middle is unknown: choose one of final",
    ),
    (lambda: linear(detach="head"), "mtp.detach=head is unknown"),
    (lambda: linear(depth=-1), "at least 0, not -1"),
    (lambda: ParallelConfig(depth=0, freeze_trunk=True), "leaves nothing to train"),
    (lambda: NextLatConfig(depth=0, freeze_trunk=True), "leaves nothing to train"),
    (lambda: SequentialConfig(depth=1, hidden_state_mixing=True), "nothing to mix"),
    (lambda: SequentialConfig(depth=1, blocks=0), "mtp.blocks must be .* at least 1, not 0"),
    *(
        (lambda p=p: SequentialConfig(depth=1, token_dropout=p), "mtp.token_dropout must be")
        for p in (-0.1, 1.5, True, "half")
    ),
    (lambda: linear(correction="rnn"), "correction=rnn is unknown: choose one"),
    (lambda: ParallelConfig(depth=1, correction_rank=0), "correction_rank must be a whole"),
    (lambda: linear(correction_rank=8), "has no meaning with mtp.correction=none"),
    (
        lambda: linear(correction="mlp", correction_rank=8),
        "set mtp.correction to markov or selector",
    ),
    (lambda: SequentialConfig(depth=2, correction="selector"), "correction"),  # type: ignore[call-arg]
    (
        lambda: linear(stride=2, correction="selector"),
        "mtp.stride=2 skips tokens.*mtp.correction=selector",
    ),
    (lambda: linear(stride=2, correction="mlp"), "would have to read"),
    (lambda: ParallelConfig(depth=1, stride=0), "mtp.stride must be a whole number"),
    (lambda: linear(rank=0), "mtp.rank must be"),
    (
        lambda: linear(rank=2, branch="before_last"),
        "mtp.branch=before_last has no meaning with mtp.rank=2",
    ),
    (lambda: linear(rank=2, detach="trunk"), "mtp.detach=trunk has no meaning with mtp.rank=2"),
    (
        lambda: linear(rank=2, freeze_trunk=True),
        "mtp.freeze_trunk=true has no meaning with mtp.rank=2",
    ),
    (lambda: linear(rank=2, stride=2), "mtp.stride=2 has no meaning with mtp.rank=2"),
    *(
        (
            lambda c=c: linear(rank=2, correction=c),
            f"mtp.correction={c} has no meaning with mtp.rank=2",
        )
        for c in ("mlp", "selector")
    ),
    (lambda: linear(rank=2, depth=0), "mtp.rank=2 has no tokens to join at mtp.depth=0"),
    (lambda: eagle(layers=(1, 2)), "mtp.layers=.1, 2. must be three whole numbers"),
    (lambda: eagle(layers=3), "mtp.layers=3 must be three whole numbers"),
    (lambda: eagle(layers="abc"), "mtp.layers=abc must be three whole numbers"),
    (
        lambda: eagle(layers=(1, 2, 3)),
        "reads states after 3 blocks, and the trunk has model.n_layers=2",
    ),
    (lambda: eagle(draft_vocab=0), "mtp.draft_vocab must be a whole number of at least 1"),
    (
        lambda: build(deepseek_trunk(vocab_size=37), EagleConfig(depth=2)),
        "use model.attention=grouped_query",
    ),
    (
        lambda: build(deepseek_trunk(vocab_size=37), MaskedConfig(depth=2)),
        "use model.attention=grouped_query",
    ),
    (
        lambda: MaskedConfig(depth=2, lora_rank=0),
        "mtp.lora_rank must be a whole number of at least 1",
    ),
    (lambda: MaskedConfig(depth=2, consistency=-1.0), "mtp.consistency must be"),
    (lambda: MaskedConfig(depth=0, freeze_trunk=True), "leaves nothing to train"),
    (
        lambda: RegistersConfig(depth=2),
        "mtp.depth must be 1 with mtp=registers, not 2",
    ),
    (
        lambda: RegistersConfig(lookahead=0),
        "mtp.lookahead must be a whole number of at least 1, not 0",
    ),
    (
        lambda: RegistersConfig(lookahead=9).check_window(7),
        r"mtp.lookahead=9 is beyond .* data.seq_len \+ 1 = 8 tok",
    ),
    (lambda: TopConfig(depth=2), "mtp.depth must be 1 with mtp=top, not 2"),
    (lambda: TopConfig(depth=0), "mtp.depth must be 1 with mtp=top, not 0"),
    (lambda: TopConfig(lookahead=0), "mtp.lookahead must be a whole number of at least 1, not 0"),
    (lambda: TopConfig(tau=0.0), "mtp.tau must be a number above 0, not 0.0"),
    (lambda: TopConfig(detach="all"), "mtp.detach=all has no meaning for mtp=top"),
    (lambda: TopConfig(detach="head"), "mtp.detach=head is unknown"),
    (lambda: BagConfig(depth=3), "mtp.depth must be 1 with mtp=bag, not 3"),
    (lambda: BagConfig(lookahead=1), "mtp.lookahead must be a whole number of at least 2, not 1"),
    (
        lambda: BagConfig(weights="tfidf"),
        "mtp.weights=tfidf is unknown: choose one of idf, none",
    ),
    (lambda: TeacherlessConfig(depth=2), "mtp.depth must be 0 with mtp=teacherless, not 2"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_makes_no_sense_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_settings_survive_a_checkpoint() -> None:
    for config in (TopConfig(tau=2.0), BagConfig(weights="none"), RegistersConfig(lookahead=9)):
        assert MTPConfig.from_dict(config.to_dict()) == config
    RegistersConfig(lookahead=9).check_window(8)
