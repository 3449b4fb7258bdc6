"""The C++ of the layers against float64, at sizes that fill whole vectors and at others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.cpu import experts
from mtp_lightning.cpu import library as native
from mtp_lightning.cpu.layers import gated
from mtp_lightning.nn.batch_invariant import batch_invariant_pass
from mtp_lightning.nn.experts import routed_experts
from mtp_lightning.nn.feed_forward import FeedForward
from mtp_lightning.nn.ops import attention, exp_, log_softmax_, rms_norm, rotary_attention
from mtp_lightning.nn.rope import rope_table
from mtp_lightning.runtime import threads
from tests import reference

pytestmark = pytest.mark.usefixtures("built_library")

SHAPES = [(1, 1, 1, 1), (2, 7, 3, 1), (1, 16, 4, 4), (2, 65, 4, 2), (1, 130, 2, 1)]


def exact_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The formula in fp64, for queries [B, T, N, H]."""
    group = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
    scores = torch.einsum("btnh,bsnh->bnts", query, key) / query.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
    probs = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bnts,bsnh->btnh", probs, value)


def compare(actual: Tensor, expected: Tensor, inputs: list[Tensor], exact: list[Tensor]) -> None:
    """Compares values, and gradients in a random direction."""
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(actual.shape)
    gradients = torch.autograd.grad(actual, inputs, grad)
    exact_gradients = torch.autograd.grad(expected, exact, grad.double())
    for a, b in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)


def assert_native(out: Tensor, name: str) -> None:
    """The result is that of an autograd node of the library."""
    assert out.grad_fn is not None and name in out.grad_fn.name()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("d_head", [16, 48])
def test_attention_with_rope_equals_float64(shape: tuple[int, int, int, int], d_head: int) -> None:
    batch, seq_len, n_heads, n_kv = shape
    qkv = torch.randn(batch, seq_len, n_heads + 2 * n_kv, d_head).requires_grad_()
    cos, sin = (x.unsqueeze(-2) for x in rope_table(torch.arange(seq_len), d_head, 100.0))
    out = rotary_attention(qkv, cos, sin, None, n_heads, n_kv)
    assert_native(out, "NativeAttention")

    exact = qkv.detach().double().requires_grad_()
    query_key, value = exact.split([n_heads + n_kv, n_kv], dim=2)
    left, right = query_key.chunk(2, dim=-1)
    c, s = cos.double(), sin.double()
    query_key = torch.cat((left * c - right * s, right * c + left * s), dim=-1)
    query, key = query_key.split([n_heads, n_kv], dim=2)
    compare(out, exact_attention(query, key, value), [qkv], [exact])


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_with_narrower_values_equals_float64(shape: tuple[int, int, int, int]) -> None:
    batch, seq_len, n_heads, n_kv = shape
    joined = torch.randn(batch, seq_len, n_kv, 32 + 16)
    sizes = [(n_heads, 32), (n_kv, 32), (n_kv, 16)]
    inputs = [torch.randn(batch, seq_len, n, h).requires_grad_() for n, h in sizes]
    # In the second inputs, heads have gaps between them, as after latent attention's split.
    gaps = [inputs[0], *(x.requires_grad_() for x in joined.split([32, 16], dim=-1))]
    for heads in (inputs, gaps):
        out = attention(*heads, None)
        if heads is inputs or seq_len > 1:  # with one position, any strides count as contiguous
            assert_native(out, "NativeAttention")
        exact = [x.detach().double().requires_grad_() for x in heads]
        compare(out, exact_attention(*exact), heads, exact)


def test_gradients_of_heads_that_are_slices_or_repeated_are_right() -> None:
    cos, sin = (x.unsqueeze(-2) for x in rope_table(torch.arange(20), 16, 100.0))
    large = torch.randn(3, 20, 9, 16).requires_grad_()
    one = torch.randn(1, 20, 4, 16).requires_grad_()
    grad = torch.randn(3, 20, 2, 16)
    for leaf, heads in ((large, large[:, :, 1:5]), (one, one.expand(3, -1, -1, -1))):
        gradient, expected = (
            torch.autograd.grad(rotary_attention(x, cos, sin, None, 2, 1), leaf, grad)
            for x in (heads, heads.contiguous())
        )
        torch.testing.assert_close(gradient, expected)


def test_attention_of_a_nan_query_is_nan_and_of_huge_scores_right() -> None:
    qkv = torch.randn(1, 20, 3, 16)
    qkv[0, 5, 0, 3] = torch.nan  # of a query
    out = attention(*qkv.split(1, dim=2), None)
    assert out[0, 5].isnan().all() and out[0, [*range(5), *range(6, 20)]].isfinite().all()
    huge = torch.randn(1, 20, 3, 16) * 100  # exp of the scores overflows
    out = attention(*huge.split(1, dim=2), None)
    expected = exact_attention(*(x.double() for x in huge.split(1, dim=2)))
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-2)


def test_attention_and_norm_have_the_same_bits_on_two_threads() -> None:
    qkv = torch.randn(3, 40, 6, 16).requires_grad_()
    cos, sin = (x.unsqueeze(-2) for x in rope_table(torch.arange(40), 16, 100.0))
    gain, results = torch.randn(96).requires_grad_(), []
    for n in (1, 2):
        with threads(n):
            out = rotary_attention(qkv, cos, sin, None, 2, 2)
            normed = rms_norm(qkv.flatten(2).flatten(0, 1), gain, 1e-6)
            gradients = torch.autograd.grad(out.sum() + normed.sum(), [qkv, gain])
            results.append((out, normed, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 16), (130, 37), (64, 96), (0, 8)])
def test_norm_and_gate_equal_float64(rows: int, width: int) -> None:
    x, gain = (torch.randn(rows, width) * 3).requires_grad_(), torch.randn(width).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (x, gain)]
    normed = rms_norm(x, gain, 1e-5)
    assert normed.grad_fn is not None
    compare(normed, reference.rms_norm(*exact, 1e-5), [x, gain], exact)

    gate_up = (torch.randn(rows, 2 * width) * 4).requires_grad_()
    both = gate_up.detach().double().requires_grad_()
    gate, up = both.chunk(2, dim=-1)
    out = gated(gate_up)
    assert_native(out, "Native")
    compare(out, F.silu(gate) * up, [gate_up], [both])


def test_the_gates_of_a_verify_pass_have_the_bits_of_single_tokens() -> None:
    """PyTorch divides so many numbers among four threads within a vector of a row."""
    gate_up = torch.randn(15, 2 * 10_944)
    with threads(4), torch.no_grad(), batch_invariant_pass(15, gate_up.device):
        together = gated(gate_up)
        assert all(torch.equal(gated(gate_up[i : i + 1])[0], together[i]) for i in range(15))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 16), (3, 61), (2, 5000), (0, 7)])
def test_softmax_equals_float64(rows: int, width: int) -> None:
    logits = torch.randn(rows, width) * 10
    expected = torch.log_softmax(logits.double(), -1)
    log_probs = log_softmax_(logits, torch.float32)
    assert log_probs is logits
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(exp_(log_probs).double(), expected.exp(), rtol=1e-5, atol=1e-7)


def test_exp_equals_float64_over_its_whole_range() -> None:
    x = torch.cat((torch.linspace(-86, 0, 5001), torch.tensor([-torch.inf, -200.0, torch.nan])))
    y, expected = exp_(x.clone()), x.double().exp()
    torch.testing.assert_close(y[:5001].double(), expected[:5001], rtol=3e-7, atol=0)
    assert y[-3] < 1e-37 and y[-2] < 1e-37 and y[-1].isnan()
    large = torch.cat((torch.linspace(0, 88.7228, 5001), torch.tensor([88.73, 1e9, torch.inf])))
    torch.testing.assert_close(exp_(large.clone()), large.double().exp().float(), rtol=3e-7, atol=0)
    payloads = torch.arange(0x7F800001, 0x7FFFFFFF, 99_991).to(torch.int32).view(torch.float32)
    assert payloads.isnan().all() and exp_(torch.cat((payloads, -payloads))).isnan().all()


def test_the_gate_is_right_at_the_ends_of_fp32() -> None:
    ends = torch.tensor([-3e38, -1e30, -200.0, 3e38, torch.inf, -torch.inf, torch.nan])
    gate, up = ends.repeat(3)[:16], torch.full((16,), 0.5)  # a whole vector, and its half
    both = torch.cat((gate, up)).unsqueeze(0)
    expected = (F.silu(gate.double()) * up).float().unsqueeze(0)
    torch.testing.assert_close(gated(both), expected, rtol=1e-6, atol=0, equal_nan=True)
    x, weights = torch.eye(16).repeat(2, 1), (torch.diag(gate[:3].repeat(6)[:16]), torch.eye(16))
    whole = experts.feed_forward(x, torch.cat(weights), torch.eye(16))
    torch.testing.assert_close(whole, torch.zeros_like(whole), rtol=0, atol=1e-30)


def test_the_library_takes_only_contiguous_fp32_tensors() -> None:
    assert native.fits(torch.empty(2, 3))
    assert not native.fits(torch.empty(2, 3, dtype=torch.float64))
    assert not native.fits(torch.empty(2, 3).t())


def test_the_code_in_use_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = {"AVX512": ("native", "C++ for AVX-512"), "AVX2": ("native_avx2", "C++ for AVX2")}
    assert native.code() == codes[torch.backends.cpu.get_cpu_capability()]
    monkeypatch.setenv("MTP_LIGHTNING_NATIVE", "0")
    library, reason = native.load()
    monkeypatch.setattr(native, "library", library)
    monkeypatch.setattr(native, "_reason", reason)
    assert native.code() == ("pytorch", "PyTorch's operators (MTP_LIGHTNING_NATIVE=0)")
    monkeypatch.setattr(native, "INSTRUCTIONS", "DEFAULT")
    assert native.load() == (None, "this CPU has neither AVX2 nor AVX-512")


def mixture(tokens: int, top_k: int, n_experts: int, width: int, inner: int) -> list[Tensor]:
    """Tokens, choices, gates and weights; the last expert of several has no token."""
    crowd = max(n_experts - 1, 1)
    chosen = torch.rand(tokens, crowd).topk(top_k, dim=1).indices
    leaves = (
        torch.randn(tokens, width),
        torch.rand(tokens, top_k),
        torch.randn(n_experts, 2 * inner, width) * width**-0.5,
        torch.randn(n_experts, width, inner) * inner**-0.5,
    )
    x, gates, gate_up, down = (leaf.requires_grad_() for leaf in leaves)
    return [x, chosen, gates, gate_up, down]


# Rows that fill no tile of 6 and no block of 96, widths below and beyond a panel of 64.
@pytest.mark.parametrize(
    "sizes", [(32, 1, 1, 16, 16), (101, 2, 5, 32, 48), (700, 3, 4, 80, 64), (97, 1, 3, 208, 112)]
)
def test_experts_equal_float64(sizes: tuple[int, ...]) -> None:
    x, chosen, gates, gate_up, down = mixture(*sizes)
    y = routed_experts(x, chosen, gates, gate_up, down)
    assert_native(y, "NativeExperts")
    inputs = [x, gates, gate_up, down]
    exact = [leaf.detach().double().requires_grad_() for leaf in inputs]
    expected = reference.experts(exact[0], chosen, *exact[1:])
    compare(y, expected, inputs, exact)
    if sizes[2] > 1:
        (d_down,) = torch.autograd.grad(
            routed_experts(x, chosen, gates, gate_up, down).sum(), [down]
        )
        assert (d_down[-1] == 0).all()


def test_frozen_experts_give_the_same_gradients_of_their_inputs() -> None:
    x, chosen, gates, *weights = mixture(64, 2, 4, 32, 16)
    trained, frozen = (
        torch.autograd.grad(routed_experts(x, chosen, gates, *matrices).sum(), [x, gates])
        for matrices in (weights, [weight.detach() for weight in weights])
    )
    first_frozen = routed_experts(x, chosen, gates, weights[0].detach(), weights[1])
    expected = routed_experts(x, chosen, gates, *weights)
    d_down, whole = (torch.autograd.grad(y.sum(), weights[1])[0] for y in (first_frozen, expected))
    assert torch.equal(d_down, whole)
    assert all(torch.equal(a, b) for a, b in zip(frozen, trained, strict=True))


@pytest.mark.parametrize(("rows", "width", "inner"), [((4, 33), 32, 96), ((32,), 112, 16)])
def test_a_dense_layer_equals_float64(rows: tuple[int, ...], width: int, inner: int) -> None:
    layer, x = FeedForward(width, inner), torch.randn(*rows, width).requires_grad_()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    inputs = [x, layer.gate_up.weight, layer.down.weight]
    exact = [leaf.detach().double().requires_grad_() for leaf in inputs]
    gate, up = (exact[0] @ exact[1].T).chunk(2, dim=-1)
    compare(layer(x), (F.silu(gate) * up) @ exact[2].T, inputs, exact)
    # Few rows, and widths that fill no whole vectors, are left to PyTorch.
    assert experts.fits(x, *inputs[1:])
    assert not experts.fits(x.flatten(0, -2)[:31], *inputs[1:])
    assert not experts.fits(torch.randn(64, 24), torch.randn(32, 24), torch.randn(24, 16))


def test_experts_have_the_same_bits_on_two_threads() -> None:
    x, chosen, gates, gate_up, down = mixture(500, 3, 7, 64, 48)
    layer, results = FeedForward(64, 208), []
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    for n in (1, 2):
        with threads(n):
            out = routed_experts(x, chosen, gates, gate_up, down) + layer(x)
            leaves = [x, gates, gate_up, down, *layer.parameters()]
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
