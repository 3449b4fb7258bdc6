"""Settings of heads that are refused, with their messages."""

from __future__ import annotations

from typing import Any

import pytest

from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.registers import RegistersConfig
from mtp_lightning.nn.config import TrunkConfig
from tests.deepseek import trunk as deepseek_trunk

FIXED_DEPTH = ("bag", "registers", "teacherless", "top")
RANK_2 = {
    "branch": "before_last", "detach": "trunk", "freeze_trunk": True, "stride": 2,
    "correction": "mlp",
}  # fmt: skip
UNTRAINABLE = {"depth": 0, "freeze_trunk": True}
# A head, its settings with a depth of 2 where none is given, and words of the message.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("parallel", {"branch": "top"}, "mtp.branch=top is unknown"),
    ("sequential", {"branch": "middle"}, "branch=middle is unknown: choose one of final"),
    ("linear", {"detach": "head"}, "mtp.detach=head is unknown"),
    ("linear", {"depth": -1}, "at least 0, not -1"),
    *((kind, UNTRAINABLE, "nothing to train") for kind in ("parallel", "nextlat")),
    ("masked", UNTRAINABLE, "nothing to train"),
    ("sequential", {"depth": 1, "hidden_state_mixing": True}, "nothing to mix"),
    ("sequential", {"blocks": 0}, "mtp.blocks must be .* at least 1, not 0"),
    *(("sequential", {"token_dropout": p}, "token_dropout") for p in (-0.1, 1.5, True, "x")),
    ("sequential", {"correction": "selector"}, "correction"),
    ("linear", {"correction": "rnn"}, "correction=rnn is unknown: choose one"),
    ("parallel", {"correction_rank": 0}, "correction_rank must be a whole"),
    ("linear", {"correction_rank": 8}, "has no meaning with mtp.correction=none"),
    ("linear", {"correction": "mlp", "correction_rank": 8}, "to markov or selector"),
    ("linear", {"stride": 2, "correction": "selector"}, "mtp.stride=2 skips tokens.*selector"),
    ("linear", {"stride": 2, "correction": "mlp"}, "would have to read"),
    ("parallel", {"stride": 0}, "mtp.stride must be a whole number"),
    ("linear", {"rank": 0}, "mtp.rank must be"),
    *(("linear", {"rank": 2, k: v}, f"mtp.{k}=.* with mtp.rank=2") for k, v in RANK_2.items()),
    ("linear", {"rank": 2, "correction": "selector"}, "correction=selector .* mtp.rank=2"),
    ("linear", {"rank": 2, "depth": 0}, "mtp.rank=2 has no tokens to join at mtp.depth=0"),
    *(("eagle", {"layers": n}, "must be three whole numbers") for n in ((1, 2), 3, "abc")),
    ("eagle", {"layers": (1, 2, 4)}, "after 4 blocks, and the trunk has model.n_layers=3"),
    ("dflash", {"layers": (1, 2)}, "must be three whole numbers"),
    ("dflash", {"correction": "mlp"}, "mtp.correction=mlp .*none.*markov.*selector"),
    ("dflash", {"blocks": 0}, "mtp.blocks must be a whole number of at least 1"),
    ("eagle", {"draft_vocab": 0}, "mtp.draft_vocab must be a whole number of at least 1"),
    *(
        (kind, {}, "use a model with grouped-query attention, such as model=nano")
        for kind in ("eagle", "dflash", "masked")
    ),
    ("masked", {"lora_rank": 0}, "mtp.lora_rank must be a whole number of at least 1"),
    ("masked", {"consistency": -1.0}, "mtp.consistency must be"),
    ("registers", {"depth": 2}, "mtp.depth must be 1 with mtp=registers, not 2"),
    ("registers", {"lookahead": 0}, "mtp.lookahead must be .* at least 1, not 0"),
    ("top", {"depth": 2}, "mtp.depth must be 1 with mtp=top, not 2"),
    ("top", {"depth": 0}, "mtp.depth must be 1 with mtp=top, not 0"),
    ("top", {"lookahead": 0}, "mtp.lookahead must be a whole number of at least 1, not 0"),
    ("top", {"tau": 0.0}, "mtp.tau must be a number above 0, not 0.0"),
    ("top", {"detach": "all"}, "mtp.detach=all has no meaning for mtp=top"),
    ("top", {"detach": "head"}, "mtp.detach=head is unknown"),
    ("bag", {"depth": 3}, "mtp.depth must be 1 with mtp=bag, not 3"),
    ("bag", {"lookahead": 1}, "mtp.lookahead must be a whole number of at least 2, not 1"),
    ("bag", {"weights": "tfidf"}, "mtp.weights=tfidf is unknown: choose one of idf, none"),
    ("teacherless", {"depth": 2}, "mtp.depth must be 0 with mtp=teacherless, not 2"),
]


@pytest.mark.parametrize(("kind", "settings", "message"), REFUSED)
def test_wrong_settings_are_refused(kind: str, settings: dict[str, Any], message: str) -> None:
    sizes = {"vocab_size": 37, "d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2}
    # Without settings, the trunk's latent attention is refused.
    trunk = TrunkConfig(**sizes, d_ff=48) if settings else deepseek_trunk()
    depth = {} if kind in FIXED_DEPTH else {"depth": 2}
    with pytest.raises((ValueError, TypeError), match=message):
        MTPConfig.find(kind)(**depth | settings).build(trunk)


def test_a_look_ahead_longer_than_the_window_is_refused() -> None:
    registers = RegistersConfig(lookahead=9)
    registers.check_window(8)
    with pytest.raises(ValueError, match=r"lookahead=9 is beyond .* data.seq_len \+ 1 = 8 tok"):
        registers.check_window(7)
