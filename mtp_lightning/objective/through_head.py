"""From hidden states through a head to losses and their gradients, chunk by chunk.

The logits of all depths would be (D + 1) x B x T x V numbers. Here they exist for one chunk of
positions of one hidden state at a time: they are turned into the gradients of the chunk's hidden
states and of the head's weight, and dropped. Only the weight's gradient, shared by all depths,
remains of size V.

A teacher (the main prediction of the same target tokens) is computed chunk by chunk too; a chunk
serves all depths before the next one is computed. The main prediction at position i teaches depth k
at i - ``DepthTarget.shift``. Windows are flattened: the first ``shift`` positions of a window fall
on the last ones of the window before, which have no teacher and weight 0. So every position of a
depth is computed once.

Shapes: M positions (B x T), C d_model, V vocabulary, R positions of one chunk, N their hidden
states (R, or several for each position).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from mtp_lightning.mtp.chunk import Teacher, TermGradients
from mtp_lightning.mtp.feed import HeadWeight, Prediction, StackLoss
from mtp_lightning.nn.head import log_probs
from mtp_lightning.nn.ops import compute_dtype, cross_entropy, exp_, matmul_transposed, no_autocast
from mtp_lightning.objective.targets import ChunkTarget, DepthTarget

# Numbers in one chunk of logits. On a CPU a chunk should fit into the cache; on a GPU it must be
# large enough to fill the device. Measured by benchmarks/head.py.
_CHUNK_NUMEL = {"cpu": 2**21, "cuda": 2**27}
_MIN_CHUNK_ROWS = 256


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Number of positions whose logits exist at once."""
    numel = _CHUNK_NUMEL.get(device.type, _CHUNK_NUMEL["cuda"])
    return max(_MIN_CHUNK_ROWS, numel // vocab_size)


def chunks(total: int, rows: int) -> Iterator[slice]:
    """``total`` positions in chunks of ``rows``."""
    for start in range(0, total, rows):
        yield slice(start, min(start + rows, total))


def log_probs_by_chunk(
    h_MC: Tensor, weight_VC: Tensor, project: Callable[[Tensor], Tensor] | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """``log_softmax(h @ weight.T)`` in chunks of positions, in at least fp32, without autograd.

    ``project`` computes a chunk by another head than the shared one.

    Yields:
        The chunk's rows among the M, and its log-probabilities [R, V], which the caller may
        overwrite.
    """
    for rows in chunks(h_MC.shape[0], chunk_rows(weight_VC.shape[0], h_MC.device)):
        chunk_RV = log_probs(h_MC[rows], weight_VC) if project is None else project(h_MC[rows])
        yield rows, chunk_RV
        del chunk_RV


@torch.no_grad()
def through_head(
    head: HeadWeight,
    predictions: Sequence[Prediction],
    term_gradients: TermGradients | None = None,
    *,
    main_hidden: Tensor | None = None,
    compiled: bool = False,
) -> None:
    """Add losses to the targets' totals, and compute the gradients of their weighted sum.

    Args:
        head: the shared head; its gradient is accumulated in place.
        predictions: their gradients are set where they are needed.
        term_gradients: accumulates the gradients of the terms' own parameters; None to drop them.
        main_hidden: the main prediction's hidden state [..., C], from which teachers are computed.
        compiled: whether plain cross-entropy uses one compiled kernel.
    """
    dtype = compute_dtype(predictions[0].hidden)
    weight, main_MC = head.weight_VC.detach().to(dtype), None
    if any(target.term.needs_teacher for p in predictions for target in p.targets):
        assert main_hidden is not None
        main_MC = main_hidden.detach().reshape(-1, main_hidden.shape[-1]).to(dtype)

    head_pass = partial(_HeadPass, head, weight, term_gradients=term_gradients)
    due = [
        p
        for p in predictions
        if p.needs_gradient or p.trains_head(head) or any(t.coefficient for t in p.targets)
    ]
    # A loss of the stack computes its own teachers.
    taught = [] if main_MC is None else [p for p in due if p.loss is None]
    with no_autocast(weight):
        if main_MC is not None and taught:
            _with_teacher(main_MC, weight, [head_pass(p) for p in taught])
        for p in due:  # begun one after another, so that their copies do not add up
            if p not in taught:
                head_pass(p).run(main_MC, compiled=compiled)


def _with_teacher(main_MC: Tensor, weight: Tensor, passes: Sequence[_HeadPass]) -> None:
    """Compute each chunk of the main prediction and train every depth with it as the teacher."""
    for rows, main_RV in log_probs_by_chunk(main_MC, weight):
        teacher = Teacher(main_RV, main_MC[rows])
        for p in passes:
            if p.depth:
                left = rows_left(rows, p.targets[0].shift, main_MC)
                # The chunk has no name here, so that run_chunk can free it.
                p.run_chunk(left, log_probs(p.h_NC[left], p.weight), p.over_head_tokens(teacher))
        del teacher
        for p in passes:  # last, since it overwrites the teacher's log-probabilities
            if not p.depth:
                p.run_chunk(rows, main_RV)
    for p in passes:
        p.finish()


def rows_left(rows: slice, shift: int, h_MC: Tensor) -> slice | Tensor:
    """``rows`` moved by ``shift`` to the left; rows before the first wrap around to the end."""
    start, stop = rows.start - shift, rows.stop - shift
    if start >= 0:
        return slice(start, stop)
    return torch.arange(start, stop, device=h_MC.device) % h_MC.shape[0]


class _HeadPass:
    """Computes one prediction, chunk by chunk: adds the losses to its targets' totals, and the
    gradients to those of its head and of the terms' own parameters. ``shared`` is the shared head,
    ``weight`` its weight in the dtype of the products."""

    def __init__(
        self,
        shared: HeadWeight,
        weight: Tensor,
        prediction: Prediction,
        term_gradients: TermGradients | None,
    ) -> None:
        self.prediction, self.term_gradients = prediction, term_gradients
        self.head, self.weight = shared, weight
        if prediction.head is not None:
            self.head = prediction.head
            self.weight = self.head.weight_VC.detach().to(weight.dtype)
        self.targets: Sequence[DepthTarget] = prediction.targets  # type: ignore[assignment]
        self.depth = self.targets[0].depth
        h, trains_hidden = prediction.hidden, prediction.needs_gradient
        self.trains_weight = prediction.trains_head(shared)
        self.learns = trains_hidden or self.trains_weight
        self.h_NC = h.detach().reshape(-1, h.shape[-1]).to(weight.dtype)
        self.d_h = torch.empty_like(self.h_NC, dtype=h.dtype) if trains_hidden else None

    def run(self, main_MC: Tensor | None, *, compiled: bool) -> None:
        """Compute all chunks of this prediction alone."""
        loss = self.prediction.loss
        width, states = (1, 1) if loss is None else (loss.width, loss.states)
        size = chunk_rows(max(self.weight.shape[0], width), self.h_NC.device)
        single = self.learns and len(self.targets) == 1
        fused = compiled and single and self.targets[0].term.of_token
        for rows in chunks(self.h_NC.shape[0] // states, max(1, size // states)):
            if loss is not None:
                self._run_stack_loss(rows, loss, main_MC)
            elif fused:
                self._run_compiled(rows)
            else:
                self.run_chunk(rows, log_probs(self.h_NC[rows], self.weight))
        self.finish()

    def finish(self) -> None:
        """Set the prediction's gradient."""
        if self.d_h is not None:
            self.prediction.gradient = self.d_h.view_as(self.prediction.hidden)

    def over_head_tokens(self, teacher: Teacher) -> Teacher:
        """The teacher, given that the token is one of those that the head has rows for."""
        if self.head.tokens_N is None:
            return teacher
        log_p_RN = teacher.log_probs_RV.index_select(-1, self.head.tokens_N).log_softmax(-1)
        return Teacher(log_p_RN, teacher.hidden_RC)

    def run_chunk(
        self, rows: slice | Tensor, log_q_RV: Tensor, teacher: Teacher | None = None
    ) -> None:
        """Losses and gradients at some positions; overwrites their log-probabilities."""
        h_RC = self.h_NC[rows]
        targets = [ChunkTarget(target, rows, teacher) for target in self.targets]
        if not self.learns:
            for target in targets:
                target.add_to_total(target.value(log_q_RV, h_RC))
            return
        d_hidden_RC, logit_gradients = self._state_gradient(targets, log_q_RV, h_RC)
        if len(targets) == 1 and not targets[0].term.of_state:
            (single,) = targets
            value_R, d_logits_RV = single.term.gradient(single.chunk(log_q_RV, h_RC))
            single.add_to_total(value_R)
            # Apply mask and coefficient to the C-wide factors instead of the V-wide one.
            scale_R1, factor = single.counts_R.unsqueeze(-1), single.coefficient
        else:
            d_logits_RV = self._logit_gradient(targets, log_q_RV, h_RC)
            scale_R1, factor = None, 1.0
        del log_q_RV
        for ids_RK, d_some_RK in logit_gradients:
            d_logits_RV.scatter_add_(1, ids_RK, d_some_RK)
        d_logits_RV = d_logits_RV.to(self.weight.dtype)
        self._propagate(rows, h_RC, d_logits_RV, scale_R1, factor, d_hidden_RC)

    def _run_compiled(self, rows: slice) -> None:
        """:meth:`run_chunk` with one compiled kernel from logits to their gradient."""
        h_RC = self.h_NC[rows]
        target = ChunkTarget(self.targets[0], rows)
        logits_RV = matmul_transposed(h_RC, self.weight)
        value_R, d_logits_RV = cross_entropy(logits_RV, target.tokens_R)
        del logits_RV
        target.add_to_total(value_R)
        self._propagate(rows, h_RC, d_logits_RV, target.counts_R.unsqueeze(-1), target.coefficient)

    def _run_stack_loss(self, rows: slice, loss: StackLoss, main_MC: Tensor | None) -> None:
        """:meth:`run_chunk` with a loss that the stack computes."""
        inner = slice(rows.start * loss.states, rows.stop * loss.states)
        h_NC, targets = self.h_NC[inner], [ChunkTarget(target, rows) for target in self.targets]
        if main_MC is not None:
            self._teach(targets, rows, main_MC)
        logits_NV = matmul_transposed(h_NC, self.weight)
        gradient = loss(rows, logits_NV, targets, self.learns)
        del logits_NV
        if gradient is not None:
            d_logits_NV, scale_N1 = gradient
            self._propagate(inner, h_NC, d_logits_NV.to(self.weight.dtype), scale_N1)

    def _teach(self, targets: Sequence[ChunkTarget], rows: slice, main_MC: Tensor) -> None:
        """Set the targets' teachers; those of one depth share a teacher."""
        teachers: dict[int, Teacher] = {}
        for target in (target for target in targets if target.term.needs_teacher):
            k, shift = target.depth, target.shift
            if k not in teachers:
                # Positions whose teacher lies beyond the window get another one, and do not count.
                right = torch.arange(rows.start + shift, rows.stop + shift, device=main_MC.device)
                main_RC = main_MC[right % main_MC.shape[0]]
                log_p_RV = log_probs(main_RC, self.weight)
                # A mixture (mtp/rank.py) is wider than C: its first state stands for it.
                teachers[k] = Teacher(log_p_RV, main_RC[:, : self.weight.shape[1]])
            target.teacher = teachers[k]

    def _propagate(
        self,
        rows: slice | Tensor,
        h_NC: Tensor,
        d_logits_NV: Tensor,
        scale_N1: Tensor | None,
        factor: float = 1.0,
        d_hidden_NC: Tensor | None = None,
    ) -> None:
        """Propagate the gradient of the logits to the hidden states and to the weight.

        Args:
            rows: rows of the hidden states ``h_NC``.
            d_logits_NV: the gradient with respect to the logits, before scaling.
            scale_N1: factors of its rows; None for 1.
            factor: factor of the whole gradient.
            d_hidden_NC: gradient of terms that read the hidden state directly.
        """
        if self.d_h is not None:
            d_h_NC = matmul_transposed(d_logits_NV, self.weight.t())
            if scale_N1 is not None:
                d_h_NC = d_h_NC * (scale_N1 * factor)
            if d_hidden_NC is not None:
                d_h_NC = d_h_NC + d_hidden_NC
            self.d_h[rows] = d_h_NC.to(self.d_h.dtype)
        if self.trains_weight:
            scaled_NC = h_NC if scale_N1 is None else (h_NC * scale_N1).to(h_NC.dtype)
            self.head.add(d_logits_NV, scaled_NC, factor)

    def _state_gradient(
        self, targets: Sequence[ChunkTarget], log_q_RV: Tensor, h_RC: Tensor
    ) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
        """The gradient of terms that read the hidden state, with mask and coefficients.

        Returns:
            The gradient [R, C] with respect to the hidden state, and those with respect to some
            tokens' logits: ids [R, K] and gradient [R, K].
        """
        total_RC: Tensor | None = None
        logit_gradients: list[tuple[Tensor, Tensor]] = []
        for target in (target for target in targets if target.term.of_state):
            if not target.coefficient:  # only logged
                target.add_to_total(target.value(log_q_RV, h_RC))
                continue
            factor_R = target.scale_R1(log_q_RV.dtype).squeeze(-1)
            into = {} if self.term_gradients is None else self.term_gradients
            gradient = target.term.state_gradient(target.chunk(log_q_RV, h_RC), factor_R, into)
            target.add_to_total(gradient.value_R)
            total_RC = gradient.hidden_RC if total_RC is None else total_RC + gradient.hidden_RC
            if gradient.logits is not None:
                logit_gradients.append(gradient.logits)
        return total_RC, logit_gradients

    def _logit_gradient(
        self, targets: Sequence[ChunkTarget], log_q_RV: Tensor, h_RC: Tensor
    ) -> Tensor:
        """The gradient of all targets with respect to their common logits, with mask and
        coefficients. That of all cross-entropies takes one pass over the chunk: ``(sum_k c_k)
        softmax - sum_k c_k one_hot(target_k)``."""
        plain: list[tuple[Tensor, Tensor]] = []
        others_RV: Tensor | None = None
        for target in (target for target in targets if not target.term.of_state):
            if target.term.of_token:
                value_R = target.value(log_q_RV, h_RC)
                plain.append((target.tokens_R.unsqueeze(-1), -target.scale_R1(log_q_RV.dtype)))
            else:
                copy = target.chunk(log_q_RV.clone(), h_RC)
                value_R, d_logits_RV = target.term.gradient(copy)
                d_logits_RV = d_logits_RV * target.scale_R1(log_q_RV.dtype)
                others_RV = d_logits_RV if others_RV is None else others_RV.add_(d_logits_RV)
                del copy, d_logits_RV
            target.add_to_total(value_R)
        if not plain:
            return torch.zeros_like(log_q_RV) if others_RV is None else others_RV
        minus_RK = torch.cat([minus_R1 for _, minus_R1 in plain], dim=1)
        d_logits_RV = exp_(log_q_RV).mul_(-minus_RK.sum(1, keepdim=True))
        # Scatter one target at a time: two depths may have the same target token.
        for target_R1, minus_R1 in plain:
            d_logits_RV.scatter_add_(1, target_R1, minus_R1)
        return d_logits_RV if others_RV is None else d_logits_RV.add_(others_RV)
