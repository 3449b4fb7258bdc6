"""Groups of parameters, each with its own algorithm and learning rate.

For example Muon (Jordan et al. 2024) for the blocks' matrices and AdamW for everything else:
``conf/optimizer/muon.yaml``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mtp_lightning.errors import UserError
from mtp_lightning.optim.base import OptimizerConfig
from mtp_lightning.settings import require_number

# Parameters of two axes that are not the matrix of a block.
_SHARED = re.compile(r"(^|\.)(embedding|head|confidence)\.|\.(register|masks|blank)$")
# Names of kinds of parameters; anything else is a regular expression on the parameters' names.
_KINDS: dict[str, Callable[[str, nn.Parameter], bool]] = {
    "matrices": lambda name, p: p.dim() == 2 and not _SHARED.search(name),
    "vectors": lambda name, p: p.dim() < 2,
    "rest": lambda name, p: True,
}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Some parameters, and the algorithm that trains them.

    Attributes:
        parameters: ``matrices`` (two axes, without embedding, head and learned vectors),
            ``vectors``, ``rest``, or a regular expression that is searched for in the names.
        algorithm: parameters and ``lr`` -> optimizer; a class of ``torch.optim`` with its other
            settings filled in.
        lr: peak learning rate.
    """

    parameters: str
    algorithm: Callable[..., torch.optim.Optimizer]
    lr: float

    def takes(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether a parameter belongs to the group."""
        kind = _KINDS.get(self.parameters)
        return bool(re.search(self.parameters, name)) if kind is None else kind(name, parameter)


@dataclass(kw_only=True)
class GroupedConfig(OptimizerConfig):
    """``optimizer=muon``, and any other optimizer made of groups.

    Attributes:
        groups: groups by name; a parameter belongs to the first one that takes it.

    Raises:
        UserError: for a learning rate that is not above 0, or an invalid expression.
    """

    groups: Mapping[str, Mapping[str, Any]]
    schedule: Callable[[int, int], float]

    def __post_init__(self) -> None:
        self._groups = {name: Group(**group) for name, group in self.groups.items()}
        for name, group in self._groups.items():
            require_number(f"optimizer.groups.{name}.lr", group.lr, above=0)
            try:
                re.compile(group.parameters)
            except re.error as error:
                raise UserError(
                    f"optimizer.groups.{name}.parameters={group.parameters} is neither "
                    f"{', '.join(_KINDS)} nor a regular expression ({error})."
                ) from error

    def build(self, model: nn.Module, others: Sequence[nn.Parameter] = ()) -> Combined:
        """See :meth:`OptimizerConfig.build`; ``others`` go to the first group that
        takes them, such as ``vectors`` or ``rest``.

        Raises:
            UserError: for a parameter that no group takes, a group without parameters, or an
                algorithm that refuses its settings.
        """
        by_group: dict[str, list[nn.Parameter]] = {name: [] for name in self._groups}
        nonempty = set()  # groups of all parameters, frozen ones included
        learned = [("what the balance rule learns", parameter) for parameter in others]
        for parameter_name, parameter in [*model.named_parameters(), *learned]:
            group = self._group_of(parameter_name, parameter)
            nonempty.add(group)
            if parameter.requires_grad:
                by_group[group].append(parameter)
        for name, unused in self._groups.items():
            if name not in nonempty and unused.parameters != "rest":
                raise UserError(
                    f"optimizer.groups.{name}.parameters={unused.parameters} takes no parameter of "
                    f"this model: give {', '.join(_KINDS)} or a regular expression on their names, "
                    "or leave the group out."
                )
        return Combined({name: self._build(name, p) for name, p in by_group.items() if p})

    def _group_of(self, name: str, parameter: nn.Parameter) -> str:
        for group_name, group in self._groups.items():
            if group.takes(name, parameter):
                return group_name
        raise UserError(
            f"No group of optimizer.groups takes {name}: add one with parameters: rest."
        )

    def _build(self, name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        group = self._groups[name]
        try:
            optimizer = group.algorithm([{"params": parameters, "name": name}], lr=group.lr)
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer.groups.{name} is refused: {error}.") from error
        if "momentum" in optimizer.defaults:  # not every class of torch.optim checks it
            key = f"optimizer.groups.{name}.algorithm.momentum"
            require_number(key, optimizer.defaults["momentum"], least=0, below=1)
        return optimizer


class Combined(torch.optim.Optimizer):
    """Several optimizers that step together, as one."""

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        self.optimizers = dict(optimizers)
        # The same dictionaries, so that a learning rate set here is set there.
        super().__init__([g for o in self.optimizers.values() for g in o.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps all of them."""
        loss = None if closure is None else closure()
        for optimizer in self.optimizers.values():
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Every optimizer's own state, by name."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            UserError: if it has other groups.
        """
        if state_dict.keys() != self.optimizers.keys():
            raise UserError(
                f"The optimizer's groups are {', '.join(self.optimizers)}, and the saved ones are "
                f"{', '.join(map(str, state_dict))}: resume with the settings that the run began "
                "with."
            )
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state_dict[name])
        self.param_groups = [g for o in self.optimizers.values() for g in o.param_groups]
