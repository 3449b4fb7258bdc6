"""The cross product of heads and objectives: its axes, which are read from conf/, its cases, and
the random models and windows of a case."""

from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf

from data_modules.windows import WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective.schedule.base import LambdaSchedule, Progress

CONF = Path(__file__).parents[2] / "conf"
TRUNK = TrunkConfig(vocab_size=11, d_model=8, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=12)
SEQ_LEN, STEPS = 6, 12

# A head's switch -> its values. The product has all values of SORTS; the others are random.
SWITCHES: dict[str, tuple[Any, ...]] = {
    "correction": ("none", "mlp", "markov", "selector"),
    "stride": (1, 2),
    "rank": (1, 3),
    "correction_rank": (None, 3),
    "branch": ("final", "before_last"),
    "input_norm": ("post", "pre"),
    "concat": ("embedding_first", "hidden_first"),
    "detach": ("none", "trunk", "all"),
    "freeze_trunk": (False, True),
    "share_layers": (False, True),
    "blocks": (1, 2),
    "hidden_state_mixing": (False, True),
    "token_dropout": (0.0, 0.4, 1.0),
    "lookahead": (1, 2, 5, SEQ_LEN + 1),
    "tau": (1.0, 0.3, 20.0),
    "weights": ("none", "idf"),
    "layers": (None, (0, 2, 2), (1, 1, 2)),
    "draft_vocab": (None, 7),
    "init": ("random", "last_block"),
    "lora_rank": (16, 2),
    "consistency": (1.0, 0.0),
}
SORTS = ("correction", "stride", "rank", "draft_vocab")
# An objective -> some of its settings, and the formulas with weights that they select.
OBJECTIVES: dict[str, list[tuple[dict[str, Any], dict[str, float]]]] = {
    **{w: [({}, {w: 1.0})] for w in ("ce", "reverse_kl", "js", "tv", "nla", "lk", "e2e_tv", "eal")},
    "wtv": [({"temperature": 0.6}, {"wtv at temperature 0.6": 1.0}), ({}, {"wtv": 1.0})],
    "kl": [
        ({}, {"kl": 1.0}),
        ({"temperature": 2.0, "beta": 0.7}, {"kl at temperature 2": 0.7, "ce": 0.3}),
    ],
    "feature": [({}, {"kl": 0.1, "feature": 1.0})],
    "nextlat": [({}, {"kl": 1.0, "raw feature": 1.0})],
    "anchor": [
        ({}, {"ce": 1.0, "anchor_latent": 0.1, "anchor_semantic": 0.1}),
        (
            {"terms": {"ce": 1.0, "anchor": {"weight": 0.1, "latent": 2.0, "padded": True}}},
            {"ce": 1.0, "anchor_latent": 0.2, "padded semantic": 0.1},
        ),
    ],
    "mix": [
        ({"terms": terms}, terms)
        for terms in (
            {"ce": 0.2, "e2e_tv": 0.7},
            {"js": 2.0, "e2e_tv": 0.5, "lk": 0.1},
            {"eal": 0.9, "ce": 0.1, "e2e_tv": 0.3},
        )
    ],
}
WEIGHTS, MASKS = ("none", "exp_decay", "acceptance"), ("none", "entropy")
ACTIVE = ("none", "some", "all")
# Schedules that need a certain depth, and settings that conf/ leaves to the user.
DEPTHS = {"modded_nanogpt": 2, "knots": 3}
KNOTS = {"knots": {"knots": {0: 0, 0.4: [0, 1, 0], 0.6: [1, 0, 1]}}}


@cache
def listed(group: str) -> dict[str, dict[str, Any]]:
    """The settings of each file of a group of conf/, by name."""
    files = sorted((CONF / group).glob("*.yaml"))
    return {file.stem: _settings(file) for file in files if file.stem != "base"}


def _settings(file: Path) -> dict[str, Any]:
    """The settings of a file if no preset is chosen: an ``oc.select`` of a preset gives its
    default."""
    config = OmegaConf.create(yaml.safe_load(file.read_text()))
    settings: dict[str, Any] = {}
    for key, value in OmegaConf.to_container(config).items():  # type: ignore[union-attr]
        of_preset = isinstance(value, str) and value.startswith("${oc.select:stack.")
        settings[str(key)] = config[key] if of_preset else value
    return settings


def target(settings: dict[str, Any]) -> Any:
    """The class or function that a file names as ``_target_``."""
    module, _, name = settings["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def built(settings: dict[str, Any], **overrides: Any) -> Any:
    """The object of a file's settings with overrides."""
    arguments = {k: v for k, v in settings.items() if k not in ("_target_", "defaults")}
    return target(settings)(**arguments | overrides)


@dataclass(frozen=True)
class Case:
    """An element of the product. Everything else is drawn at random, with ``draw`` in the seed."""

    head: str
    sort: tuple[tuple[str, Any], ...]
    objective: str
    weights: str
    mask: str
    active: str
    draw: int = 0

    @property
    def takes_all(self) -> bool:
        """Whether no objective is refused: its depths predict tokens in a row, each over the whole
        vocabulary."""
        predicts = target(listed("mtp")[self.head]).predicts_tokens
        switches = dict(self.sort)
        plain = switches.get("stride", 1) == switches.get("rank", 1) == 1
        plain = plain and switches.get("draft_vocab") is None
        return predicts and plain and listed("mtp")[self.head]["depth"] > 0


def sorts() -> Iterator[tuple[str, tuple[tuple[str, Any], ...]]]:
    """Every head, with each value of at most one of its switches in SORTS."""
    for head, settings in listed("mtp").items():
        names = [name for name in SORTS if name in settings]
        supported = getattr(target(settings), "supported_corrections", None)
        for values in itertools.product(*(SWITCHES[name] for name in names)):
            sort = tuple(zip(names, values, strict=True))
            correction = dict(sort).get("correction", "none")
            if supported is not None and correction not in ("none", *supported):
                continue
            if sum(value != SWITCHES[name][0] for name, value in sort) < 2:  # else refused
                yield head, sort


HEADS_BY_NAME = {
    "-".join([head, *(f"{name}={v}" for name, v in sort if v != SWITCHES[name][0])]): (head, sort)
    for head, sort in sorts()
}


def product(head: str, sort: tuple[tuple[str, Any], ...]) -> Iterator[Case]:
    for rest in itertools.product(listed("objective"), WEIGHTS, MASKS, ACTIVE):
        yield Case(head, sort, *rest)
    yield from plain(head, sort)


def some_of(head: str, sort: tuple[tuple[str, Any], ...]) -> Iterator[Case]:
    """Every objective, each with one choice of weights, mask and schedule."""
    objectives = list(listed("objective"))
    random.Random(str((head, sort))).shuffle(objectives)
    rest = zip((*WEIGHTS, "acceptance"), MASKS * 2, ("all", "some", "all", "none"), strict=True)
    for objective, choice in zip(objectives, itertools.cycle(rest), strict=False):
        yield Case(head, sort, objective, *choice)
    yield from plain(head, sort)


def plain(head: str, sort: tuple[tuple[str, Any], ...]) -> Iterator[Case]:
    """Cross-entropy, which every head takes."""
    case = Case(head, sort, "ce", "none", "none", "all")
    for draw in range(1, 4):
        yield replace(case, draw=draw)


@cache
def schedules(depth: int) -> dict[str, list[tuple[LambdaSchedule, int]]]:
    """All schedules and steps, grouped by whether none, some or all depths are active."""
    grouped: dict[str, list[tuple[LambdaSchedule, int]]] = {active: [] for active in ACTIVE}
    for name, settings in listed("lambda_schedule").items():
        if DEPTHS.get(name, depth) != depth:
            continue
        mtp_lambda = [0.5, 0.3, 0.2][:depth]
        schedule = built(settings, depth=depth, mtp_lambda=mtp_lambda, **KNOTS.get(name, {}))
        for step in range(STEPS):
            n = sum(weight > 0 for weight in schedule.lambdas(Progress(step, STEPS)))
            grouped["none" if n == 0 else "all" if n == depth else "some"].append((schedule, step))
    return grouped


def drawn_head(case: Case, draw: random.Random, *, confidence: bool) -> MTPConfig:
    """A config of the case's head with random switches: the first draw that is not refused."""
    settings = listed("mtp")[case.head]
    depth = settings["depth"] if settings["depth"] < 2 else draw.choice((2, 3))
    names = [name for name in settings if name in SWITCHES and name not in SORTS]
    while True:
        switches = {name: draw.choice(SWITCHES[name]) for name in names}
        try:
            switches |= {**dict(case.sort), "depth": depth, "confidence": confidence}
            return built(settings, **switches)
        except UserError:
            continue


def drawn_model(config: MTPConfig, seed: int) -> MTPModel:
    """A model in float64 whose weights are all random, also those that usually start at 0."""
    model = MTPModel(ModelConfig(trunk=TRUNK, mtp=config)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
            parameter.mul_(0.5).add_(1.0 if parameter.dim() == 1 else 0.0)
        for buffer in (b for b in model.buffers() if b.is_floating_point()):
            buffer.uniform_(0.5, 1.5, generator=generator)
        if (own := model.mtp.own_head) is not None:
            own.choose(torch.randint(0, 99, (TRUNK.vocab_size,), generator=generator))
    return model


def drawn_batch(config: MTPConfig, draw: random.Random) -> WindowBatch:
    """Random windows: some with documents, and some with prompts that are not scored."""
    generator = torch.Generator().manual_seed(draw.randrange(2**30))
    extra = config.extra_places
    shape = (2, SEQ_LEN + config.stride * config.depth + 1 + extra)
    # No token twice in a row: with equal states, p equals q, and min(p, q) has a kink.
    ids = TRUNK.vocab_size - 1
    tokens = torch.randint(1, ids, shape, generator=generator).cumsum(1) % ids + 1
    starts, prompts = torch.rand(2, *shape, generator=generator)
    starts[0, :3] = prompts[0, :3] = 1  # so that the main prediction has a target
    return WindowBatch(
        tokens,
        config.depth,
        (starts < 0.12).long().cumsum(1) if draw.random() < 0.5 else None,
        prompts > 0.2 if config.answers_at_once or draw.random() < 0.5 else None,
        stride=config.stride,
        extra=extra,
    )
