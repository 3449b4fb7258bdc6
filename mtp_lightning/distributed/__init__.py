"""Several processes that train one model: rendezvous, sharding, and sharded checkpoints.

This folder can be removed: a single process trains without it. ``mtp_lightning/processes.py``
imports it when a run, the environment or a checkpoint asks for several processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtp_lightning import processes
from mtp_lightning.distributed import shard_files, sharding
from mtp_lightning.parts import on_demand

if TYPE_CHECKING:
    from mtp_lightning.distributed.rendezvous import find_peers
    from mtp_lightning.distributed.strategy import choose_strategy

__all__ = ["choose_strategy", "find_peers", "shard_files"]

__getattr__ = on_demand(__name__)

processes.attach(sharding.Sharded())
