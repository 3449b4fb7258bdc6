"""Planning and memory as data: tasks, one file each, with the interface of ``base.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtp_lightning.parts import on_demand

if TYPE_CHECKING:
    from data_modules.tasks.base import Example, Task
    from data_modules.tasks.copy import Copy
    from data_modules.tasks.countdown import Countdown
    from data_modules.tasks.group import Group
    from data_modules.tasks.hmm import HMM
    from data_modules.tasks.induction import Induction
    from data_modules.tasks.mqar import MQAR
    from data_modules.tasks.navigation import Navigation
    from data_modules.tasks.polynomial import Polynomial
    from data_modules.tasks.sat import Sat
    from data_modules.tasks.sibling import Sibling
    from data_modules.tasks.star_graph import StarGraph

__all__ = [
    "HMM", "MQAR", "Copy", "Countdown", "Example", "Group", "Induction", "Navigation", "Polynomial",
    "Sat", "Sibling", "StarGraph", "Task",
]  # fmt: skip

__getattr__ = on_demand(__name__)
