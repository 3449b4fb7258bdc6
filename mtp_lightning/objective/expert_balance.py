"""Balances experts without an auxiliary loss: moves the biases that choose them.

Wang et al. 2024 (arXiv 2408.15664, algorithm 1); DeepSeek-V3, section 2.1.2.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from mtp_lightning.nn.ledger import Ledger
from mtp_lightning.nn.moe import routers_of
from mtp_lightning.objective.ranks import sum_over_ranks


@torch.no_grad()
def balance_experts(model: nn.Module, ledger: Ledger, *, done: float) -> dict[str, Tensor]:
    """``b += gamma * sign(mean load - load)`` for every router, after an optimizer step.

    Loads are tokens sent to an expert in the whole step: all micro-batches, all ranks, each token
    once under activation recomputation. gamma is ``model.feed_forward.bias_rate``, and 0 in the
    last ``model.feed_forward.bias_frozen`` of the run. A router that the step did not use (a depth
    of weight 0) stays as it is.

    Args:
        model: its routers are those of the trunk and of the MTP modules.
        ledger: the loads of all micro-batches of this rank's step.
        done: fraction of the run that lay behind before the step.

    Returns:
        What to log: ``moe/max_violation_layer_l`` of trunk layer l and
        ``moe/max_violation_depth_k`` of the module of depth k, each MaxVio = max load / mean load
        - 1 of the step, and their mean, ``moe/max_violation``. Empty without experts.
    """
    if not ledger.loads:
        return {}
    used = {name: router for name, router in routers_of(model).items() if router in ledger.loads}
    # All have the same number of experts, and all ranks have used the same routers.
    load_LE = sum_over_ranks(torch.stack([ledger.loads[router] for router in used.values()]))
    for router, load_E in zip(used.values(), load_LE, strict=True):
        # In whole numbers, E * load against the total: a balance is then seen as one.
        direction_E = torch.sign(load_E.sum() - load_E * load_E.shape[0])
        router.expert_bias.add_(direction_E, alpha=router.config.rate(done))
    violation_L = load_LE.amax(-1) / load_LE.float().mean(-1) - 1
    values = {
        f"moe/max_violation_{label(name)}": value
        for name, value in zip(used, violation_L, strict=True)
    }
    return {**values, "moe/max_violation": violation_L.mean()}


def label(name: str) -> str:
    """A router's name in the log: ``layer_3`` of the trunk, ``depth_1`` of the modules."""
    trunk = re.search(r"trunk\.blocks\.(\d+)\.", name)
    if trunk:
        return f"layer_{trunk[1]}"
    module = re.search(r"mtp\.\w+\.(\d+)\.", name)
    return f"depth_{int(module[1]) + 1}" if module else name.replace(".", "_")
