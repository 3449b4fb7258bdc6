"""Every kernel for CPUs next to the code that it replaces.

    python -m benchmarks.kernels         matrix products, and the layers between them
    python -m benchmarks.kernels moe     a mixture of experts against a dense layer

Matrix products have the shapes of a model's linear layers, forward and backward, and run by oneDNN
and by MKL. The layers run forward and backward by the code in C++, by the code that runs where the
C++ is not built, and by PyTorch's own functions. All sides take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cli, harness
from benchmarks.harness import Row
from mtp_lightning.cpu import library as native
from mtp_lightning.cpu.layers import gated
from mtp_lightning.cpu.linear import uses_onednn
from mtp_lightning.experiment.instantiate import instantiate
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.feed_forward import FeedForward
from mtp_lightning.nn.init import initialize
from mtp_lightning.nn.moe import MoE
from mtp_lightning.nn.norm import RMSNorm
from mtp_lightning.nn.ops import (
    exp_,
    log_softmax_,
    matmul_transposed,
    rotary_attention,
    weight_gradient,
)
from mtp_lightning.nn.rope import rope_table
from mtp_lightning.objective.through_head import chunk_rows
from mtp_lightning.runtime import keep_freed_memory

# Windows, and tokens of each, of the micro-batch of ``deepseek_SIZE``.
MOE_BATCHES = {"nano": (16, 256), "micro": (16, 256), "tiny": (8, 256)}
# The aim: a mixture's time over that of a dense layer with as many active parameters.
LIMIT = 1.5


def time_linear(name: str, rows: int, d_in: int, d_out: int, repeats: int) -> list[Row]:
    """The forward product and the gradients of input and weight, by our choice and by MKL."""
    x, grad, weight = torch.randn(rows, d_in), torch.randn(rows, d_out), torch.randn(d_out, d_in)
    sides: dict[str, dict[str, Callable[[], Tensor]]] = {
        "forward": {
            "ours": lambda: matmul_transposed(x, weight),
            "pytorch": lambda: x @ weight.t(),
        },
        "d_input": {
            "ours": lambda: matmul_transposed(grad, weight.t()),
            "pytorch": lambda: grad @ weight,
        },
        "d_weight": {"ours": lambda: weight_gradient(grad, x), "pytorch": lambda: grad.t() @ x},
    }
    gflop = 2 * rows * d_in * d_out / 1e9
    found = {
        product: harness.median_times(both, repeats=repeats, warmup=3)
        for product, both in sides.items()
    }
    return [
        {
            "kernel": f"{name} {product}",
            "shape": f"{rows} x {d_in} -> {d_out}",
            "ms": seconds["ours"] * 1e3,
            "ms_pytorch": seconds["pytorch"] * 1e3,
            "gflops": gflop / seconds["ours"],
            "gflops_pytorch": gflop / seconds["pytorch"],
            "speedup": seconds["pytorch"] / seconds["ours"],
        }
        for product, seconds in found.items()
    ]


def time_layer(
    name: str, sides: Mapping[str, Callable[..., Tensor]], *leaves: Tensor, repeats: int
) -> Row:
    """Forward and backward of functions of the same tensors, and the bytes that each keeps for it.
    ``ours`` comes first, and the others must agree with it."""
    row: Row = {"kernel": name, "shape": " x ".join(str(size) for size in leaves[0].shape)}
    functions = {}
    for side, function in sides.items():
        with harness.saved_tensors() as saved:
            output = function(*leaves)
        row[f"{side}_saved_mb"] = saved["peak"] / 1e6
        if side == "ours":
            expected, grad = output.detach(), torch.randn_like(output)
        torch.testing.assert_close(output.detach(), expected, rtol=1e-3, atol=1e-4)
        functions[side] = partial(_both_ways, function, leaves, grad)
        del output
    seconds = harness.median_times(functions, repeats=repeats, warmup=3)
    row |= {f"{side}_ms": 1e3 * s for side, s in seconds.items()}
    return row | {f"over_{side}": s / seconds["ours"] for side, s in seconds.items()}


def _both_ways(function: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad: Tensor) -> None:
    torch.autograd.grad(function(*leaves), leaves, grad)


def without_library(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` without the C++ library, whose backward pass then does not use it either."""

    def without(*tensors: Tensor) -> Tensor:
        with mock.patch.object(native, "library", None):
            return function(*tensors)

    return without


def composed_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE from PyTorch's elementary steps."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def composed_swiglu(gate_up: Tensor) -> Tensor:
    """SwiGLU from PyTorch's elementary steps."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear_shapes(trunk: TrunkConfig, rows: int) -> dict[str, tuple[int, int, int]]:
    """Rows, inputs and outputs of every matrix of a block and of an MTP module, and of the head on
    a chunk of rows."""
    d_model, vocab_size = trunk.d_model, trunk.vocab_size
    heads = trunk.n_heads * trunk.d_head
    head_rows = min(rows, chunk_rows(vocab_size, torch.device("cpu")))
    return {
        "qkv": (rows, d_model, heads + 2 * trunk.n_kv_heads * trunk.d_head),
        "out": (rows, heads, d_model),
        "gate_up": (rows, d_model, 2 * trunk.d_ff),
        "down": (rows, trunk.d_ff, d_model),
        "eh_proj": (rows, 2 * d_model, d_model),
        f"head V={vocab_size}": (head_rows, d_model, vocab_size),
    }


def layers(trunk: TrunkConfig, batch_size: int, seq_len: int, repeats: int) -> list[Row]:
    """The layers between the matrices: by C++ where it is built, without it, and by PyTorch."""
    rows, d_head = batch_size * seq_len, trunk.d_head
    n_heads, n_kv = trunk.n_heads, trunk.n_kv_heads
    norm = RMSNorm(trunk.d_model, trunk.norm_eps)
    cos, sin = rope_table(torch.arange(seq_len), d_head, trunk.rope_theta)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    layer = FeedForward(trunk.d_model, trunk.d_ff)
    initialize(layer, std=0.02, seed=0)
    names, weights = zip(*layer.named_parameters(), strict=True)

    def attention(qkv: Tensor) -> Tensor:
        return rotary_attention(qkv, cos, sin, None, n_heads, n_kv)

    def pytorch_attention(qkv_BTNH: Tensor) -> Tensor:
        query, key, value = qkv_BTNH.split((n_heads, n_kv, n_kv), dim=-2)
        rotated = (composed_rope(query, cos, sin), composed_rope(key, cos, sin), value)
        query, key, value = (x.transpose(1, 2) for x in rotated)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    def feed_forward(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))

    def pytorch_feed_forward(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return F.linear(composed_swiglu(F.linear(x, gate_up)), down)

    def pytorch_norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)

    def timed(name: str, ours: Any, pytorch: Any, *leaves: Tensor) -> Row:
        sides = {"ours": ours, "without": without_library(ours), "pytorch": pytorch}
        return time_layer(name, sides, *(x.requires_grad_() for x in leaves), repeats=repeats)

    x, heads = torch.randn(rows, trunk.d_model), n_heads + 2 * n_kv
    qkv = torch.randn(batch_size, seq_len, heads, d_head)
    logits = torch.randn(chunk_rows(trunk.vocab_size, torch.device("cpu")), trunk.vocab_size)

    def softmax() -> Tensor:
        return exp_(log_softmax_(logits.clone(), torch.float32))

    found = [
        timed("feed-forward layer", feed_forward, pytorch_feed_forward, x, *weights),
        timed("RMSNorm", norm, pytorch_norm, torch.randn(rows, trunk.d_model)),
        timed("SwiGLU", gated, composed_swiglu, torch.randn(rows, 2 * trunk.d_ff)),
        timed("RoPE and attention", attention, pytorch_attention, qkv),
    ]
    sides = {
        "ours": softmax,
        "without": without_library(softmax),
        "pytorch": lambda: logits.log_softmax(-1).exp(),
        "copy": logits.clone,
    }
    seconds = harness.median_times(sides, repeats=repeats, warmup=3)
    for side in ("ours", "without"):  # these overwrite their input, a copy
        seconds[side] -= seconds["copy"]
    row: Row = {"kernel": "log-softmax and exp", "shape": f"{len(logits)} x {trunk.vocab_size}"}
    for side in ("ours", "without", "pytorch"):
        row |= {f"{side}_ms": 1e3 * seconds[side], f"over_{side}": seconds[side] / seconds["ours"]}
    return [*found, row]


def mixture(size: str, *, repeats: int) -> Row:
    """A mixture of experts, with and without its C++, and a dense layer of its active size.

    Inputs change from step to step, so that experts get varying numbers of tokens, as in training.
    The dense layer is as wide as the shared and the chosen experts together.
    """
    config = instantiate(harness.compose_config([f"model=deepseek_{size}"]).model, vocab_size=256)
    experts = config.feed_forward
    batch, seq_len = MOE_BATCHES[size]
    active = (experts.n_shared + experts.top_k) * experts.d_expert
    layers = {"moe": MoE(config.d_model, experts), "dense": FeedForward(config.d_model, active)}
    layers["plain"] = layers["moe"]
    for layer in layers.values():
        initialize(layer, std=config.init_std, seed=0)
    generator = torch.Generator().manual_seed(0)
    shape = (batch, seq_len, config.d_model)
    pool = [torch.randn(shape, generator=generator) for _ in range(repeats + 3)]
    grad = torch.randn(shape, generator=generator)
    turns = dict.fromkeys(layers, 0)

    def step(name: str) -> None:
        x = pool[turns[name] % len(pool)].requires_grad_()
        turns[name] += 1
        library = None if name == "plain" else native.library
        with mock.patch.object(native, "library", library):
            layers[name](x).backward(grad)
        x.grad = None
        for parameter in layers[name].parameters():
            parameter.grad = None

    steps = {name: partial(step, name) for name in layers}
    seconds = harness.median_times(steps, repeats=repeats, warmup=3)
    n_tokens = batch * seq_len
    return {
        "model": f"deepseek_{size}",
        "experts": f"{experts.n_shared} + {experts.top_k} of {experts.n_routed}",
        "d_expert": experts.d_expert,
        "dense_d_ff": active,
        "tokens": n_tokens,
        "moe_us_per_token": 1e6 * seconds["moe"] / n_tokens,
        "dense_us_per_token": 1e6 * seconds["dense"] / n_tokens,
        "ratio": seconds["moe"] / seconds["dense"],
        "times_as_fast": seconds["plain"] / seconds["moe"],
    }


@cli.command(quick={"repeats": 5}, cpu_time=True)
def kernels(
    model: str = "micro",
    vocab_sizes: Sequence[int] = (4096, 32768),
    batch_size: int = 8,
    seq_len: int = 256,
    repeats: int = 30,
) -> Row:
    """Matrix products, and the layers between them."""
    config = harness.compose_config([f"model={model}"]).model
    trunks = [instantiate(config, vocab_size=size) for size in vocab_sizes]
    harness.progress("linear layers")
    shapes: dict[str, tuple[int, int, int]] = {}
    for trunk in trunks:  # only their heads differ
        shapes |= linear_shapes(trunk, batch_size * seq_len)
    products = [row for name, shape in shapes.items() for row in time_linear(name, *shape, repeats)]
    harness.progress("layers between them")
    between = layers(trunks[0], batch_size, seq_len, repeats)
    onednn = uses_onednn(torch.empty(64, 64), torch.empty(64, 64))
    used = "by oneDNN" if onednn else "by PyTorch's default, as oneDNN is not used here"
    cli.print_table(
        f"Matrix products of model={model}, fp32: {used}, and by PyTorch's default",
        "product: kernel; shape: shape; ms: ms .3f; PyTorch's: ms_pytorch .3f; "
        "GFLOP/s: gflops .0f; PyTorch's: gflops_pytorch .0f; times as fast: speedup .2f",
        products,
    )
    built = "C++" if native.library is not None else "no C++ is built"
    cli.print_table(
        f"Layers, forward and backward: {built}, without it, and by PyTorch",
        "layer: kernel; shape: shape; ms: ours_ms .3f; without: without_ms .3f; "
        "PyTorch's: pytorch_ms .3f; times without: over_without .2f; "
        "times PyTorch's: over_pytorch .2f; kept for backward, MB: ours_saved_mb .1f; "
        "without: without_saved_mb .1f; PyTorch's: pytorch_saved_mb .1f",
        between,
    )
    return {"onednn": onednn, "linear": products, "layers": between}


@cli.command(quick={"repeats": 5}, choices={"sizes": list(MOE_BATCHES)}, cpu_time=True)
def moe(sizes: Sequence[str] = tuple(MOE_BATCHES), threads: int = 0, repeats: int = 25) -> Row:
    """A mixture of experts against a dense layer of the same active size, and without its C++.

    Args:
        sizes: sizes of ``deepseek_SIZE``.
        threads: threads of the process; default all cores.
    """
    if threads:
        torch.set_num_threads(threads)
    rows = []
    for size in sizes:
        harness.progress(f"deepseek_{size}")
        rows.append(mixture(size, repeats=repeats))
    cli.print_table(
        "Forward and backward of a feed-forward layer",
        "model: model; experts: experts; tokens: tokens ,; MoE us/token: moe_us_per_token .2f; "
        f"dense us/token: dense_us_per_token .2f; ratio (limit {LIMIT}): ratio .2f; "
        "times as fast as without C++: times_as_fast .2f",
        rows,
    )
    return {"limit": LIMIT, "rows": rows}


main = cli.program(kernels, moe)

if __name__ == "__main__":
    keep_freed_memory()  # as the apps do
    main()
