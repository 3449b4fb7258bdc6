"""Readable names of config keys, of their values, and of the arms of claims, in figures and pages.

Tables of a report and ``--reference`` use the keys as typed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtp_lightning.run.config import key_of

# Key -> (name of its axis, format of its values, names of values; "" stands for no override).
# The names of a claim's arms use these keys in this order, as few as tell the arms apart.
_NAMES: dict[str, tuple[str, str, dict[str, str]]] = {
    "experiment": ("task", "{}", {"mqar": "recall of pairs", "copy": "copying"}),
    "mtp": (
        "kind of head",
        "{} head",
        {
            "none": "no MTP",
            "linear": "linear heads",
            "parallel": "parallel heads",
            "sequential": "sequential modules",
            "parameter_free": "parameter-free modules",
            "teacherless": "teacherless training",
            "nextlat": "NextLat head",
            "eagle": "EAGLE-3 layer",
            "masked": "masks with LoRA",
        },
    ),
    "mtp.depth": ("D", "D = {}", {}),
    "tokenizer": ("tokenizer", "{} tokenizer", {"": "bytes", "bpe_small": "BPE"}),
    "mtp.share_layers": ("sharing", "shared: {}", {"true": "one for all depths"}),
    "mtp.correction": (
        "correction",
        "{} correction",
        {"mlp": "MLP correction", "markov": "Markov correction", "selector": "candidate selector"},
    ),
    "mtp.token_dropout": (
        "token dropout",
        "token dropout {}",
        {"": "no token dropout", "0.0": "no token dropout"},
    ),
    "mtp.input_norm": (
        "input norm",
        "{}-norm input",
        {"post": "state after the final norm", "pre": "state before the final norm"},
    ),
    "mtp.concat": (
        "order of the input",
        "{}",
        {"embedding_first": "embedding first", "hidden_first": "state first"},
    ),
    "mtp.detach": ("detached", "{} detached", {}),
    "mtp_lambda": ("lambda", "lambda = {}", {}),
    "lambda_schedule": (
        "lambda schedule",
        "{} schedule",
        {
            "deepseek_v3": "DeepSeek-V3 schedule",
            "forward_curriculum": "forward curriculum",
            "reverse_curriculum": "reverse curriculum",
        },
    ),
    "balance": (
        "balancing rule",
        "{} balancing",
        {
            "none": "fixed weights",
            "dwa": "DWA",
            "gradnorm": "GradNorm",
            "trunk_ratio": "trunk-ratio balancing",
            "uncertainty": "uncertainty weights",
            "sampled_depths": "sampled depths",
            "random": "random weights",
        },
    ),
    "objective": (
        "objective",
        "{} objective",
        {
            "ce": "cross-entropy",
            "kl": "KL divergence",
            "lk": "LK objective",
            "tv": "total variation",
            "e2e_tv": "end-to-end total variation",
        },
    ),
    "model": ("model size", "{} model", {}),
    "model.feed_forward.bias_rate": (
        "rate of the router bias",
        "router bias at rate {}",
        {"0": "no router bias"},
    ),
    "data.seq_len": ("window length", "windows of {} tokens", {}),
    "data.batch_size": ("windows per batch", "{} windows per batch", {}),
    "optimizer.lr": ("learning rate", "learning rate {}", {}),
    "trainer.max_steps": ("optimizer steps", "{} steps", {}),
    "folder": ("sweep", "{}", {}),
}


def name_of(key: str, value: str) -> str:
    """A readable name of a value: ``D = 2`` for ``mtp.depth=2``; unknown keys stay as typed."""
    if key not in _NAMES:
        return f"{key}={value}"
    _, form, values = _NAMES[key]
    return values.get(value) or form.format(value)


def axis_of(key: str) -> str:
    """A readable name of a key: ``D`` for ``mtp.depth``."""
    return _NAMES[key][0] if key in _NAMES else key


def arm_names(arms: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Readable names of a claim's arms, by the first keys that tell each from all others; where the
    named keys do not, the arm's own name.

    Args:
        arms: each arm's overrides.
    """
    given = {
        arm: {key_of(o): o.partition("=")[2] for o in overrides} for arm, overrides in arms.items()
    }
    keys = [key for key in _NAMES if len({of.get(key) for of in given.values()}) > 1]
    names = {}
    for arm, own in given.items():
        names[arm] = arm.replace("_", " ")
        others = [of for other, of in given.items() if other != arm]
        parts: list[str] = []
        for key in keys:
            left = [of for of in others if of.get(key) == own.get(key)]
            if len(left) < len(others) or not parts:
                value = own.get(key, "")
                known = value or "" in _NAMES[key][2]
                parts += [name_of(key, value)] if known else []
            others = left
            if not others and parts:
                names[arm] = ", ".join(parts)
                break
    return names


def joined(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def question(varied: Sequence[str], metric: Any, *, task: bool) -> str:
    """The question that a report answers; empty if nothing varies.

    Args:
        varied: the keys in which the settings differ.
        metric: the metric by which they are compared.
        task: whether they are compared by the seeds that solve a task.
    """
    if not varied:
        return ""
    end = "" if len(varied) > 1 else "s"
    answer = f"solve{end} the task" if task else f"give{end} the lowest loss in {metric.unit}"
    return f"Which {joined([axis_of(key) for key in varied])} {answer}?"
