"""What every prediction depth gets right, teacher-forced.

Three rates that the field calls "acceptance", named apart: *accuracy* compares a depth with the
text, *agreement* with the main model's own choice at the same token, *overlap* with its whole
distribution. The rate of the real draft-verify loop is measured in decoding, not here.

Shapes: B batch, T positions, K depths (0 .. D), V vocabulary, P positions of one chunk.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from data_modules.windows import WindowBatch
from mtp_lightning.objective.through_head import chunk_rows, log_probs_by_chunk


class DepthRates(Metric):
    """Loss, accuracy, agreement and overlap of every depth, over all ranks and batches.

    For depth k at position i, with p the main model's distribution at i + k (which predicts the
    same token, i + k + 1) and q that of depth k at i:

    - ``loss``: mean of ``-log q(target)`` in nats
    - ``accuracy``: share of ``argmax q == target``
    - ``agreement`` (k >= 1): share of ``argmax q == argmax p``
    - ``overlap`` (k >= 1): mean of ``sum_v min(p, q)``, the chance that a token sampled from q is
      accepted (Leviathan et al. 2023, theorem 3.5)

    The last k positions of a window have no main prediction in it to agree with and are left out
    of the last two; so is every position that the document mask rules out, of all four.
    """

    full_state_update = False
    # Sums over what was counted, one number a depth.
    count: Tensor
    loss: Tensor
    accuracy: Tensor
    pairs: Tensor
    agreement: Tensor
    overlap: Tensor

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth
        for name in ("count", "loss", "accuracy", "pairs", "agreement", "overlap"):
            zeros = torch.zeros(depth + 1, dtype=torch.float64)
            self.add_state(name, default=zeros, dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, hidden: dict[int, Tensor], weight_VC: Tensor, batch: WindowBatch) -> None:
        """Count one batch.

        Args:
            hidden: of every depth 0 .. D, [B, T, C], as :class:`MTPModel` returns it.
            weight_VC: the shared head's weight.
            batch: the windows.
        """
        targets = [batch.targets(k) for k in range(self.depth + 1)]
        width = chunk_rows(weight_VC.shape[0], weight_VC.device)
        for row in range(batch.batch_size):
            for start in range(0, batch.seq_len, width):
                end = min(start + width, batch.seq_len)
                self._update_chunk(hidden, weight_VC, targets, row, start, end)

    def _update_chunk(
        self,
        hidden: dict[int, Tensor],
        weight_VC: Tensor,
        targets: list[Tensor],
        row: int,
        start: int,
        end: int,
    ) -> None:
        # Depth k is compared with the main prediction k positions on.
        main = _log_probs(hidden[0][row, start : end + self.depth], weight_VC)
        main_choice = main.argmax(-1)
        main_probs = main.exp()
        for k in range(self.depth + 1):
            log_q = main[: end - start]
            if k > 0:
                log_q = _log_probs(hidden[k][row, start:end], weight_VC)
            target_P = targets[k][row, start:end]
            valid_P = target_P >= 0
            choice_P = log_q.argmax(-1)
            nll_P = -log_q.gather(-1, target_P.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            self.count[k] += valid_P.sum()
            self.loss[k] += nll_P[valid_P].double().sum()
            self.accuracy[k] += (choice_P == target_P)[valid_P].sum()
            if k == 0:
                continue
            seen = max(min(end - start, main.shape[0] - k), 0)
            paired = valid_P[:seen]
            agrees = choice_P[:seen] == main_choice[k : k + seen]
            shared = torch.minimum(log_q[:seen].exp(), main_probs[k : k + seen]).sum(-1)
            self.pairs[k] += paired.sum()
            self.agreement[k] += agrees[paired].sum()
            self.overlap[k] += shared[paired].double().sum()

    def compute(self) -> dict[str, float]:
        """``loss_depth_k`` and ``accuracy_depth_k`` for k = 0 .. D, ``agreement_depth_k`` and
        ``overlap_depth_k`` for k = 1 .. D; NaN where nothing was counted."""
        rates: dict[str, float] = {}
        for name, total in (("loss", self.count), ("accuracy", self.count)):
            for k in range(self.depth + 1):
                rates[f"{name}_depth_{k}"] = float(getattr(self, name)[k] / total[k])
        for name in ("agreement", "overlap"):
            for k in range(1, self.depth + 1):
                rates[f"{name}_depth_{k}"] = float(getattr(self, name)[k] / self.pairs[k])
        return rates


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Nats per token -> bits per byte of text, which compares across tokenizers."""
    return loss / math.log(2) / bytes_per_token


def _log_probs(h_PC: Tensor, weight_VC: Tensor) -> Tensor:
    chunks = log_probs_by_chunk(h_PC.to(weight_VC.dtype), weight_VC)
    return torch.cat([chunk for _, chunk in chunks])
