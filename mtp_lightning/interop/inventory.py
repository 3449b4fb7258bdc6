"""States of a folder's MTP tensors: trained, missing, all zero, or as initialized.

Systems have silently written MTP layers that were never trained or never loaded. A tensor shows
it: an initialization draws every value of a matrix independently from one distribution, and
training does not leave it that way.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mtp_lightning.interop.tensor_files import StoredTensor, equal
from mtp_lightning.interop.weight_map import weight_map
from mtp_lightning.model import ModelConfig
from mtp_lightning.nn.config import TrunkConfig

# The states of tensors with which a module cannot be used or was not trained, in the words of a
# verdict. All other tensors are "trained".
UNUSABLE = {
    "missing": "are missing",
    "misshapen": "have another shape than config.json says",
    "zero": "are all zero",
    "fresh": "look like a random initialization",
    "copied": "are the trunk's last block, as an initialization copies it",
    "different": "differ from the trunk's, which they should be copies of",
}
_HEAD = "lm_head.weight"
# Smaller matrices prove nothing.
_FEWEST_ROWS, _FEWEST = 16, 2048
# Short training may leave the size of a smaller matrix within the errors of chance, 2 % here.
_FEWEST_ALONE = 2**15
# Kurtosis of the two initial distributions, and its variance times n over n values.
_NORMAL, _UNIFORM = (3.0, 24.0), (1.8, 0.92)
# Standard errors that chance may cause.
_ERRORS = 5.0
# Relative error of a standard deviation that rounding to bf16 may cause.
_ROUNDED = 0.002


@dataclass(frozen=True, kw_only=True)
class Module:
    """Depth k, from 1, of a folder's MTP modules, and the states of its tensors by the folder's
    names."""

    depth: int
    states: dict[str, str]

    @property
    def lost(self) -> dict[str, list[str]]:
        """The tensors that are not as training leaves them, by their state.

        An expert that gets hardly any tokens may stay as initialized, so experts count only if none
        of their matrices has changed.
        """
        experts = {n: s for n, s in self.states.items() if ".experts." in n}
        counted = {n: s for n, s in self.states.items() if n not in experts or s != "fresh"}
        if experts and all(state == "fresh" for state in experts.values()):
            counted |= experts
        by_state = {state: [n for n, s in counted.items() if s == state] for state in UNUSABLE}
        return {state: names for state, names in by_state.items() if names}

    def __str__(self) -> str:
        counts = Counter(self.states.values())
        return ", ".join(f"{count} {state}" for state, count in counts.most_common())


def take_inventory(config: ModelConfig, parts: Mapping[str, StoredTensor]) -> list[Module]:
    """The modules of a layout, and the states of all their tensors.

    Args:
        config: config of the model, with as many depths as the folder has or declares.
        parts: tensors of the folder, by its names. Those that are needed are read one at a time.
    """
    places, prefix = list(weight_map(config)), f"trunk.blocks.{config.trunk.n_layers - 1}."
    last = {p.own.removeprefix(prefix): p.parts for p in places if p.own.startswith(prefix)}
    modules: dict[int, dict[str, str]] = {k: {} for k in range(1, config.mtp.depth + 1)}
    copied_blocks: dict[int, list[str]] = {k: [] for k in modules}
    for place in places:
        if place.own.startswith("mtp.depths."):
            depth = int(place.own.split(".")[2]) + 1
            twins = [name for name, _ in last.get(place.own.split(".block.", 1)[-1], ())]
            if len(twins) != len(place.parts):  # the trunk's layer is of another kind
                twins = [""] * len(place.parts)
            for (name, shape), twin in zip(place.parts, twins, strict=True):
                tensor = parts[name].read() if name in parts else None
                state = modules[depth][name] = _state(name, tensor, shape, config.trunk)
                comparable = state == "trained" and len(shape) > 1 and twin in parts
                if comparable and tensor is not None and equal(tensor, parts[twin].read()):
                    copied_blocks[depth].append(name)
        elif place.copy and (name := place.parts[0][0]) in parts and name != _HEAD:
            # A copy of embedding or head, which may be left out. A tied head is the embedding.
            untied = place.own == "head.weight" and _HEAD in parts
            base = parts.get(_HEAD if untied else "model.embed_tokens.weight")
            if base is not None and not equal(parts[name].read(), base.read()):
                depth = int(name.split(".")[2]) - config.trunk.n_layers + 1
                modules[depth][name] = "different"
    for depth, states in modules.items():
        if any(s == "trained" and _can_be_judged(parts[n].shape) for n, s in states.items()):
            fresh = [name for name, state in states.items() if state == "fresh"]
            small = [name for name in fresh if math.prod(parts[name].shape) < _FEWEST_ALONE]
            states |= dict.fromkeys(small, "trained")
        block = [n for n in states if "self_attn" in n or ".mlp." in n]
        matrices = [n for n in block if n in parts and len(parts[n].shape) > 1]
        copied = copied_blocks[depth]
        if copied and len(copied) == len(matrices):  # a whole block that was never trained
            states |= dict.fromkeys(copied, "copied")
    return [Module(depth=k, states=states) for k, states in modules.items()]


def _state(name: str, tensor: Tensor | None, shape: tuple[int, ...], trunk: TrunkConfig) -> str:
    """The state of a tensor. Biases start at 0 and gains at 1, and may still be so after
    training."""
    if tensor is None:
        return "missing"
    if tuple(tensor.shape) != shape:
        return "misshapen"
    numbers = tensor.detach().double()
    if not numbers.any():
        return "trained" if name.endswith("bias") else "zero"
    fresh = tensor.dim() > 1 and is_fresh(numbers) and has_initial_size(numbers, trunk)
    return "fresh" if fresh else "trained"


def has_initial_size(matrix: Tensor, trunk: TrunkConfig) -> bool:
    """Whether the standard deviation is that of an initialization: transformers' (the config's
    initializer_range), also divided by the root of twice the layers (GPT-2), or PyTorch's. Short
    training keeps the shape of a distribution, but not its size."""
    init_std = trunk.init_std
    usual = (init_std, init_std / (2 * trunk.n_layers) ** 0.5, 0.02, (3 * matrix.shape[1]) ** -0.5)
    std = float(matrix.std())
    chance = _ERRORS * (0.5 / matrix.numel()) ** 0.5  # of a normal distribution's
    return any(abs(std / size - 1) < chance + _ROUNDED for size in usual)


def _can_be_judged(shape: Sequence[int]) -> bool:
    return len(shape) > 1 and min(shape) >= _FEWEST_ROWS and math.prod(shape) >= _FEWEST


def is_fresh(matrix: Tensor) -> bool:
    """Whether a matrix looks drawn independently from one distribution: its kurtosis is that of a
    normal or uniform distribution, and the lengths of rows and columns vary no more than chance."""
    rows, columns = matrix.shape
    n = matrix.numel()
    if not _can_be_judged(matrix.shape):
        return False
    square = (matrix - matrix.mean()) ** 2
    variance = square.mean()
    if variance == 0:
        return True
    kurtosis = float((square**2).mean() / variance**2)
    if not any(
        abs(kurtosis - law) < _ERRORS * (spread / n) ** 0.5 for law, spread in (_NORMAL, _UNIFORM)
    ):
        return False
    for means, size in ((square.mean(1), columns), (square.mean(0), rows)):
        expected = (kurtosis - 1) / size
        variation = float((means / variance).var())
        if variation > expected * (1 + _ERRORS * (2 / (len(means) - 1)) ** 0.5):
            return False
    return True
