"""Several processes that train one model: rendezvous, sharding, and sharded checkpoints.

This folder can be removed: a single process trains without it. ``mtp_lightning/processes.py``
imports it when a run, the environment or a checkpoint asks for several processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtp_lightning import processes
from mtp_lightning.distributed import shard_files, sharding

__all__ = ["choose_strategy", "find_peers", "shard_files"]

processes.attach(sharding.Sharded())


def find_peers() -> processes.Peers:
    """See :func:`mtp_lightning.distributed.rendezvous.find_peers`."""
    from mtp_lightning.distributed.rendezvous import find_peers

    return find_peers()


def choose_strategy(trainer: Mapping[str, Any], *, may_skip: bool) -> Any:
    """See :func:`mtp_lightning.distributed.strategy.choose_strategy`."""
    from mtp_lightning.distributed.strategy import choose_strategy

    return choose_strategy(trainer, may_skip=may_skip)
