"""Every head by every objective, switch and rule: it trains, or one sentence says why not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from data_modules.windows import WindowBatch
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective.balance.base import Balance, NoBalance
from mtp_lightning.objective.balance.cosine_gate import CosineGate
from mtp_lightning.objective.balance.gradnorm import GradNorm
from mtp_lightning.objective.balance.uncertainty import Uncertainty
from mtp_lightning.objective.objective import Objective
from mtp_lightning.objective.schedule.base import Progress
from mtp_lightning.objective.schedule.piecewise import Piecewise
from mtp_lightning.objective.step import OptimizerStep
from mtp_lightning.objective.terms.base import Term
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from mtp_lightning.objective.terms.e2e_tv import E2ETV
from mtp_lightning.objective.terms.js import JS
from mtp_lightning.objective.terms.kl import KL
from mtp_lightning.objective.terms.lk import LK
from mtp_lightning.objective.terms.mixture import Mixture
from mtp_lightning.objective.terms.nla import NLA
from mtp_lightning.objective.terms.reverse_kl import ReverseKL
from mtp_lightning.objective.terms.tv import TV

TRUNK = TrunkConfig(vocab_size=11, d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, d_ff=16)
SEQ_LEN = 7

HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "sequential": ("sequential", {}),
    "shared": ("sequential", {"share_layers": True}),
    "token dropout": ("sequential", {"token_dropout": 0.5}),
    "mixing": ("sequential", {"hidden_state_mixing": True}),
    "parallel": ("parallel", {}),
    "parallel, mlp": ("parallel", {"correction": "mlp"}),
    "parallel, stride": ("parallel", {"stride": 2}),
    "linear": ("linear", {}),
    "linear, markov": ("linear", {"correction": "markov"}),
    "linear, stride": ("linear", {"stride": 2}),
    "linear, rank": ("linear", {"rank": 2}),
    "joint": ("joint", {}),
    "nextlat": ("nextlat", {}),
    "parameter_free": ("parameter_free", {}),
    "top": ("top", {"depth": 1, "lookahead": 5}),
    "bag": ("bag", {"depth": 1, "lookahead": 5, "weights": "none"}),
    "registers": ("registers", {"depth": 1, "lookahead": 3}),
    "teacherless": ("teacherless", {"depth": 0}),
    "none": ("none", {"depth": 0}),
}
TERMS: dict[str, Term] = {
    "ce": CrossEntropy(),
    "kl": KL(),
    "reverse_kl": ReverseKL(),
    "js": JS(),
    "tv": TV(),
    "nla": NLA(),
    "lk": LK(),
    "e2e_tv": E2ETV(),
    "mix": Mixture({"ce": 0.1, "tv": 0.9}),
    "feature": Mixture({"kl": 0.1, "feature": 1}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "exp_decay": {"weights": "exp_decay"},
    "acceptance": {"weights": "acceptance"},
    "mask": {"mask": "entropy", "tau": 0.01},
    "confidence": {"confidence": True},
    "train_head": {"train_head": False},
}
# Switches of a stack, as a user types them, and rules.
SWITCHES: dict[str, dict[str, Any]] = {
    "": {},
    "detach trunk": {"detach": "trunk"},
    "detach all": {"detach": "all"},
    "frozen": {"freeze_trunk": True},
    "before_last": {"branch": "before_last"},
    "pre": {"input_norm": "pre"},
    "depth 0": {"depth": 0},
    "depth 1": {"depth": 1},
    "rank": {"rank": 3},
    "stride": {"stride": 3},
    "markov": {"correction": "markov"},
}
RULES: dict[str, Callable[[int], Balance]] = {
    "": NoBalance,
    "gradnorm": GradNorm,
    "cosine_gate": CosineGate,
    "uncertainty": Uncertainty,
}


def train(head: str, objective: Objective, switches: dict[str, Any], rule: str) -> str | None:
    """An optimizer step under a mask; the sentence of a refusal, or None.

    Raises:
        TypeError: of a switch that the head does not have, which Hydra tells a user before.
    """
    variant, own = HEADS[head]
    settings = {"depth": 2, **own, **switches, "confidence": objective.confidence}
    try:
        mtp = MTPConfig.find(variant)(**settings)
        mtp = mtp if mtp.depth or mtp.answers_at_once else MTPConfig.find("none")(depth=0)
        model = MTPModel(ModelConfig(trunk=TRUNK, mtp=mtp))
        model.initialise(0)
        balance = RULES[rule](mtp.depth)
        balance.check(model.config)
        step = OptimizerStep(
            model,
            schedule=Piecewise(mtp.depth, 0.3),
            balance=balance,
            objective=objective,
            clip_norm=1.0,
        )
    except ValueError as error:
        return str(error)
    extra = max(mtp.places_ahead - mtp.depth - 1, 0)
    width = SEQ_LEN + mtp.stride * mtp.depth + 1 + extra
    tokens = torch.randint(1, 11, (2, width), generator=torch.Generator().manual_seed(0))
    places = torch.arange(width).expand(2, -1)
    batch = WindowBatch(tokens, mtp.depth, places // 9, places > 1, stride=mtp.stride, extra=extra)
    trained = [p for p in model.parameters() if p.requires_grad] or [
        torch.nn.Parameter(tokens[0] * 1.0)
    ]
    optimizer = torch.optim.SGD([*trained, *balance.parameters()], lr=0.01)
    result = step(batch, Progress(step=0, max_steps=2), optimizer)
    assert torch.isfinite(result.loss)
    assert set(result.plan.active) <= set(range(1, mtp.depth + 1))
    return None


def require_sentence(said: str | None, *named: str) -> None:
    """One sentence that names what was asked for."""
    if said is not None:
        assert "\n" not in said and said.endswith(".") and len(said) < 400, said
        assert any(name in said for name in named), said


@pytest.mark.parametrize("head", HEADS)
def test_every_objective(head: str) -> None:
    trained, asked = 0, [(name, "") for name in TERMS]
    asked += itertools.product(("ce", "kl", "feature"), list(OPTIONS)[1:])
    for name, option in asked:
        said = train(head, Objective(term=TERMS[name], **OPTIONS[option]), {}, "")
        require_sentence(said, "objective")
        trained += said is None
        if not option and name == "ce":
            assert said is None
    # What predicts no token by depth takes cross-entropy alone, what leaps or is joined nothing
    # that looks at drafts or states, and everything else takes everything.
    sorts = {"top": 1, "bag": 1, "registers": 1}
    assert trained >= sorts.get(head, 9)
    if head not in sorts and HEADS[head][1].keys().isdisjoint({"stride", "rank", "depth"}):
        assert trained == len(asked)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_every_switch_and_rule(head: str) -> None:
    fields = MTPConfig.find(HEADS[head][0]).__dataclass_fields__
    for switches in SWITCHES.values():
        if not switches.keys() <= fields.keys():
            continue
        for rule in RULES:
            for term in (TERMS["kl"], TERMS["e2e_tv"]):
                said = train(head, Objective(term=term), switches, rule)
                named = [f"mtp.{name}" for name in switches] + ["objective=", "balance=", "mtp="]
                require_sentence(said, *named)
