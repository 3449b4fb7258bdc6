"""How far back the model looks, measured at each validation."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl

from data_modules.windows import WindowBatch
from mtp_lightning.callbacks.base import RunCallback
from mtp_lightning.decoding.acceptance import acceptance_by
from mtp_lightning.decoding.generate import generate
from mtp_lightning.errors import UserError
from mtp_lightning.metrics.long_range import LongRange as Measure
from mtp_lightning.model import MTPModel

log = logging.getLogger(__name__)


@dataclass(eq=False)
class LongRange(RunCallback):
    """Logs the loss by position, the gain from context, the use of repeats (``val/*``) and, for a
    model with drafts, acceptance by position and entropy (``decode/*``): docs/long_range.md.

    Training is unchanged: it makes its own pass over the validation batches, and draws from its own
    generators. It costs about two validations (``metrics/long_range.py``), and the decoding of
    ``n_prompts`` texts of a window's length.
    """

    n_prompts: int = 4
    prompt_tokens: int = 8
    _measure: Measure | None = field(default=None, init=False)
    _warned: bool = field(default=False, init=False)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._measure = None
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data.has_text:
            model = pl_module.whole_model(everywhere=True)
            self._measure = Measure(model, data.seq_len, data.tokenizer.token_bytes())
        elif not self._warned:
            log.warning("callbacks=long_range needs text in bytes, and this data has none.")
            self._warned = True

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: object, batch: WindowBatch, *_: Any
    ) -> None:
        if self._measure is not None:
            with trainer.precision_plugin.val_step_context():
                self._measure.update(batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        measure, self._measure = self._measure, None
        if measure is None:
            return
        with trainer.precision_plugin.val_step_context():
            values = {f"val/{name}": value for name, value in measure.compute().items()}
        if trainer.is_global_zero:
            acceptance = acceptance_on_long_texts(
                measure.model,
                trainer.datamodule,  # type: ignore[attr-defined]
                n_prompts=self.n_prompts,
                prompt_tokens=self.prompt_tokens,
            )
            values |= {f"decode/{name}": value for name, value in acceptance.items()}
            self.newest = values
            pl_module.log_dict(values, rank_zero_only=True)


def acceptance_on_long_texts(
    model: MTPModel, data: Any, *, n_prompts: int, prompt_tokens: int = 8
) -> dict[str, float]:
    """Acceptance by position and entropy, on greedy texts as long as a window; see
    :func:`acceptance_by`. Empty without drafts or prompts."""
    room = data.seq_len - prompt_tokens
    if model.mtp.max_draft_depth == 0 or n_prompts == 0 or room < 3:
        return {}
    try:
        prompts = data.held_out_prompts(n_prompts, prompt_tokens)
    except UserError as error:  # training works on a small corpus anyway
        log.warning("No acceptance by the position in long texts: %s.", error)
        return {}
    texts = generate(model, prompts, max_new_tokens=room, tokenizer=data.tokenizer)
    return acceptance_by(model, prompts, texts, max_new_tokens=room)
