"""Auxiliary-loss-free balancing of experts: moves the biases that choose them.

Wang et al. 2024 (arXiv 2408.15664, algorithm 1); DeepSeek-V3, section 2.1.2.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from mtp_lightning.nn.auxiliary import AuxiliaryOutputs
from mtp_lightning.objective.ranks import sum_over_ranks


@torch.no_grad()
def balance_experts(
    model: nn.Module, auxiliary: AuxiliaryOutputs, *, fraction: float
) -> dict[str, Tensor]:
    """``b += gamma * sign(mean load - load)`` for every router, after an optimizer step.

    The load of an expert is the number of tokens sent to it in the whole step, over all
    micro-batches and ranks; ``auxiliary`` holds the loads of this rank. Activation recomputation
    does not count twice. gamma is ``model.feed_forward.bias_rate``, and 0 in the last fraction
    ``model.feed_forward.bias_frozen`` of the run; ``fraction`` of it was done before the step. A
    router that the step did not use (a depth of weight 0) keeps its biases.

    Returns:
        Values to log: ``moe/max_violation_layer_l`` for trunk layer l and
        ``moe/max_violation_depth_k`` for the module of depth k, each MaxVio = max load / mean load
        - 1 of the step, and their mean, ``moe/max_violation``. A further router of a depth is
        logged by its own name. Empty without experts.
    """
    if not auxiliary.loads:
        return {}
    routers = {name: layer for name, layer in model.named_modules() if layer in auxiliary.loads}
    # All routers have the same number of experts, and all ranks used the same routers.
    load_LE = sum_over_ranks(torch.stack([auxiliary.loads[router] for router in routers.values()]))
    for router, load_E in zip(routers.values(), load_LE, strict=True):
        # Compare E * load with the total in whole numbers, so that equality is exact.
        direction_E = torch.sign(load_E.sum() - load_E * load_E.shape[0])
        router.expert_bias.add_(direction_E, alpha=router.config.rate(fraction))
    violation_L = load_LE.amax(-1) / load_LE.float().mean(-1) - 1
    values: dict[str, Tensor] = {}
    for name, value in zip(routers, violation_L, strict=True):
        tag = f"moe/max_violation_{label(name)}"
        # A depth of a user's own stack may have several routers.
        values[f"moe/max_violation_{_flat(name)}" if tag in values else tag] = value
    return {**values, "moe/max_violation": violation_L.mean()}


def label(name: str) -> str:
    """A router's name in the log: ``layer_3`` in the trunk, and ``depth_1`` in the modules, or
    ``depth_1_block_0`` in a block of a module before its last; elsewhere the name itself."""
    trunk = re.search(r"trunk\.blocks\.(\d+)\.", name)
    if trunk:
        return f"layer_{trunk[1]}"
    module = re.search(r"mtp\.depths\.(\d+)\.(?:before\.(\d+)\.)?", name)
    if module is None:
        return _flat(name)
    return f"depth_{int(module[1]) + 1}" + (f"_block_{module[2]}" if module[2] else "")


def _flat(name: str) -> str:
    return name.replace(".", "_")
