"""Planning and memory as data: tasks, one file each, behind the interface of ``base.py``."""

from __future__ import annotations

from data_modules.tasks.base import Example, Task
from data_modules.tasks.copy import Copy
from data_modules.tasks.mqar import MQAR
from data_modules.tasks.star_graph import StarGraph

__all__ = ["MQAR", "Copy", "Example", "StarGraph", "Task"]
