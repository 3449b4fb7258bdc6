"""Estimates the memory and time of a training on GPUs, without a GPU.

    python -m mtp_lightning.plan model=large mtp.depth=1 data.seq_len=4096 data.batch_size=4 \\
        devices=8,64 tokens=1e11

It prints parameters and, for each strategy, memory per device, tokens per second and days.
Each number is an estimate from the code's own counts of parameters and FLOPs. The rates of the
machines are assumed and shown. Every other KEY=VALUE is one of train.py's. A step of a device is
``data.batch_size`` windows of ``data.seq_len``, whatever ``trainer.accumulate_grad_batches`` is.

A weight takes 4 + 4 + 8 bytes for its fp32 value, gradient and AdamW's two moments, as train.py
keeps them under bf16-mixed, and 2 bytes for its bf16 copy while that is used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, singledispatch
from typing import Any

import torch

from data_modules.windows import RandomKey
from mtp_lightning.command_line.shell import readable_errors
from mtp_lightning.errors import UserError
from mtp_lightning.model import ModelConfig, MTPModel, n_weights
from mtp_lightning.nn.attention import GroupedQueryConfig, qkv_width
from mtp_lightning.nn.block import Block
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.feed_forward import DenseConfig
from mtp_lightning.nn.mla import LatentAttentionConfig
from mtp_lightning.nn.moe import ExpertsConfig
from mtp_lightning.objective.cost import StepCost, counted_flops, window_on_meta
from mtp_lightning.objective.objective import CROSS_ENTROPY, Objective
from mtp_lightning.objective.through_head import chunk_rows
from mtp_lightning.settings import require_number, require_whole

STRATEGIES = ("ddp", "fsdp", "hsdp")
_STATES = 16  # bytes per weight: its value, gradient and two moments, in fp32
_HALF = 2  # bytes per bf16 number
_SINGLE = 4  # bytes per fp32 number


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Assumptions about the machines. The defaults are for the H100 (SXM), eight per machine."""

    peak: float = 989e12  # bf16 FLOP/s of a device, as published for dense matrices
    mfu: float = 0.4  # share of the peak that training reaches without waiting for the network
    memory: float = 80e9  # bytes per device
    in_machine: int = 8  # devices per machine, which form one hsdp shard group
    near: float = 350e9  # bytes/s from a device to others of its machine (NVLink, as measured)
    far: float = 45e9  # bytes/s between machines (400 Gb/s per device)

    def __post_init__(self) -> None:
        for field in fields(self):
            most = 1 if field.name == "mfu" else None
            require_number(field.name, getattr(self, field.name), above=0, most=most)
        require_whole("in_machine", self.in_machine)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of memory on one device."""

    states: float  # the device's own weights, gradients and moments
    gathered: float  # weights that are gathered for a while, and their gradients
    activations: float  # kept for the backward pass of one micro-batch
    head: float  # logits of one chunk

    @property
    def total(self) -> float:
        """The sum, without the overhead of allocator and libraries."""
        return self.states + self.gathered + self.activations + self.head


def kept_bytes(trunk: TrunkConfig, layer: int | None = None) -> int:
    """Bytes per token that a block keeps for its backward pass, with fused attention (no [T, T]).

    These are the inputs of matrices and attention in bf16, and the inputs of the two norms in fp32,
    as the residual stream has under autocast. With ``recompute`` it is the block's input only.
    ``layer`` is None for a prediction module's block.

    Raises:
        UserError: no function is registered for a layer's class.
    """
    if trunk.recompute:
        return _SINGLE * trunk.d_model
    layers = (trunk.attention, trunk.feed_forward)
    numbers = sum(numbers_kept(config, trunk, layer) for config in layers)
    return _HALF * numbers + _SINGLE * (2 * trunk.d_model + trunk.n_heads)


@singledispatch
def numbers_kept(layer: Any, trunk: TrunkConfig, index: int | None) -> int:
    """Numbers per token that an attention or feed-forward layer keeps for its backward pass, in the
    block of this index of the trunk, as in :func:`kept_bytes`. Your own layer can register here."""
    raise UserError(f"What {type(layer).__name__} keeps for its backward pass is not known here.")


@numbers_kept.register
def _(layer: GroupedQueryConfig, trunk: TrunkConfig, index: int | None) -> int:
    return trunk.d_model + qkv_width(trunk) + trunk.n_heads * trunk.d_head


@numbers_kept.register
def _(layer: LatentAttentionConfig, trunk: TrunkConfig, index: int | None) -> int:
    latents = 2 * (layer.q_rank or 0) + 2 * layer.kv_rank + layer.d_rope
    return trunk.d_model + latents + trunk.n_heads * (2 * layer.d_head + 2 * layer.d_value)


@numbers_kept.register
def _(layer: DenseConfig, trunk: TrunkConfig, index: int | None) -> int:
    return trunk.d_model + 3 * trunk.d_ff


@numbers_kept.register
def _(layer: ExpertsConfig, trunk: TrunkConfig, index: int | None) -> int:
    if layer.is_dense(index):
        return trunk.d_model + 3 * trunk.d_ff
    routed = layer.top_k * (2 * trunk.d_model + 3 * layer.d_expert)
    shared = 3 * layer.n_shared * layer.d_expert
    return trunk.d_model + 2 * layer.n_routed + routed + shared


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A planned training on a number of devices."""

    model: ModelConfig
    seq_len: int  # T
    batch: int  # windows per micro-batch of a device
    devices: int  # of all machines
    machines: Machines = Machines()
    objective: Objective = CROSS_ENTROPY

    @property
    def shard(self) -> int:
        """Devices that share one hsdp replica."""
        return min(self.devices, self.machines.in_machine)

    def memory(self, strategy: str) -> Memory:
        """The memory of a device.

        With ddp, a device has all states, a second copy of the gradients in buckets, and bf16
        copies of the weights. With fsdp, it has its shard and, gathered in bf16, the root
        (embedding, head and everything outside blocks), this block and the next one, and the fp32
        gradient of one block.

        Args:
            strategy: ``ddp``, ``fsdp`` over all devices, or ``hsdp`` with a replica per machine.
        """
        params, blocks = self.model.num_params(), self._block_params
        block, root = max(blocks), params - sum(blocks)
        states = float(_STATES * self._trained + _SINGLE * (params - self._trained))
        shard = {"ddp": 1, "fsdp": self.devices, "hsdp": self.shard}[strategy]
        gathered = _HALF * params
        if strategy == "ddp":
            gathered += _SINGLE * self._trained
        elif shard > 1:
            gathered = _HALF * (root + 2 * block) + _SINGLE * block
        trunk = self.model.trunk
        rows = min(chunk_rows(trunk.vocab_size, torch.device("cuda")), self.batch * self.seq_len)
        return Memory(
            states=states / shard,
            gathered=gathered,
            activations=self.batch * self.seq_len * self._kept(),
            head=(_SINGLE + _HALF) * rows * trunk.vocab_size,
        )

    def compute_seconds(self) -> float:
        """Seconds of arithmetic for one micro-batch, at the assumed MFU."""
        flops = self.cost.per_token(self.seq_len) * self.batch * self.seq_len
        return flops / (self.machines.peak * self.machines.mfu)

    def network_seconds(self, strategy: str) -> float:
        """Seconds on the network for a step of one micro-batch, as a sequence of ring collectives,
        each at the speed of its slowest link.

        ddp all-reduces the fp32 gradients. fsdp gathers the bf16 weights for the forward and again
        for the backward pass, and reduce-scatters the fp32 gradients. hsdp does the same within a
        machine, and then all-reduces each device's shard between machines.
        """
        n = self.devices
        if strategy == "ddp":
            return self._ring(2 * _SINGLE * self._trained, n)
        moved = 2 * _HALF * self.model.num_params() + _SINGLE * self._trained
        if strategy == "fsdp":
            return self._ring(moved, n)
        replicas = n // self.shard
        between = self._ring(2 * _SINGLE * self._trained / self.shard, replicas, self.machines.far)
        return self._ring(moved, self.shard) + between

    def tokens_per_second(self, strategy: str) -> float:
        """Tokens per second of all devices, if arithmetic and network overlap completely."""
        seconds = max(self.compute_seconds(), self.network_seconds(strategy))
        return self.devices * self.batch * self.seq_len / seconds

    def _ring(self, moved: float, n: int, link: float | None = None) -> float:
        """Seconds in which each of ``n`` devices in a ring moves ``moved`` bytes. ``link`` is the
        speed of the slowest link in bytes/s; by default that between machines if the ring spans
        several, else that within one."""
        machines = self.machines
        slowest = machines.near if n <= machines.in_machine else machines.far
        return moved * (n - 1) / n / (slowest if link is None else link)

    def _kept(self) -> float:
        """Bytes per token of all blocks. A stack counts as the number of blocks with its FLOPs."""
        trunk, mtp = self.model.trunk, self.model.mtp
        layers = range(trunk.n_layers) if mtp.trains_trunk else ()  # a frozen one keeps nothing
        blocks = sum(kept_bytes(trunk, layer) for layer in layers)
        outputs = _SINGLE * trunk.d_model * (1 + mtp.depth)
        # The one block that is being recomputed.
        recomputed = kept_bytes(replace(trunk, recompute=False)) if trunk.recompute else 0
        return blocks + self._stack_in_blocks() * kept_bytes(trunk) + outputs + recomputed

    @torch.no_grad()
    def _stack_in_blocks(self) -> float:
        """FLOPs that the stack adds to a forward pass, as a multiple of a module's block's."""
        trunk, depths, meta = self.model.trunk, range(1, self.model.mtp.depth + 1), self._on_meta
        # With a key, as in training: registers are drawn at random.
        window = replace(window_on_meta(self.model, self.seq_len), key=RandomKey(0, 0))
        with counted_flops() as trunk_flops:
            meta.run_trunk(window, ())
        with counted_flops() as all_flops:
            _, inputs = meta.run_trunk(window, depths)
            list(meta.mtp.states(inputs, depths))
        with torch.device("meta"), counted_flops() as block_flops:
            Block(trunk)(inputs.branch[..., : trunk.d_model], inputs.ctx)
        return (all_flops.total - trunk_flops.total) / block_flops.total

    @cached_property
    def _trained(self) -> int:
        """Parameters that have gradients and moments."""
        frozen = 0 if self.model.mtp.trains_trunk else self.model.num_trunk_params()
        return self.model.num_params() - frozen

    @cached_property
    def cost(self) -> StepCost:
        """FLOPs of training steps."""
        return StepCost(self.model, self.objective)

    @cached_property
    def _on_meta(self) -> MTPModel:
        return self.model.on_meta()

    @cached_property
    def _block_params(self) -> list[int]:
        """Parameters of every block, of the trunk and of the stack."""
        blocks = (part for part in self._on_meta.modules() if isinstance(part, Block))
        return [n_weights(block) for block in blocks]


def describe(plans: Sequence[Plan], tokens: float) -> list[str]:
    """The lines of the report: two about the assumptions, and an aligned table. The plans are those
    of one model, one per number of devices; ``tokens`` is the length of the training."""
    first, machines, model = plans[0], plans[0].machines, plans[0].model
    flops = first.cost.per_token(first.seq_len)
    head = [
        f"{model.num_params() / 1e9:.3f}B parameters, {model.num_active_params() / 1e9:.3f}B "
        f"active; {flops / 1e9:.2f} GFLOPs per token at T={first.seq_len}; {first.batch} windows "
        "per device",
        f"estimated, not run: MFU {machines.mfu:g} of {machines.peak / 1e12:g} TFLOP/s, "
        f"{machines.memory / 1e9:g} GB, {machines.in_machine} devices per machine, "
        f"{machines.near / 1e9:g} GB/s within and {machines.far / 1e9:g} GB/s between machines",
    ]
    names = ("devices", "strategy", "states", "gathered", "activations", "head", "total GB", "fits")
    rows = [[*names, "network/compute", "tokens/s", f"days for {tokens:.3g}"]]
    for plan in plans:
        for strategy in STRATEGIES:
            memory = plan.memory(strategy)
            parts = (memory.states, memory.gathered, memory.activations, memory.head, memory.total)
            rate = plan.tokens_per_second(strategy)
            row = [str(plan.devices), strategy, *(f"{part / 1e9:.1f}" for part in parts)]
            row.append("yes" if memory.total <= 0.9 * machines.memory else "no")
            row.append(f"{plan.network_seconds(strategy) / plan.compute_seconds():.2f}")
            rows.append([*row, f"{rate:,.0f}", f"{tokens / rate / 86_400:.1f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ([c.rjust(w) for c, w in zip(row, widths, strict=True)] for row in rows)
    return [*head, *map("  ".join, aligned)]


def plans_of(arguments: Sequence[str]) -> tuple[list[Plan], float]:
    """The plans and the number of tokens of a command line: ``devices``, ``tokens``, ``vocab_size``
    and the fields of :class:`Machines` as ``KEY=VALUE``. All others are train.py's.

    Raises:
        UserError: a value is not a number, or settings do not fit together.
    """
    from mtp_lightning.experiment.build import build_model_config, build_objective
    from mtp_lightning.experiment.compose import compose_config

    values = _defaults()
    typed = dict(a.split("=", 1) for a in arguments if a.split("=", 1)[0] in values and "=" in a)
    rest = [a for a in arguments if a.split("=", 1)[0] not in typed]
    values |= typed
    try:
        devices = [int(n) for n in values.pop("devices").split(",")]
        numbers = {key: _number(value) for key, value in values.items()}
    except ValueError as error:
        raise UserError(
            f"devices, tokens, vocab_size and the assumptions must be numbers: {error}."
        ) from None
    machines = Machines(**{f.name: numbers[f.name] for f in fields(Machines)})  # type: ignore[arg-type]
    cfg = compose_config("config", ["paths.output_dir=plan", *rest])
    if cfg.data.seq_len is None:
        raise UserError("data.seq_len has no value: give it as data.seq_len=...")
    require_whole("data.seq_len", cfg.data.seq_len, least=1, most=1 << 24)
    require_whole("data.batch_size", cfg.data.batch_size, least=1)
    require_number("tokens", numbers["tokens"], above=0)
    model = build_model_config(cfg, require_whole("vocab_size", numbers["vocab_size"], least=1))
    objective = build_objective(cfg)
    for n in devices:
        if n < 1 or (n > machines.in_machine and n % machines.in_machine):
            raise UserError(
                f"devices={n}: give at least 1, and whole machines of {machines.in_machine}."
            )
    seq_len, batch = cfg.data.seq_len, cfg.data.batch_size
    plans = [
        Plan(
            model=model,
            devices=n,
            machines=machines,
            seq_len=seq_len,
            batch=batch,
            objective=objective,
        )
        for n in devices
    ]
    return plans, numbers["tokens"]


def _defaults() -> dict[str, str]:
    """The values of the command's own keys, as they are typed."""
    machines = {field.name: f"{field.default:g}" for field in fields(Machines)}
    return {"devices": "8", "tokens": "1e11", "vocab_size": "32768", **machines}


def _number(text: str) -> float:
    """The number of a text; a whole one as an int, also from 1e5."""
    number = float(text)
    return int(number) if number.is_integer() else number


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with readable_errors(ends_with_reader=True):
        if not arguments or {"-h", "--help"} & set(arguments):
            print(__doc__)
            print("\n".join(f"{key}={value}" for key, value in _defaults().items()))
            return
        print("\n".join(describe(*plans_of(arguments))))


if __name__ == "__main__":
    main()
