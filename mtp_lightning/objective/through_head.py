"""From hidden states through the shared head to losses and their gradients, chunk by chunk.

The logits of all depths would be (D + 1) x B x T x V numbers. Here they exist for one chunk of
positions of one hidden state at a time: a chunk's logits become the gradients of its hidden states
and of the head's weight at once and are dropped, so nothing of size V is kept but one gradient of
the weight, shared by all depths.

A teacher (the main prediction of the same target tokens) is made along the way, too: a chunk of it
serves every depth before the next chunk is made. Depth k at position t is taught by the main
prediction at t + k, so a chunk of main positions meets every depth k places to the left (s k, where
depths leap by a stride of s). The first k main positions of a window meet the last k of the window
before, which have no teacher: so nothing is left out, and nothing comes twice.

Shapes: M positions (B x T), C d_model, V vocabulary, R positions of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data_modules.windows import IGNORE_INDEX
from mtp_lightning.nn.cross_entropy import cross_entropy
from mtp_lightning.nn.mixture import mixed_log_probs
from mtp_lightning.nn.ops import exp_, log_softmax_, matmul_transposed, weight_gradient
from mtp_lightning.objective.terms.base import Chunk, HiddenTerm, Teacher, Term
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy

# Numbers in one chunk of logits. On a CPU a chunk should stay in the cache between the passes
# over it; on a GPU it must be large enough to fill the device. See benchmarks/head.py.
_CHUNK_NUMEL = {"cpu": 2**21, "cuda": 2**27}
_MIN_CHUNK_ROWS = 256


@dataclass(frozen=True, eq=False)
class DepthTarget:
    """What one depth is to predict by one term, and how much it counts.

    Attributes:
        depth: k.
        tokens: [...] token ids; -100 is ignored.
        coefficient: factor of the term's summed loss: its weight / positions that count in the
            step. A loss of factor 0 that nothing learns from is not computed.
        term: what it is trained on.
        weights: [...] of the positions, which multiply loss and gradient; None is 1.
        values: [...] the losses, where they are known beforehand and rest on other depths, too;
            ``weights`` then multiply the gradient alone.
        stride: s, of depths that leap: the main prediction of the same token stands s k places on.
    """

    depth: int
    tokens: Tensor
    coefficient: float
    term: Term
    weights: Tensor | None = None
    values: Tensor | None = None
    stride: int = 1


@dataclass(eq=False)
class Prediction:
    """A hidden state on its way through the head.

    Attributes:
        hidden: [..., C], ready for the head.
        targets: all that its logits are made for once: a depth's, one for every term of the
            objective; with ``parameter_free`` those of all depths.
        train_head: whether the head's weight gets a gradient from it.
        needs_gradient: whether the hidden state does.
        gradient: that gradient, [..., C], once it is known.
        of_parameters: the gradients of the terms' own parameters, once they are known.
    """

    hidden: Tensor
    targets: Sequence[DepthTarget]
    train_head: bool = True
    needs_gradient: bool = True
    gradient: Tensor | None = None
    of_parameters: list[Tensor] = field(default_factory=list)

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares with the main prediction."""
        return any(target.term.needs_teacher for target in self.targets)


class HeadWeight:
    """The shared head's weight, and its gradient as it adds up.

    Args:
        weight_VC: the weight.
        needs_gradient: whether anybody wants its gradient.

    Attributes:
        gradient: so far; None before the first part.
    """

    def __init__(self, weight_VC: Tensor, *, needs_gradient: bool = False) -> None:
        self.weight_VC = weight_VC
        self.needs_gradient = needs_gradient
        self.gradient: Tensor | None = None

    def add(self, d_logits_RV: Tensor, h_RC: Tensor, factor: float = 1.0) -> None:
        """``gradient += factor * d_logits.T @ h``."""
        if self.gradient is None:
            # Laid out as weight_gradient gives its parts: adding across layouts is slow.
            self.gradient = self.weight_VC.new_zeros(self.weight_VC.shape[::-1]).t()
        self.gradient.add_(weight_gradient(d_logits_RV, h_RC), alpha=factor)


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Positions whose logits exist at once."""
    numel = _CHUNK_NUMEL.get(device.type, _CHUNK_NUMEL["cuda"])
    return max(_MIN_CHUNK_ROWS, numel // vocab_size)


def log_probs_by_chunk(h_MC: Tensor, weight_VC: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """``log_softmax(h @ weight.T)`` in chunks of positions, without autograd; in fp32, in a double
    precision model in fp64.

    Yields:
        The chunk's place in M, and its log-probabilities [R, V], which the caller may overwrite.
    """
    for place in _places(h_MC, weight_VC):
        chunk_RV = log_probs(h_MC[place], weight_VC)
        yield place, chunk_RV
        del chunk_RV


def _places(h_MC: Tensor, weight_VC: Tensor) -> Iterator[slice]:
    rows = chunk_rows(weight_VC.shape[0], h_MC.device)
    for start in range(0, h_MC.shape[0], rows):
        yield slice(start, min(start + rows, h_MC.shape[0]))


def log_probs(h_RC: Tensor, weight_VC: Tensor) -> Tensor:
    """``log_softmax(h @ weight.T)`` [R, V] of one chunk; see :func:`log_probs_by_chunk`. Of a
    mixture (``nn/mixture.py``), its logarithm."""
    d_model = weight_VC.shape[1]
    if h_RC.shape[1] != d_model:
        return mixed_log_probs(h_RC, d_model, lambda h: log_probs(h, weight_VC))
    logits_RV = matmul_transposed(h_RC, weight_VC)
    dtype = torch.promote_types(logits_RV.dtype, torch.float32)
    return log_softmax_(logits_RV, dtype)


@torch.no_grad()
def through_head(
    head: HeadWeight,
    predictions: Sequence[Prediction],
    sums: Tensor,
    *,
    main_hidden: Tensor | None = None,
    compiled: bool = False,
) -> None:
    """The losses of hidden states, and the gradients of ``sum_k coefficient_k * loss_k``.

    Args:
        head: its gradient is added to.
        predictions: their ``gradient`` is set where it is needed.
        sums: fp64 [number of targets, those of all predictions]; each target's summed loss is added
            to it, in place.
        main_hidden: the main prediction's hidden state [..., C], from which teachers are made.
        compiled: whether cross-entropy alone is one compiled kernel.
    """
    dtype = compute_dtype(predictions[0].hidden)
    weight = head.weight_VC.detach().to(dtype)
    ways, done = [], 0
    for prediction in predictions:
        end = done + len(prediction.targets)
        way = _Way(head, weight, prediction, sums[done:end])
        if way.learns or any(target.coefficient for target in prediction.targets):
            ways.append(way)
        done = end
    with torch.autocast(weight.device.type, enabled=False):
        if any(way.prediction.needs_teacher for way in ways):
            assert main_hidden is not None
            _with_teacher(main_hidden, weight, ways)
        else:
            for way in ways:
                if compiled and way.is_plain:
                    way.go_compiled()
                else:
                    for place, chunk_RV in log_probs_by_chunk(way.h_MC, weight):
                        way.go(place, chunk_RV)
    for way in ways:
        if way.d_h is not None:
            way.prediction.gradient = way.d_h.view_as(way.prediction.hidden)


def _with_teacher(main_hidden: Tensor, weight: Tensor, ways: Sequence[_Way]) -> None:
    """Each chunk of the main prediction, and what every depth learns from it."""
    main_MC = main_hidden.detach().reshape(-1, main_hidden.shape[-1]).to(weight.dtype)
    for place, main_RV in log_probs_by_chunk(main_MC, weight):
        teacher = Teacher(main_RV, main_MC[place])
        for way in ways:
            if way.depth:
                rows = places_left(place, way.to_teacher, main_MC)
                way.go(rows, log_probs(way.h_MC[rows], weight), teacher)
        del teacher
        for way in ways:  # at the end, since it overwrites what the depths compare with
            if not way.depth:
                way.go(place, main_RV)


def places_left(place: slice, k: int, h_MC: Tensor) -> slice | Tensor:
    """``place`` moved by ``k`` to the left; what falls off comes in again at the end."""
    if place.start >= k:
        return slice(place.start - k, place.stop - k)
    return torch.arange(place.start - k, place.stop - k, device=h_MC.device) % h_MC.shape[0]


class _Way:
    """One prediction, chunk by chunk.

    Args:
        head: whose gradient is added to.
        weight: the head's weight in the precision of the products.
        prediction: what is computed.
        sums: of its targets.
    """

    def __init__(
        self, head: HeadWeight, weight: Tensor, prediction: Prediction, sums: Tensor
    ) -> None:
        h = prediction.hidden
        self.head, self.weight, self.prediction, self.sums = head, weight, prediction, sums
        self.trains_weight = head.needs_gradient and prediction.train_head
        self.learns = prediction.needs_gradient or self.trains_weight
        self.h_MC = h.detach().reshape(-1, h.shape[-1]).to(weight.dtype)
        needed = prediction.needs_gradient
        self.d_h = torch.empty_like(self.h_MC, dtype=h.dtype) if needed else None

    @property
    def depth(self) -> int:
        """k, of the first of its targets."""
        return self.prediction.targets[0].depth

    @property
    def to_teacher(self) -> int:
        """How many places on the main prediction of the same token stands."""
        return self.depth * self.prediction.targets[0].stride

    def go(self, rows: slice | Tensor, chunk_RV: Tensor, main: Teacher | None = None) -> None:
        """Losses and gradients of the positions ``rows``, whose ``chunk_RV`` is overwritten."""
        h_RC = self.h_MC[rows]
        targets = [ChunkTarget(target, rows) for target in self.prediction.targets]
        if not self.learns:
            for index, target in enumerate(targets):
                value_R = target.term.value(target.chunk(chunk_RV, h_RC, main))
                self._add(index, value_R, target)
            return
        d_hidden_RC = self._of_hidden(targets, chunk_RV, h_RC, main)
        single: ChunkTarget | None = None
        if len(targets) == 1:
            (single,) = targets
            value_R, d_logits_RV = single.term.gradient(single.chunk(chunk_RV, h_RC, main))
            self._add(0, value_R, single)
        else:
            d_logits_RV = self._of_several(targets, chunk_RV, h_RC, main)
        del chunk_RV
        self._learn(rows, h_RC, d_logits_RV.to(self.weight.dtype), single, d_hidden_RC)

    @property
    def is_plain(self) -> bool:
        """Whether cross-entropy with one target is all there is to learn."""
        targets = self.prediction.targets
        return (
            self.learns
            and len(targets) == 1
            and isinstance(targets[0].term, CrossEntropy)
            and self.h_MC.shape[1] == self.weight.shape[1]  # no mixture
        )

    def go_compiled(self) -> None:
        """:meth:`go` of all positions, from logits to their gradient in one kernel a chunk."""
        for place in _places(self.h_MC, self.weight):
            h_RC = self.h_MC[place]
            target = ChunkTarget(self.prediction.targets[0], place)
            logits_RV = matmul_transposed(h_RC, self.weight)
            value_R, d_logits_RV = cross_entropy(logits_RV, target.tokens_R)
            del logits_RV
            self._add(0, value_R, target)
            self._learn(place, h_RC, d_logits_RV, target)

    def _learn(
        self,
        rows: slice | Tensor,
        h_RC: Tensor,
        d_logits_RV: Tensor,
        single: ChunkTarget | None,
        d_hidden_RC: Tensor | None = None,
    ) -> None:
        """Hand the gradient by the logits on to the hidden states and to the weight.

        Args:
            rows: the positions.
            h_RC: their hidden states.
            d_logits_RV: the gradient.
            single: a single target, whose mask and coefficient it does not have yet: they go onto
                the C-wide factors, not onto the V-wide one.
            d_hidden_RC: of terms that read the state.
        """
        scale_R1 = None if single is None else single.counts_R.unsqueeze(-1)
        factor = 1.0 if single is None else single.coefficient
        if self.d_h is not None:
            d_h_RC = matmul_transposed(d_logits_RV, self.weight.t())
            if scale_R1 is not None:
                d_h_RC = d_h_RC * (scale_R1 * factor)
            if d_hidden_RC is not None:
                d_h_RC = d_h_RC + d_hidden_RC
            self.d_h[rows] = d_h_RC.to(self.d_h.dtype)
        if self.trains_weight:
            self.head.add(d_logits_RV, h_RC if scale_R1 is None else h_RC * scale_R1, factor)

    def _add(self, index: int, value_R: Tensor, target: ChunkTarget) -> None:
        counts_R = target.counts_R
        if target.values_R is not None:
            value_R, counts_R = target.values_R, target.valid_R
        self.sums[index] += (value_R * counts_R).double().sum()

    def _of_hidden(
        self, targets: list[ChunkTarget], chunk_RV: Tensor, h_RC: Tensor, main: Teacher | None
    ) -> Tensor | None:
        """The gradient [R, C] of terms that read the state, mask and coefficients included."""
        total_RC: Tensor | None = None
        for index, target in enumerate(targets):
            if not isinstance(target.term, HiddenTerm):
                continue
            if not target.coefficient:  # looked at, and learned from by nobody
                self._add(index, target.term.value(target.chunk(chunk_RV, h_RC, main)), target)
                continue
            parameters = list(target.term.parameters)
            with torch.enable_grad():
                hidden_RC = h_RC.detach().requires_grad_()
                value_R = target.term.value(target.chunk(chunk_RV, hidden_RC, main))
                loss = (value_R * target.scale_R1(value_R.dtype).squeeze(-1)).sum()
                d_hidden_RC, *own = torch.autograd.grad(loss, [hidden_RC, *parameters])
            self._add(index, value_R.detach(), target)
            total_RC = d_hidden_RC if total_RC is None else total_RC + d_hidden_RC
            if own:
                before = self.prediction.of_parameters or [torch.zeros_like(p) for p in parameters]
                self.prediction.of_parameters = [a + b for a, b in zip(before, own, strict=True)]
        return total_RC

    def _of_several(
        self, targets: list[ChunkTarget], chunk_RV: Tensor, h_RC: Tensor, main: Teacher | None
    ) -> Tensor:
        """The gradient by logits that all targets share, mask and coefficients included.

        Cross-entropy's is ``(sum_k c_k) softmax - sum_k c_k one_hot(target_k)``: one pass over the
        chunk serves all such targets.
        """
        plain: list[tuple[Tensor, Tensor]] = []
        others_RV: Tensor | None = None
        for index, target in enumerate(targets):
            if isinstance(target.term, HiddenTerm):
                continue
            if isinstance(target.term, CrossEntropy):
                value_R = target.term.value(target.chunk(chunk_RV, h_RC, main))
                plain.append((target.tokens_R.unsqueeze(-1), -target.scale_R1(chunk_RV.dtype)))
            else:
                copy = target.chunk(chunk_RV.clone(), h_RC, main)
                value_R, d_logits_RV = target.term.gradient(copy)
                d_logits_RV = d_logits_RV * target.scale_R1(chunk_RV.dtype)
                others_RV = d_logits_RV if others_RV is None else others_RV.add_(d_logits_RV)
                del copy, d_logits_RV
            self._add(index, value_R, target)
        if not plain:
            assert others_RV is not None
            return others_RV
        minus_RK = torch.cat([minus_R1 for _, minus_R1 in plain], dim=1)
        d_logits_RV = exp_(chunk_RV).mul_(-minus_RK.sum(1, keepdim=True))
        # One target at a time: two depths of a row may have the same token.
        for target_R1, minus_R1 in plain:
            d_logits_RV.scatter_add_(1, target_R1, minus_R1)
        return d_logits_RV if others_RV is None else d_logits_RV.add_(others_RV)


class ChunkTarget:
    """A target of some positions: token ids [R], and how much each of them counts [R]."""

    def __init__(self, target: DepthTarget, rows: slice | Tensor) -> None:
        tokens_R = target.tokens.reshape(-1)[rows]
        self.depth, self.coefficient, self.term = target.depth, target.coefficient, target.term
        self.tokens_R, self.valid_R = tokens_R.clamp(min=0), tokens_R != IGNORE_INDEX
        # Mask and weights.
        self.counts_R = self.valid_R
        if target.weights is not None:
            self.counts_R = target.weights.reshape(-1)[rows] * self.valid_R
        self.values_R = None if target.values is None else target.values.reshape(-1)[rows]

    def scale_R1(self, dtype: torch.dtype) -> Tensor:
        """Mask, weights and coefficient."""
        return (self.counts_R.to(dtype) * self.coefficient).unsqueeze(-1)

    def chunk(self, log_probs_RV: Tensor, h_RC: Tensor, main: Teacher | None) -> Chunk:
        return Chunk(self.depth, log_probs_RV, self.tokens_R, h_RC, main)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
