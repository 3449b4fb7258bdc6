"""Decodes held-out prompts at each validation, plainly and speculatively: real acceptance."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from mtp_lightning.decoding.measure import race, rates, require_same_greedy
from mtp_lightning.loggers.base import RunLogger
from mtp_lightning.model import MTPModel
from mtp_lightning.settings import require_whole

log = logging.getLogger(__name__)


class SpeculativeEval(Callback):
    """Logs ``decode/acceptance_position_j``, ``decode/tokens_per_step``, ``decode/speedup`` and
    ``decode/tokens_per_second``.

    Acceptance at position j is conditional: drafts accepted there / drafts that reached it.
    Tokens per step are the tokens emitted by verify passes / verify passes, the model's own token
    included. Speed-up is the wall-clock of plain over that of speculative greedy decoding, warm,
    one prompt at a time in turns: a figure of this machine at this moment, as tokens per second
    are, which compare models of different sizes too. Greedy outputs that differ stop the run. The
    first prompt's continuation is logged as text.

    A model without drafts (D = 0, or a head that does not draft) logs the text, and tokens per
    second of plain decoding. Of a task, whole prompts are answered; where an answer is a single
    token, nothing is decoded here.

    Args:
        n_prompts: held-out prompts, >= 1.
        prompt_tokens: their length, >= 1.
        new_tokens: tokens to add to each, >= 2.
    """

    def __init__(self, n_prompts: int = 4, prompt_tokens: int = 32, new_tokens: int = 64) -> None:
        group = "callbacks.speculative_eval"
        self.n_prompts = require_whole(f"{group}.n_prompts", n_prompts, least=1)
        self.prompt_tokens = require_whole(f"{group}.prompt_tokens", prompt_tokens, least=1)
        self.new_tokens = require_whole(f"{group}.new_tokens", new_tokens, least=2)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decode, compare, log; by the first process alone."""
        if trainer.sanity_checking:
            return
        model = pl_module.whole_model()  # type: ignore[operator]  # which all processes gather
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero:
            return
        assert isinstance(model, MTPModel)
        new_tokens = self.new_tokens if data.answer_length is None else data.answer_length
        room = data.seq_len - new_tokens
        if room < 1 or new_tokens < 2 or model.config.mtp.answers_at_once:
            return  # a window shorter than what would be decoded, a single token, none by itself
        try:
            prompts = data.held_out_prompts(self.n_prompts, min(self.prompt_tokens, room))
        except ValueError as error:  # a small corpus can be trained on all the same
            log.warning("No decoding at validation: %s.", error)
            return
        options: dict[str, Any] = {
            "max_new_tokens": new_tokens,
            "tokenizer": data.tokenizer,
            "batch_size": 1,
        }
        ways: dict[str, dict[str, Any]] = {"plain": {"speculative": False}}
        if model.mtp.max_draft_depth != 0:
            ways["drafted"] = {}
        run = race(model, prompts, ways, **options)
        plain = run.outputs["plain"]
        text = f"{data.tokenizer.decode(prompts[0].tolist())}|{plain[0].text}"
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.write_text("decode/sample", text, trainer.global_step)
        values: dict[str, float] = {}
        if "drafted" in ways:
            drafted = run.outputs["drafted"]
            require_same_greedy(model, prompts, plain, drafted)
            values = {**rates(drafted), "speedup": run.speedup("drafted")}
        # As the model is used: with drafts if it has any.
        fastest = list(ways)[-1]
        emitted = sum(g.new_tokens for g in run.outputs[fastest])
        values["tokens_per_second"] = emitted / run.seconds[fastest][0]
        tagged = {f"decode/{name}": value for name, value in values.items()}
        pl_module.log_dict(tagged, rank_zero_only=True)
