"""Decodes held-out prompts at each validation, plainly and speculatively: measured acceptance."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from mtp_lightning.callbacks.base import RunCallback
from mtp_lightning.decoding.measure import acceptance, prompts_that_fit, short_race
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.runtime import full_fp32

log = logging.getLogger(__name__)


@dataclass(eq=False)
class SpeculativeEval(RunCallback):
    """Logs ``decode/acceptance_position_j``, ``decode/tokens_per_step``, ``decode/speedup`` and
    ``decode/tokens_per_second``.

    Acceptance at position j is conditional: drafts accepted there / drafts that reached it. Tokens
    per pass are the tokens emitted by verify passes / verify passes, including the model's own
    token. Both have ``_low`` and ``_high``, and are measured with all prompts decoded together.
    Speed-up is the wall-clock time of plain over that of speculative greedy decoding, warm, one
    prompt at a time in turns: as many as take about half a second, and at least four. Like tokens
    per second, which compare models of different sizes too, it depends on this machine at this
    moment. Different greedy outputs stop the run. The first prompt's continuation is logged as
    text.

    A model without drafts (D = 0, or a head that does not draft) logs the text, and tokens per
    second of plain decoding. For a task, whole prompts are answered; if an answer is a single
    token, nothing is decoded. Prompts have fewer tokens if a window has less room. If it has none
    for a prompt and the new tokens, a log line and the run's table say so.
    """

    n_prompts: int = 64
    prompt_tokens: int = 32
    new_tokens: int = 64
    _skipped: str = field(default="", init=False)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Decodes, compares and logs, in the first process only."""
        model = pl_module.whole_model()  # gathered by all processes
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero:
            return
        if data.answer_length == 1 or model.config.mtp.answers_at_once:
            return  # a single token needs no draft
        try:
            prompts, new_tokens = prompts_that_fit(
                data,
                n_prompts=self.n_prompts,
                prompt_tokens=self.prompt_tokens,
                new_tokens=self.new_tokens,
                key=f"callbacks.{type(self).__module__.rpartition('.')[2]}.new_tokens",
            )
        except UserError as error:  # training works on such data anyway
            if not self._skipped:
                log.warning("No decoding at validation: %s.", error)
            self._skipped = str(error)
            return
        # As in generate.py. In TF32, passes of different widths can differ by more than a tie.
        with full_fp32():
            self.newest = self.measure(trainer, model, prompts, new_tokens)
        pl_module.log_dict(self.newest, rank_zero_only=True)

    def measure(
        self, trainer: pl.Trainer, model: MTPModel, prompts: list[Tensor], new_tokens: int
    ) -> dict[str, float]:
        """Decode the prompts and return the values to log, by tag."""
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        options = DecodingOptions(max_new_tokens=new_tokens, batch_size=1)
        ways = {"plain": options.plain()}
        if model.mtp.max_draft_depth != 0:
            ways["drafted"] = options
        run = short_race(model, prompts, ways, tokenizer=tokenizer, seconds=0.5)
        plain = run.outputs["plain"]
        text = f"{tokenizer.decode(prompts[0].tolist())}|{plain[0].text}"
        loggers: list[Any] = trainer.loggers  # each a GuardedLogger
        for logger in loggers:
            logger.write_text("decode/sample", text, trainer.global_step)
        values: dict[str, float] = {}
        if "drafted" in ways:
            values, _ = acceptance(model, prompts, options, tokenizer=tokenizer)
            values["speedup"] = run.speedup("drafted")
        # As the model is used: with drafts, if it has any.
        fastest = list(ways)[-1]
        emitted = sum(g.new_tokens for g in run.outputs[fastest])
        values["tokens_per_second"] = emitted / run.seconds[fastest][0]
        return {f"decode/{name}": value for name, value in values.items()}

    def summary(self) -> dict[str, Any]:
        """The newest values, and the reason why nothing was decoded, if there is one."""
        return {**({"not_decoded": self._skipped} if self._skipped else {}), **self.newest}
