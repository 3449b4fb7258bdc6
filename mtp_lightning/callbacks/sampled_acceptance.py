"""Acceptance of drafts when the text is sampled, at each validation."""

from __future__ import annotations

from dataclasses import dataclass

import lightning.pytorch as pl
from torch import Tensor

from mtp_lightning.callbacks.speculative_eval import SpeculativeEval
from mtp_lightning.decoding.generate import generate
from mtp_lightning.decoding.measure import TOGETHER, intervals
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.sequence import rates
from mtp_lightning.model import MTPModel


@dataclass(eq=False)
class SampledAcceptance(SpeculativeEval):
    """Logs ``decode/sampled/acceptance_position_j`` and ``decode/sampled/tokens_per_step``, each
    with ``_low`` and ``_high``, and ``decode/sampled/n_prompts``.

    They are the rates of ``speculative_eval`` for text from speculative sampling (Leviathan et al.
    2023). Greedy text of a small model repeats itself, which makes drafting easy; sampled text does
    not. Every prompt has its own random stream, the same at every validation. A model without
    drafts logs nothing. ``decoding/verification.py`` has the rules ``verify`` that accept drafts.
    """

    n_prompts: int = 256
    temperature: float = 1.0
    verify: str = "token"

    def measure(
        self, trainer: pl.Trainer, model: MTPModel, prompts: list[Tensor], new_tokens: int
    ) -> dict[str, float]:
        if model.mtp.max_draft_depth == 0:
            return {}
        options = DecodingOptions(
            max_new_tokens=new_tokens,
            temperature=self.temperature,
            verify=self.verify,
            batch_size=TOGETHER,
        )
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        drafted = generate(model, prompts, options, tokenizer=tokenizer)
        values = {**rates(drafted), **intervals(drafted), "n_prompts": float(len(prompts))}
        return {f"decode/sampled/{name}": value for name, value in values.items()}
