"""Why the CPU code is written as it is: every kernel of its own against what it replaces.

Run ``python -m benchmarks.kernels``. Linear layers at micro's shapes (the product, and the two of
its backward pass) by oneDNN and by MKL; RMSNorm, SwiGLU, RoPE and causal attention, forward and
backward, against PyTorch's own; the layers' code in C++ (``mtp_lightning/cpu``) against what
stands for it where that is not built; and a whole optimizer step with and without
``keep_freed_memory()``, each in processes of its own. The two sides of a ratio take turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common, train_step
from mtp_lightning.cpu import library as native
from mtp_lightning.cpu.attention import causal_attention
from mtp_lightning.cpu.linear import uses_onednn
from mtp_lightning.cpu.swiglu import gated
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.feed_forward import FeedForward
from mtp_lightning.nn.init import initialise
from mtp_lightning.nn.norm import RMSNorm
from mtp_lightning.nn.ops import (
    exp_,
    log_softmax_,
    matmul_transposed,
    rotary,
    rotary_attention,
    weight_gradient,
)
from mtp_lightning.nn.rope import rope_table
from mtp_lightning.objective.through_head import chunk_rows
from mtp_lightning.runtime import keep_freed_memory


def time_linear(
    name: str, *, rows: int, d_in: int, d_out: int, repeats: int
) -> list[dict[str, Any]]:
    """Forward, gradient of the input, gradient of the weight: ours and MKL's."""
    x, grad, weight = torch.randn(rows, d_in), torch.randn(rows, d_out), torch.randn(d_out, d_in)
    pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "forward": (lambda: matmul_transposed(x, weight), lambda: x @ weight.t()),
        "d_input": (lambda: matmul_transposed(grad, weight.t()), lambda: grad @ weight),
        "d_weight": (lambda: weight_gradient(grad, x), lambda: grad.t() @ x),
    }
    flops = 2 * rows * d_in * d_out
    result = []
    for product, (ours, theirs) in pairs.items():
        seconds = common.median_times({"ours": ours, "theirs": theirs}, repeats=repeats, warmup=3)
        result.append(
            {
                "kernel": f"{name} {product}",
                "shape": f"{rows} x {d_in} -> {d_out}",
                "ms": seconds["ours"] * 1e3,
                "ms_pytorch": seconds["theirs"] * 1e3,
                "gflops": flops / seconds["ours"] / 1e9,
                "gflops_pytorch": flops / seconds["theirs"] / 1e9,
                "speedup": seconds["theirs"] / seconds["ours"],
            }
        )
    return result


def time_pair(
    name: str,
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    *leaves: Tensor,
    repeats: int,
) -> dict[str, Any]:
    """Forward and backward of two functions of the same tensors, and what each keeps between."""
    saved, outputs = {}, {}
    for side, function in (("ours", ours), ("theirs", theirs)):
        counter = common.SavedTensors()
        with counter.counting():
            outputs[side] = function(*leaves)
        saved[side] = counter.n_bytes
    torch.testing.assert_close(outputs["ours"], outputs["theirs"], rtol=1e-3, atol=1e-4)
    grad = torch.randn_like(outputs["ours"])

    def both(function: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(*leaves), leaves, grad)

    seconds = common.median_times(
        {"ours": both(ours), "theirs": both(theirs)}, repeats=repeats, warmup=3
    )
    return {
        "kernel": name,
        "shape": " x ".join(str(size) for size in leaves[0].shape),
        "ms": seconds["ours"] * 1e3,
        "ms_pytorch": seconds["theirs"] * 1e3,
        "speedup": seconds["theirs"] / seconds["ours"],
        "saved_mb": saved["ours"] / 1e6,
        "saved_mb_pytorch": saved["theirs"] / 1e6,
    }


def plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` without the C++ library; its backward pass is that of its forward pass."""

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


def pytorch_attention(query_BTNH: Tensor, key_BTMH: Tensor, value_BTMH: Tensor) -> Tensor:
    """PyTorch's causal attention, from and to this project's order of axes."""
    query, key, value = (t.transpose(1, 2) for t in (query_BTNH, key_BTMH, value_BTMH))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def linears(trunk: TrunkConfig, rows: int, repeats: int) -> list[dict[str, Any]]:
    """Every matrix of a block, of an MTP module, and the head by its chunk of rows."""
    d_model, vocab_size = trunk.d_model, trunk.vocab_size
    heads = trunk.n_heads * trunk.d_head
    head_rows = min(rows, chunk_rows(vocab_size, torch.device("cpu")))
    shapes = {
        "qkv": (rows, d_model, heads + 2 * trunk.n_kv_heads * trunk.d_head),
        "out": (rows, heads, d_model),
        "gate_up": (rows, d_model, 2 * trunk.d_ff),
        "down": (rows, trunk.d_ff, d_model),
        "eh_proj": (rows, 2 * d_model, d_model),
        f"head V={vocab_size}": (head_rows, d_model, vocab_size),
    }
    return [
        row
        for name, (m, d_in, d_out) in shapes.items()
        for row in time_linear(name, rows=m, d_in=d_in, d_out=d_out, repeats=repeats)
    ]


def layers(trunk: TrunkConfig, batch_size: int, seq_len: int, repeats: int) -> list[dict[str, Any]]:
    """The layers between the matrices."""
    shape, heads = (batch_size, seq_len), (trunk.n_heads, trunk.n_kv_heads, trunk.n_kv_heads)
    norm = RMSNorm(trunk.d_model, trunk.norm_eps)

    def leaf(*sizes: int) -> Tensor:
        return torch.randn(*shape, *sizes).requires_grad_()

    cos, sin = rope_table(torch.arange(seq_len), trunk.d_head, trunk.rope_theta)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return [
        time_pair(
            "RMSNorm",
            plain(norm),
            lambda x: F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps),
            leaf(trunk.d_model),
            repeats=repeats,
        ),
        time_pair("SwiGLU", plain(gated), composed_swiglu, leaf(2 * trunk.d_ff), repeats=repeats),
        time_pair(
            "RoPE",
            lambda x: rotary(x, cos, sin),
            lambda x: composed_rope(x, cos, sin),
            leaf(trunk.n_heads + trunk.n_kv_heads, trunk.d_head),
            repeats=repeats,
        ),
        time_pair(
            "causal attention",
            causal_attention,
            pytorch_attention,
            *(leaf(n, trunk.d_head) for n in heads),
            repeats=repeats,
        ),
    ]


def in_cpp(trunk: TrunkConfig, batch_size: int, seq_len: int, repeats: int) -> list[dict[str, Any]]:
    """The layers' code in C++ against what stands for it; none where it was not built."""
    if native.library is None:
        return []
    norm, rows = RMSNorm(trunk.d_model, trunk.norm_eps), batch_size * seq_len
    cos, sin = (x.unsqueeze(-2) for x in rope_table(torch.arange(seq_len), trunk.d_head, 1e4))
    heads = trunk.n_heads + 2 * trunk.n_kv_heads

    def attention(qkv: Tensor) -> Tensor:
        return rotary_attention(qkv, cos, sin, None, trunk.n_heads, trunk.n_kv_heads)

    def pair(name: str, function: Callable[..., Tensor], *sizes: int) -> dict[str, Any]:
        leaf = torch.randn(*sizes).requires_grad_()
        return time_pair(name, function, plain(function), leaf, repeats=repeats)

    logits = torch.randn(chunk_rows(trunk.vocab_size, torch.device("cpu")), trunk.vocab_size)

    def softmax() -> Tensor:
        return exp_(log_softmax_(logits.clone(), torch.float32))

    seconds = common.median_times(
        {"ours": softmax, "theirs": plain(softmax), "copy": logits.clone}, repeats=repeats, warmup=3
    )
    ours, theirs = (seconds[side] - seconds["copy"] for side in ("ours", "theirs"))
    layer = FeedForward(trunk.d_model, trunk.d_ff)
    initialise(layer, std=0.02, seed=0)
    names, weights = zip(*layer.named_parameters(), strict=True)

    def feed_forward(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))

    x = torch.randn(rows, trunk.d_model).requires_grad_()
    whole = time_pair(
        "feed-forward layer", feed_forward, plain(feed_forward), x, *weights, repeats=repeats
    )
    return [
        whole,
        pair("RMSNorm", norm, rows, trunk.d_model),
        pair("SwiGLU", gated, rows, 2 * trunk.d_ff),
        pair("RoPE and attention", attention, batch_size, seq_len, heads, trunk.d_head),
        {
            "kernel": "log-softmax and exp",
            "shape": " x ".join(str(size) for size in logits.shape),
            "ms": ours * 1e3,
            "ms_pytorch": theirs * 1e3,
            "speedup": theirs / ours,
        },
    ]


def freed_memory(task: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """A whole step with and without ``keep_freed_memory()``, the processes taking turns."""
    runs: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for repeat in range(repeats):
        for keep in (True, False):
            common.progress(f"whole step, keep_freed_memory={keep}, {repeat + 1}/{repeats}")
            child = {**task, "keep_freed_memory": keep}
            runs[keep].append(common.run_child(train_step.MODULE, child))
    ms = {keep: statistics.median(run["ms_per_step"] for run in runs[keep]) for keep in runs}
    return [
        {
            "what": "kept" if keep else "given back",
            "ms": ms[keep],
            "speedup": ms[False] / ms[keep],
            "peak_mb": statistics.median(run["rss_peak"] for run in runs[keep]) / 1e6,
        }
        for keep in runs
    ]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the tables, writes the JSON and returns it."""
    parser = common.parser("Measures this project's CPU kernels.", "kernels")
    parser.add_argument("--model", default="micro", help="a size of conf/model")
    parser.add_argument("--vocab-sizes", type=common.whole_numbers, default=[4096, 32768])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--depth", type=int, default=2, help="of the whole step")
    parser.add_argument("--repeats", type=int, help="default 30, with --quick 5")
    parser.add_argument("--step-repeats", type=int, help="processes; default 3, with --quick 1")
    common.add_cpu_time(parser)
    options = parser.parse_args(arguments)
    if options.cpu_time:
        common.use_cpu_time()
    repeats = options.repeats or (5 if options.quick else 30)

    from mtp_lightning.experiment.instantiate import instantiate

    cfg = common.compose_config([f"model={options.model}"])
    trunks = [instantiate(cfg.model, vocab_size=size) for size in options.vocab_sizes]
    common.progress("linear layers")
    products = linears(trunks[0], options.batch_size * options.seq_len, repeats)
    for trunk in trunks[1:]:
        # Of another vocabulary, only the head is another shape.
        products += linears(trunk, options.batch_size * options.seq_len, repeats)[-3:]
    common.progress("layers between them")
    between = layers(trunks[0], options.batch_size, options.seq_len, repeats)
    own = in_cpp(trunks[0], options.batch_size, options.seq_len, repeats)
    task = {
        "model": options.model,
        "vocab_size": options.vocab_sizes[0],
        "depth": options.depth,
        "batch_size": options.batch_size,
        "seq_len": options.seq_len,
        "steps": 4 if options.quick else 12,
    }
    result = {
        "benchmark": "kernels",
        "model": options.model,
        "batch_size": options.batch_size,
        "seq_len": options.seq_len,
        "repeats": repeats,
        "onednn": uses_onednn(torch.empty(64, 64), torch.empty(64, 64)),
        "linear": products,
        "layers": between,
        "native": own,
        "freed_memory": freed_memory(task, options.step_repeats or (1 if options.quick else 3)),
        "machine": common.machine(),
    }
    print_tables(result)
    common.write_json(result, options.output)
    return result


def print_tables(result: dict[str, Any]) -> None:
    """Matrix products, layers, the whole step."""
    used = "by oneDNN" if result["onednn"] else "by PyTorch's default, as oneDNN is not used here"
    common.print_table(
        f"Matrix products of model={result['model']}, fp32: {used}, and by PyTorch's default",
        {
            "product": "kernel",
            "shape": "shape",
            "ms": "ms|.3f",
            "PyTorch's": "ms_pytorch|.3f",
            "GFLOP/s": "gflops|.0f",
            "PyTorch's ": "gflops_pytorch|.0f",
            "times as fast": "speedup|.2f",
        },
        result["linear"],
    )
    common.print_table(
        "Layers, forward and backward",
        {
            "layer": "kernel",
            "shape": "shape",
            "ms": "ms|.3f",
            "PyTorch's": "ms_pytorch|.3f",
            "times as fast": "speedup|.2f",
            "kept for backward, MB": "saved_mb|.1f",
            "PyTorch's, MB": "saved_mb_pytorch|.1f",
        },
        result["layers"],
    )
    common.print_table(
        "The layers in C++, and without it, forward and backward",
        {
            "layer": "kernel",
            "shape": "shape",
            "ms": "ms|.3f",
            "without": "ms_pytorch|.3f",
            "times as fast": "speedup|.2f",
            "kept for backward, MB": "saved_mb|.1f",
            "without, MB": "saved_mb_pytorch|.1f",
        },
        result["native"],
    )
    common.print_table(
        "Optimizer step by what happens to freed memory (keep_freed_memory)",
        {
            "freed memory": "what",
            "ms": "ms|.1f",
            "times as fast": "speedup|.2f",
            "peak MB": "peak_mb|.0f",
        },
        result["freed_memory"],
    )


if __name__ == "__main__":
    keep_freed_memory()  # as the apps do
    main()
